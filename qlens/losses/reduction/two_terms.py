"""Reductions that no single count explains: a number added to a count, and two terms divided by different counts."""

import contextlib
from collections.abc import Callable, Mapping
from itertools import combinations
from typing import Any

import torch
from torch import Tensor

from qlens.core.errors import InputError
from qlens.core.tokens import Tokens
from qlens.losses.layout.layouts import Counts, Layout, Style, counts
from qlens.losses.layout.pairing import given_as_sums
from qlens.losses.reduction.comparison import LayoutGradients, misfit, replayed_gradient
from qlens.losses.reduction.divisors import REDUCTIONS, Division

EXACT = 1e-4  # relative error of a fit with more than one unknown


def shifted_mean(gradients: LayoutGradients) -> Division | None:
    """A mean over the rows and some more, sum / (N + c), with c from the rows shown twice."""
    ratio = float(gradients.grads[1].norm() / gradients.grads[0].norm())
    if not 0.5 < ratio < 1:
        return None
    number = gradients.numbers[0].rows
    added = number * (2 * ratio - 1) / (1 - ratio)
    added = round(added, 3) if abs(added - round(added, 3)) < EXACT else added

    def divisor(c: Counts) -> float:
        return c.rows + added

    if gradients.misfit(divisor) > EXACT:
        return None
    return Division(f"sum divided by the number of supervised tokens + {added:g}", divisor)


def two_terms(
    fn: Callable,
    params: Mapping[str, Any],
    tokens: Tokens,
    style: Style,
    gradients: LayoutGradients,
    exact: float = EXACT,
) -> Division | None:
    """Two terms that are divided by different counts: the division of the larger one, with a note on both."""
    if style.laid_out and not style.pairs:  # texts of other lengths tell rows, positions and texts apart
        split, gradient_of = Layout(split=True), replayed_gradient(fn, tokens)
        with contextlib.suppress(InputError):  # then the layouts shown are enough
            base, other = (gradient_of(fn, params, tokens, style, layout) for layout in (Layout(), split))
            if misfit([gradients.grads[0], base]) > exact:  # other draws, or another state, than in the other layouts
                return None
            number = counts(tokens, split, style, given_as_sums(fn))
            gradients = LayoutGradients(
                [*gradients.layouts, split], [*gradients.grads, other], [*gradients.numbers, number]
            )
    stacked = torch.stack(gradients.grads, 1)  # (N, layouts, V)
    fits: list[tuple[float, str, str, Tensor]] = []
    for first, second in combinations(REDUCTIONS, 2):
        matrix = _inverse_counts((first, second), gradients, stacked)
        parts = torch.linalg.pinv(matrix) @ stacked
        off = float((matrix @ parts - stacked).norm() / stacked.norm())
        fits.append((off, first, second, matrix[:, 0, :, None] * parts))
    least = min(off for off, *_ in fits)
    off, first, second, parts = next(fit for fit in fits if fit[0] <= max(10 * least, exact / 100))
    if off > exact:
        return None
    sizes = {first: float(parts[:, 0].norm()), second: float(parts[:, 1].norm())}
    major, minor = sorted(sizes, key=lambda name: -sizes[name])
    share = sizes[minor] / sum(sizes.values())
    note = (
        f"It adds two terms that are divided by different counts, one a {major}, the other ({share:.2g} of the gradient on "
        f"{len(tokens)} tokens) a {minor}: their balance depends on the numbers of tokens, positions and texts in a batch. "
        "This explanation holds for the batch shown; divide both by one count to make it hold for all."
    )
    return Division(major, REDUCTIONS[major], note)


def _inverse_counts(names: tuple[str, str], gradients: LayoutGradients, stacked: Tensor) -> Tensor:
    """1 / divisor of two reductions in every layout, (N, layouts, 2)."""
    by_layout = []
    for number in gradients.numbers:
        inverse = [1 / torch.as_tensor(REDUCTIONS[name](number)).to(stacked) for name in names]
        by_layout.append(torch.stack([value.expand(len(stacked)) for value in inverse], -1))
    return torch.stack(by_layout, 1)


def refusal(name: str, gradients: LayoutGradients) -> str:
    """The error message for a loss with an unknown reduction: how its gradient changes with the layout."""
    size = float(gradients.grads[0].norm())
    factors = [f"{float(grad.norm()) / size:.4g}" for grad in gradients.grads[1:]]
    more = f", and by {factors[2]} with 7 unsupervised positions beside them" if len(factors) > 2 else ""
    return (
        f"{name}: its reduction could not be found: with every row shown twice, a row's gradient changes by a factor "
        f"{factors[0]}, shown three times by {factors[1]}{more}; a sum gives 1 and 1, a mean 0.5 and 0.3333. No count of "
        "tokens, positions or texts, no power of one and no two terms explain it. Return the unreduced loss (N,) instead."
    )
