"""Implied target: Q = p - g of any loss, read from its logit gradient."""

from collections.abc import Callable
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from qlens.core.autograd import gradient
from qlens.core.errors import InputError
from qlens.core.numerics import precision, row_blocks
from qlens.core.target import Target
from qlens.core.tokens import Tokens
from qlens.losses.user_code import user_errors
from qlens.registry import Variant, resolve

ENTRIES = 2**22  # logits per call of autograd


def implied_target(
    loss: Variant | str | Callable, tokens: Tokens, scale: Literal["unit", "natural"] = "unit"
) -> Target:
    r"""The target that a loss drives the model toward, from its logit gradient: Q = p - g / s.

    Args:
        loss: a Variant, a spec, or a callable: f(logits, labels) on rows (N, V) or batches (B, T, V), f(outputs, labels),
            f(model, inputs), f(tokens), f(log_probs, ...), a Trainer's class and so on. Its layout and its reduction are
            found by trial calls; the reduction is undone, so that g is the gradient of the unreduced loss.
        tokens: N supervised positions, (N, V).
        scale: "unit" (s = 1) or "natural" (the smallest s that leaves Q no negative entry).

    A loss that also depends on raw logits gives rows whose ``target.total`` is not 1; they are not projected.

    Returns:
        The implied Target, N rows.

    Raises:
        InputError: the loss cannot be called, has no gradient, or has an unknown reduction.

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
    with user_errors(variant.spec), torch.inference_mode(False):
        grad = read(variant, tokens, variant.total)
    return Target.from_grad(tokens, grad).at(scale)


def read(variant: Variant, tokens: Tokens, value: Callable[[Tokens], Tensor]) -> Float[Tensor, "N V"]:
    """The gradient of a variant's summed ``value``, its loss or total, (N, V).

    Methods that are declared per-token are read some rows at a time, so that autograd's copies stay small on long texts.
    """
    if tokens.logits.numel() <= ENTRIES or not variant.alone:
        return gradient(value, tokens)
    grads = torch.empty_like(tokens.logits, dtype=precision(tokens.logits.dtype))
    for rows in row_blocks(*tokens.logits.shape, ENTRIES):
        grads[rows] = gradient(value, tokens[rows])
    return grads
