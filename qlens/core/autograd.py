"""Autograd: logit gradients, also under torch.no_grad and torch.inference_mode."""

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
    """Record gradients within the block, also under torch.no_grad or torch.inference_mode.

    Example:
        >>> with torch.inference_mode(), recorded():
        ...     torch.zeros(1, requires_grad=True).exp().requires_grad
        True
    """
    with torch.inference_mode(False), torch.enable_grad():
        yield


def ordinary(tokens: Tokens) -> Tokens:
    """The tokens with copies of tensors made under torch.inference_mode, which autograd refuses."""
    copies = {name: value.clone() for name, value in tokens.fields().items() if value.is_inference()}
    return Tokens.unchecked(**{**tokens.fields(), **copies}) if copies else tokens


def gradient(rows: Callable[[Tokens], Tensor], tokens: Tokens) -> Float[Tensor, "N V"]:
    """The logit gradient g of a summed loss.

    Args:
        rows: an unreduced loss, tokens -> (N,).
        tokens: N tokens.

    Returns:
        g = d sum(rows) / d logits, (N, V), in float32 at least.

    Raises:
        InputError: the loss has a value but no graph.
    """
    return value_and_gradient(rows, tokens)[1]


def value_and_gradient(rows: Callable[[Tokens], Tensor], tokens: Tokens) -> tuple[Tensor, Float[Tensor, "N V"]]:
    """The detached losses and the logit gradient of their sum, from one call; as ``gradient``."""
    with recorded():
        tokens = ordinary(tokens)
        leaf = tokens.logits.detach().to(precision(tokens.logits.dtype)).requires_grad_()
        losses = rows(tokens.with_logits(leaf))
        return losses.detach(), slope_of(losses, leaf)


def slope_of(losses: Tensor, leaf: Float[Tensor, "N V"]) -> Float[Tensor, "N V"]:
    """The gradient of the summed losses by the logits; zeros where the losses do not depend on them or are all zero.

    Raises:
        InputError: losses other than zero without a graph.
    """
    if not losses.requires_grad and not bool(losses.any()):  # the loss skips all of these rows
        return torch.zeros_like(leaf)
    if not losses.requires_grad:
        raise InputError(
            "the loss has no gradient: it detaches the logits, take out .detach(), .item() or torch.no_grad()"
        )
    (grad,) = torch.autograd.grad(losses.sum(), leaf, allow_unused=True)
    return torch.zeros_like(leaf) if grad is None else grad


def slopes(
    value: Callable[[Tokens], Tensor], grad: Float[Tensor, "N V"], tokens: Tokens, step: float, seed: int
) -> Iterator[tuple[float, float]]:
    """Finite differences of a summed value along four random directions, each with the gradient's own slope."""
    draw = torch.Generator().manual_seed(seed)
    for _ in range(4):
        direction = torch.randn(tokens.logits.shape, generator=draw, dtype=torch.float64).to(tokens.logits)
        up, down = (float(value(tokens.replace(logits=tokens.logits + sign * step * direction))) for sign in (1, -1))
        yield (up - down) / (2 * step), float((grad * direction).sum())
