"""Statistics of a comparison: intervals for means over seeds crossed with items."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike
from scipy import stats

from qlens.errors import InputError


@dataclass(frozen=True, kw_only=True)
class Interval:
    """A mean over seeds x items with its interval; ``note`` says what the interval leaves out, '' if nothing.

    Args:
        mean: over all seeds and items.
        low, high: the ends; NaN for a single score.
        df: degrees of freedom of t; NaN where nothing varies.
        seeds, items: how many of each.
        note: in words, which variation could not be seen.
    """

    mean: float
    low: float
    high: float
    df: float
    seeds: int
    items: int
    note: str = ""

    @property
    def n(self) -> str:
        """'3 x 100': seeds x items."""
        return f"{self.seeds} x {self.items}"


def crossed_interval(scores: ArrayLike, level: float = 0.95) -> Interval:
    r"""A t interval for the mean of a new seed on a new item, from S seeds crossed with I items.

    Two-way random effects, one score per cell, ``x_si = mean + a_s + b_i + e_si``. The variance of the grand mean,

    .. math:: \operatorname{var} = \frac{MS_{seed} + MS_{item} - MS_{error}}{S I},

    is estimated with the mean squares of seeds and items raised to MS_error where they fall below it (a variance
    component is never negative); t has Satterthwaite's degrees of freedom for the combination that is left.

    With one seed, items alone are behind the interval, and with one item seeds alone: ``note`` says so.

    Coverage of 95 % intervals in simulations with 20 and 100 items, over component ratios from 0 to 2 (normal effects):
    92 to 97 % with 3 seeds, 93 to 97 % with 5, 94 to 96 % with 10. The low end is where seeds and items weigh alike.

    Args:
        scores: (S, I), without gaps.
        level: of the interval, between 0 and 1.

    Raises:
        InputError: scores are not a full (S, I) table of finite numbers, or the level is not between 0 and 1.

    Source: Satterthwaite 1946, Biometrics Bulletin 2(6).

    Example:
        >>> interval = crossed_interval([[0.0, 1.0, 0.5], [0.5, 1.0, 0.5]])
        >>> f"{interval.mean:.3f} [{interval.low:.3f}, {interval.high:.3f}]"
        '0.583 [-0.365, 1.532]'
    """
    x = np.asarray(scores, dtype=float)
    if x.ndim != 2 or not x.size or not np.isfinite(x).all():
        missing = f" with {int((~np.isfinite(x)).sum())} missing or infinite values" if x.ndim == 2 and x.size else ""
        raise InputError(f"scores must be a full table (seeds, items) of finite numbers, got shape {x.shape}{missing}")
    if not 0 < level < 1:
        raise InputError(f"level must be between 0 and 1, got {level}")
    seeds, items = x.shape
    if min(seeds, items) > 1:
        variance, df = _crossed(x)
        note = "" if variance else "all scores are the same"
    elif max(seeds, items) > 1:
        variance, df = x.var(ddof=1) / x.size, float(x.size - 1)
        note = "one seed: the interval knows nothing of seeds" if seeds == 1 else "one item: it knows nothing of items"
    else:
        variance, df, note = np.nan, np.nan, "one score: no interval"
    half = stats.t.ppf((1 + level) / 2, df) * np.sqrt(variance) if variance else 0.0
    mean = float(x.mean())
    ends = {"low": float(mean - half), "high": float(mean + half)}
    return Interval(mean=mean, **ends, df=float(df), seeds=seeds, items=items, note=note)


def _crossed(x: np.ndarray) -> tuple[float, float]:
    """The variance of the grand mean and its degrees of freedom."""
    seeds, items = x.shape
    by_seed, by_item = x.mean(1, keepdims=True) - x.mean(), x.mean(0, keepdims=True) - x.mean()
    df = np.array([seeds - 1, items - 1, (seeds - 1) * (items - 1)])
    error = x - x.mean() - by_seed - by_item
    squares = np.array([items * (by_seed**2).sum(), seeds * (by_item**2).sum(), (error**2).sum()])
    ms = squares / df
    # Where a component would be negative, its mean square estimates the error's variance too, and drops out.
    kept = ms[:2] > ms[2]
    parts = np.array([*kept, 1 - kept.sum()]) * ms
    total = parts.sum()
    if total <= np.finfo(float).eps * max(1.0, float(np.abs(x).max())) ** 2:  # rounding of a table that is constant
        return 0.0, np.nan
    return total / x.size, total**2 / (parts**2 / df).sum()
