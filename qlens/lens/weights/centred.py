"""Centred weights: a line in each token's cross-entropy minus the batch's mean, as a variance or standard deviation has."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from qlens.core.autograd import gradient
from qlens.core.tokens import Tokens
from qlens.lens.identify.batch_statistics import other_batches
from qlens.lens.identify.matching import written
from qlens.lens.identify.parameter_fits import pushes_only
from qlens.lens.reading import Reading
from qlens.lens.rounding import rounding
from qlens.lens.weights.features import plain
from qlens.registry.variant import Variant

EQUAL = 1e-4  # relative difference of numbers that are one
NEAR_ONE = 1e-9  # 1 - p_y below which no weight is read
FEWEST = 5  # tokens on which a line is fitted

SCALES: dict[str, Callable[[Tensor], float]] = {
    "the variance": lambda loss: 1.0,
    "the variance (divided by N - 1)": lambda loss: (len(loss) - 1) / len(loss),
    "the standard deviation": lambda loss: float(loss.std(correction=0)),
    "the standard deviation (divided by N - 1)": lambda loss: float(loss.std()) * (len(loss) - 1) / len(loss),
}


@dataclass(frozen=True)
class Centred:
    """Weights a + b (l - mean l) of a token's cross-entropy l.

    Args:
        level: a.
        share: of the spread beside the mean.
        spread: which spread of the batch's cross-entropies, in words.
    """

    level: float
    share: float
    spread: str

    def __str__(self) -> str:
        mean = "the mean cross-entropy" if self.level == 1 else f"{plain(self.level)} times the mean cross-entropy"
        sign, less = ("minus", "less") if self.share < 0 else ("plus", "more")
        added = f"{mean} {sign} {plain(abs(self.share))} times {self.spread} of the tokens' cross-entropies"
        added = added if self.level else added.partition(f" {sign} ")[2]
        return f"{added}: tokens above the batch's mean count {less} than those below it"


def centred(variant: Variant, shown: Reading, trial: Reading | None) -> Centred | None:
    """The mean and spread of cross-entropies whose gradient a loss has in every batch, or None."""
    if variant.compares_pairs:
        return None
    batches: list[tuple[Tokens, Tensor]] = [(shown.given, shown.grad)]
    batches += [(tokens, gradient(variant.loss, tokens).double()) for tokens, _ in other_batches(variant, shown, trial)]
    found = [_line(*batch) for batch in batches if _telling(batch[0])]
    lines = [line for line in found if line is not None]
    if len(lines) < 3 or len(lines) < len(found):
        return None
    levels = [line[0] for line in lines]
    if max(levels) - min(levels) > EQUAL * max(1.0, *map(abs, levels)):
        return None
    for name, scale in SCALES.items():
        shares = [line[1] * scale(line[2]) for line in lines]
        if max(shares) - min(shares) <= EQUAL * max(map(abs, shares)) and max(map(abs, shares)) > EQUAL:
            level = written(levels[0], EQUAL) if abs(levels[0]) > EQUAL else 0.0
            half = 2.0 if "variance" in name else 1.0
            return Centred(level, written(shares[0] / half, EQUAL), name)
    return None


def _telling(tokens: Tokens) -> bool:
    """Whether there are enough tokens, of different cross-entropies, to tell a line."""
    known = tokens.rest_log_probs.double().exp() > NEAR_ONE
    return int(known.sum()) >= FEWEST and float(tokens.label_log_probs[known].std()) >= EQUAL


def _line(tokens: Tokens, grad: Tensor) -> tuple[float, float, Tensor] | None:
    """The weight at the mean cross-entropy and its slope, and the cross-entropies; None where it is no line."""
    exact = tokens.with_precision(torch.float64)
    if not bool(grad.isfinite().all()) or not pushes_only(grad, tokens, rounding(grad, tokens)):
        return None
    loss, rest = -exact.label_log_probs, exact.rest_log_probs.exp()
    known = rest > NEAR_ONE
    weight, x = (-exact.gather(grad) / rest.clamp(min=1e-300))[known], (loss - loss.mean())[known]
    columns = torch.stack([torch.ones_like(x), x], 1)
    level, slope = torch.linalg.lstsq(columns, weight[:, None]).solution[:, 0].tolist()
    off = (weight - level - slope * x).abs()
    return (level, slope, loss) if bool((off <= EQUAL * weight.abs().max()).all()) else None
