"""Gradients of hidden states, head and bias, summed over chunks of logit gradients."""

from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from qlens.core.numerics import precision
from qlens.engine.heads import Head
from qlens.engine.kernels.plain import RowConstants


class NeedsGradient(NamedTuple):
    """Which gradients are to be computed."""

    hidden: bool
    head: bool
    bias: bool


class Gradients(NamedTuple):
    """Gradients of hidden states (N, H), head (V, H) and bias (V,); None where not wanted."""

    hidden: Tensor | None
    head: Tensor | None
    bias: Tensor | None


class GradientSums:
    """Sums over chunks: d_hidden = G W, d_head = G^T h and d_bias = G^T 1, for G = scale g' of a chunk.

    In float16 a factor 1 / denominator would underflow before a scaler's upstream gradient raises it: these gradients are
    float32 and without ``factor``, which comes in with the upstream gradient.

    Args:
        head: the student's hidden states and head.
        rows: N.
        needs_gradient: which gradients are computed.
        factor: what the gradient of every row is multiplied by.
        uniform: whether ``add`` is given numbers to subtract from all entries of a row.
        chunks: whether there is more than one; the head's gradient of a single one needs no sum in float32.
    """

    def __init__(
        self, head: Head, rows: int, needs_gradient: NeedsGradient, factor: float, uniform: bool, chunks: bool = True
    ):
        wide, device = precision(head.hidden.dtype), head.weight.device
        half = head.hidden.dtype == torch.float16
        self.head, self.factor = head, 1.0 if half else factor
        self.d_hidden = torch.empty_like(head.hidden, dtype=wide if half else None) if needs_gradient.hidden else None
        allocate = torch.empty if rows else torch.zeros  # the first chunk fills it
        summed = wide if chunks or half else head.hidden.dtype
        self.d_head = allocate(head.weight.shape, dtype=summed, device=device) if needs_gradient.head else None
        self.d_bias = torch.zeros(len(head.weight), dtype=wide, device=device) if needs_gradient.bias else None
        # Behind a cap, and where g is rounded to the inputs' dtype, the constants are subtracted entry by entry.
        separate_constants = uniform and head.softcap is None and wide == head.hidden.dtype
        self.constants = RowConstants(head) if separate_constants else None

    def add(self, rows: slice, z: Tensor, scale: Tensor, uniform: Tensor | None, capped: Tensor | None) -> None:
        """Add a chunk.

        Args:
            rows: of the batch that the chunk holds.
            z: g', (n, V); used up.
            scale: (n,), g = scale g'.
            uniform: (n,), of which uniform / V is still to be subtracted from every entry of g'; or None.
            capped: the chunk's logits, (n, V), behind a soft-cap; used up; None without one.
        """
        head = self.head
        if uniform is not None and self.constants is None:
            z -= uniform[:, None] / len(head.weight)
        if capped is not None:
            z *= head.slope_(capped)
        # Factors of a whole row go into the small operands of the products.
        a = self.factor * head.logit_scale * scale[:, None]
        g, h = z.to(head.hidden.dtype), head.hidden[rows]
        if self.d_bias is not None:
            self.d_bias += _column_sums(z, a)
        d_hidden = None if self.d_hidden is None else self.d_hidden[rows]
        if d_hidden is not None and d_hidden.dtype != g.dtype:
            torch.mul(g @ head.weight, a, out=d_hidden)
        elif d_hidden is not None:
            torch.mm(g, head.weight, out=d_hidden).mul_(a)
        if self.d_head is not None:
            _add_product(self.d_head, g, (h * a).to(h.dtype), first=rows.start == 0)
        if uniform is not None and self.constants is not None:
            self.constants.sub_(a * uniform[:, None] / len(head.weight), h, d_hidden)

    def not_finite(self) -> Tensor:
        """Rows whose gradient is not finite, (N,) or, where the hidden states are constants, one flag for all.

        An infinite gradient of float16 hidden states is an overflow that a loss scaler handles; NaN is none.
        """
        if self.d_hidden is not None:
            sums = self.d_hidden.sum(-1, dtype=precision(self.head.hidden.dtype))
            return sums.isnan() if self.head.hidden.dtype == torch.float16 else ~sums.isfinite()
        if self.d_head is not None:
            return ~self.d_head.sum(dtype=precision(self.d_head.dtype)).isfinite()
        return torch.zeros((), dtype=torch.bool, device=self.head.weight.device)

    def result(self) -> Gradients:
        """The gradients; those of head and bias may still be in float32, and float16's are."""
        if self.constants is not None and self.d_head is not None:
            self.d_head += self.constants.head
        if self.constants is not None and self.d_bias is not None:
            self.d_bias += self.constants.bias
        return Gradients(self.d_hidden, self.d_head, self.d_bias)


def _add_product(total: Float[Tensor, "V H"], g: Float[Tensor, "n V"], h: Float[Tensor, "n H"], first: bool) -> None:
    """total += g^T h, summed in the dtype of the total; ``first``: the total holds nothing yet."""
    if total.dtype == g.dtype:
        torch.addmm(total, g.T, h, beta=0 if first else 1, out=total)
    elif total.is_cuda:  # not rounded before it is added
        if first:
            torch.mm(g.T, h, out_dtype=total.dtype, out=total)
        else:
            torch.addmm(total, g.T, h, out_dtype=total.dtype, out=total)
    elif first:
        total.copy_(g.T @ h)
    else:
        total.add_(g.T @ h)


def _column_sums(g: Float[Tensor, "n V"], a: Float[Tensor, "n 1"]) -> Float[Tensor, " V"]:
    """sum_i a_i g_i, summed in float32 at least."""
    if g.dtype == a.dtype:
        return (g.T @ a)[:, 0]
    if g.is_cuda:
        return torch.mm(a.T.to(g.dtype), g, out_dtype=a.dtype)[0]
    return (a.T @ g.to(a.dtype))[0]
