"""The lens: the target that any loss implies, Q = p - g, read from its gradient."""

from collections.abc import Callable, Iterator
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from qlens.autograd import ordinary, recorded
from qlens.errors import InputError
from qlens.guards import blamed
from qlens.registry import Variant, resolve
from qlens.scales import COARSE as COARSE
from qlens.scales import carried as carried
from qlens.target import Target
from qlens.tokens import Tokens, precision

ENTRIES = 2**22  # logits that autograd works on at a time


def implied_target(
    loss: Variant | str | Callable, tokens: Tokens, scale: Literal["unit", "natural"] = "unit"
) -> Target:
    r"""The target that a loss drives the model toward, from its logit gradient: Q = p - g / s.

    Args:
        loss: a Variant, a spec, or a callable: f(logits, labels) on rows (N, V) or batches (B, T, V), f(outputs, labels),
            f(model, inputs), f(tokens), f(log_probs, ...), a Trainer's class and so on. Its layout and its reduction are
            found by trying; the reduction is undone, so that g is the gradient of the unreduced loss.
        tokens: N supervised positions, (N, V).
        scale: "unit" (s = 1) or "natural" (the smallest s that leaves Q no negative entry).

    A loss that also sees raw logits gives rows whose ``target.total`` is not 1; they are reported, not projected.

    Raises:
        InputError: the loss cannot be called, has no gradient, or divides in a way that cannot be found.

    Source: Xie et al. 2026 (arXiv 2606.11189), from any loss to Q.

    Example:
        >>> import torch, torch.nn.functional as F
        >>> tokens = Tokens(logits=torch.zeros(1, 2), labels=torch.tensor([0]))
        >>> implied_target(lambda logits, labels: 2 * F.cross_entropy(logits, labels), tokens).q
        tensor([[ 1.5000, -0.5000]])
    """
    if scale not in ("unit", "natural"):
        raise InputError(f"scale must be 'unit' or 'natural', got {scale!r}: a gradient alone names no fixed targets")
    variant = resolve(loss)
    with blamed(variant.spec), torch.inference_mode(False):
        grad = read(variant, tokens, variant.total)
    return Target.from_grad(tokens, grad).at(scale)


def read(variant: Variant, tokens: Tokens, value: Callable[[Tokens], Tensor]) -> Float[Tensor, "N V"]:
    """The gradient of a variant's summed ``value``, its loss or total, (N, V).

    Some rows at a time where no row needs another, so that autograd's own copies stay small on long texts; a loss that
    nobody has declared so is shown all of them.
    """
    size = max(1, ENTRIES // tokens.logits.shape[1])
    if len(tokens) <= size or variant.scope != "token" or variant.derived:
        return gradient(value, tokens)
    made = torch.empty_like(tokens.logits, dtype=precision(tokens.logits.dtype))
    for start in range(0, len(tokens), size):
        made[start : start + size] = gradient(value, tokens[start : start + size])
    return made


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
