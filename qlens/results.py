"""Results: which part of what a loss returns is the loss."""

from collections.abc import Mapping
from typing import Any, NamedTuple

from torch import Tensor

from qlens.errors import InputError

NAMES = ("loss", "total_loss", "loss_total", "total", "objective", "policy_loss", "pg_loss")


class Result(NamedTuple):
    """The loss, and where it stood in what was returned; "" where it was all."""

    value: Tensor
    part: str


def loss_of(made: Any, name: str) -> Result:
    """The loss in what a function returned: a tensor, the "loss" of a dict or an object, or the first tensor with a graph.

    Raises:
        InputError: there is none.
    """
    if isinstance(made, Tensor):
        return _floating(made, "", name)
    if isinstance(made, Mapping):
        found = next((key for key in NAMES if isinstance(made.get(key), Tensor)), None)
        found = found or next((key for key, value in made.items() if _trains(value)), None)
        if found is not None:
            others = ", ".join(str(key) for key in made if key != found)
            return _floating(made[found], f"the entry {found!r} of what it returns{_beside(others)}", name)
    named = next((key for key in NAMES if isinstance(getattr(made, key, None), Tensor)), None)
    if named is not None:
        return _floating(getattr(made, named), f"the attribute {named!r} of what it returns", name)
    if isinstance(made, tuple | list) and made:
        at = next((i for i, value in enumerate(made) if _trains(value)), None)
        at = at if at is not None else next((i for i, value in enumerate(made) if isinstance(value, Tensor)), None)
        if at is not None:
            which = f"number {at + 1} of the {len(made)} things it returns"
            return _floating(made[at], which, name)
        if isinstance(made[0], Mapping):
            return loss_of(made[0], name)
    raise InputError(f"{name} must return a floating-point tensor, it returns {type(made).__name__}")


def _trains(value: Any) -> bool:
    return isinstance(value, Tensor) and value.requires_grad


def _beside(others: str) -> str:
    return f" (beside {others})" if others else ""


def _floating(value: Tensor, part: str, name: str) -> Result:
    if not value.is_floating_point():
        raise InputError(f"{name} must return a floating-point tensor, it returns one of {value.dtype}")
    return Result(value, part)
