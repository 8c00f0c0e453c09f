"""Other batches: the gradient of a loss that depends on its batch, read on batches of another composition."""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from qlens.core.autograd import gradient
from qlens.core.errors import InputError
from qlens.core.tokens import Tokens
from qlens.lens.reading import Reading
from qlens.lens.rounding import Noise, rounding
from qlens.losses.notes.effective_tokens import effective_tokens
from qlens.registry.variant import Variant

UNLIKELY = 0.5  # label probability below which tokens form one of the batches


class BatchReading(NamedTuple):
    """A gradient on a batch.

    Args:
        tokens: the batch.
        grad: the gradient, (N, V).
        noise: its rounding error.
        rows: places of the batch's tokens among those shown, (N,); None for the trial tokens.
    """

    tokens: Tokens
    grad: Tensor
    noise: Noise
    rows: Tensor | None


def read_other_batches(variant: Variant, shown: Reading, trial: Reading | None) -> list[BatchReading]:
    """The gradient on the trial tokens, on some of the tokens shown, and on those of low or high label probability.

    Advantages that a loss standardises itself are standardised over each batch.

    Args:
        variant: the loss.
        shown: its gradient on the tokens shown.
        trial: its gradient on the trial tokens.
    """
    readings = []
    for tokens, rows in _batches(variant, shown, trial):
        if variant.derived:
            try:
                tokens = effective_tokens(variant.method.fn, variant.params, tokens)
            except InputError:  # a loss of groups of texts takes no batch of other numbers of texts
                continue
        grad = gradient(variant.loss, tokens)
        readings.append(BatchReading(tokens, grad, rounding(grad, tokens), rows))
    return readings


def _batches(variant: Variant, shown: Reading, trial: Reading | None) -> Iterator[tuple[Tokens, Tensor | None]]:
    """The batches, and the places of their tokens among those shown."""
    if trial is not None:
        yield trial.inputs, None
    tokens, p = shown.inputs, shown.tokens.label_probs
    ids = tokens.pair if tokens.pair is not None else tokens.sequence
    some = torch.arange(len(p), device=p.device) % 3 > 0 if ids is None else ids < (ids.min() + ids.max() + 1) // 2
    if 1 < int(some.sum()) < len(p):
        yield tokens[some], some.nonzero()[:, 0]
    if variant.compares_pairs:
        return
    extreme, middle = (p < 1e-3) | (p > 0.9), (p > 0.05) & (p < UNLIKELY)
    for chosen in (p < UNLIKELY, p >= UNLIKELY, extreme, middle, torch.arange(len(p), device=p.device) % 5 == 1):
        if 1 < int(chosen.sum()) < len(p):
            yield tokens[chosen], chosen.nonzero()[:, 0]
