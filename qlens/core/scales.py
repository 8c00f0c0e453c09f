"""Scales: label weight and natural scale of a logit gradient, and tolerances for rounding."""

import math

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from qlens.core.numerics import BLOCK_ENTRIES

COARSE = (torch.bfloat16, torch.float16)
DISTINCT = 32  # different digits that tell the precision of values


def label_weight(
    log_probs: Float[Tensor, "N V"], labels: Int[Tensor, " N"], grad: Float[Tensor, "N V"]
) -> Float[Tensor, " N"]:
    """-g_y / (1 - p_y), (N,); NaN where 1 - p_y = 0."""
    rest = log_probs.exp().scatter(1, labels[:, None].long(), 0.0).sum(-1)
    return torch.where(rest > 0, label_pull(log_probs, labels, grad, balanced(log_probs, grad)) / rest, torch.nan)


def label_pull(
    log_probs: Float[Tensor, "N V"], labels: Int[Tensor, " N"], grad: Float[Tensor, "N V"], balance: Bool[Tensor, " N"]
) -> Float[Tensor, " N"]:
    """-g_y, (N,). Where sum(g) = 0 and p_y > 1/2 it is the sum of the other entries, which keeps its digits as p_y -> 1."""
    index = labels[:, None].long()
    near_one = balance & (log_probs.gather(1, index)[:, 0] > math.log(0.5))
    return torch.where(near_one, grad.scatter(1, index, 0.0).sum(-1), -grad.gather(1, index)[:, 0])


def with_sum_(
    values: Float[Tensor, "N V"], log_probs: Float[Tensor, "N V"], total: float, rows: Bool[Tensor, " N"] | None = None
) -> Float[Tensor, "N V"]:
    """Rows known to sum to ``total``: in place, an entry with p > 1/2 becomes ``total`` minus the others, for its digits."""
    top = log_probs.argmax(-1, keepdim=True)
    dominant = log_probs.gather(1, top) > math.log(0.5)
    if rows is not None:
        dominant &= rows[:, None]
    remainder = total - values.scatter(1, top, 0.0).sum(-1, keepdim=True)
    return values.scatter_(1, top, torch.where(dominant, remainder, values.gather(1, top)))


def balanced(
    log_probs: Float[Tensor, "N V"], grad: Float[Tensor, "N V"], dtype: torch.dtype | None = None
) -> Bool[Tensor, " N"]:
    """Whether sum_k g_k = 0 up to the rounding of ``dtype`` (of the gradient itself by default), whatever V is.

    Rounding is relative to s in g = s (p - Q), which is at least the largest entry of |g|. It is more in a row whose p
    is nearly all on one token, if g is s p on all the others.
    """
    off, slack = grad.sum(-1).abs(), gradient_tolerance(dtype or grad)
    zero = off <= slack * grad.abs().amax(-1).clamp(min=1)
    for row in (~zero).nonzero().split(8):
        g, p = grad[row[:, 0]], log_probs[row[:, 0]].exp()
        top = p.argmax(-1, keepdim=True)
        g, p = (values.scatter(1, top, 0.0) for values in (g, p))
        scale = g.sum(-1) / p.sum(-1)
        is_parallel = (g - scale[:, None] * p).abs().sum(-1) <= 0.01 * g.abs().sum(-1)
        zero[row[:, 0]] = is_parallel & (off[row[:, 0]] <= slack * scale.abs())
    return zero


def tolerance(values: Tensor | torch.dtype) -> float:
    """The relative error that counts as rounding in probabilities computed in this dtype; it does not depend on V.

    float64: 1e-9. float32: 1e-4, because torch's own softmax is off by up to 4e-5 on a CPU at V = 250,000, and so is
        the
    gradient of any loss that uses it. Half precision: 1e-2.
    """
    dtype = values.dtype if isinstance(values, Tensor) else values
    return 1e-9 if dtype == torch.float64 else 1e-2 if dtype in COARSE else 1e-4


def gradient_tolerance(values: Tensor | torch.dtype) -> float:
    """The same in a gradient: 0.1 in half precision, where log p = -20 is rounded by 0.06 and p with it."""
    dtype = values.dtype if isinstance(values, Tensor) else values
    return 0.1 if dtype in COARSE else tolerance(dtype)


def carried(values: Tensor) -> torch.dtype:
    """The dtype that values were computed in before a cast: the least precise one that holds all their digits.

    The values' own dtype where they have too few different digits to tell.
    """
    some = values.detach().flatten()[:: max(1, values.numel() // 2**16)]
    if len(torch.frexp(some[some != 0]).mantissa.abs().unique()) < DISTINCT:  # 1 and 0.5 fit any dtype
        return values.dtype
    for dtype in (*COARSE, torch.float32):
        if all(bool((rows.to(dtype).to(rows.dtype) == rows).all()) for rows in values.split(8)):
            return dtype
    return values.dtype


def coefficient_tolerance(values: Tensor) -> float:
    """The same for the coefficients of a mixture, which no sum over V enters."""
    return 1e-9 if values.dtype == torch.float64 else 1e-5


def natural_scale(log_probs: Float[Tensor, "N V"], grad: Float[Tensor, "N V"]) -> Float[Tensor, " N"]:
    """max(0, max_k g_k / p_k) over p_k > 0, (N,), in float64: the smallest s whose Q has no negative entry.

    Entries below the smallest normal number of the gradient's dtype are ignored: they have no digits left.
    """
    size, tiny = max(1, BLOCK_ENTRIES // grad.shape[-1]), torch.finfo(grad.dtype).tiny
    scale = torch.zeros_like(grad[:, 0])
    for log_p, g, rows in zip(log_probs.split(size), grad.split(size), scale.split(size), strict=True):
        p = log_p.double().exp()
        counts = (p > 0) & ((p >= tiny) | (g.abs() >= tiny))
        rows.copy_(torch.where(counts, g.double() / p, -torch.inf).amax(-1).clamp(min=0))
    return scale


PRECISION = {torch.float64: 1e-9, torch.float32: 2e-5, torch.bfloat16: 1e-2}
"""How far a gradient may be from the exact one of the same logits, as a share of max(1, largest |g|), by their dtype."""
