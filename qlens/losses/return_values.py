"""The loss among the values that a user's function returns: a tensor, an entry of a dict, an attribute or a tuple item."""

import numbers
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from qlens.core.errors import InputError

NAMES = ("loss", "total_loss", "loss_total", "total", "objective", "policy_loss", "pg_loss")


class Result(NamedTuple):
    """The loss, and the part of the returned value that it is; "" if it is all of it."""

    value: Tensor
    part: str


def loss_of(made: Any, name: str) -> Result:
    """The loss in a returned value: a tensor, the "loss" of a dict or an object, or the first tensor with a graph.

    A Python number becomes a tensor without a graph: a loss may return 0.0 if it skips all of its rows.

    Raises:
        InputError: there is no loss in it.
    """
    if isinstance(made, Tensor) or _is_number(made):
        return _floating(made, "", name)
    if isinstance(made, Mapping):
        found = _key(dict(made))
        if found is not None:
            others = ", ".join(str(key) for key in made if key != found)
            return _floating(made[found], f"the entry {found!r} of what it returns{_beside(others)}", name)
    named = _key({key: getattr(made, key, None) for key in NAMES})
    if named is not None:
        return _floating(getattr(made, named), f"the attribute {named!r} of what it returns", name)
    if isinstance(made, tuple | list) and made:
        at = _first(range(len(made)), lambda i: made[i])
        if at is not None:
            which = f"number {at + 1} of the {len(made)} things it returns"
            return _floating(made[at], which, name)
        if isinstance(made[0], Mapping):
            return loss_of(made[0], name)
    line = ": write return loss" if made is None else ""
    if isinstance(made, str):  # the outputs of a model, unpacked as a tuple, are their names
        line = ", as where logits, loss = model(...) unpacks a model's outputs: write outputs = model(...) and outputs.loss"
    raise InputError(f"{name} must return a floating-point tensor, it returns {type(made).__name__}{line}")


def check_shape(value: Tensor, rows: int, name: str) -> None:
    """Check the shape of a loss of rows.

    Raises:
        InputError: it has two or more dimensions, and not one entry per row.
    """
    if value.ndim > 1 and value.numel() != rows:
        raise InputError(f"{name} returned shape {tuple(value.shape)} for {rows} tokens: it must be () or (N,)")


def _key(entries: Mapping[Any, Any]) -> Any:
    """The key of the loss: a known name, preferably of a tensor with a graph, else that of the first tensor with a graph."""
    named = [key for key in NAMES if key in entries]
    found = next((key for key in named if _trains(entries[key])), None)
    found = found or next((key for key in named if isinstance(entries[key], Tensor)), None)
    found = found or next((key for key, value in entries.items() if _trains(value)), None)
    return found or next((key for key in named if _is_number(entries[key])), None)


def _first(places: Iterable[int], at: Callable[[int], Any]) -> int | None:
    """The first place of a tensor with a graph, else of a floating-point tensor, else of a number."""
    for fits in (_trains, lambda value: isinstance(value, Tensor) and value.is_floating_point(), _is_loss):
        found = next((i for i in places if fits(at(i))), None)
        if found is not None:
            return found
    return None


def _trains(value: Any) -> bool:
    return isinstance(value, Tensor) and value.requires_grad


def _is_number(value: Any) -> bool:
    return isinstance(value, numbers.Real) and not isinstance(value, bool)


def _is_loss(value: Any) -> bool:
    return isinstance(value, Tensor) or _is_number(value)


def _beside(others: str) -> str:
    return f" (beside {others})" if others else ""


def _floating(value: Tensor | float, part: str, name: str) -> Result:
    if not isinstance(value, Tensor):
        return Result(torch.tensor(float(value)), part)
    if not value.is_floating_point() and bool(value.any()):
        raise InputError(f"{name} must return a floating-point tensor, it returns one of {value.dtype}")
    return Result(value if value.is_floating_point() else value.to(torch.get_default_dtype()), part)
