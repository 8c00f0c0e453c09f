"""Random draws of methods: new at every micro-batch of a run, and reproducible for each of them."""

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch
from torch import Tensor

_PLACE: ContextVar[tuple[int, ...]] = ContextVar("place", default=())


@contextmanager
def draws_of(*place: int) -> Iterator[None]:
    """Within the block, ``uniform`` draws for this place of a run, for example its seed, step, micro-batch and process.

    Example:
        >>> with draws_of(0, 1):
        ...     first = uniform(3, seed=0)
        >>> with draws_of(0, 2):
        ...     second = uniform(3, seed=0)
        >>> bool((first == second).any())
        False
    """
    token = _PLACE.set(place)
    try:
        yield
    finally:
        _PLACE.reset(token)


def uniform(count: int, seed: int) -> Tensor:
    """``count`` numbers from [0, 1), on the CPU, that depend on count, seed and place only."""
    place = _PLACE.get()
    number = seed * 1_000_003 + count
    if place:
        digest = hashlib.blake2b(repr((number, place)).encode(), digest_size=8).digest()
        number = int.from_bytes(digest, "little", signed=True)
    return torch.rand(count, generator=torch.Generator().manual_seed(number))
