"""Trust against truth: whether a method trusts the good labels more than the noisy ones, where the noise is known."""

import numpy as np
from numpy.typing import ArrayLike
from scipy.stats import rankdata

from qlens.core.errors import InputError

BINS = 10


def auroc(trust: ArrayLike, good: ArrayLike) -> float:
    """The chance that a good label is trusted more than a noisy one, ties by half: 1 separates them, .5 knows nothing.

    Args:
        trust: (N,), any score; only its order counts.
        good: (N,), whether the label is right.

    Returns:
        NaN where all labels are good, or none is.

    Raises:
        InputError: shapes differ, or a trust is NaN.

    Source: Mann and Whitney 1947; Hanley and McNeil 1982, Radiology 143(1).

    Example:
        >>> auroc([0.9, 0.8, 0.3, 0.1], [True, True, False, True])
        0.6666666666666666
    """
    x, right = _checked(trust, good)
    positive, negative = int(right.sum()), int((~right).sum())
    if not positive or not negative:
        return np.nan
    above = rankdata(x)[right].sum() - positive * (positive + 1) / 2
    return float(above / (positive * negative))


def calibration(trust: ArrayLike, good: ArrayLike, bins: int = BINS) -> dict[str, list[float]]:
    """Mean trust, share of good labels and their number, in even bins of trust from 0 to 1; empty bins are left out.

    Trust below 0 has a bin of its own, and so has trust above 1: nothing is clipped.

    Raises:
        InputError: shapes differ, or a trust is NaN.

    Example:
        >>> calibration([0.1, 0.1, 0.9], [False, True, True], bins=2)
        {'trust': [0.1, 0.9], 'good': [0.5, 1.0], 'n': [2, 1]}
    """
    x, right = _checked(trust, good)
    edges = np.linspace(0, 1, bins + 1)
    number = np.digitize(x, edges)
    number[x == 1] = bins  # the last bin has both its ends
    found: dict[str, list[float]] = {"trust": [], "good": [], "n": []}
    for each in np.unique(number):
        inside = number == each
        found["trust"].append(round(float(x[inside].mean()), 6))
        found["good"].append(round(float(right[inside].mean()), 6))
        found["n"].append(int(inside.sum()))
    return found


def _checked(trust: ArrayLike, good: ArrayLike) -> tuple[np.ndarray, np.ndarray]:
    x, right = np.asarray(trust, dtype=float), np.asarray(good, dtype=bool)
    if x.ndim != 1 or x.shape != right.shape:
        raise InputError(f"trust and good must be two lists of one length, got shapes {x.shape} and {right.shape}")
    if np.isnan(x).any():
        raise InputError(f"trust has {int(np.isnan(x).sum())} NaN among {len(x)} values: leave those labels out")
    return x, right
