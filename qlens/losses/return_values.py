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


def loss_of(returned: Any, name: str) -> Result:
    """The loss in a returned value: a tensor, the "loss" of a dict or an object, or the first tensor with a graph.

    A Python number becomes a tensor without a graph: a loss may return 0.0 if it skips all of its rows.

    Raises:
        InputError: there is no loss in it.
    """
    if isinstance(returned, Tensor) or _is_number(returned):
        return _floating(returned, "", name)
    if isinstance(returned, Mapping):
        loss_key = _key(dict(returned))
        if loss_key is not None:
            other_keys = ", ".join(str(key) for key in returned if key != loss_key)
            return _floating(
                returned[loss_key], f"the entry {loss_key!r} of what it returns{_beside(other_keys)}", name
            )
    attribute = _key({key: getattr(returned, key, None) for key in NAMES})
    if attribute is not None:
        return _floating(getattr(returned, attribute), f"the attribute {attribute!r} of what it returns", name)
    if isinstance(returned, tuple | list) and returned:
        at = _first(range(len(returned)), lambda i: returned[i])
        if at is not None:
            which = f"number {at + 1} of the {len(returned)} things it returns"
            return _floating(returned[at], which, name)
        if isinstance(returned[0], Mapping):
            return loss_of(returned[0], name)
    line = ": write return loss" if returned is None else ""
    if isinstance(returned, str):  # the outputs of a model, unpacked as a tuple, are their names
        line = ", as where logits, loss = model(...) unpacks a model's outputs: write outputs = model(...) and outputs.loss"
    raise InputError(f"{name} must return a floating-point tensor, it returns {type(returned).__name__}{line}")


def check_shape(value: Tensor, rows: int, name: str) -> None:
    """Check the shape of a loss of rows.

    Raises:
        InputError: it has two or more dimensions, and not one entry per row.
    """
    if value.ndim > 1 and value.numel() != rows:
        raise InputError(f"{name} returned shape {tuple(value.shape)} for {rows} tokens: it must be () or (N,)")


def _key(entries: Mapping[Any, Any]) -> Any:
    """The key of the loss: a known name, preferably of a tensor with a graph, else that of the first tensor with a graph."""
    known_keys = [key for key in NAMES if key in entries]
    loss_key = next((key for key in known_keys if _trains(entries[key])), None)
    loss_key = loss_key or next((key for key in known_keys if isinstance(entries[key], Tensor)), None)
    loss_key = loss_key or next((key for key, value in entries.items() if _trains(value)), None)
    return loss_key or next((key for key in known_keys if _is_number(entries[key])), None)


def _first(places: Iterable[int], at: Callable[[int], Any]) -> int | None:
    """The first place of a tensor with a graph, else of a floating-point tensor, else of a number."""
    for fits in (_trains, lambda value: isinstance(value, Tensor) and value.is_floating_point(), _is_loss):
        place = next((i for i in places if fits(at(i))), None)
        if place is not None:
            return place
    return None


def _trains(value: Any) -> bool:
    return isinstance(value, Tensor) and value.requires_grad


def _is_number(value: Any) -> bool:
    return isinstance(value, numbers.Real) and not isinstance(value, bool)


def _is_loss(value: Any) -> bool:
    return isinstance(value, Tensor) or _is_number(value)


def _beside(other_keys: str) -> str:
    return f" (beside {other_keys})" if other_keys else ""


def _floating(value: Tensor | float, part: str, name: str) -> Result:
    if not isinstance(value, Tensor):
        return Result(torch.tensor(float(value)), part)
    if not value.is_floating_point() and bool(value.any()):
        raise InputError(f"{name} must return a floating-point tensor, it returns one of {value.dtype}")
    return Result(value if value.is_floating_point() else value.to(torch.get_default_dtype()), part)
