"""Advantages or rewards that a loss centres or standardises itself, over its batch, over groups of texts or over each text."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from qlens.core.errors import InputError
from qlens.core.segments import Groups
from qlens.core.tokens import Tokens
from qlens.losses.layout.layout_search import style_of
from qlens.losses.layout.layouts import Layout, Style, counts
from qlens.losses.layout.signature import name_of
from qlens.losses.layout.trial import grad_of
from qlens.losses.reduction.scalar import find_division

SAME = (
    1e-3  # relative difference of two equal gradients: a loss adds a small number to the deviation that it divides by
)
WHOLE = 1e-4  # smaller than the effect of a sample deviation's correction, for any number of values that is tried
FAR = 1e8  # a factor of advantages at which that small number is negligible
GROUPS = (2, 3, 4, 5, 6, 8, 10, 12, 16)  # sizes of groups that are tried
CERTAIN = 1e-9  # 1 - p_y below which no label weight is computed


class Standardised(NamedTuple):
    """Advantages that a loss leaves unchanged, (N,), and a description of what it does to others."""

    values: Tensor
    description: str


class Partition(NamedTuple):
    """Values that are centred together: the group number of each value, and the name of the groups."""

    group: Tensor
    name: str


def standardised(fn: Callable, params: Mapping[str, Any], tokens: Tokens) -> Standardised | None:
    """The advantages of some tokens after the centring or standardising that a loss applies to them.

    A loss that is not proportional to the centred values, such as one with a softmax of advantages as weights, centres nothing.

    Returns:
        advantages of mean zero, and of standard deviation one if the loss divides by it; None if it does neither.
    """
    advantage = tokens.advantage
    if advantage is None or not len(advantage):
        return None
    style = style_of(fn, params, tokens)

    def read(values: Tensor) -> Tensor:
        return grad_of(fn, params, tokens.replace(advantage=values), style)

    base = read(advantage)
    size = float(base.norm())
    if not 0 < size < float("inf") or _off(read(advantage + 1), base) > SAME:
        return None
    if _off(read(advantage.flip(0)), base) <= SAME:
        return None
    values, place = advantage, torch.arange(len(advantage), device=advantage.device)
    if style.by_text and tokens.sequence is not None:  # one value for each text: that of its first token
        texts = Groups(tokens.sequence)
        values, place = advantage[texts.first()], texts.index
    try:
        partition = _partition(lambda shift: read(advantage + shift[place]), base, values, tokens, style)
        groups = Groups(partition.group)
        centred = values - groups.mean(values)[partition.group]
        grad, doubled = read(centred[place]), read(2 * centred[place])
        if _off(grad, base) > SAME:
            return None
        if _off(doubled, 2 * grad) <= SAME:
            pull = _pull(fn, params, tokens.replace(advantage=centred[place]), style, grad)
            description = f"takes their mean off, over {partition.name}"
            return Standardised(centred[place], description + _baseline(pull, groups.size(values)))
        if _off(doubled, grad) > SAME:
            return None
        number = groups.size(values)
        deviation = groups.mean(centred.square())[partition.group].sqrt()
        correction = (number / (number - 1)).sqrt()
        scaled = (centred / (deviation * correction)).nan_to_num(0.0)[place]
        grad = read(scaled)
        if _of_all(
            fn, params, tokens.replace(advantage=scaled), style, grad, correction, groups.number > 1 or style.group > 1
        ):
            scaled, of = scaled * correction[place].nan_to_num(1.0), "of all values"
            grad = read(scaled)
        else:
            of = "of a sample"
        description = f"takes their mean off and divides by their standard deviation ({of}), over {partition.name}"
        return Standardised(scaled * _shrunk(grad, read(FAR * scaled)), description)
    except InputError:
        return None


def _partition(
    shifted: Callable[[Tensor], Tensor], base: Tensor, values: Tensor, tokens: Tokens, style: Style
) -> Partition:
    """The smallest groups of values that a loss centres: adding a constant to those of the first group changes nothing."""
    partitions = _partitions(values, tokens, style)
    for partition in partitions[:-1]:
        shift = (partition.group == partition.group[0]).to(values)
        if _off(shifted(shift), base) <= SAME:
            return partition
    return partitions[-1]


def _partitions(values: Tensor, tokens: Tokens, style: Style) -> list[Partition]:
    """Each text, groups of consecutive values, groups of values at equal distances, and all values."""
    number, place = len(values), torch.arange(len(values), device=values.device)
    sizes = sorted({size for size in (*GROUPS, style.group) if 1 < size < number and not number % size})
    many = "texts" if style.by_text else "tokens"
    partitions = []
    if not style.by_text and tokens.sequence is not None and style.laid_out:
        partitions = [Partition(Groups(tokens.sequence).index, "the tokens of each text")]
    partitions += [Partition(place // size, f"groups of {size} {many}") for size in sizes]
    partitions += [
        Partition(place % (number // size), f"groups of {size} {many} at distances of {number // size}")
        for size in sizes
    ]
    return [*partitions, Partition(torch.zeros_like(place), f"all {many} of its batch")]


def _of_all(
    fn: Callable,
    params: Mapping[str, Any],
    tokens: Tokens,
    style: Style,
    grad: Tensor,
    correction: Tensor,
    groups: bool,
) -> bool:
    """Whether a loss divides by the standard deviation of all values, not by that of a sample.

    Over the whole batch a copy of every row tells these apart; over groups, only the label weight of a loss that is
    proportional to its advantages does.
    """
    if groups:
        pull = _pull(fn, params, tokens, style, grad)
        return pull is not None and abs(pull / float(correction[0]) - 1) <= SAME
    twice = float(grad_of(fn, params, tokens, style, Layout(2)).norm() / grad.norm())
    return min(abs(twice - 1), abs(twice - 0.5)) <= WHOLE


def _pull(fn: Callable, params: Mapping[str, Any], tokens: Tokens, style: Style, grad: Tensor) -> float | None:
    """The median of label weight by advantage; None if the reduction of the loss is not known."""
    try:
        division = find_division(fn, params, tokens, name_of(fn))
    except InputError:
        return None
    if division is None:
        return None
    divisor = torch.as_tensor(division.divisor(counts(tokens, Layout(), style))).to(grad)
    p_other, advantage = tokens.rest_log_probs.exp(), tokens.require("advantage")
    pulls = -grad.gather(-1, tokens.labels[:, None])[:, 0] * divisor / p_other / advantage
    pulls = pulls[(p_other > CERTAIN) & (advantage != 0)]
    return float(pulls.median()) if len(pulls) else None


def _baseline(pull: float | None, number: Tensor) -> str:
    """Whether each value's baseline is the mean of the others in its group, in words."""
    times = float(number[0] / (number[0] - 1))
    if pull is None or abs(pull / times - 1) > SAME:
        return ""
    return f", the mean of the others, so that advantages are {times:.4g} times as large"


def _shrunk(grad: Tensor, far: Tensor) -> float:
    """The factor by which the small number added to a deviation of 1 makes standardised values smaller."""
    times = float((far * grad).sum() / grad.square().sum())
    return 2 - times if 1 < times < 1 + SAME else 1.0


def _off(grad: Tensor, base: Tensor) -> float:
    """Relative difference of two gradients."""
    return float((grad - base).norm() / base.norm())
