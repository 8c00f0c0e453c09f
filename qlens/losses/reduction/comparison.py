"""Comparison of the gradients of the same rows in several layouts, multiplied by what a loss may have divided by."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from qlens.core.errors import InputError
from qlens.core.tokens import Tokens
from qlens.losses.calling import takes
from qlens.losses.layout.layouts import Counts, Layout, Style, counts
from qlens.losses.layout.pairing import given_as_sums
from qlens.losses.layout.trial import grad_of
from qlens.losses.reduction.divisors import KNOWN, Divisor
from qlens.losses.replay import Replay

ALIKE = 0.01  # relative difference of equal gradients: losses may compute in bfloat16, and counts differ by far more


class LayoutGradients(NamedTuple):
    """The gradients of the same rows in several layouts, and what a mean may divide by in each."""

    layouts: list[Layout]
    grads: list[Tensor]
    numbers: list[Counts]

    def multiplied(self, divisor: Divisor) -> list[Tensor]:
        """The gradients, each times the divisor in its layout."""
        return [times(divisor, *pair) for pair in zip(self.grads, self.numbers, strict=True)]

    def misfit(self, divisor: Divisor) -> float:
        """The relative difference of the multiplied gradients."""
        return misfit(self.multiplied(divisor))


def times(divisor: Divisor, grad: Tensor, number: Counts) -> Tensor:
    """A gradient times a divisor, which is a number or one number per row."""
    by = divisor(number)
    return grad * (by.to(grad)[:, None] if isinstance(by, Tensor) else by)


def misfit(grads: list[Tensor]) -> float:
    """The largest relative difference of gradients from the first."""
    return max(float((grad - grads[0]).norm() / grads[0].norm()) for grad in grads[1:])


def replayed(function: Callable[..., Tensor], replay: Replay) -> Callable[..., Tensor]:
    """The function, called with the random draws and from the state of ``replay``, which it leaves unchanged."""

    def repeat(*args: Any) -> Tensor:
        with replay.again():
            return function(*args)

    return repeat


def replayed_gradient(fn: Callable, tokens: Tokens) -> Callable[..., Tensor]:
    """``grad_of`` with the same draws and from the same state at every call."""
    return replayed(grad_of, Replay(tokens.logits.device, fn))


def gradients_in(
    layouts: Iterable[Layout],
    fn: Callable,
    params: Mapping[str, Any],
    tokens: Tokens,
    style: Style,
    gradient_of: Callable,
) -> LayoutGradients:
    """The gradients of the rows in these layouts."""
    layouts = list(layouts)
    grads = [gradient_of(fn, params, tokens, style, layout) for layout in layouts]
    return LayoutGradients(layouts, grads, [counts(tokens, layout, style, given_as_sums(fn)) for layout in layouts])


def views(
    fn: Callable, params: Mapping[str, Any], tokens: Tokens, style: Style, gradient_of: Callable
) -> Iterator[LayoutGradients]:
    """The rows once, twice and three times, and with further unsupervised positions; copies in one or two orders."""
    for interleave in (False, True) if style.laid_out else (False,):
        layouts = [Layout(), Layout(2, 0, False, interleave), Layout(3, 0, False, interleave)]
        if style.laid_out or takes(fn, "mask"):
            layouts += [Layout(1, 7), Layout(2, 12, False, interleave)]
        yield gradients_in(layouts, fn, params, tokens, style, gradient_of)


def with_prompts(
    names: list[str],
    divisors: Mapping[str, Divisor],
    fn: Callable,
    params: Mapping[str, Any],
    tokens: Tokens,
    style: Style,
) -> list[str]:
    """Those of the named reductions that hold for texts with a prompt too; all of them if none does."""
    layouts = [Layout(), Layout(before=3)]
    gradients = gradients_in(layouts, fn, params, tokens, style, replayed_gradient(fn, tokens))
    return [name for name in names if gradients.misfit(divisors[name]) <= ALIKE] or names


def by_length(names: list[str], fn: Callable, params: Mapping[str, Any], tokens: Tokens, style: Style) -> str:
    """The first of the named reductions that holds for texts of unequal lengths too; "" if none does."""
    gradient_of = replayed_gradient(fn, tokens)
    try:
        if style.by_text and tokens.sequence is not None:  # dealt anew, a text would have another advantage
            base, longer = gradient_of(fn, params, tokens, style), _with_a_longer_text(tokens)
            cases = [(base, counts(tokens, Layout(), style))]
            cases += [
                (gradient_of(fn, params, longer, style)[: len(tokens)], _of_first_rows(longer, len(tokens), style))
            ]
        else:
            layouts = [Layout(), Layout(split=True)]
            cases = [(gradient_of(fn, params, tokens, style, each), counts(tokens, each, style)) for each in layouts]
    except InputError:  # a loss of pairs cannot be called on other numbers of texts
        return ""
    off = {name: misfit([times(KNOWN[name], *case) for case in cases]) for name in names if name in KNOWN}
    least = min(off.values(), default=ALIKE)
    return next((name for name in off if off[name] <= min(ALIKE, max(2 * least, ALIKE / 100))), "")


def _with_a_longer_text(tokens: Tokens) -> Tokens:
    """The tokens, followed by a copy of the rows of the first text as its further rows."""
    sequence = tokens.require("sequence")
    rows = torch.arange(len(tokens), device=sequence.device)
    return tokens[torch.cat([rows, rows[sequence == sequence[0]]])]


def _of_first_rows(tokens: Tokens, number: int, style: Style) -> Counts:
    """The counts of a batch, with the lengths of the texts of its first rows alone."""
    batch = counts(tokens, Layout(), style)
    return batch._replace(own=batch.own[:number]) if isinstance(batch.own, Tensor) else batch
