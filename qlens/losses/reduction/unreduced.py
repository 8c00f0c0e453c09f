"""Adapters: any loss as somebody writes it, as rows of an unreduced loss; its reduction found and undone."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import replace
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from qlens.core.errors import InputError
from qlens.core.target import Target
from qlens.core.tokens import Tokens
from qlens.losses import graphs
from qlens.losses.calling import Layout, call, kind
from qlens.losses.layout.layout_search import style_of
from qlens.losses.layout.layouts import Style, counts, sequences
from qlens.losses.layout.pairing import given_as_sums
from qlens.losses.layout.signature import settings_of
from qlens.losses.layout.trial import grad_of, value_of
from qlens.losses.leaves import leaves
from qlens.losses.reduction.divisors import Division
from qlens.losses.reduction.scalar import ALIKE, find_division, rows_to_read, takes_pairs
from qlens.losses.replay import Replay
from qlens.losses.return_values import check_shape, loss_of

if TYPE_CHECKING:
    from qlens.registry.variant import Variant

V = TypeVar("V", bound="Variant")
SUM = Division("sum", lambda c: 1)
SUM_LIKE = 0.75  # of its gradient that a token keeps as every row is shown twice: a sum keeps all, a mean half
MOST_WEIGHTS = 1024  # different weights of one batch, for each of which a loss that reduces itself is called
_SCALED = ContextVar("scaled", default=True)


@contextmanager
def value_alone() -> Iterator[None]:
    """Within it a loss that divides each row by a count of its own keeps its gradient as it is, the slope of its value."""
    before = _SCALED.set(False)
    try:
        yield
    finally:
        _SCALED.reset(before)


class Unreduced:
    """A loss with its reduction undone, as a function of tokens.

    Its rows as they are; of a scalar, rows that add up to the sum of what it reduced. A scalar's reduction is found at the first
    call on rows that have a gradient.

    Args:
        fn: the loss.
        params: its parameters.
        name: what messages call it.
    """

    def __init__(self, fn: Callable, params: dict[str, Any], name: str):
        self.fn, self.params, self.name = fn, params, name
        self.division: Division | None = None  # None as long as no row has taught it anything
        self.settings: tuple = ()  # under which it was found

    def rows(self, tokens: Tokens, weight: Tensor | None = None) -> Any:
        """The loss of every row, (N,), times its weight; what a tokens function returns that is no tensor is handed on.

        Every row of a loss that reduces itself has the gradient of its own logits, and an equal share of the sum of the rows that
        weigh alike, which takes a call for each weight.

        Raises:
            InputError: rows of a loss that reduces itself weigh differently, and depend on each other, or have more than
                ``MOST_WEIGHTS`` different weights.
        """
        made = self(tokens)
        if not isinstance(made, Tensor):
            return made
        if made.ndim:
            return made if weight is None else made * weight
        if weight is None or not len(tokens):
            return _shared(made, tokens.logits)
        weighted = _shared(made, tokens.logits) * weight
        return weighted + (self._by_weight(tokens, weight, made.detach()) - weighted.detach())

    def __call__(self, tokens: Tokens) -> Any:
        """Rows (N,), or a scalar that is their sum."""
        if not len(tokens):
            return tokens.logits[:, :0].sum(-1)  # no rows, but a graph
        style = self.style(tokens)

        def run() -> Any:
            return call(self.fn, self.params, tokens, Layout(), style=style)

        replay = Replay(tokens.logits.device, self.fn) if self._may_call_again(tokens, style) else None
        made = run()
        if replay is not None and not isinstance(made, Tensor | Target) and not tokens.logits.requires_grad:
            with replay.again():
                made = value_of(self.fn, self.params, tokens, style)  # which part is the loss shows in the graphs alone
        if kind(self.fn) == "tokens" and isinstance(made, Target):
            return made
        if kind(self.fn) == "tokens" and isinstance(made, int | float):  # a method of tokens has a value for each
            raise InputError(f"{self.name} must return a floating-point tensor (N,), it returns {type(made).__name__}")
        made = graphs.checked(loss_of(made, self.name), self.name, run, tokens.logits).value
        if made.ndim and made.numel() == len(tokens) and not style.laid_out:
            return made.reshape(-1)
        if not (style.laid_out or takes_pairs(self.fn, style)):
            check_shape(made, len(tokens), self.name)
        if made.ndim:  # what is unreduced over texts, pairs or positions leaves nothing to undo
            return made.sum()
        divisor = self.reduction(tokens).divisor(counts(tokens, Layout(), style, given_as_sums(self.fn)))
        if not isinstance(divisor, Tensor):
            return made * divisor
        assert replay is not None  # a divisor of each row comes of texts alone
        with replay.again():  # the same draws, from the same state
            return self._by_text(tokens, style, made, divisor)

    def _may_call_again(self, tokens: Tokens, style: Style) -> bool:
        """Whether one call may not be enough, so that the state before it has to be kept: never for rows with a gradient."""
        if not tokens.logits.requires_grad:
            return True
        if not style.laid_out or self.division is None or settings_of(self.fn) != self.settings:
            return style.laid_out
        return isinstance(self.division.divisor(counts(tokens, Layout(), style, given_as_sums(self.fn))), Tensor)

    def style(self, tokens: Tokens) -> Style:
        """How the loss is called, remembered."""
        return style_of(self.fn, self.params, tokens)

    def reduction(self, tokens: Tokens) -> Division:
        """How a scalar loss divides; a sum as long as no row has had a gradient."""
        settings = settings_of(self.fn)
        if self.division is None or settings != self.settings:
            self.settings = settings
            self.division = find_division(self.fn, self.params, tokens, self.name)
        return self.division or SUM

    def _by_text(self, tokens: Tokens, style: Style, made: Tensor, divisors: Tensor) -> Tensor:
        """The sum over tokens of a loss that divides by each text's length: of every text alone, times what it divides by."""
        if style.group > 1:  # it takes no text alone
            return self._times(tokens, style, divisors)
        sequence, division = sequences(tokens, style, Layout()), self.reduction(tokens)
        parts, alone, together = [], [], []
        for each in sequence.unique():
            mine = sequence == each
            text = tokens[mine]
            parts.append(loss_of(call(self.fn, self.params, text, Layout(), style=style), self.name).value)
            alone.append(float(division.divisor(counts(text, Layout(), style))[0]))
            together.append(float(divisors[mine.to(divisors.device)][0]))
        if not apart(parts, alone, together, made):
            return self._times(tokens, style, divisors)
        return add_up(parts, alone)

    def _times(self, tokens: Tokens, style: Style, divisors: Tensor) -> Tensor:
        """The loss with the gradient of every row multiplied by its own divisor, for texts that depend on each other."""
        through = tokens.logits * 1
        if through.requires_grad and _SCALED.get():
            through.register_hook(lambda grad: grad * (divisors / len(tokens)).to(grad)[:, None])
        made = loss_of(call(self.fn, self.params, tokens.with_logits(through), Layout(), style=style), self.name).value
        if made.requires_grad and (learned := leaves(made, through)):
            raise InputError(
                f"{self.name} divides every text by its own length, its texts depend on each other, and it has a parameter of "
                f"its own that requires a gradient, of shape {tuple(learned[0].shape)}, whose gradient for the sum over tokens "
                "cannot be told: return the unreduced loss (N,), or detach the parameter"
            )
        return made * len(tokens)

    def _by_weight(self, tokens: Tokens, weight: Tensor, total: Tensor) -> Tensor:
        """Rows' values times their weights, (N,): those that weigh alike are called together, and share their sum."""
        if bool((weight == weight[0]).all()):
            return total * weight / len(tokens)
        if (number := len(weight.unique())) > MOST_WEIGHTS:
            raise InputError(
                f"{self.name} reduces itself, and is called once for each weight: {number} different weights, of which at most "
                f"{MOST_WEIGHTS} are possible; return the unreduced loss (N,), or take weight as an argument"
            )
        values, summed = torch.zeros_like(weight, dtype=total.dtype), torch.zeros_like(total)
        with torch.no_grad(), Replay(tokens.logits.device, self.fn).again():
            for each in weight.unique():
                mine = weight == each
                part = self(tokens[mine]).sum()
                values[mine] = part * each.to(part) / mine.sum()
                summed += part
        if not (summed - total).abs() <= ALIKE / 10 * total.abs().clamp(min=1e-6 * len(tokens)):
            raise InputError(
                f"{self.name} reduces itself, and its rows depend on each other ({float(total):.6g} together, "
                f"{float(summed):.6g} apart), so that they cannot be weighted: return the unreduced loss (N,), or take weight as "
                "an argument"
            )
        return values


def add_up(parts: list[Tensor], alone: list[float]) -> Tensor:
    """The sum over tokens of a loss, from its value on every text alone and what it divides by there."""
    return torch.stack([part * divisor for part, divisor in zip(parts, alone, strict=True)]).sum()


def apart(parts: list[Tensor], alone: list[float], together: list[float], made: Tensor) -> bool:
    """Whether texts do not depend on each other: their losses alone, divided as ``together``, add up to that of the batch."""
    ratios = [divisor / whole for divisor, whole in zip(alone, together, strict=True)]
    gap = abs(float((add_up(parts, ratios) - made).detach()))
    return gap <= ALIKE / 10 * max(abs(float(made.detach())), 1e-6)


def _shared(total: Tensor, logits: Tensor) -> Tensor:
    """Rows that add up to ``total``, each with the gradient of its own logits and no other's: so that rows can be weighted.

    A parameter of the loss's own has its gradient by all rows together, where they are weighted alike.
    """
    value = (total.detach() / len(logits)).expand(len(logits))
    if not total.requires_grad:
        return value
    if not logits.requires_grad:  # a parameter of the loss's own is all that it depends on
        return (total / len(logits)).expand(len(logits))
    learned = leaves(total, logits)
    asked = (logits, *learned) if logits.requires_grad else tuple(learned)
    grads = torch.autograd.grad(total, asked, allow_unused=True) if asked else ()
    grads = grads if logits.requires_grad else (None, *grads)
    if all(grad is None for grad in grads):
        return value
    found = zip(grads, (logits, *learned), strict=True)
    grads = tuple(torch.zeros_like(of) if grad is None else grad for grad, of in found)
    return _Shares.apply(value, grads, logits, *learned)


class _Shares(torch.autograd.Function):
    """Values of rows, (N,), with a given gradient each, (N, V), and gradients of parameters by all of them."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, grads: tuple[Tensor, ...], *inputs: Tensor) -> Tensor:
        ctx.save_for_backward(*grads)
        return value.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *upstream: Tensor) -> tuple:  # pyright: ignore[reportIncompatibleMethodOverride]
        (u,), (rows, *learned) = upstream, ctx.saved_tensors
        if learned and bool((u != u[0]).any()):
            raise InputError(
                "a loss that returns a scalar and has a parameter of its own that requires a gradient has none of it for rows "
                "that are weighted differently: return the unreduced loss (N,) instead, or detach the parameter"
            )
        return None, None, u[:, None] * rows, *(u[0] * grad for grad in learned)


class Whole(Unreduced):
    """A loss whose reduction is not known: its value times the number of rows, its gradient that of the batch."""

    ratio: float | None = None  # of its gradient that a row keeps as every row is shown twice

    def rows(self, tokens: Tokens, weight: Tensor | None = None) -> Any:
        """Equal shares of the sum, (N,), times the weights."""
        rows = _shared(self(tokens), tokens.logits) if len(tokens) else self(tokens).expand(0)
        return rows if weight is None else rows * weight

    def __call__(self, tokens: Tokens) -> Any:
        """A scalar."""
        if not len(tokens):
            return tokens.logits[:, :0].sum()
        style = self.style(tokens)
        if self.ratio is None:
            with Replay(tokens.logits.device, self.fn).again():
                self.ratio = self._kept_twice(tokens, style)
        made = loss_of(call(self.fn, self.params, tokens, Layout(), style=style), self.name).value.sum()
        return made * (len(tokens) if self.ratio < SUM_LIKE else 1)

    def _kept_twice(self, tokens: Tokens, style: Style) -> float:
        some = rows_to_read(self.fn, tokens, style)
        sizes = [float(grad_of(self.fn, self.params, some, style, Layout(copies)).norm()) for copies in (1, 2)]
        return sizes[1] / sizes[0] if sizes[0] else 0.0


def whole(variant: V) -> V:
    """A loss whose reduction is not known, as a variant that leaves its value as it is, times the number of rows.

    What it divides by is not undone, so that its gradient is that of the batch. A loss whose gradient stays about the same as
    every row is shown twice is a sum already.
    """
    made = replace(variant)
    made.__dict__["unreduced"] = Whole(variant.unreduced.fn, variant.params, variant.unreduced.name)
    return made
