"""Gradients of hidden states, head and bias, summed over chunks of logit gradients."""

from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from qlens.core.numerics import precision
from qlens.engine.heads import Head
from qlens.engine.kernels import RowConstants


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
    """

    def __init__(self, head: Head, rows: int, needs_gradient: NeedsGradient, factor: float, uniform: bool):
        wide, device = precision(head.hidden.dtype), head.weight.device
        half = head.hidden.dtype == torch.float16
        self.head, self.factor = head, 1.0 if half else factor
        self.d_hidden = torch.empty_like(head.hidden, dtype=wide if half else None) if needs_gradient.hidden else None
        allocate = torch.empty if rows else torch.zeros  # the first chunk fills it
        self.d_head = allocate(head.weight.shape, dtype=wide, device=device) if needs_gradient.head else None
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
            self.d_bias += (z.T @ a)[:, 0]
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
            return ~self.d_head.sum().isfinite()
        return torch.zeros((), dtype=torch.bool, device=self.head.weight.device)

    def result(self) -> Gradients:
        """The gradients, in the dtype of the head; float16's in float32."""
        if self.constants is not None and self.d_head is not None:
            self.d_head += self.constants.head
        if self.constants is not None and self.d_bias is not None:
            self.d_bias += self.constants.bias
        if self.head.hidden.dtype == torch.float16:
            return Gradients(self.d_hidden, self.d_head, self.d_bias)
        dtype = self.head.weight.dtype
        return Gradients(
            self.d_hidden,
            None if self.d_head is None else self.d_head.to(dtype),
            None if self.d_bias is None else self.d_bias.to(dtype),
        )


def _add_product(total: Float[Tensor, "V H"], g: Float[Tensor, "n V"], h: Float[Tensor, "n H"], first: bool) -> None:
    """total += g^T h, summed in the dtype of the total; ``first``: the total holds nothing yet."""
    if total.dtype == g.dtype:
        torch.addmm(total, g.T, h, beta=0 if first else 1, out=total)
    elif first:
        total.copy_(g.T @ h)
    else:
        total.add_(g.T @ h)
