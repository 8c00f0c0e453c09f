"""Replayed calls of a user's function, with the same random draws and from the same state."""

import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor

from qlens.losses.states import State, check_unchanged, copied


class Replay:
    """The random generators and the state of some functions at one moment, to call them again from there.

    Args:
        device: the device whose torch generator is included beside the CPU's.
        functions: users' functions, which may keep a state or draw by numpy, ``random`` or generators of their own; none if
            only torch's generators matter.
    """

    def __init__(self, device: torch.device, *functions: Callable):
        self.device, self.users = device, bool(functions)
        self.state = State(functions)
        self.before = copied(self.state.read())
        self.fixed = self.state.fixed()
        self.draws = self._draws()

    @contextmanager
    def again(self) -> Iterator[None]:
        """A context that starts from the recorded generators and state, and restores the present ones at its end.

        Raises:
            InputError: a function has written on a tensor that can be neither copied nor replaced.
        """
        check_unchanged(self.fixed)
        later, draws = self.state.read(), self._draws()
        self.state.write(copied(self.before))
        self._restore(self.draws)
        try:
            yield
            check_unchanged(self.fixed)
        finally:
            self._restore(draws)
            self.state.write(later)

    def _draws(self) -> tuple[Any, ...]:
        """The states of the global generators."""
        cuda = torch.cuda.get_rng_state(self.device) if self.device.type == "cuda" else None
        return torch.get_rng_state(), cuda, *((np.random.get_state(), random.getstate()) if self.users else ())

    def _restore(self, states: tuple[Any, ...]) -> None:
        torch.set_rng_state(states[0])
        if states[1] is not None:
            torch.cuda.set_rng_state(states[1], self.device)
        if self.users:
            np.random.set_state(states[2])
            random.setstate(states[3])


def why_calls_differ(read: Callable[[], Tensor], device: torch.device) -> str:
    """The reason, in words, why two calls of a loss on the same tokens differ: torch's random numbers, or a state.

    Args:
        read: calls the loss.
        device: the device whose generator it may use.
    """
    replay, gradients = Replay(device), []
    for _ in range(2):
        with replay.again():
            gradients.append(read())
    if torch.allclose(gradients[0], gradients[1], rtol=1e-9, atol=0.0, equal_nan=True):
        return "is random: two calls on the same tokens differ{}. Seed it, or switch dropout off"
    return (
        "has a state, or draws numbers that torch does not seed: two calls on the same tokens differ{}. Give its state as an "
        "argument, or start it anew at every call"
    )
