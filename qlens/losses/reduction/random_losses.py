"""The reduction of a scalar loss that draws random numbers, from gradients averaged over many draws."""

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from qlens.core.errors import InputError
from qlens.losses.replay import Replay

ROWS = 800  # rows, over several calls, that a gradient is averaged over
NEAR = 0.2  # relative error of such an average


def draws(read: Callable[[], Tensor], replay: Replay, tolerance: float) -> bool:
    """Whether a loss draws numbers: relative differences of gradients on the same rows exceed ``tolerance``."""
    with replay.again():
        several = [read() for _ in range(16)]
    return max(float((grad - several[0]).abs().max()) for grad in several) > tolerance * float(several[0].abs().max())


def averaged(read: Callable[..., Tensor], rows: int) -> Callable[..., Tensor]:
    """A function that averages as many calls as make up ``ROWS`` rows."""
    calls = math.ceil(ROWS / rows)

    def mean(*arguments: Any) -> Tensor:
        return torch.stack([read(*arguments) for _ in range(calls)]).mean(0)

    return mean


def nearest_count(multiplied: Mapping[str, list[Tensor]], name: str) -> str:
    """The count by which the averaged gradients in several layouts are most nearly equal.

    Args:
        multiplied: by the name of a count, the gradients multiplied by it.
        name: of the loss, in messages.

    Raises:
        InputError: no count fits much better than all others.
    """
    off: dict[str, float] = {}
    for count, (first, *rest) in multiplied.items():
        size = first.square().sum()
        off[count] = max(abs(float((other * first).sum() / size) - 1) for other in rest)
    best = min(off, key=off.__getitem__)
    rest = [error for error in off.values() if error - off[best] > 1e-9]  # counts that are equal here are one
    if off[best] < NEAR and all(error > 2 * off[best] + 0.05 for error in rest):
        return best
    raise InputError(
        f"{name} draws numbers and reduces them itself, by a count that could not be found: return the unreduced loss (N,) "
        "instead, or switch dropout off"
    )
