"""Checks of the parts that a target is made of: trust, scale and residual."""

import torch
from jaxtyping import Float
from torch import Tensor

from qlens.core.errors import InputError
from qlens.core.numerics import precision
from qlens.core.tokens import Tokens

SUM_TOLERANCE = 0.05  # of the sum of a residual, as it is in bfloat16 at a large vocabulary


def per_token(name: str, value: Tensor | float, tokens: Tokens) -> Float[Tensor, " N"]:
    """A number or a tensor (N,) as a tensor (N,) in the precision of the target, detached.

    Raises:
        InputError: another shape.
    """
    rows = len(tokens)
    value = torch.as_tensor(value, dtype=precision(tokens.logits.dtype), device=tokens.logits.device).detach()
    if value.ndim > 1 or (value.ndim == 1 and len(value) != rows):
        raise InputError(f"{name} has shape {tuple(value.shape)}, but there are {rows} tokens")
    return value.expand(rows).clone()


def residual_of(residual: str | Tensor, tokens: Tokens) -> str | Float[Tensor, "N V"]:
    """A residual by name, or its probabilities in the precision of the target, detached.

    Raises:
        InputError: an unknown name or another shape.
    """
    if isinstance(residual, Tensor):
        if residual.shape != tokens.logits.shape:
            shapes = f"{tuple(residual.shape)}, but the logits have {tuple(tokens.logits.shape)}"
            raise InputError(f"residual has shape {shapes}")
        return residual.detach().to(precision(tokens.logits.dtype))
    if residual not in ("student", "uniform"):
        raise InputError(f"residual must be 'student', 'uniform' or probabilities (N, V), got {residual!r}")
    return residual


def check_values(scale: Float[Tensor, " N"], trust: Float[Tensor, " N"] | None, residual: str | Tensor | None) -> None:
    """Check the values of scale, trust and residual.

    Raises:
        InputError: a scale below 0 or not finite, a trust that is NaN, or a residual whose rows do not sum to 1.
    """
    if not bool((scale >= 0).all() & scale.isfinite().all()):
        at = int((~((scale >= 0) & scale.isfinite())).nonzero()[0, 0])
        raise InputError(f"scale must be finite and at least 0, got {float(scale[at]):g} at token {at}")
    if trust is not None and bool(trust.isnan().any()):
        raise InputError(f"trust is NaN at token {int(trust.isnan().nonzero()[0, 0])}: it must be a number")
    if isinstance(residual, Tensor) and bool((off := (residual.sum(-1) - 1).abs() > SUM_TOLERANCE).any()):
        at = int(off.nonzero()[0, 0])
        raise InputError(
            f"residual must be probabilities (N, V), but its row {at} sums to {float(residual[at].sum()):g}: give "
            "logits.softmax(-1), or Target.dense for a Q of another sum"
        )
