"""Checks of the fields of Tokens: shapes, dtypes and values."""

import math
import numbers
import re
from typing import Any

import torch
from torch import Tensor

from qlens.core.errors import InputError, brief

IDS, NUMBERS, MASKS = ("sequence", "pair"), ("weight", "advantage"), ("critical", "hint", "chosen", "negatives")


def check_shape(name: str, value: Tensor, shape: tuple[int, ...]) -> None:
    """Check the shape of a field.

    Raises:
        InputError: another shape; both are named.
    """
    if tuple(value.shape) != shape:
        raise InputError(f"{name} has shape {tuple(value.shape)}, but logits and labels ask for {shape}")


def checked_field(name: str, value: Any, shape: tuple[int, ...]) -> Tensor:
    """A field other than logits and labels, checked; masks as bool.

    Raises:
        InputError: no tensor, another shape; ids that are no integers; a mask beyond 0 and 1; numbers that are not
            finite.
    """
    requirement = "an integer" if name in IDS else "a real" if name in NUMBERS else "a bool"
    if not isinstance(value, Tensor):
        raise InputError(f"{name} must be {requirement} tensor {shape}, got {brief(value)}")
    check_shape(name, value, shape)
    whole = not value.is_floating_point() and not value.is_complex()
    if value.is_complex() or (name in IDS and (not whole or value.dtype == torch.bool)):
        raise InputError(f"{name} must be {requirement} tensor {shape}, got {value.dtype}")
    if name in NUMBERS and not whole and not bool(value.isfinite().all()):
        raise InputError(f"{name} holds NaN or infinite values: they must be finite")
    if name in MASKS and value.dtype != torch.bool and not bool(((value == 0) | (value == 1)).all()):
        raise InputError(f"{name} is a mask: its values must be True and False, or 1 and 0")
    return value.bool() if name in MASKS else value


def check_vocabulary(name: str, size: int) -> None:
    """Check the size of a vocabulary.

    Raises:
        InputError: fewer than two entries.
    """
    if size < 2:
        raise InputError(
            f"{name} has a vocabulary of {size}: at least 2 entries are needed, for one token alone always has p = 1"
        )


def check_ids(labels: Tensor, vocabulary: int) -> None:
    """Check that labels are ids of a vocabulary.

    Raises:
        InputError: -100, or an id outside; it is named.
    """
    if len(labels):
        check_id_range(
            *torch.stack(labels.long().aminmax()).tolist(), vocabulary
        )  # there is no such function for uint16


def check_id_range(low: int, high: int, vocabulary: int) -> None:
    """Check the least and the greatest label.

    Raises:
        InputError: -100, or an id outside; it is named.
    """
    if low == -100:
        raise InputError(
            "labels hold -100: Tokens takes supervised positions only (qlens.core.supervised.Supervised removes it)"
        )
    if low < 0 or high >= vocabulary:
        wrong = low if low < 0 else high
        raise InputError(f"labels hold {wrong}, outside the vocabulary 0..{vocabulary - 1}")


def check_logits(name: str, logits: Any) -> None:
    """Check that logits are a floating-point tensor (N, V), V >= 2, without NaN, +inf or rows of -inf alone.

    Raises:
        InputError: they are not; the first such row is named.
    """
    if not isinstance(logits, Tensor) or not logits.is_floating_point() or logits.ndim != 2:
        description = (
            f"{tuple(logits.shape)} of {logits.dtype}" if isinstance(logits, Tensor) else type(logits).__name__
        )
        raise InputError(f"{name} must be a floating-point tensor (N, V), got {description}")
    check_vocabulary(name, logits.shape[1])
    if len(logits) and not bool((top := logits.detach().amax(-1)).isfinite().all()):  # amax propagates NaN
        rows = (~top.isfinite()).nonzero()[:, 0].tolist()
        raise InputError(f"{name} holds NaN, +inf or nothing but -inf in row {rows[0]} ({len(rows)} such rows)")


def check_labels(labels: Any, shape: tuple[int, ...]) -> None:
    """Check that labels are an integer tensor (N,) of ids, for logits of the given shape (N, V).

    Raises:
        InputError: another dtype or shape, -100, or an id outside the vocabulary.
    """
    if (
        not isinstance(labels, Tensor)
        or labels.is_floating_point()
        or labels.is_complex()
        or labels.dtype == torch.bool
    ):
        raise InputError(
            f"labels must be an integer tensor (N,), got {getattr(labels, 'dtype', type(labels).__name__)}"
        )
    check_shape("labels", labels, shape[:1])
    check_ids(labels, shape[1])


def number(name: str, value: Any, requirement: str) -> float:
    """A number from Python, numpy or torch as a float.

    Args:
        name: what the message calls it.
        value: an int, a float, a numpy scalar or a tensor of one entry.
        requirement: what would be right, for the message.

    Raises:
        InputError: no number, not finite, or a tensor that requires a gradient, which it would lose.
    """
    if isinstance(value, Tensor) and value.requires_grad:
        raise InputError(f"{name} requires a gradient, which it gets none of here: give {name}.detach()")
    scalar = isinstance(value, Tensor) and value.numel() == 1 and not value.is_complex() and value.device.type != "meta"
    real = isinstance(value, numbers.Real) and not isinstance(value, bool)
    try:
        result = float(value) if scalar or real else math.nan
    except OverflowError:
        result = math.inf
    if not math.isfinite(result):
        raise InputError(f"{name} must be {requirement}, got {brief(value)}")
    return result


FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def check_floats(name: str, value: Any, shape: str, device: torch.device | None = None) -> None:
    """Check that a value is a dense floating-point tensor of the given number of dimensions.

    Args:
        name: what the message calls it.
        value: the tensor.
        shape: its shape in words, "(N, H)" or "(V,)".
        device: where the other tensors are.

    Raises:
        InputError: no tensor, another number of dimensions, another layout or dtype, no numbers in it, another device.
    """
    if isinstance(value, Tensor) and value.is_nested:
        raise InputError(f"{name} is a nested tensor: it must be dense, write torch.cat({name}.unbind())")
    if not isinstance(value, Tensor) or value.ndim != len(re.findall(r"\w+", shape)) or not value.is_floating_point():
        description = f"{tuple(value.shape)} of {value.dtype}" if isinstance(value, Tensor) else brief(value)
        raise InputError(f"{name} must be a floating-point tensor {shape}, got {description}")
    if value.dtype not in FLOATS:
        raise InputError(
            f"{name} is {value.dtype}: it must be float64, float32, bfloat16 or float16, write {name}.bfloat16()"
        )
    if value.layout != torch.strided:
        raise InputError(f"{name} is a {value.layout} tensor: it must be dense, write {name}.to_dense()")
    if value.device.type == "meta":
        raise InputError(f"{name} is on the device 'meta', which holds no numbers")
    if device is not None and value.device != device:
        raise InputError(f"{name} is on {value.device}, but hidden on {device}: they must be on one device")
