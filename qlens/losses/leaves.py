"""Leaf tensors of a graph, and gradients that cannot be differentiated."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from qlens.core.errors import InputError


class StubParameter(nn.Parameter):
    """The only parameter of a stub model; a loss that reads it has a term of the model's weights."""


def leaves(value: Tensor, *inputs: Tensor) -> list[Tensor]:
    """The leaf tensors of a value's graph, without the inputs and all that these were computed from.

    Args:
        value: a tensor, with or without a graph.
        inputs: tensors at which the search stops.

    Example:
        >>> import torch
        >>> a, b = torch.ones(2, requires_grad=True), torch.ones(2, requires_grad=True)
        >>> len(leaves((a * b).sum())), len(leaves((a * b).sum(), a))
        (2, 1)
    """
    leaf_tensors = [value] if value.grad_fn is None and value.requires_grad else []
    leaf_tensors += [
        node.variable for node in _nodes(value, *inputs) if isinstance(getattr(node, "variable", None), Tensor)
    ]
    return [leaf for leaf in leaf_tensors if not any(leaf is each for each in inputs)]


def reaches(value: Tensor, part: Tensor) -> bool:
    """Whether a tensor with a graph was computed from another one with a graph.

    Example:
        >>> import torch
        >>> a = torch.ones(2, requires_grad=True).exp()
        >>> reaches(a.sum(), a), reaches(torch.ones(2, requires_grad=True).sum(), a)
        (True, False)
    """
    return value is part or any(node is part.grad_fn for node in _nodes(value))


def _nodes(value: Tensor, *inputs: Tensor) -> Iterator[Any]:
    """The nodes of a value's graph, without those of the inputs and all behind them."""
    visited, pending = {each.grad_fn for each in inputs}, [value.grad_fn]
    while pending:
        node = pending.pop()
        if node is None or node in visited:
            continue
        visited.add(node)
        yield node
        pending += [following for following, _ in node.next_functions]


class LearnedParameter(InputError):
    """A loss has a parameter of its own, whose gradient the engine does not compute."""


def refuse_learned(name: str, losses: Tensor, *inputs: Tensor) -> None:
    """Refuse a loss whose graph reaches a leaf other than the inputs.

    Raises:
        LearnedParameter: it does; the shape of the leaf is named.
    """
    if losses.requires_grad and (learned := leaves(losses, *inputs)):
        raise LearnedParameter(
            f"{name} has a parameter of its own that requires a gradient, of shape {tuple(learned[0].shape)}, and the "
            "engine makes none for it: to train it, take the plain path (QTrainer(fused=False), Variant.loss); else "
            "requires_grad_(False) or detach it"
        )


class Once(torch.autograd.Function):
    """The identity, without a derivative."""

    @staticmethod
    def forward(ctx: Any, grad: Tensor, *inputs: Tensor) -> Tensor:
        return grad.view_as(grad)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple:
        raise InputError(
            "fused_loss has no second derivative: take the plain path, Variant.loss(tokens), where gradients are differentiated"
        )
