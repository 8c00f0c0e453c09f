"""Standardising: advantages or rewards that a loss centres or standardises itself, over its batch or over groups of texts."""

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from qlens.errors import InputError
from qlens.styles import style_of
from qlens.tokens import Tokens
from qlens.trying import grad_of

SAME = 1e-3  # of the gradient: a loss adds a small number to the standard deviation that it divides by
FAR = 1e8  # a factor of advantages beside which that number is none
GROUPS = (2, 3, 4, 5, 6, 8, 16)  # texts of a group, tried after the whole batch


def with_standardised(fn: Callable, params: Mapping[str, Any], tokens: Tokens) -> Tokens:
    """The tokens with advantages that are as the loss makes them, so that it leaves them as they are.

    A loss that takes the mean off its advantages, over the batch or over groups of texts, is given advantages of mean zero there;
    one that divides by their standard deviation as well, those of standard deviation one.
    """
    given = tokens.advantage
    if given is None or not len(given):
        return tokens
    style = style_of(fn, params, tokens)

    def read(values: Tensor) -> Tensor:
        return grad_of(fn, params, tokens.replace(advantage=values), style)

    base = read(given)
    size = float(base.norm())
    if not 0 < size < float("inf") or _off(read(given + 1), base) > SAME or _off(read(given.flip(0)), base) <= SAME:
        return tokens
    for values in _ways(given, tokens.sequence if style.by_text else None):
        try:
            if _off(kept := read(values), base) <= SAME:
                return tokens.replace(advantage=values * _shrunk(kept, read(FAR * values)))
        except InputError:
            continue
    return tokens


def _ways(given: Tensor, sequence: Tensor | None) -> Iterator[Tensor]:
    """The advantages standardised, by either standard deviation, or centred alone; over all values, then over groups."""
    value = given
    text = torch.arange(len(given), device=given.device)
    if sequence is not None:  # one value for each text, its first token's
        _, text = sequence.unique(return_inverse=True)
        first = text.new_full((int(text.max()) + 1,), len(given))
        value = given[first.scatter_reduce(0, text, torch.arange(len(given), device=text.device), "amin")]
    for group in (len(value), *(size for size in GROUPS if size < len(value) and not len(value) % size)):
        table = value.view(-1, group)
        centred = table - table.mean(1, keepdim=True)
        for correction in (1, 0):
            yield (centred / table.std(1, correction=correction, keepdim=True)).nan_to_num(0.0).flatten()[text]
        yield centred.flatten()[text]


def _shrunk(kept: Tensor, far: Tensor) -> float:
    """By what standardised values are smaller that a loss leaves as they are, for the number that it adds to their deviation."""
    times = float((far * kept).sum() / kept.square().sum())
    return 2 - times if 1 < times < 1 + SAME else 1.0


def _off(one: Tensor, base: Tensor) -> float:
    return float((one - base).norm() / base.norm())
