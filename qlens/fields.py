"""What the fields of Tokens must be: shapes, dtypes and values."""

from typing import Any

import torch
from torch import Tensor

from qlens.errors import InputError, brief

IDS, NUMBERS, MASKS = ("sequence", "pair"), ("weight", "advantage"), ("critical", "hint", "chosen", "negatives")


def check_shape(name: str, value: Tensor, shape: tuple[int, ...]) -> None:
    """Whether a field has the shape that logits and labels ask for.

    Raises:
        InputError: another shape; both are named.
    """
    if tuple(value.shape) != shape:
        raise InputError(f"{name} has shape {tuple(value.shape)}, but logits and labels ask for {shape}")


def check_field(name: str, value: Any, shape: tuple[int, ...]) -> None:
    """Whether a field beside logits and labels has its shape and dtype, and values that mean something.

    Raises:
        InputError: no tensor, another shape; ids that are no integers; a mask beyond 0 and 1; numbers that are not finite.
    """
    wanted = "an integer" if name in IDS else "a real" if name in NUMBERS else "a bool"
    if not isinstance(value, Tensor):
        raise InputError(f"{name} must be {wanted} tensor {shape}, got {brief(value)}")
    check_shape(name, value, shape)
    whole = not value.is_floating_point() and not value.is_complex()
    if value.is_complex() or (name in IDS and (not whole or value.dtype == torch.bool)):
        raise InputError(f"{name} must be {wanted} tensor {shape}, got {value.dtype}")
    if name in NUMBERS and not whole and not bool(value.isfinite().all()):
        raise InputError(f"{name} holds NaN or infinite values: they must be finite")
    if name in MASKS and value.dtype != torch.bool and not bool(((value == 0) | (value == 1)).all()):
        raise InputError(f"{name} is a mask: its values must be True and False, or 1 and 0")


def check_ids(labels: Tensor, vocabulary: int) -> None:
    """Whether labels are ids of a vocabulary.

    Raises:
        InputError: -100, or an id outside; it is named.
    """
    if not len(labels):
        return
    low, high = torch.stack(labels.aminmax()).tolist()
    if low == -100:
        raise InputError(
            "labels hold -100: Tokens takes supervised positions only (qlens.batching.Supervised removes it)"
        )
    if low < 0 or high >= vocabulary:
        wrong = low if low < 0 else high
        raise InputError(f"labels hold {wrong}, outside the vocabulary 0..{vocabulary - 1}")
