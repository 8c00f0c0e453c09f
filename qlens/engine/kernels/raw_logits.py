"""Raw logits: products of hidden states and a head in their own dtype, as the Triton kernels read them."""

import importlib.util
from dataclasses import dataclass
from functools import cache

import torch
from jaxtyping import Float
from torch import Tensor

from qlens.core.numerics import precision
from qlens.engine.heads import Head, capped_
from qlens.registry.structure import Structure

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
DEVICES: set[str] = set()
"""Device types on which the Triton kernels run: none until they have been measured on a device. The GPU benchmark adds
"cuda", a test by Triton's interpreter "cpu"."""


@cache
def has_triton() -> bool:
    """Whether Triton is installed."""
    return importlib.util.find_spec("triton") is not None


def uses_triton(structure: Structure, hidden: Tensor) -> bool:
    """Whether a structure's gradient is computed by Triton kernels from raw logits."""
    return structure != "dense" and hidden.device.type in DEVICES and hidden.dtype in DTYPES and has_triton()


@dataclass(frozen=True, eq=False)
class RawLogits:
    """Logits of some rows before bias, scale and soft-cap, which are applied as they are read; or finished ones.

    Args:
        values: products h W^T in their own dtype, or finished logits, (n, V).
        head: whose bias, scale and soft-cap are still to come; None for finished logits.
    """

    values: Float[Tensor, "n V"]
    head: Head | None = None

    @property
    def bias(self) -> Tensor | None:
        """b, (V,), or None."""
        return None if self.head is None else self.head.bias

    @property
    def softcap(self) -> float | None:
        """The soft-cap, or None."""
        return None if self.head is None else self.head.softcap

    @property
    def logit_scale(self) -> float:
        """The scale of the logits."""
        return 1.0 if self.head is None else self.head.logit_scale

    def finished(self) -> Float[Tensor, "n V"]:
        """The logits in float32 at least, on memory of their own."""
        z = self.values.to(precision(self.values.dtype), copy=True)
        if self.bias is not None:
            z += self.bias
        return capped_(z, self.softcap, self.logit_scale)
