"""Texts: what conformance is tested on, ordinary rows cut into texts with prompts of their own."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from qlens.batching import IGNORE
from qlens.tokens import MODELS, Tokens
from qlens.trial_tokens import random_tokens

VOCABULARY = 24
UNEQUAL = (2, 4, 3, 3, 9, 7, 8, 12)  # predicted labels of eight texts: 12 in the first half, 36 in the second
PROMPTS = (3, 5, 4)  # of those texts, in turn


class Text(NamedTuple):
    """One text: logits (T, V), labels (T,) unshifted with -100 on the prompt, and its n predicted rows as Tokens."""

    logits: Float[Tensor, "T V"]
    labels: Int[Tensor, " T"]
    tokens: Tokens


def texts(lengths: Sequence[int], prompts: Sequence[int], dtype: torch.dtype) -> list[Text]:
    """Texts that predict ``lengths`` labels each, after prompts of the given lengths, in turn."""
    n = sum(lengths)
    rows, other = (cast(random_tokens(n, VOCABULARY, seed=seed), dtype) for seed in (1, 2))
    rows = rows.replace(sequence=torch.repeat_interleave(torch.tensor(lengths)))
    made, start = [], 0
    for number, length in enumerate(lengths):
        own, prompt = rows[start : start + length], prompts[number % len(prompts)]
        logits = torch.cat([other.logits[: prompt - 1], own.logits, other.logits[-1:]])
        labels = torch.cat([own.labels.new_full((prompt,), IGNORE), own.labels])
        made.append(Text(logits, labels, own))
        start += length
    return made


def count(texts: list[Text]) -> int:
    """Predicted labels: all but -100 and the first of each row, which nothing predicts."""
    return sum(int((text.labels[1:] != IGNORE).sum()) for text in texts)


def cast(tokens: Tokens, dtype: torch.dtype) -> Tokens:
    """The same tokens, every floating-point field in another dtype."""
    return tokens.replace(**{k: v.to(dtype) for k, v in tokens.fields().items() if v.is_floating_point()})


def everywhere(tokens: Tokens, where: Tensor, value: float) -> Tokens:
    """The same tokens with ``value`` for the logits ``where``, (N, V), in every model."""
    return tokens.replace(**{name: getattr(tokens, name).masked_fill(where, value) for name in ("logits", *MODELS)})
