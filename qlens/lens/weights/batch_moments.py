"""Batch moments: losses that are the mean of a batch's cross-entropies plus a multiple of their spread."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from qlens.core.tokens import Tokens
from qlens.lens.identify.matching import written
from qlens.lens.identify.other_batches import BatchReading
from qlens.lens.identify.parameter_fits import pushes_only
from qlens.lens.reading import Reading
from qlens.lens.rounding import rounding
from qlens.lens.weights.features import plain
from qlens.lens.weights.label_weights import OPEN, label_weights

EQUAL = 1e-4  # relative difference of two numbers that count as equal
FEWEST = 5  # tokens on which a line is fitted

SCALES: dict[str, Callable[[Tensor], float]] = {
    "the variance": lambda loss: 1.0,
    "the variance (divided by N - 1)": lambda loss: (len(loss) - 1) / len(loss),
    "the standard deviation": lambda loss: float(loss.std(correction=0)),
    "the standard deviation (divided by N - 1)": lambda loss: float(loss.std()) * (len(loss) - 1) / len(loss),
}


@dataclass(frozen=True)
class BatchMoments:
    """The mean of a batch's cross-entropies plus a multiple of their spread.

    Args:
        level: factor of the mean.
        share: factor of the spread.
        spread: which spread, in words.
    """

    level: float
    share: float
    spread: str

    def __str__(self) -> str:
        mean = "the mean cross-entropy" if self.level == 1 else f"{plain(self.level)} times the mean cross-entropy"
        sign, less = ("minus", "less") if self.share < 0 else ("plus", "more")
        sentence = f"{mean} {sign} {plain(abs(self.share))} times {self.spread} of the tokens' cross-entropies"
        sentence = sentence if self.level else sentence.partition(f" {sign} ")[2]
        return f"{sentence}: tokens above the batch's mean count {less} than those below it"


def batch_moments(shown: Reading, others: Sequence[BatchReading]) -> BatchMoments | None:
    """The mean and spread of cross-entropies whose gradient a loss has in every batch, or None.

    In such a gradient the label weights are a line in the cross-entropy, a + b (l - mean l).

    Args:
        shown: the gradient on the tokens shown.
        others: the gradient on other batches.
    """
    batches: list[tuple[Tokens, Tensor]] = [(shown.inputs, shown.grad)]
    batches += [(batch.tokens, batch.grad.double()) for batch in others]
    fits = [_line(*batch) for batch in batches if _informative(batch[0])]
    lines = [line for line in fits if line is not None]
    if len(lines) < 3 or len(lines) < len(fits):
        return None
    levels = [line[0] for line in lines]
    if max(levels) - min(levels) > EQUAL * max(1.0, *map(abs, levels)):
        return None
    for name, scale in SCALES.items():
        shares = [line[1] * scale(line[2]) for line in lines]
        if max(shares) - min(shares) <= EQUAL * max(map(abs, shares)) and max(map(abs, shares)) > EQUAL:
            level = written(levels[0], EQUAL) if abs(levels[0]) > EQUAL else 0.0
            half = 2.0 if "variance" in name else 1.0
            return BatchMoments(level, written(shares[0] / half, EQUAL), name)
    return None


def _informative(tokens: Tokens) -> bool:
    """Whether there are enough tokens, of different cross-entropies, to fit a line."""
    known = tokens.rest_log_probs.double().exp() > OPEN
    return int(known.sum()) >= FEWEST and float(tokens.label_log_probs[known].std()) >= EQUAL


def _line(tokens: Tokens, grad: Tensor) -> tuple[float, float, Tensor] | None:
    """The label weight at the mean cross-entropy, its slope, and the cross-entropies; None where it is not linear in them."""
    exact = tokens.with_precision(torch.float64)
    if not bool(grad.isfinite().all()) or not pushes_only(grad, tokens, rounding(grad, tokens)):
        return None
    loss, (weight, known) = -exact.label_log_probs, label_weights(grad, tokens)
    weight, x = weight[known], (loss - loss.mean())[known]
    columns = torch.stack([torch.ones_like(x), x], 1)
    level, slope = torch.linalg.lstsq(columns, weight[:, None]).solution[:, 0].tolist()
    error = (weight - level - slope * x).abs()
    return (level, slope, loss) if bool((error <= EQUAL * weight.abs().max()).all()) else None
