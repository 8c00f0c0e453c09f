"""Unused inputs: fields that a loss asks for and that have no effect."""

import torch

from qlens.lens.reading import Reading, requested_fields
from qlens.lens.rounding import TOLERANCE
from qlens.registry.variant import Variant

STRUCTURE = ("sequence", "pair", "chosen")  # fields that group tokens


def unused_inputs(variant: Variant, at: Reading) -> tuple[str, ...]:
    """The fields that a loss asks for and whose change leaves its values and its gradient as they are.

    Args:
        variant: the loss.
        at: its gradient at some tokens.
    """
    names = []
    for name in requested_fields(variant):
        value = getattr(at.inputs, name)
        if name in STRUCTURE or value is None:
            continue
        other = ~value if value.dtype == torch.bool else value.flip(0) * 1.3 + 0.2
        after = Reading.of(variant, at.inputs.replace(**{name: other}))
        distance = (after.grad - at.grad).norm(dim=-1)
        same_grad = bool((distance <= TOLERANCE * after.grad.norm(dim=-1) + 2 * at.noise.rows).all())
        if same_grad and bool(torch.allclose(after.losses, at.losses, rtol=1e-6, equal_nan=True)):
            names.append(name)
    return tuple(names)
