"""Probes: built-in tokens on which any loss can be read. A sweep of p_y to be shown, and trials that reach further."""

import math

import torch
from torch import Tensor

from qlens.core.numerics import one_hot
from qlens.core.tokens import Tokens

VOCABULARY = 32
WIDE = 160  # vocabulary of the trials: beyond the top k, ranks and entropies that published losses use
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
# What the alternatives do with what the label leaves: one holds nine tenths, each holds .8 of the one before, all alike.
SHAPES = ("peaked", "graded", "flat")


def probes(
    dtype: torch.dtype = torch.float64, device: torch.device | str = "cpu", vocabulary: int = VOCABULARY
) -> Tokens:
    """Tokens that tell losses apart: every p_y of the sweep with alternatives of low, middle and high entropy, V = 32.

    Teacher, reference, old policy and second pass differ from the student and from each other. The tokens are dealt to eight
    sequences in four pairs; masks, advantages and negatives so that every one of them tells.

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
    """A few of the probes, as wide as a model's vocabulary."""
    few = probes(dtype, device, min(vocabulary, VOCABULARY))[:4]
    missing = vocabulary - few.logits.shape[1]
    wide = {name: value for name, value in few.fields().items() if value.ndim == 2}
    return Tokens.unchecked(
        **few.fields() | {name: torch.nn.functional.pad(value, (0, missing)) for name, value in wide.items()}
    )


def _dealt(
    labels: Tensor,
    models: dict[str, Tensor],
    critical: Tensor,
    negatives: Tensor,
    dtype: torch.dtype,
    device: torch.device | str,
) -> Tokens:
    """Tokens of these logits, dealt to eight sequences in four pairs, with hints and advantages in turn."""
    rows = torch.arange(len(labels))
    fields = models | {"advantage": torch.tensor([1.5, -0.7, 0.4, -1.2, 0.9], dtype=torch.float64)[rows % 5]}
    fields = {name: value.to(dtype=dtype, device=device) for name, value in fields.items()}
    sequence = rows % 8
    marks = dict(sequence=sequence, pair=sequence // 2, chosen=sequence % 2 == 0)
    marks |= dict(critical=critical, hint=rows % 4 == 1, negatives=negatives)
    return Tokens(labels=labels.to(device), **{name: value.to(device) for name, value in marks.items()}, **fields)


def shapes() -> list[str]:
    """The shape of the alternatives at every probe, in order."""
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
    """Wider tokens than the sweep of ``probes``, on which clamps, floors, thresholds and label ids of published losses show.

    p_y runs from 1e-14 to 1 - 1e-7, the label's rank from first to last, the entropy from 0 to ln V, ratios to reference and
    old policy from under a hundredth to over a hundred, teachers from flatter to sharper than the student (so that divergences
    on its top k are negative somewhere); every id is a label (of the first 160). One row more than a multiple of V, so that
    rows and entries are not taken for each other.

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
    at, there = logits.gather(1, labels[:, None]), logits.gather(1, swapped)
    logits = logits.scatter(1, swapped, at).scatter(1, labels[:, None], there)
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
    clipped &= log_p < -0.01  # an old policy cannot give a label more than all
    rest = models["old"].scatter(1, labels[:, None], -math.inf).logsumexp(-1)
    moved = rest + log_p - torch.log1p(-log_p.exp())
    models["old"][rows[clipped], labels[clipped]] = moved[clipped]
    models["second"] = logits + noise(0.1)
    negatives = one_hot((labels + 2) % vocabulary, vocabulary, torch.float64).bool()
    negatives[rows, order[:, 0]] = (rows % 2 == 1) & (order[:, 0] != labels)
    return _dealt(labels, models, rows % 3 == 0, negatives, dtype, device)
