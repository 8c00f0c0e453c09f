"""Losses without a softmax: each logit trained on its own, or a margin between raw logits."""

from dataclasses import replace

import torch

from qlens.lens.decompose.shift_variance import ShiftVariance
from qlens.lens.implied import read
from qlens.lens.reading import Reading
from qlens.lens.rounding import TOLERANCE
from qlens.registry.variant import Variant

STILL = 0.9  # share of tokens whose gradient must not change when the logits move a little


def uncoupled(variant: Variant, at: Reading, cause: ShiftVariance | None) -> ShiftVariance | None:
    """``cause``, marked as uncoupled where moving half of the other logits leaves a logit's gradient as it is."""
    if cause is None or cause.uncoupled:
        return cause
    z, labels = at.inputs.logits, at.inputs.labels
    draw = torch.Generator().manual_seed(0)
    moved_entries = (torch.rand(z.shape, generator=draw) < 0.5).to(z.device).scatter_(1, labels[:, None].long(), False)
    moved_entries &= at.grad != 0  # moving a clamped logit has no effect
    if not bool((moved_entries.any(-1) & (at.grad * ~moved_entries).any(-1)).any()):
        return cause
    after = read(variant, at.inputs.replace(logits=z - moved_entries.to(z)), variant.loss)
    distance = ((after - at.grad) * ~moved_entries).norm(dim=-1)
    if not bool((distance <= TOLERANCE * at.grad.norm(dim=-1) + at.noise.rows).all()):
        return cause
    return replace(
        cause,
        cause="each logit is trained on its own, without a softmax",
        grad=at.grad,
        tokens=at.tokens,
        rows=torch.arange(len(at.inputs)),
        uncoupled="It trains each logit on its own: no softmax couples them",
    )


def piecewise_linear(variant: Variant, at: Reading) -> bool:
    """Whether the gradient takes a few values that do not change when the logits move a little."""
    z, draw = at.inputs.logits, torch.Generator().manual_seed(0)
    if len((at.grad / at.grad.abs().max()).abs().round(decimals=6).unique()) > z.shape[1] + 2:
        return False  # a softmax of rounded logits does not change either, but takes as many values as entries
    by = 1e-3 * torch.randn(z.shape, generator=draw, dtype=torch.float64).to(z)
    after = read(variant, at.inputs.replace(logits=torch.where(z.isfinite(), z + by, z)), variant.loss)
    still = (after - at.grad).norm(dim=-1) <= 1e-9 * at.grad.norm(dim=-1)
    return bool(at.grad.any()) and float(still[~at.zero_rows].double().mean()) >= STILL
