"""Counts that a scalar loss may divide by."""

from collections.abc import Callable
from typing import Any, NamedTuple

from qlens.losses.layout.layouts import Counts

Divisor = Callable[[Counts], Any]
# Divisors by name, as functions of the counts of a batch; a tensor (N,) is one number per row.
REDUCTIONS: dict[str, Divisor] = {
    "sum": lambda c: 1,
    "mean over unmasked": lambda c: c.rows,
    "mean over all": lambda c: c.positions,
    "mean over all, the unused last position included": lambda c: c.columns,
    "mean over all but padding": lambda c: c.attended,
    "sum of each text, mean over texts": lambda c: c.texts,
    "mean of each text, mean over texts": lambda c: c.texts * c.own,
    "mean of each text, sum over texts": lambda c: c.own,
}


def _power(name: str, exponent: float) -> Divisor:
    return lambda c: getattr(c, name) ** exponent


NUMBERS = {"rows": "supervised tokens", "columns": "positions", "texts": "texts"}
UNUSUAL: dict[str, Divisor] = {
    f"sum divided by the number of {what} to the power {exponent:g}": _power(name, exponent)
    for exponent in (2, 0.5, 1.5, 3, 0.75, 0.25)
    for name, what in NUMBERS.items()
} | {
    "mean over unmasked, divided by the number of texts once more": lambda c: c.rows * c.texts,
    "mean over all, divided by the number of texts once more": lambda c: c.positions * c.texts,
    "mean of each text, mean over texts, divided by the number of texts once more": lambda c: c.texts**2 * c.own,
    "sum of each text divided by the root of its length, mean over texts": lambda c: c.texts * c.own**0.5,
}


def _corrected(divisor: Divisor, name: str, root: float) -> Divisor:
    """The divisor times a power of m / (m - 1), the correction of a sample variance of m values."""
    return lambda c: divisor(c) * (getattr(c, name) / max(getattr(c, name) - 1, 1)) ** root


OF_BATCH: dict[str, Divisor] = {
    f"{reduction}; {statistic} of the batch's {what}": _corrected(divisor, name, root)
    for reduction, divisor in REDUCTIONS.items()
    for name, what in (("texts", "texts"), ("rows", "tokens"))
    for statistic, root in (
        ("values are divided by the standard deviation (of a sample)", 0.5),
        ("each value is compared with the mean of the others", -1.0),
    )
}
"""Divisors of losses with a statistic of the batch in their gradient, by reduction and statistic."""
KNOWN = REDUCTIONS | UNUSUAL | OF_BATCH


class Division(NamedTuple):
    """The division of a scalar loss.

    Args:
        name: of the reduction.
        divisor: the count, as a function of the counts of a batch.
        note: a sentence on what else the reduction does.
        off: relative error.
    """

    name: str
    divisor: Divisor
    note: str = ""
    off: float = 0.0
