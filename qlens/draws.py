"""Random draws of methods: new ones at every micro-batch of a run, the same ones whenever that is looked at again."""

import hashlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch
from torch import Tensor

_PLACE: ContextVar[tuple[int, ...]] = ContextVar("place", default=())


@contextmanager
def draws_of(*place: int) -> Iterator[None]:
    """Inside, ``uniform`` draws for this place of a run: its seed, step, micro-batch and process, say.

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
    """``count`` numbers from [0, 1), on the CPU: a function of count, seed and place alone, and of no generator's state."""
    place = _PLACE.get()
    number = seed * 1_000_003 + count
    if place:
        digest = hashlib.blake2b(repr((number, place)).encode(), digest_size=8).digest()
        number = int.from_bytes(digest, "little", signed=True)
    return torch.rand(count, generator=torch.Generator().manual_seed(number))


class Replay:
    """The state of torch's own generators at one moment, to draw the same numbers again without drawing any more.

    Args:
        device: whose generator counts beside the CPU's.
    """

    def __init__(self, device: torch.device):
        self.device, self.state = device, _states(device)

    @contextmanager
    def again(self) -> Iterator[None]:
        """Inside, what was drawn since then is drawn again; outside, nothing has changed."""
        later = _states(self.device)
        _restore(self.device, self.state)
        try:
            yield
        finally:
            _restore(self.device, later)


def why_calls_differ(read: Callable[[], Tensor], device: torch.device) -> str:
    """Why two readings of a loss on the same tokens differ: it draws numbers from torch, or it keeps a state.

    Args:
        read: reads it once more.
        device: where it draws.
    """
    replay, found = Replay(device), []
    for _ in range(2):
        with replay.again():
            found.append(read())
    if torch.allclose(found[0], found[1], rtol=1e-9, atol=0.0, equal_nan=True):
        return "is random: two calls on the same tokens differ{}. Seed it, or switch dropout off"
    return (
        "has a state, or draws numbers that torch does not seed: two calls on the same tokens differ{}. Give its state as an "
        "argument, or start it anew at every call"
    )


def _states(device: torch.device) -> tuple[Tensor, Tensor | None]:
    return torch.get_rng_state(), torch.cuda.get_rng_state(device) if device.type == "cuda" else None


def _restore(device: torch.device, states: tuple[Tensor, Tensor | None]) -> None:
    torch.set_rng_state(states[0])
    if states[1] is not None:
        torch.cuda.set_rng_state(states[1], device)
