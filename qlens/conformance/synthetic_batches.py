"""Synthetic batches: ordinary rows cut into texts with prompts, on which conformance is tested."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from qlens.core.probes.trial_tokens import random_tokens
from qlens.core.supervised import IGNORE
from qlens.core.tokens import MODELS, Tokens

VOCABULARY = 24
WIDE = 4096  # vocabularies beyond this are tested on a third of the labels
UNEQUAL = (2, 4, 3, 3, 9, 7, 8, 12)  # predicted labels of eight texts: 12 in the first half, 36 in the second
PROMPTS = (3, 5, 4)  # of those texts, in turn


class Text(NamedTuple):
    """One text: logits (T, V), labels (T,) unshifted with -100 on the prompt, input ids (T,), its n predicted rows."""

    logits: Float[Tensor, "T V"]
    labels: Int[Tensor, " T"]
    ids: Int[Tensor, " T"]
    tokens: Tokens


class Padded(NamedTuple):
    """Texts padded to one width: logits (B, T, V), labels (B, T), input ids (B, T), where they are no padding, all rows."""

    logits: Float[Tensor, "B T V"]
    labels: Int[Tensor, "B T"]
    ids: Int[Tensor, "B T"]
    real: Bool[Tensor, "B T"]
    rows: Tokens


def pad(texts: Sequence[Text], side: str, columns: int, vocabulary: int) -> Padded:
    """Pad texts on one side to the width of the longest and ``columns`` more, with random logits."""
    width = max(len(text.labels) for text in texts) + columns
    draw, size = torch.Generator().manual_seed(width), (len(texts), width)
    logits = torch.randn(*size, vocabulary, generator=draw, dtype=torch.float64).to(texts[0].logits.dtype)
    lengths, column = torch.tensor([len(text.labels) for text in texts])[:, None], torch.arange(width)
    real = column < lengths if side == "right" else column >= width - lengths
    labels, ids = torch.full(size, IGNORE), torch.zeros(size, dtype=torch.long)
    logits[real] = torch.cat([text.logits.detach() for text in texts])
    labels[real], ids[real] = (torch.cat(parts) for parts in zip(*((t.labels, t.ids) for t in texts), strict=True))
    parts = [text.tokens.fields() for text in texts]
    rows = Tokens(**{name: torch.cat([part[name] for part in parts]) for name in parts[0]})
    return Padded(logits, labels, ids, real, rows)


def texts(lengths: Sequence[int], prompts: Sequence[int], dtype: torch.dtype, vocabulary: int) -> list[Text]:
    """Texts that predict ``lengths`` labels each, after prompts of the given lengths, in turn."""
    n = sum(lengths)
    rows, other = (cast(random_tokens(n, vocabulary, seed=seed), dtype) for seed in (1, 2))
    rows = rows.replace(sequence=torch.repeat_interleave(torch.tensor(lengths)))
    draw = torch.Generator().manual_seed(3)
    built, start = [], 0
    for number, length in enumerate(lengths):
        own, prompt = rows[start : start + length], prompts[number % len(prompts)]
        logits = torch.cat([other.logits[: prompt - 1], own.logits, other.logits[-1:]])
        labels = torch.cat([own.labels.new_full((prompt,), IGNORE), own.labels])
        ids = torch.cat([torch.randint(vocabulary, (prompt,), generator=draw), own.labels])
        built.append(Text(logits, labels, ids, own))
        start += length
    return built


def cut(tokens: Tokens, length: int) -> list[Text]:
    """The rows as texts of so many labels each, without a prompt: only a first token, which nothing predicts."""
    rows, fields = torch.arange(len(tokens)), tokens.fields()
    text, starts = rows // length, rows[::length]
    size = len(rows) + len(starts)  # a text has one position more than rows, with the logits of its first row
    first = torch.arange(0, size, length + 1)
    index = torch.empty(size, dtype=torch.long)
    index[rows + text] = rows
    index[torch.cat([first[1:], torch.tensor([size])]) - 1] = starts
    labels, ids = torch.full((size,), IGNORE), torch.empty(size, dtype=torch.long)
    labels[rows + text + 1] = ids[rows + text + 1] = tokens.labels
    ids[first] = (tokens.labels[starts] + 1) % tokens.logits.shape[1]
    own = zip(*(value.split(length) for value in fields.values()), strict=True)
    positions = (value.split(length + 1) for value in (tokens.logits.detach()[index], labels, ids))
    return [
        Text(*parts, Tokens.unchecked(**dict(zip(fields, values, strict=True))))
        for *parts, values in zip(*positions, own, strict=True)
    ]


def count(texts: Sequence[Text]) -> int:
    """Predicted labels: all but -100 and the first of each row, which nothing predicts."""
    return sum(int((text.labels[1:] != IGNORE).sum()) for text in texts)


def relabelled(text: Text, labels: Tensor) -> Text:
    """The text with other labels, of which as many are predicted; input ids stay as they are."""
    own = labels[1:]
    return text._replace(labels=labels, tokens=text.tokens.replace(labels=own[own != IGNORE]))


def cast(tokens: Tokens, dtype: torch.dtype) -> Tokens:
    """The same tokens, every floating-point field in another dtype."""
    return tokens.replace(**{k: v.to(dtype) for k, v in tokens.fields().items() if v.is_floating_point()})


def everywhere(tokens: Tokens, where: Tensor, value: float) -> Tokens:
    """The same tokens with ``value`` for the logits ``where``, (N, V), in every model."""
    return tokens.replace(**{name: getattr(tokens, name).masked_fill(where, value) for name in ("logits", *MODELS)})
