"""Reductions: what a scalar loss divides by, found from its gradient on the same rows in several layouts."""

from collections.abc import Callable, Iterator, Mapping
from itertools import combinations
from typing import Any, NamedTuple

import torch
from torch import Tensor

from qlens.core.errors import InputError, UnknownReduction
from qlens.core.numerics import spread
from qlens.core.tokens import Tokens
from qlens.losses.calling import takes
from qlens.losses.layout.layout_search import probes_like, style_of
from qlens.losses.layout.layouts import Counts, Layout, Style, counts
from qlens.losses.layout.names import role_of
from qlens.losses.layout.pairing import given_as_sums
from qlens.losses.layout.trial import few, first_copy, grad_of, inputs_masked
from qlens.losses.reduction.divisors import KNOWN, OF_BATCH, REDUCTIONS, UNUSUAL, Division, Divisor
from qlens.losses.reduction.random_losses import averaged, draws, nearest_count
from qlens.losses.replay import Replay
from qlens.losses.user_code import LossError

FOUND_ON = 8  # rows: enough to see how a loss divides, few enough to be free
ROUNDING = 1e3  # units of rounding below which a gradient that no count explains is none
ALIKE = 0.01  # gradients this near are one gradient: losses may compute in bfloat16, and counts differ by far more
EXACT = 1e-4  # the same where more is fitted: two terms, or a number added to a count
TRIALS = 2**12  # vocabulary up to which the wider trial tokens are tried too


class Shown(NamedTuple):
    """The gradients of the same rows in several layouts."""

    layouts: list[Layout]
    grads: list[Tensor]


def find_reduction(fn: Callable, params: Mapping[str, Any], tokens: Tokens, name: str) -> str:
    """How a scalar loss divides, by name; "sum" where it learns from no row that it could be shown."""
    found = find_division(fn, params, tokens, name)
    return "sum" if found is None else found.name


def find_division(fn: Callable, params: Mapping[str, Any], tokens: Tokens, name: str) -> Division | None:
    """How a scalar loss divides: the one count by which its gradient on the same rows is the same in every layout.

    Returns:
        the division; None where it has no gradient at any row that it could be shown, or one that is not finite.

    Raises:
        InputError: nothing explains it, or two calls on the same rows differ.
    """
    with Replay(tokens.logits.device, fn).again():  # what it draws and keeps stays as it was
        return _division(fn, params, tokens, name)


def _division(fn: Callable, params: Mapping[str, Any], tokens: Tokens, name: str) -> Division | None:
    style = style_of(fn, params, tokens)
    rows = _lit(fn, params, tokens, style)
    lit = _readable(rows) if _takes_advantages(fn, style) else next(rows, None)
    if lit is None:
        return None
    shown, replay = lit[0], Replay(tokens.logits.device, fn)
    read = _replayed(grad_of, replay)
    base = read(fn, params, shown, style)
    if not bool(base.isfinite().all()):
        return None  # a gradient that is no number is divided by nothing; it is reported as it is
    if _misfit([base, read(fn, params, shown, style)]) > ALIKE:
        raise InputError(
            f"{name} is not deterministic: it has a state, or draws numbers, that qlens cannot restore: two calls on the same "
            "tokens differ. Draw by the generators of torch, numpy or Python, give its state as an argument, or return the "
            "unreduced loss (N,)."
        )
    views = list(_views(fn, params, shown, style, read))
    found = _fitted(REDUCTIONS, fn, params, shown, style, views)
    if found is None and draws(lambda: grad_of(fn, params, shown, style), replay, ALIKE):
        view = next(_views(fn, params, shown, style, averaged(grad_of, len(shown))))
        nearest = nearest_count({k: _multiplied(by, fn, view, shown, style) for k, by in REDUCTIONS.items()}, name)
        return Division(nearest, REDUCTIONS[nearest])
    if found is None and float(base.abs().max()) < ROUNDING * torch.finfo(base.dtype).eps:
        return None  # nothing but rounding: there is no gradient to be divided
    if found is not None and found.off > EXACT:  # a small second term may hide in what is taken for rounding
        return _two_terms(fn, params, shown, style, views[0], EXACT**2) or found
    found = found or _fitted(UNUSUAL, fn, params, shown, style, views)
    found = found or _of_batch(fn, params, shown, style, views)
    found = found or _shifted(fn, shown, style, views[0])
    if found is None:  # copies may see each other: then the first may not see those after it
        views = list(_views(fn, params, shown, style, _replayed(first_copy, replay)))
        found = _fitted(REDUCTIONS, fn, params, shown, style, views) or _two_terms(fn, params, shown, style, views[0])
    if found is None:
        raise UnknownReduction(_refusal(name, views[0]))
    return found


def _takes_advantages(fn: Callable, style: Style) -> bool:
    """Whether a loss is given advantages or rewards, which it may standardise over its batch."""
    return takes(fn, "advantage") or "advantage" in map(role_of, style.columns)


def _readable(lit: Iterator[tuple[Tokens, Tensor]]) -> tuple[Tokens, Tensor] | None:
    """The first whose gradient is finite, else the first of all."""
    first = None
    for some, base in lit:
        if bool(base.isfinite().all()):
            return some, base
        first = first or (some, base)
    return first


def _replayed(read: Callable[..., Tensor], replay: Replay) -> Callable[..., Tensor]:
    """The same reading, every time with the draws and from the state of ``replay``, which are left as they are."""

    def again(*call: Any) -> Tensor:
        with replay.again():
            return read(*call)

    return again


def takes_pairs(fn: Callable, style: Style) -> bool:
    """Whether a loss compares the texts of pairs, given as sums or by their places in a batch."""
    return given_as_sums(fn) or bool(style.pairs)


def rows_to_read(fn: Callable, tokens: Tokens, style: Style) -> Tokens:
    """Some rows from all over, on which a division is found; of a loss of pairs or groups of texts, whole ones."""
    if takes_pairs(fn, style) or style.group > 1:
        return few(tokens, style.group)
    return tokens[spread(len(tokens), FOUND_ON).to(tokens.logits.device)]


def _lit(fn: Callable, params: Mapping[str, Any], tokens: Tokens, style: Style) -> Iterator[tuple[Tokens, Tensor]]:
    """A few rows that a loss learns from, with their gradient: of the tokens, else of the probes and trials."""
    from qlens.core.probes import trials

    some = rows_to_read(fn, tokens, style)
    try:
        base = grad_of(fn, params, some, style)
    except LossError:  # it may want whole groups of texts
        some, base = tokens, grad_of(fn, params, tokens, style)
    if bool(base.any()):
        yield some, base
    if not takes_pairs(fn, style) and style.group == 1 and len(tokens) > FOUND_ON:
        learned = grad_of(fn, params, tokens, style).any(-1).nonzero()[:, 0]
        if len(learned):
            some = tokens[learned[spread(len(learned), FOUND_ON).to(learned.device)]]
            yield from _with_gradient(fn, params, some, style)
    for made in (probes_like(tokens), trials if tokens.logits.shape[1] <= TRIALS else None):
        if callable(made):
            wide = made(tokens.logits.dtype, tokens.logits.device, tokens.logits.shape[1])
            made = Tokens.unchecked(**{name: getattr(wide, name) for name in tokens.unweighted().fields()})
        if made is not None:
            try:
                yield from _with_gradient(fn, params, made, style)
            except InputError:  # it may be made for these very tokens
                continue


def _with_gradient(
    fn: Callable, params: Mapping[str, Any], tokens: Tokens, style: Style
) -> Iterator[tuple[Tokens, Tensor]]:
    base = grad_of(fn, params, tokens, style)
    if bool(base.any()):
        yield tokens, base


def _views(fn: Callable, params: Mapping[str, Any], tokens: Tokens, style: Style, read: Callable) -> Iterator[Shown]:
    """The rows once, twice and three times, and with further positions that are not supervised."""
    for interleave in (False, True) if style.laid_out else (False,):
        layouts = [Layout(), Layout(2, 0, False, interleave), Layout(3, 0, False, interleave)]
        if style.laid_out or inputs_masked(fn):
            layouts += [Layout(1, 7), Layout(2, 12, False, interleave)]
        yield Shown(layouts, [read(fn, params, tokens, style, layout) for layout in layouts])


def _fitted(
    known: Mapping[str, Divisor],
    fn: Callable,
    params: Mapping[str, Any],
    tokens: Tokens,
    style: Style,
    views: list[Shown],
) -> Division | None:
    """The one of these divisors by which all views have one gradient; None where none does."""
    misfits = {
        name: min(_misfit(_multiplied(divisor, fn, shown, tokens, style)) for shown in views)
        for name, divisor in known.items()
    }
    best = min(misfits, key=misfits.__getitem__)
    if not misfits[best] <= ALIKE:
        return None
    alike = [name for name, off in misfits.items() if off <= max(ALIKE / 100, 2 * misfits[best])]
    if style.laid_out and takes(fn, "attention mask"):
        alike = _with_prompts(alike, known, fn, params, tokens, style)
    found = (alike or [best])[0]
    if style.laid_out and not style.pairs:  # of those no view tells apart, the one for texts of other lengths
        others = list(UNUSUAL) if known is REDUCTIONS else []
        others = [
            name
            for name in others
            if min(_misfit(_multiplied(UNUSUAL[name], fn, v, tokens, style)) for v in views) <= ALIKE
        ]
        if len(alike) + len(others) > 1:
            found = by_length([*alike, *others], fn, params, tokens, style) or found
    return Division(found, KNOWN[found], off=misfits[best])


def _of_batch(
    fn: Callable, params: Mapping[str, Any], tokens: Tokens, style: Style, views: list[Shown]
) -> Division | None:
    """What a loss divides by beside a statistic of its batch, such as the standard deviation of rewards, which is kept."""
    if not _takes_advantages(fn, style):
        return None
    found = _fitted(OF_BATCH, fn, params, tokens, style, views)
    if found is None:
        return None
    known, _, statistic = found.name.partition("; ")
    note = f"A statistic of the batch is in its gradient, and is kept: {statistic}."
    return Division(known, REDUCTIONS[known], note, found.off)


def _with_prompts(
    alike: list[str],
    known: Mapping[str, Divisor],
    fn: Callable,
    params: Mapping[str, Any],
    tokens: Tokens,
    style: Style,
) -> list[str]:
    """Those of these reductions that hold for texts with a prompt too; all of them where none does."""
    layouts, read = [Layout(), Layout(before=3)], _replayed(grad_of, Replay(tokens.logits.device, fn))
    shown = Shown(layouts, [read(fn, params, tokens, style, layout) for layout in layouts])
    held = [name for name in alike if _misfit(_multiplied(known[name], fn, shown, tokens, style)) <= ALIKE]
    return held or alike


def by_length(alike: list[str], fn: Callable, params: Mapping[str, Any], tokens: Tokens, style: Style) -> str:
    """The one of these reductions that holds for texts of unequal lengths too; "" where none does."""
    read = _replayed(grad_of, Replay(tokens.logits.device, fn))
    try:
        if style.by_text and tokens.sequence is not None:  # dealt anew, a text would have another advantage
            base, longer = read(fn, params, tokens, style), _with_a_longer_text(tokens)
            cases = [(base, counts(tokens, Layout(), style))]
            cases += [(read(fn, params, longer, style)[: len(tokens)], _first_rows(longer, len(tokens), style))]
        else:
            layouts = [Layout(), Layout(split=True)]
            cases = [(read(fn, params, tokens, style, each), counts(tokens, each, style)) for each in layouts]
    except InputError:  # a loss of pairs, say, takes no texts in other numbers
        return ""
    off = {name: _misfit([_times(KNOWN[name], *case) for case in cases]) for name in alike if name in KNOWN}
    least = min(off.values(), default=ALIKE)
    return next((name for name in off if off[name] <= min(ALIKE, max(2 * least, ALIKE / 100))), "")


def _with_a_longer_text(tokens: Tokens) -> Tokens:
    """The tokens, and the rows of the first text once more, at its end."""
    sequence = tokens.require("sequence")
    rows = torch.arange(len(tokens), device=sequence.device)
    return tokens[torch.cat([rows, rows[sequence == sequence[0]]])]


def _first_rows(tokens: Tokens, number: int, style: Style) -> Counts:
    """The counts of a batch, those of each row's text for the first rows alone."""
    found = counts(tokens, Layout(), style)
    return found._replace(own=found.own[:number]) if isinstance(found.own, Tensor) else found


def _shifted(fn: Callable, tokens: Tokens, style: Style, shown: Shown) -> Division | None:
    """A mean over the rows and some more: sum / (N + c), c found from the rows shown twice."""
    ratio = float(shown.grads[1].norm() / shown.grads[0].norm())
    if not 0.5 < ratio < 1:
        return None
    number = counts(tokens, Layout(), style, given_as_sums(fn)).rows
    added = number * (2 * ratio - 1) / (1 - ratio)
    added = round(added, 3) if abs(added - round(added, 3)) < EXACT else added

    def divisor(c: Counts) -> float:
        return c.rows + added

    if _misfit(_multiplied(divisor, fn, shown, tokens, style)) > EXACT:
        return None
    return Division(f"sum divided by the number of supervised tokens + {added:g}", divisor)


def _two_terms(
    fn: Callable, params: Mapping[str, Any], tokens: Tokens, style: Style, shown: Shown, exact: float = EXACT
) -> Division | None:
    """Two terms that are divided by different counts; the division of the larger, and a sentence about both."""
    if style.laid_out and not style.pairs:  # texts of other lengths, in which rows, positions and texts are told apart
        layouts, read = [Layout(), Layout(split=True)], _replayed(grad_of, Replay(tokens.logits.device, fn))
        try:
            base, dealt = (read(fn, params, tokens, style, layout) for layout in layouts)
            # other draws, or another state, than those of the other layouts
            if _misfit([shown.grads[0], base]) > exact:
                return None
            shown = Shown([*shown.layouts, layouts[1]], [*shown.grads, dealt])
        except InputError:
            return None
    stacked = torch.stack(shown.grads, 1)  # (N, layouts, V)
    fits: list[tuple[float, str, str, Tensor]] = []
    for one, other in combinations(REDUCTIONS, 2):
        inverse = []
        for layout in shown.layouts:
            number = counts(tokens, layout, style, given_as_sums(fn))
            each = [1 / torch.as_tensor(REDUCTIONS[name](number)).to(stacked) for name in (one, other)]
            inverse.append(torch.stack([value.expand(len(stacked)) for value in each], -1))
        matrix = torch.stack(inverse, 1)  # (N, layouts, 2)
        parts = torch.linalg.pinv(matrix) @ stacked
        off = float((matrix @ parts - stacked).norm() / stacked.norm())
        fits.append((off, one, other, matrix[:, 0, :, None] * parts))
    least = min(off for off, *_ in fits)
    off, one, other, parts = next(fit for fit in fits if fit[0] <= max(10 * least, exact / 100))
    sizes = {one: float(parts[:, 0].norm()), other: float(parts[:, 1].norm())}
    if off > exact:
        return None
    major, minor = sorted(sizes, key=lambda name: -sizes[name])
    share = sizes[minor] / sum(sizes.values())
    note = (
        f"It adds two terms that are divided by different counts, one a {major}, the other ({share:.2g} of the gradient on "
        f"{len(tokens)} tokens) a {minor}: their balance depends on the numbers of tokens, positions and texts in a batch. "
        "What is said here holds for the batch shown; divide both by one count to make it hold for all."
    )
    return Division(major, REDUCTIONS[major], note)


def _refusal(name: str, shown: Shown) -> str:
    """What was seen of a loss that divides by nothing known."""
    size = float(shown.grads[0].norm())
    factors = [f"{float(grad.norm()) / size:.4g}" for grad in shown.grads[1:]]
    more = f", and by {factors[2]} with 7 unsupervised positions beside them" if len(factors) > 2 else ""
    return (
        f"{name}: its reduction could not be found: with every row shown twice, a row's gradient changes by a factor "
        f"{factors[0]}, shown three times by {factors[1]}{more}; a sum gives 1 and 1, a mean 0.5 and 0.3333. No count of "
        "tokens, positions or texts, no power of one and no two terms explain it. Return the unreduced loss (N,) instead."
    )


def _multiplied(divisor: Divisor, fn: Callable, shown: Shown, tokens: Tokens, style: Style) -> list[Tensor]:
    """Gradients in several layouts, each multiplied by what is divided by there."""
    numbers = [counts(tokens, layout, style, given_as_sums(fn)) for layout in shown.layouts]
    return [_times(divisor, grad, number) for grad, number in zip(shown.grads, numbers, strict=True)]


def _times(divisor: Divisor, grad: Tensor, number: Counts) -> Tensor:
    """A gradient multiplied by what is divided by, a number or one for each row."""
    by = divisor(number)
    return grad * (by.to(grad)[:, None] if isinstance(by, Tensor) else by)


def _misfit(grads: list[Tensor]) -> float:
    """How far gradients that should be one are apart, as a share of the first."""
    return max(float((grad - grads[0]).norm() / grads[0].norm()) for grad in grads[1:])
