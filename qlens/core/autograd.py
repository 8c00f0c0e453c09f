"""Autograd: gradients that are taken whatever mode the caller is in, torch.no_grad or torch.inference_mode."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from jaxtyping import Float
from torch import Tensor

from qlens.core.errors import InputError
from qlens.core.numerics import precision
from qlens.core.tokens import Tokens


@contextmanager
def recorded() -> Iterator[None]:
    """Inside, torch records gradients, though the caller switched them off.

    Example:
        >>> with torch.inference_mode(), recorded():
        ...     torch.zeros(1, requires_grad=True).exp().requires_grad
        True
    """
    with torch.inference_mode(False), torch.enable_grad():
        yield


def ordinary(tokens: Tokens) -> Tokens:
    """The tokens with copies of what was made under torch.inference_mode, which autograd refuses; outside that mode."""
    copies = {name: value.clone() for name, value in tokens.fields().items() if value.is_inference()}
    return Tokens.unchecked(**{**tokens.fields(), **copies}) if copies else tokens


def gradient(rows: Callable[[Tokens], Tensor], tokens: Tokens) -> Float[Tensor, "N V"]:
    """g, the gradient of the sum of an unreduced loss by the logits, (N, V)."""
    with recorded():
        tokens = ordinary(tokens)
        leaf = tokens.logits.detach().to(precision(tokens.logits.dtype)).requires_grad_()
        return slope_of(rows(tokens.with_logits(leaf)), leaf)


def slope_of(losses: Tensor, leaf: Float[Tensor, "N V"]) -> Float[Tensor, "N V"]:
    """The gradient of the summed losses by the logits, zeros where they do not depend on these.

    So it is where nothing but zeros came without a graph.

    Raises:
        InputError: the losses are other than zero and have no graph.
    """
    if not losses.requires_grad and not bool(losses.any()):  # a loss that skips all of these rows
        return torch.zeros_like(leaf)
    if not losses.requires_grad:
        raise InputError("the loss has a value without a graph, so without a gradient: the logits are detached inside")
    (grad,) = torch.autograd.grad(losses.sum(), leaf, allow_unused=True)
    return torch.zeros_like(leaf) if grad is None else grad


def slopes(
    value: Callable[[Tokens], Tensor], grad: Float[Tensor, "N V"], tokens: Tokens, step: float, seed: int
) -> Iterator[tuple[float, float]]:
    """Along four random directions, the numerical slope of a summed value and what the gradient says it is."""
    draw = torch.Generator().manual_seed(seed)
    for _ in range(4):
        way = torch.randn(tokens.logits.shape, generator=draw, dtype=torch.float64).to(tokens.logits)
        ends = [float(value(tokens.replace(logits=tokens.logits + sign * step * way))) for sign in (1, -1)]
        yield (ends[0] - ends[1]) / (2 * step), float((grad * way).sum())
