"""The unreduced loss behind a user's loss: its reduction is found and undone."""

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
SUM_LIKE = 0.75  # share of a row's gradient left when all rows are passed twice: 1 for a sum, 0.5 for a mean
MOST_WEIGHTS = 1024  # different weights of one batch; a loss that reduces itself is called once for each
_SCALED = ContextVar("scaled", default=True)


@contextmanager
def value_alone() -> Iterator[None]:
    """A context in which a loss that divides each text by its length keeps the gradient of its value."""
    before = _SCALED.set(False)
    try:
        yield
    finally:
        _SCALED.reset(before)


class Unreduced:
    """A loss with its reduction undone, as a function of tokens.

    A loss of rows is left as it is; of a scalar loss the rows add up to the sum that it reduced. The reduction is found at the
    first call on rows with a gradient.

    Args:
        fn: the loss.
        params: its parameters.
        name: what messages call it.
    """

    def __init__(self, fn: Callable, params: dict[str, Any], name: str):
        self.fn, self.params, self.name = fn, params, name
        self.division: Division | None = None  # None until a row has a gradient
        self.settings: tuple = ()  # of the loss when the division was found

    def rows(self, tokens: Tokens, weight: Tensor | None = None) -> Any:
        """The loss of every row, (N,), times its weight; a value of a tokens function that is no tensor is returned as it is.

        Every row of a loss that reduces itself has the gradient of its own logits, and an equal share of the sum of the rows
        with the same weight, which takes a call for each weight.

        Raises:
            InputError: rows of a loss that reduces itself weigh differently, and depend on each other, or have more than
                ``MOST_WEIGHTS`` different weights.
        """
        value = self(tokens)
        if not isinstance(value, Tensor):
            return value
        if value.ndim:
            return value if weight is None else value * weight
        if weight is None or not len(tokens):
            return _shared(value, tokens.logits)
        weighted = _shared(value, tokens.logits) * weight
        return weighted + (self._by_weight(tokens, weight, value.detach()) - weighted.detach())

    def __call__(self, tokens: Tokens) -> Any:
        """Rows (N,), or a scalar that is their sum."""
        if not len(tokens):
            return tokens.logits[:, :0].sum(-1)  # no rows, but a graph
        style = self.style(tokens)

        def run() -> Any:
            return call(self.fn, self.params, tokens, Layout(), style=style)

        replay = Replay(tokens.logits.device, self.fn) if self._may_call_again(tokens, style) else None
        value = run()
        if replay is not None and not isinstance(value, Tensor | Target) and not tokens.logits.requires_grad:
            with replay.again():
                value = value_of(
                    self.fn, self.params, tokens, style
                )  # which part is the loss shows in the graphs alone
        if kind(self.fn) == "tokens" and isinstance(value, Target):
            return value
        if kind(self.fn) == "tokens" and isinstance(value, int | float):  # a method of tokens has a value for each
            raise InputError(f"{self.name} must return a floating-point tensor (N,), it returns {type(value).__name__}")
        value = graphs.checked(loss_of(value, self.name), self.name, run, tokens.logits).value
        if value.ndim and value.numel() == len(tokens) and not style.laid_out:
            return value.reshape(-1)
        if not (style.laid_out or takes_pairs(self.fn, style)):
            check_shape(value, len(tokens), self.name)
        if value.ndim:  # what is unreduced over texts, pairs or positions leaves nothing to undo
            return value.sum()
        divisor = self.reduction(tokens).divisor(counts(tokens, Layout(), style, given_as_sums(self.fn)))
        if not isinstance(divisor, Tensor):
            return value * divisor
        assert replay is not None  # a divisor of each row comes of texts alone
        with replay.again():  # the same draws, from the same state
            return self._by_text(tokens, style, value, divisor)

    def _may_call_again(self, tokens: Tokens, style: Style) -> bool:
        """Whether one call may not be enough, so that the state before it has to be kept."""
        if not tokens.logits.requires_grad:
            return True
        if not style.laid_out or self.division is None or settings_of(self.fn) != self.settings:
            return style.laid_out
        return isinstance(self.division.divisor(counts(tokens, Layout(), style, given_as_sums(self.fn))), Tensor)

    def style(self, tokens: Tokens) -> Style:
        """How the loss is called."""
        return style_of(self.fn, self.params, tokens)

    def reduction(self, tokens: Tokens) -> Division:
        """The division of a scalar loss; a sum until a row has a gradient."""
        settings = settings_of(self.fn)
        if self.division is None or settings != self.settings:
            self.settings = settings
            self.division = find_division(self.fn, self.params, tokens, self.name)
        return self.division or SUM

    def _by_text(self, tokens: Tokens, style: Style, total: Tensor, divisors: Tensor) -> Tensor:
        """The sum over tokens of a loss that divides by each text's length: every text alone, times its divisor."""
        if style.group > 1:  # it takes no text alone
            return self._times(tokens, style, divisors)
        sequence, division = sequences(tokens, style, Layout()), self.reduction(tokens)
        parts, alone, together = [], [], []
        for each in sequence.unique():
            in_text = sequence == each
            text = tokens[in_text]
            parts.append(loss_of(call(self.fn, self.params, text, Layout(), style=style), self.name).value)
            alone.append(float(division.divisor(counts(text, Layout(), style))[0]))
            together.append(float(divisors[in_text.to(divisors.device)][0]))
        if not independent(parts, alone, together, total):
            return self._times(tokens, style, divisors)
        return add_up(parts, alone)

    def _times(self, tokens: Tokens, style: Style, divisors: Tensor) -> Tensor:
        """The loss with every row's gradient times its divisor, for texts that depend on each other."""
        through = tokens.logits * 1
        if through.requires_grad and _SCALED.get():
            through.register_hook(lambda grad: grad * (divisors / len(tokens)).to(grad)[:, None])
        value = loss_of(call(self.fn, self.params, tokens.with_logits(through), Layout(), style=style), self.name).value
        if value.requires_grad and (learned := leaves(value, through)):
            raise InputError(
                f"{self.name} divides every text by its own length, its texts depend on each other, and it has a parameter of "
                f"its own that requires a gradient, of shape {tuple(learned[0].shape)}, whose gradient for the sum over tokens "
                "cannot be told: return the unreduced loss (N,), or detach the parameter"
            )
        return value * len(tokens)

    def _by_weight(self, tokens: Tokens, weight: Tensor, total: Tensor) -> Tensor:
        """Rows' values times their weights, (N,); rows of the same weight are called together, and share their sum equally."""
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
                same_weight = weight == each
                part = self(tokens[same_weight]).sum()
                values[same_weight] = part * each.to(part) / same_weight.sum()
                summed += part
        if not (summed - total).abs() <= ALIKE / 10 * total.abs().clamp(min=1e-6 * len(tokens)):
            raise InputError(
                f"{self.name} reduces itself, and its rows depend on each other ({float(total):.6g} together, "
                f"{float(summed):.6g} apart), so that they cannot be weighted: return the unreduced loss (N,), or take weight as "
                "an argument"
            )
        return values


def add_up(parts: list[Tensor], alone: list[float]) -> Tensor:
    """The sum over tokens of a loss, from its value on every text alone and its divisor there."""
    return torch.stack([part * divisor for part, divisor in zip(parts, alone, strict=True)]).sum()


def independent(parts: list[Tensor], alone: list[float], together: list[float], total: Tensor) -> bool:
    """Whether texts are independent: their losses alone, with the divisors of the batch, add up to that of the batch."""
    ratios = [divisor / whole for divisor, whole in zip(alone, together, strict=True)]
    gap = abs(float((add_up(parts, ratios) - total).detach()))
    return gap <= ALIKE / 10 * max(abs(float(total.detach())), 1e-6)


def _shared(total: Tensor, logits: Tensor) -> Tensor:
    """Rows that add up to ``total``, each with the gradient of its own logits alone, so that rows can be weighted.

    A parameter of the loss has its gradient from all rows together, if these have the same weight.
    """
    value = (total.detach() / len(logits)).expand(len(logits))
    if not total.requires_grad:
        return value
    if not logits.requires_grad:  # a parameter of the loss's own is all that it depends on
        return (total / len(logits)).expand(len(logits))
    learned = leaves(total, logits)
    wrt = (logits, *learned) if logits.requires_grad else tuple(learned)
    grads = torch.autograd.grad(total, wrt, allow_unused=True) if wrt else ()
    grads = grads if logits.requires_grad else (None, *grads)
    if all(grad is None for grad in grads):
        return value
    pairs = zip(grads, (logits, *learned), strict=True)
    grads = tuple(torch.zeros_like(of) if grad is None else grad for grad, of in pairs)
    return _Shares.apply(value, grads, logits, *learned)


class _Shares(torch.autograd.Function):
    """Values of rows, (N,), with known gradients, (N, V), and gradients of parameters from all rows together."""

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
    """A loss with an unknown reduction: its value times the number of rows, with the gradient of the batch."""

    ratio: float | None = None  # share of a row's gradient left when all rows are passed twice

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
        value = loss_of(call(self.fn, self.params, tokens, Layout(), style=style), self.name).value.sum()
        return value * (len(tokens) if self.ratio < SUM_LIKE else 1)

    def _kept_twice(self, tokens: Tokens, style: Style) -> float:
        some = rows_to_read(self.fn, tokens, style)
        sizes = [float(grad_of(self.fn, self.params, some, style, Layout(copies)).norm()) for copies in (1, 2)]
        return sizes[1] / sizes[0] if sizes[0] else 0.0


def whole(variant: V) -> V:
    """A variant with an unknown reduction, whose value is that of the loss times the number of rows.

    Its division is not undone, so that its gradient is that of the batch. A loss whose gradient changes little when all rows
    are passed twice is a sum already, and is not multiplied.
    """
    batch_variant = replace(variant)
    batch_variant.__dict__["unreduced"] = Whole(variant.unreduced.fn, variant.params, variant.unreduced.name)
    return batch_variant
