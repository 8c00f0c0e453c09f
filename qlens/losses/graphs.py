"""Losses without a graph: the operation that cuts the graph, in an error message with the line to write."""

import traceback
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from qlens.losses.return_values import Result, loss_of
from qlens.losses.user_code import EndedError, from_outside, place

TO_PYTHON = {
    Tensor.item: ".item()", Tensor.tolist: ".tolist()", Tensor.numpy: ".numpy()", Tensor.__float__: "float()",
    Tensor.__int__: "int()",
}  # fmt: skip
CUTS = {Tensor.detach: ".detach()", Tensor.detach_: ".detach_()", torch.detach: "torch.detach()"}
DATA = Tensor.data.__get__  # pyright: ignore[reportAttributeAccessIssue]


class NoGraphError(EndedError):
    """A loss returned a value without a gradient."""


class GraphCuts(TorchFunctionMode):
    """Records the operations on tensors with a graph whose results have none.

    Attributes:
        cuts: (operation, place) in order; "inference mode" and "no_grad" stand for operations under these.
        graph_kept: whether any operation on a tensor with a graph kept it.
    """

    def __init__(self):
        super().__init__()
        self.cuts: list[tuple[str, str]] = []
        self.graph_kept = False

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if any(isinstance(x, Tensor) and x.requires_grad for x in _flat((args, kwargs or {}))):
            self._note(func, result)
        return result

    def _note(self, func: Any, result: Any) -> None:
        if func in TO_PYTHON or func in CUTS or func == DATA:
            self.cuts.append((TO_PYTHON.get(func) or CUTS.get(func) or ".data", _here()))
            return
        tensors = [x for x in _flat(result) if isinstance(x, Tensor)]
        if any(x.requires_grad for x in tensors):
            self.graph_kept = True
        elif any(x.is_floating_point() for x in tensors) or getattr(func, "__name__", "") in ("argmax", "argsort"):
            name = f"{getattr(func, '__name__', func)}()"
            if not torch.is_grad_enabled():
                name = "inference mode" if torch.is_inference_mode_enabled() else "no_grad"
            self.cuts.append((name, _here()))


def checked(result: Result, name: str, call_again: Callable[[], Any], logits: Tensor) -> Result:
    """The loss with a graph; zeros without one get a graph from the logits, with a gradient of zero.

    Args:
        result: the loss on ``logits``, which require a gradient.
        name: of the loss, in messages.
        call_again: calls the loss once more, to find where the graph is lost.
        logits: what the gradient is taken by.

    Raises:
        NoGraphError: its value is not zero, and has no graph; the line that cuts the graph is named.
    """
    value = result.value
    if value.requires_grad or not logits.requires_grad:
        return result
    if bool(value.any()):
        raise NoGraphError(
            f"{name} returns a value without a graph, so without a gradient: {_reason(call_again, name)}"
        )
    anchor = logits[:, :0].sum().to(value.dtype)
    return result._replace(value=value.to(logits.device) + anchor)


def _reason(call_again: Callable[[], Any], name: str) -> str:
    with GraphCuts() as recorder:
        loss_of(call_again(), name)
    blanket = [(what, where) for what, where in recorder.cuts if what in ("inference mode", "no_grad")]
    cuts = [(what, where) for what, where in recorder.cuts if what not in ("inference mode", "no_grad")]
    if blanket and (not recorder.graph_kept or not cuts):
        what, where = blanket[-1]
        called = "torch.inference_mode()" if what == "inference mode" else "torch.no_grad()"
        return f"it computes under {called}{where}: take that off, for training needs the graph"
    if not cuts:
        return "it does not depend on the logits it is given: compute it from them, by operations of torch"
    what, where = cuts[-1]
    if what in TO_PYTHON.values():
        return f"{what}{where} turns tensors into numbers: return the tensor itself, and take numbers for printing only"
    if what in (*CUTS.values(), ".data"):
        return f"{what}{where} detaches what it returns from the logits: leave it out there"
    return f"{what}{where} has no gradient: a loss is made of operations that have one"


def _here() -> str:
    """The running line of the user's file."""
    frames = [frame for frame in traceback.extract_stack() if from_outside(frame.filename)]
    return place(frames[-1]) if frames else ""


def _flat(value: Any) -> Iterator[Any]:
    """The leaves of nested lists, tuples and dicts."""
    if isinstance(value, dict):
        value = value.values()
    elif not isinstance(value, list | tuple):
        yield value
        return
    for part in value:
        yield from _flat(part)
