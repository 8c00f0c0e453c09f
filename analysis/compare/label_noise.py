"""Scores of labels against known label noise: AUROC and calibration."""

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike
from scipy.stats import mannwhitneyu

from qlens.core.errors import InputError

BINS = 10


def auroc(score: ArrayLike, correct: ArrayLike) -> float:
    r"""Area under the ROC curve of a score that separates correct labels from noisy ones.

    .. math:: P(s_{correct} > s_{noisy}) + \tfrac12 P(s_{correct} = s_{noisy})

    Args:
        score: (N,), any score of a label; only its order counts.
        correct: (N,), whether the label is correct.

    Returns:
        1 for a perfect separation, 0.5 for none; NaN where all labels are correct, or none is.

    Raises:
        InputError: shapes differ, or a score is NaN.

    Source: Mann and Whitney 1947; Hanley and McNeil 1982, Radiology 143(1).

    Example:
        >>> auroc([0.9, 0.8, 0.3, 0.1], [True, True, False, True])
        0.6666666666666666
    """
    x, right = _checked(score, correct)
    positive, negative = x[right], x[~right]
    if not len(positive) or not len(negative):
        return np.nan
    return float(mannwhitneyu(positive, negative, method="asymptotic").statistic / (len(positive) * len(negative)))


def calibration(trust: ArrayLike, correct: ArrayLike, bins: int = BINS) -> dict[str, list[float]]:
    """Reliability diagram: mean trust, share of correct labels and count in even bins of trust.

    Args:
        trust: (N,), the label's coefficient in each target. Values below 0, and above 1, have a bin of their own.
        correct: (N,), whether the label is correct.
        bins: number of bins between 0 and 1.

    Returns:
        columns ``trust``, ``good`` (share of correct labels) and ``n``, one entry per bin that is not empty.

    Raises:
        InputError: shapes differ, or a trust is NaN.

    Example:
        >>> calibration([0.1, 0.1, 0.9], [False, True, True], bins=2)
        {'trust': [0.1, 0.9], 'good': [0.5, 1.0], 'n': [2, 1]}
    """
    x, right = _checked(trust, correct)
    edges = [-np.inf, *np.linspace(0, 1, bins + 1)[:-1], np.nextafter(1, 2), np.inf]
    frame = pd.DataFrame({"trust": x, "good": right.astype(float), "n": 1})
    groups = frame.groupby(pd.cut(x, edges, right=False, labels=False))
    table = groups.agg({"trust": "mean", "good": "mean", "n": "sum"}).round(6)
    return {name: values.tolist() for name, values in table.items()}


def _checked(score: ArrayLike, correct: ArrayLike) -> tuple[np.ndarray, np.ndarray]:
    x, right = np.asarray(score, dtype=float), np.asarray(correct, dtype=bool)
    if x.ndim != 1 or x.shape != right.shape:
        raise InputError(f"score and correct must be two lists of one length, got shapes {x.shape} and {right.shape}")
    if np.isnan(x).any():
        raise InputError(f"score has {int(np.isnan(x).sum())} NaN among {len(x)} values: leave those labels out")
    return x, right
