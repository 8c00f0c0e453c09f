"""Scales: what can be read off a gradient and p alone, the effective trust, the smallest scale, and what counts as rounding."""

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor


def effective_trust(
    log_probs: Float[Tensor, "N V"], labels: Int[Tensor, " N"], grad: Float[Tensor, "N V"]
) -> Float[Tensor, " N"]:
    """-g_y / (1 - p_y) in unit scale, (N,); NaN where nothing is left to pull, 1 - p_y = 0.

    Where sum(g) = 0 that is the others' share, sum_{k != y} g_k / sum_{k != y} p_k, which keeps its digits as p_y -> 1.
    """
    index = labels[:, None].long()
    rest = log_probs.exp().scatter(1, index, 0.0).sum(-1)
    pull = torch.where(balanced(grad), grad.scatter(1, index, 0.0).sum(-1), -grad.gather(1, index)[:, 0])
    return torch.where(rest > 0, pull / rest, torch.nan)


def balanced(grad: Float[Tensor, "N V"]) -> Bool[Tensor, " N"]:
    """Whether sum_k g_k = 0, to rounding."""
    return grad.sum(-1).abs() <= tolerance(grad) * grad.abs().amax(-1).clamp(min=1)


def tolerance(values: Tensor) -> float:
    """What counts as rounding in this dtype."""
    return 1e-9 if values.dtype == torch.float64 else 1e-5


def natural_scale(log_probs: Float[Tensor, "N V"], grad: Float[Tensor, "N V"]) -> Float[Tensor, " N"]:
    """max(0, max_k g_k / p_k) over p_k > 0, (N,), in float64: the smallest s whose Q has no negative entry."""
    p = log_probs.double().exp()
    ratio = torch.where(p > 0, grad.double() / p, -torch.inf)
    return ratio.amax(-1).clamp(min=0).to(log_probs.dtype)
