"""Probes: built-in tokens on which losses are analysed: a sweep of p_y to show, and wider trials."""

import math

import torch
from torch import Tensor

from qlens.core.numerics import one_hot
from qlens.core.tokens import Tokens

VOCABULARY = 32
WIDE = 160  # vocabulary of the trials, larger than the top k and ranks of published losses
SWEEP = (
    1e-6,
    1e-4,
    1e-3,
    0.01,
    0.03,
    0.1,
    0.2,
    0.3,
    0.4,
    0.5,
    0.6,
    0.7,
    0.8,
    0.9,
    0.97,
    0.99,
    0.999,
    1 - 1e-4,
    1 - 1e-6,
)
# distributions of the alternatives: one with nine tenths, each with .8 of the one before, uniform
SHAPES = ("peaked", "graded", "flat")


def probes(
    dtype: torch.dtype = torch.float64, device: torch.device | str = "cpu", vocabulary: int = VOCABULARY
) -> Tokens:
    """57 tokens that distinguish losses: 19 values of p_y, each with alternatives of low, middle and high entropy.

    Teacher, reference, old policy and second pass differ from the student and from each other. The tokens belong to
    eight sequences in four pairs; masks, advantages and negatives vary over them.

    Args:
        dtype: of the logits.
        device: of all fields.
        vocabulary: V.

    Example:
        >>> probes().logits.shape
        torch.Size([57, 32])
    """
    p_y = torch.tensor(SWEEP, dtype=torch.float64).repeat(len(SHAPES))
    rows = torch.arange(len(p_y))
    labels = (rows * 7) % vocabulary
    rival = (labels + 1) % vocabulary
    rank = (torch.arange(vocabulary) - rival[:, None]) % vocabulary  # the rival first, the label last
    first = (rank == 0).double()
    peaked = 0.9 * first + 0.1 * (1 - first) / (vocabulary - 2)
    kinds = [peaked, 0.8 ** rank.double(), torch.ones_like(peaked)]
    rest = torch.stack([kinds[int(row) // len(SWEEP)][row] for row in rows])
    rest[rows, labels] = 0.0
    probs = (1 - p_y)[:, None] * rest / rest.sum(-1, keepdim=True)
    probs[rows, labels] = p_y
    draw = torch.Generator().manual_seed(0)
    level = 3 * torch.randn(len(rows), 1, generator=draw, dtype=torch.float64)
    logits = probs.log() + level  # so that a loss which sees raw logits shows it

    def noise(size: float) -> torch.Tensor:
        return size * torch.randn(logits.shape, generator=draw, dtype=torch.float64)

    teacher = 0.5 * logits + noise(1.5)
    teacher[rows[rows % 3 > 0], labels[rows % 3 > 0]] += 3.0  # a teacher that backs two labels in three
    models = dict(logits=logits, teacher=teacher, reference=logits + noise(0.7), old=logits + noise(0.2))
    models["second"] = logits + noise(0.1)
    negatives = one_hot((labels + 2) % vocabulary, vocabulary, torch.float64).bool()
    negatives[rows, rival] = rows % 2 == 1
    return _dealt(labels, models, rows % 2 == 0, negatives, dtype, device)


def widened(vocabulary: int, dtype: torch.dtype, device: torch.device) -> Tokens:
    """Four probes padded to a model's vocabulary."""
    sample = probes(dtype, device, min(vocabulary, VOCABULARY))[:4]
    missing = vocabulary - sample.logits.shape[1]
    matrices = {name: value for name, value in sample.fields().items() if value.ndim == 2}
    padded = {name: torch.nn.functional.pad(value, (0, missing)) for name, value in matrices.items()}
    return Tokens.unchecked(**sample.fields() | padded)


def _dealt(
    labels: Tensor,
    models: dict[str, Tensor],
    critical: Tensor,
    negatives: Tensor,
    dtype: torch.dtype,
    device: torch.device | str,
) -> Tokens:
    """Tokens of these logits in eight sequences and four pairs, with varying hints and advantages."""
    rows = torch.arange(len(labels))
    fields = models | {"advantage": torch.tensor([1.5, -0.7, 0.4, -1.2, 0.9], dtype=torch.float64)[rows % 5]}
    fields = {name: value.to(dtype=dtype, device=device) for name, value in fields.items()}
    sequence = rows % 8
    masks = dict(sequence=sequence, pair=sequence // 2, chosen=sequence % 2 == 0)
    masks |= dict(critical=critical, hint=rows % 4 == 1, negatives=negatives)
    return Tokens(labels=labels.to(device), **{name: value.to(device) for name, value in masks.items()}, **fields)


def shapes() -> list[str]:
    """The name of the alternatives' distribution at every probe."""
    return [shape for shape in SHAPES for _ in SWEEP]


TRIED = (
    1e-14, 1e-12, 1e-11, 1e-10, 1e-9, 3e-9, 1e-8, 3e-8, 1e-7, 3e-7, 1e-6, 3e-6, 1e-5, 3e-5, 1e-4, 3e-4, 1e-3, 3e-3, 0.01,
    0.02, 0.05, 0.08, 0.12, 0.15, 0.22, 0.28, 0.35, 0.45, 0.55, 0.65, 0.75, 0.85, 0.92, 0.98, 0.995, 1 - 1e-3, 1 - 1e-5,
    1 - 1e-7,
)  # fmt: skip
RANKS = (
    0, 0, 1, 2, 3, 4, 5, 7, 9, 10, 11, 15, 19, 20, 21, 29, 30, 31, 40, 49, 50, 51, 60, 61, 64, 65, 80, 99, 100, 101, 120, 159
)  # fmt: skip
RATIOS = (0.0, 0.15, -0.15, 0.4, -0.4, 1.0, -1.0, 2.5, -2.5, 5.0, -5.0)  # logarithms
CLIPS = (  # ratios to the old policy on both sides of the clips that published losses have
    1.0, 0.99, 1.01, 0.91, 0.89, 1.09, 1.11, 1.19, 1.21, 1.25, 1.27, 1.29, 1.31, 1.39, 1.41, 1.49, 1.51, 1.9, 2.1, 2.9, 3.1,
    4.9, 5.1, 9.9, 10.1, 0.81, 0.79, 0.76, 0.74, 0.73, 0.71, 0.69, 0.51, 0.49, 0.34, 0.32, 0.21, 0.19,
)  # fmt: skip
SPREADS = (0.1, 0.5, 1.0, 2.0, 3.0, 5.0, 8.0)  # standard deviations of logits


def trials(dtype: torch.dtype = torch.float64, device: torch.device | str = "cpu", vocabulary: int = WIDE) -> Tokens:
    """163 tokens beyond the sweep of ``probes``, at which clamps, floors and thresholds of published losses act.

    p_y runs from 1e-14 to 1 - 1e-7, the label's rank from first to last, the entropy from 0 to ln V, ratios to
    reference and old policy from below 0.01 to above 100. Teachers are flatter or sharper than the student, so that
    divergences on their top k are negative somewhere. Each of the first 160 ids is a label. N is no multiple of V, so
    that a confusion of rows and entries shows.

    Example:
        >>> t = trials()
        >>> t.logits.shape, len(t.labels.unique())
        (torch.Size([163, 160]), 160)
    """
    number = WIDE + 3
    draw = torch.Generator().manual_seed(1)
    rows = torch.arange(number)

    def noise(size: torch.Tensor | float) -> torch.Tensor:
        return size * torch.randn(number, vocabulary, generator=draw, dtype=torch.float64)

    labels = (rows * 37 + 5) % min(WIDE, vocabulary)
    order = noise(1.0).argsort(-1)  # which entry has which rank in a row
    built = rows < 2 * len(TRIED)
    p_y = torch.tensor(TRIED, dtype=torch.float64)[rows % len(TRIED)]
    falling = torch.linspace(0, 1, vocabulary, dtype=torch.float64)
    steep = torch.tensor([0.02, 3.0, 12.0, 40.0], dtype=torch.float64)[(rows + rows // len(TRIED)) % 4]
    spread = torch.tensor(SPREADS, dtype=torch.float64)[rows % len(SPREADS)]
    drawn = (spread[:, None] * noise(1.0)).sort(-1, descending=True).values
    ranked = torch.where(built[:, None], -steep[:, None] * falling, drawn)
    logits = torch.empty_like(ranked).scatter(1, order, ranked)
    rank = torch.tensor(RANKS)[rows % len(RANKS)].clamp(max=vocabulary - 1)
    swapped = order.gather(1, rank[:, None])  # the entry at the wanted rank changes places with the label
    label_logit, other_logit = logits.gather(1, labels[:, None]), logits.gather(1, swapped)
    logits = logits.scatter(1, swapped, label_logit).scatter(1, labels[:, None], other_logit)
    others = logits.scatter(1, labels[:, None], -math.inf).logsumexp(-1)
    wanted = others + (p_y / (1 - p_y)).log()
    logits[rows[built], labels[built]] = wanted[built]
    logits = logits - logits.logsumexp(-1, keepdim=True) + noise(1.0)[:, :1] * 3

    teacher = logits * torch.tensor([0.5, 0.3, 1.5, 0.0], dtype=torch.float64)[rows % 4, None]
    teacher = teacher + noise(1.0) * torch.tensor([1.5, 0.05, 0.7, 2.0], dtype=torch.float64)[rows % 4, None]
    size = torch.tensor([0.05, 0.3, 1.0, 3.0], dtype=torch.float64)[rows % 4, None]
    models = dict(logits=logits, teacher=teacher, reference=logits + noise(size), old=logits + noise(size.flip(0) / 2))
    for name, apart in (("reference", RATIOS), ("old", RATIOS[::-1])):  # at the label, both ways
        models[name][rows, labels] += torch.tensor(apart, dtype=torch.float64)[rows // 2 % len(RATIOS)]
    clipped = rows % 3 > 0
    wanted_ratio = torch.tensor(CLIPS, dtype=torch.float64)[(clipped.cumsum(0) - 1) % len(CLIPS)]
    log_p = logits[rows, labels] - logits.logsumexp(-1) - wanted_ratio.log()
    clipped &= log_p < -0.01  # a probability of the old policy is below 1
    rest = models["old"].scatter(1, labels[:, None], -math.inf).logsumexp(-1)
    moved = rest + log_p - torch.log1p(-log_p.exp())
    models["old"][rows[clipped], labels[clipped]] = moved[clipped]
    models["second"] = logits + noise(0.1)
    negatives = one_hot((labels + 2) % vocabulary, vocabulary, torch.float64).bool()
    negatives[rows, order[:, 0]] = (rows % 2 == 1) & (order[:, 0] != labels)
    return _dealt(labels, models, rows % 3 == 0, negatives, dtype, device)
