"""Averages: how a scalar loss divides that draws numbers, seen in its gradient averaged over many draws."""

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from qlens.core.errors import InputError
from qlens.losses.replay import Replay

ROWS = 800  # over several calls, that a gradient is averaged over
NEAR = 0.2  # how far such an average may be from what a count says


def draws(read: Callable[[], Tensor], replay: Replay, alike: float) -> bool:
    """Whether calls on the same rows have gradients that differ by more than a share ``alike``: the loss draws numbers."""
    with replay.again():
        several = [read() for _ in range(16)]
    return max(float((grad - several[0]).abs().max()) for grad in several) > alike * float(several[0].abs().max())


def averaged(read: Callable[..., Tensor], rows: int) -> Callable[..., Tensor]:
    """The mean of as many calls as make up ``ROWS`` rows."""
    calls = math.ceil(ROWS / rows)

    def mean(*given: Any) -> Tensor:
        return torch.stack([read(*given) for _ in range(calls)]).mean(0)

    return mean


def nearest_count(multiplied: Mapping[str, list[Tensor]], name: str) -> str:
    """The count by which averaged gradients of the same rows in several layouts are nearest to one.

    Args:
        multiplied: by the name of a count, the gradients multiplied by it.
        name: of the loss.

    Raises:
        InputError: no count is much nearer than any other.
    """
    off: dict[str, float] = {}
    for count, (first, *others) in multiplied.items():
        size = first.square().sum()
        off[count] = max(abs(float((other * first).sum() / size) - 1) for other in others)
    best = min(off, key=off.__getitem__)
    rest = [far for far in off.values() if far - off[best] > 1e-9]  # those that are the same here are one
    if off[best] < NEAR and all(far > 2 * off[best] + 0.05 for far in rest):
        return best
    raise InputError(
        f"{name} draws numbers and reduces them itself, by a count that could not be found: return the unreduced loss (N,) "
        "instead, or switch dropout off"
    )
