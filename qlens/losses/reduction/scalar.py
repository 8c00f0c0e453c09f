"""The reduction of a scalar loss: the count that it divides by, from its gradient on the same rows in several layouts."""

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from qlens.core.errors import InputError, UnknownReduction
from qlens.core.numerics import spread
from qlens.core.tokens import Tokens
from qlens.losses.calling import takes
from qlens.losses.layout.layout_search import probes_like, style_of
from qlens.losses.layout.layouts import Style
from qlens.losses.layout.pairing import given_as_sums
from qlens.losses.layout.signature import roles_taken
from qlens.losses.layout.trial import few, first_copy, grad_of, holds_rows
from qlens.losses.reduction.comparison import ALIKE, LayoutGradients, by_length, misfit, replayed, views, with_prompts
from qlens.losses.reduction.divisors import KNOWN, OF_BATCH, REDUCTIONS, UNUSUAL, Division, Divisor
from qlens.losses.reduction.random_losses import averaged, draws, nearest_count
from qlens.losses.reduction.two_terms import EXACT, refusal, shifted_mean, two_terms
from qlens.losses.replay import Replay
from qlens.losses.user_code import LossError

__all__ = ["ALIKE", "ROUNDING", "by_length", "find_division", "find_reduction", "rows_to_read", "takes_pairs"]

ROWS = 8  # rows on which a division is found
ROUNDING = 1e3  # machine epsilons below which a gradient that no count explains is rounding
TRIALS = 2**12  # vocabulary up to which the wider trial tokens are tried too


def find_reduction(fn: Callable, params: Mapping[str, Any], tokens: Tokens, name: str) -> str:
    """The name of the reduction of a scalar loss; "sum" if it has no gradient at any row that it is tried on."""
    division = find_division(fn, params, tokens, name)
    return "sum" if division is None else division.name


def find_division(fn: Callable, params: Mapping[str, Any], tokens: Tokens, name: str) -> Division | None:
    """The division of a scalar loss: the count by which its gradient on the same rows is the same in every layout.

    Args:
        fn: the loss.
        params: its parameters.
        tokens: rows on which it is called.
        name: of the loss, in messages.

    Returns:
        the division; None if the gradient is zero at every row that it is tried on, or is not finite.

    Raises:
        InputError: no division explains the gradients, or two calls on the same rows differ.
    """
    with Replay(tokens.logits.device, fn).again():  # random generators and states are left unchanged
        try:
            return _division(fn, params, tokens, name)
        except LossError as error:
            if not holds_rows(fn, tokens):
                raise
            raise UnknownReduction(
                f"{name} holds values of its own for these {len(tokens)} tokens, so that it cannot be called on fewer or on "
                "copies, by which its reduction would be found. Return the unreduced loss (N,)."
            ) from error


def _division(fn: Callable, params: Mapping[str, Any], tokens: Tokens, name: str) -> Division | None:
    style = style_of(fn, params, tokens)
    candidates = _rows_with_gradient(fn, params, tokens, style)
    standardises = "advantage" in roles_taken(fn, style.columns)  # then a few rows may have no finite gradient
    rows = _finite(candidates) if standardises else next((some for some, _ in candidates), None)
    if rows is None:
        return None
    replay = Replay(tokens.logits.device, fn)
    gradient_of = replayed(grad_of, replay)
    base = gradient_of(fn, params, rows, style)
    if not bool(base.isfinite().all()):
        return None
    if misfit([base, gradient_of(fn, params, rows, style)]) > ALIKE:
        raise InputError(
            f"{name} is not deterministic: it has a state, or draws numbers, that qlens cannot restore: two calls on the same "
            "tokens differ. Draw by the generators of torch, numpy or Python, give its state as an argument, or return the "
            "unreduced loss (N,)."
        )
    gradients = list(views(fn, params, rows, style, gradient_of))
    division = _fitted(REDUCTIONS, fn, params, rows, style, gradients)
    if division is None and draws(lambda: grad_of(fn, params, rows, style), replay, ALIKE):
        mean = next(views(fn, params, rows, style, averaged(grad_of, len(rows))))
        nearest = nearest_count({k: mean.multiplied(by) for k, by in REDUCTIONS.items()}, name)
        return Division(nearest, REDUCTIONS[nearest])
    if division is None and float(base.abs().max()) < ROUNDING * torch.finfo(base.dtype).eps:
        return None
    if division is not None and division.off > EXACT:  # the difference may be a small second term, not rounding
        return two_terms(fn, params, rows, style, gradients[0], EXACT**2) or division
    division = division or _fitted(UNUSUAL, fn, params, rows, style, gradients)
    division = division or _of_batch(fn, params, rows, style, gradients)
    division = division or shifted_mean(gradients[0])
    if division is None:  # copies may depend on each other: the first copy alone
        gradients = list(views(fn, params, rows, style, replayed(first_copy, replay)))
        division = _fitted(REDUCTIONS, fn, params, rows, style, gradients) or two_terms(
            fn, params, rows, style, gradients[0]
        )
    if division is None:
        raise UnknownReduction(refusal(name, gradients[0]))
    return division


def takes_pairs(fn: Callable, style: Style) -> bool:
    """Whether a loss compares the texts of pairs, given as sums or by their places in a batch."""
    return given_as_sums(fn) or bool(style.pairs)


def rows_to_read(fn: Callable, tokens: Tokens, style: Style) -> Tokens:
    """Some rows at equal distances, on which a division is found; whole pairs or groups of texts if the loss takes these."""
    if holds_rows(fn, tokens):
        return tokens
    if takes_pairs(fn, style) or style.group > 1:
        return few(tokens, style.group)
    return tokens[spread(len(tokens), ROWS).to(tokens.logits.device)]


def _finite(candidates: Iterator[tuple[Tokens, Tensor]]) -> Tokens | None:
    """The first rows whose gradient is finite, else the first of all."""
    first = None
    for rows, grad in candidates:
        if bool(grad.isfinite().all()):
            return rows
        first = first or rows
    return first


def _rows_with_gradient(
    fn: Callable, params: Mapping[str, Any], tokens: Tokens, style: Style
) -> Iterator[tuple[Tokens, Tensor]]:
    """Rows at which a loss has a gradient, with that: a few of the tokens, then the probes and the trial tokens."""
    from qlens.core.probes import trials

    some = rows_to_read(fn, tokens, style)
    try:
        base = grad_of(fn, params, some, style)
    except LossError:  # a loss of whole groups of texts
        some, base = tokens, grad_of(fn, params, tokens, style)
    if bool(base.any()):
        yield some, base
    if not takes_pairs(fn, style) and style.group == 1 and len(tokens) > ROWS:
        learned = grad_of(fn, params, tokens, style).any(-1).nonzero()[:, 0]
        if len(learned):
            some = tokens[learned[spread(len(learned), ROWS).to(learned.device)]]
            yield from _if_any(fn, params, some, style)
    for rows in (probes_like(tokens), trials if tokens.logits.shape[1] <= TRIALS else None):
        if callable(rows):
            wide = rows(tokens.logits.dtype, tokens.logits.device, tokens.logits.shape[1])
            rows = Tokens.unchecked(**{name: getattr(wide, name) for name in tokens.unweighted().fields()})
        if rows is not None:
            try:
                yield from _if_any(fn, params, rows, style)
            except InputError:  # the loss may be written for these very tokens
                continue


def _if_any(fn: Callable, params: Mapping[str, Any], tokens: Tokens, style: Style) -> Iterator[tuple[Tokens, Tensor]]:
    """The tokens and their gradient, if it is not zero."""
    base = grad_of(fn, params, tokens, style)
    if bool(base.any()):
        yield tokens, base


def _fitted(
    divisors: Mapping[str, Divisor],
    fn: Callable,
    params: Mapping[str, Any],
    tokens: Tokens,
    style: Style,
    gradients: list[LayoutGradients],
) -> Division | None:
    """The one of these divisors by which the gradients are the same in all layouts; None if none is."""
    misfits = {name: min(view.misfit(by) for view in gradients) for name, by in divisors.items()}
    best = min(misfits, key=misfits.__getitem__)
    if not misfits[best] <= ALIKE:
        return None
    fitting = [name for name, off in misfits.items() if off <= max(ALIKE / 100, 2 * misfits[best])]
    if style.laid_out and takes(fn, "attention mask"):
        fitting = with_prompts(fitting, divisors, fn, params, tokens, style)
    name = (fitting or [best])[0]
    if style.laid_out and not style.pairs:  # texts of other lengths distinguish reductions that fit all layouts
        unusual = UNUSUAL if divisors is REDUCTIONS else {}
        unusual_names = [k for k, by in unusual.items() if min(view.misfit(by) for view in gradients) <= ALIKE]
        if len(fitting) + len(unusual_names) > 1:
            name = by_length([*fitting, *unusual_names], fn, params, tokens, style) or name
    return Division(name, KNOWN[name], off=misfits[best])


def _of_batch(
    fn: Callable, params: Mapping[str, Any], tokens: Tokens, style: Style, gradients: list[LayoutGradients]
) -> Division | None:
    """The division of a loss whose gradient holds a statistic of its batch too, such as the deviation of rewards."""
    if "advantage" not in roles_taken(fn, style.columns):
        return None
    division = _fitted(OF_BATCH, fn, params, tokens, style, gradients)
    if division is None:
        return None
    name, _, statistic = division.name.partition("; ")
    note = f"A statistic of the batch is in its gradient, and is kept: {statistic}."
    return Division(name, REDUCTIONS[name], note, division.off)
