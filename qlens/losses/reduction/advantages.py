"""Standardising: advantages or rewards that a loss centres or standardises itself, over its batch or over groups of texts."""

from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from qlens.core.errors import InputError
from qlens.core.segments import Groups
from qlens.core.tokens import Tokens
from qlens.losses.layout.layout_search import style_of
from qlens.losses.layout.layouts import Layout
from qlens.losses.layout.trial import grad_of

SAME = 1e-3  # of the gradient: a loss adds a small number to the standard deviation that it divides by
WHOLE = 1e-4  # of a gradient: the correction of a sample's deviation is larger for any number of values that is tried
FAR = 1e8  # a factor of advantages beside which that number is none
GROUPS = (2, 3, 4, 5, 6, 8, 16)  # texts of a group, tried after the whole batch


class Standardised(NamedTuple):
    """Advantages that a loss leaves as they are, (N,), and what it does to others, in words."""

    values: Tensor
    said: str


def standardised(fn: Callable, params: Mapping[str, Any], tokens: Tokens) -> Standardised | None:
    """What a loss makes of its advantages, where it takes their mean off, over its batch or over groups of texts.

    A loss that is no multiple of what is left, such as weights that are a softmax of advantages, takes no mean off.

    Returns:
        advantages of mean zero, and of standard deviation one where it divides by that; None where it does neither.
    """
    given = tokens.advantage
    if given is None or not len(given):
        return None
    style = style_of(fn, params, tokens)

    def read(values: Tensor) -> Tensor:
        return grad_of(fn, params, tokens.replace(advantage=values), style)

    base = read(given)
    size = float(base.norm())
    if not 0 < size < float("inf") or _off(read(given + 1), base) > SAME or _off(read(given.flip(0)), base) <= SAME:
        return None
    twice = grad_of(fn, params, tokens, style, Layout(2)).norm() / base.norm()
    for values, divides, said in _ways(given, tokens.sequence if style.by_text else None, float(twice)):
        try:
            if _off(kept := read(values), base) <= SAME and (divides or _off(read(2 * values), 2 * kept) <= SAME):
                return Standardised(values * _shrunk(kept, read(FAR * values)), said)
        except InputError:
            continue
    return None


def _ways(given: Tensor, sequence: Tensor | None, twice: float) -> Iterator[tuple[Tensor, bool, str]]:
    """The advantages standardised, or centred alone, and which; over all values, then over groups.

    Args:
        given: the advantages, (N,).
        sequence: the text of each, where the loss is given one value for each text.
        twice: the size of the gradient with all rows shown twice, by which the standard deviation of a sample is told from
            that of all values; over groups it is that of a sample.
    """
    value, many = given, "tokens"
    text = torch.arange(len(given), device=given.device)
    if sequence is not None:  # one value for each text, its first token's
        texts = Groups(sequence)
        value, text, many = given[texts.first()], texts.index, "texts"
    for group in (len(value), *(size for size in GROUPS if size < len(value) and not len(value) % size)):
        over = f"all {many} of its batch" if group == len(value) else f"groups of {group} {many}"
        table = value.view(-1, group)
        centred = table - table.mean(1, keepdim=True)
        sample = group < len(value) or not _whole_share(twice)
        deviation, of = table.std(1, correction=int(sample), keepdim=True), "of a sample" if sample else "of all values"
        said = f"takes their mean off and divides by their standard deviation ({of}), over {over}"
        yield (centred / deviation).nan_to_num(0.0).flatten()[text], True, said
        yield centred.flatten()[text], False, f"takes their mean off, over {over}"


def _whole_share(twice: float) -> bool:
    """Whether a gradient is all or half of what it was, as of a sum or a mean over rows shown twice."""
    return min(abs(twice - 1), abs(twice - 0.5)) <= WHOLE


def _shrunk(kept: Tensor, far: Tensor) -> float:
    """By what standardised values are smaller that a loss leaves as they are, for the number that it adds to their deviation."""
    times = float((far * kept).sum() / kept.square().sum())
    return 2 - times if 1 < times < 1 + SAME else 1.0


def _off(one: Tensor, base: Tensor) -> float:
    return float((one - base).norm() / base.norm())
