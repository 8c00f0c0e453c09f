"""Scaling: the same gradient g = s (p - Q) at another scale s."""

from dataclasses import replace
from typing import TYPE_CHECKING, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from qlens.core.errors import InputError
from qlens.core.scales import natural_scale, with_sum_

if TYPE_CHECKING:
    from qlens.core.target.target import Target

Scale = Literal["unit", "structural", "natural"]


def rescaled(target: "Target", scale: Scale) -> "Target":
    """``target.at(scale)``."""
    wanted = _scale(target, scale)
    same = wanted == target.scale
    if bool(same.all()):
        return target
    positive = wanted > 0
    if target.label_only:
        weight = target.scale * target.trust if target.pushed is None else target.pushed
        trust = torch.where(same, target.trust, torch.where(positive, weight / wanted, 0.0))
        return replace(target, scale=wanted, constructed=trust, pushed=weight, named=None)
    # Q' = p + (Q - p) s / s' lies between p and Q where s <= s'
    if scale == "natural":
        proper = target.shift_invariant
    elif target.named is not None or target.proper is not None:
        proper = target.in_simplex & (same | ~positive | ((target.scale >= 0) & (target.scale <= wanted)))
    else:
        proper = None
    q = target.probs - torch.where(positive[:, None], target.grad / wanted[:, None].to(target.grad), 0.0)
    if scale == "natural":
        q = with_sum_(q, target.log_probs, 1.0, rows=proper)
    q = torch.where(same[:, None], target.q, q)  # rows that keep their scale keep their digits
    trust = torch.where(same, target.trust, torch.where(positive, target.trust * target.scale / wanted, 0.0))
    return type(target)(
        target.logits,
        target.labels,
        q,
        target.grad,
        wanted,
        trust,
        target.pulls,
        proper=proper,
        rounding=target.rounding,
    )


def _scale(target: "Target", scale: Scale) -> Float[Tensor, " N"]:
    """s' by name, (N,)."""
    if scale == "unit":
        return torch.ones_like(target.scale)
    if scale == "structural":
        if isinstance(target.structural, str):
            raise InputError(f"the structural scale is undefined here: {target.structural}")
        return target.structural
    if scale != "natural":
        raise InputError(f"scale must be 'unit', 'structural' or 'natural', got {scale!r}")
    if not target.label_only:
        return natural_scale(target.log_probs, target.grad)
    weight = target.scale * target.trust if target.pushed is None else target.pushed
    # with a negative weight the label's own Q is the first entry to reach 0
    down = torch.where(target.label_probs > 0, -weight * target.rest / target.label_probs, 0.0)
    return torch.where(weight > 0, torch.where(target.rest > 0, weight, 0.0), down.clamp(min=0))
