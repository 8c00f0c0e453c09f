"""The linear head of a model, and its input in a forward pass."""

import math
import threading
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from qlens.core.errors import InputError

# Outputs of a head at which soft-cap and scale are compared; soft-caps in use are 15 to 50.
PROBES = (32.0, -256.0, 2048.0, -0.5, 4.0, -32.0, 256.0, -2048.0)
_LOCKS: "weakref.WeakKeyDictionary[nn.Module, threading.RLock]" = weakref.WeakKeyDictionary()  # pyright: ignore
_LOCKS_LOCK = threading.Lock()


class NoBackbone(InputError):
    """A model's logits are not a linear head's of its hidden states; the message says why."""


def linear_head(model: nn.Module) -> nn.Linear:
    """The output embedding of a model.

    Raises:
        NoBackbone: it has none, or it is not a plain linear layer on one device.
    """
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    if type(head) is not nn.Linear:
        kind = "none" if head is None else f"a {type(head).__name__} of {type(head).__module__}"
        adapted = ", an adapted one" if hasattr(head, "base_layer") or hasattr(head, "parametrizations") else ""
        raise NoBackbone(f"it has no plain linear head: its output embedding is {kind}{adapted}")
    if head.weight.ndim != 2 or type(head.weight.detach()) is not Tensor:
        raise NoBackbone("its head is cut up over devices")
    return head


@contextmanager
def captured_input(head: nn.Linear, width: int, record: bool = False) -> Iterator[list[tuple[Tensor, Tensor]]]:
    """Replace ``head.forward`` by one that keeps its input and returns ``PROBES``, and put it back at the end.

    Everything else of the model runs as usual.

    Args:
        head: the output embedding.
        width: number of outputs that are returned for every token.
        record: whether autograd records what follows the head.

    Yields:
        A list, to which every call of the head adds (input, outputs), the input in the dtype of the head's product.
    """
    calls: list[tuple[Tensor, Tensor]] = []
    thread = threading.get_ident()

    def forward(hidden: Tensor) -> Tensor:
        if threading.get_ident() != thread:  # another thread runs the same model
            return original(hidden)
        device = hidden.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden.dtype
        shape = (*hidden.shape[:-1], width)
        outputs = hidden.new_tensor(PROBES, dtype=dtype).repeat(math.ceil(math.prod(shape) / len(PROBES)))
        outputs = outputs[: math.prod(shape)].reshape(shape)
        if record:  # until the context that switched it off is left
            torch.set_grad_enabled(True)
            outputs.requires_grad_()
        calls.append((hidden.to(dtype), outputs))
        return outputs

    with _lock_of(head):
        original, instance_forward = head.forward, head.__dict__.get("forward")
        head.forward = forward
        try:
            yield calls
        finally:
            if instance_forward is None:
                del head.forward
            else:
                head.forward = instance_forward


def _lock_of(head: nn.Module) -> Any:
    """A lock, one per head: one thread at a time replaces its forward."""
    with _LOCKS_LOCK:
        return _LOCKS.setdefault(head, threading.RLock())
