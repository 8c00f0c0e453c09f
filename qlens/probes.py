"""Probes: built-in tokens on which any loss can be read, p_y swept from 1e-6 to 1 - 1e-6."""

import torch

from qlens.tokens import Tokens, one_hot

VOCABULARY = 32
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
    fields = dict(logits=logits, teacher=teacher, reference=logits + noise(0.7), old=logits + noise(0.2))
    fields["second"] = logits + noise(0.1)
    fields["advantage"] = torch.tensor([1.5, -0.7, 0.4, -1.2, 0.9], dtype=torch.float64)[rows % 5]
    fields = {name: value.to(dtype=dtype, device=device) for name, value in fields.items()}
    sequence = rows % 8
    marks = dict(sequence=sequence, pair=sequence // 2, chosen=sequence % 2 == 0)
    marks |= dict(critical=rows % 2 == 0, hint=rows % 4 == 1)
    marks["negatives"] = one_hot((labels + 2) % vocabulary, vocabulary, torch.float64).bool()
    marks["negatives"][rows, rival] = rows % 2 == 1
    return Tokens(labels=labels.to(device), **{name: value.to(device) for name, value in marks.items()}, **fields)


def shapes() -> list[str]:
    """The shape of the alternatives at every probe, in order."""
    return [shape for shape in SHAPES for _ in SWEEP]
