"""Inputs and results of the structure functions: supervised rows of a batch, sizes of a chunk, and the gradients of one."""

import math
from dataclasses import dataclass
from functools import cache
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from qlens.core.target import Target
from qlens.core.tokens import Tokens
from qlens.engine.heads import Head, TopK
from qlens.engine.kernels.raw_logits import uses_triton
from qlens.losses.leaves import refuse_learned
from qlens.registry import Variant
from qlens.registry.structure import GeometricMixture, Structure
from qlens.registry.variant import ALONE

TILE_ENTRIES = 2**20  # logits worked on at a time, so that the passes over them stay in a CPU's cache
DEVICE_TILE_ENTRIES = 2**24  # on other devices, where a pass over fewer entries is shorter than its launch


CHUNK_ENTRIES = 22 * 2**20  # logits of a chunk on a CPU: at most 88 MiB in float32
DEVICE_BYTES = 2**29
"""Bytes of a chunk's logits of all models on another device: few large products, whose launches cost nothing beside them.

As many bytes as the head has are allowed too. Without them the gradient of the head, which is summed in float32 and then
rounded, has the greater peak, so that they cost no memory.
"""


@dataclass(frozen=True, eq=False, kw_only=True)
class RowInputs:
    """The supervised rows of a batch, as the structure functions take them.

    Args:
        variant: the method.
        structure: by which the gradient is computed, see ``effective_structure``.
        labels: (N,).
        models: other models' predictions, as logits (N, V), ``Head`` or ``TopK``.
        fields: per-token fields, (N,), and negatives, (N, V).
        tile: rows on which a method is evaluated at a time; all of them where rows may depend on each other.
        gradients: whether gradients are wanted, or the losses alone.
        refuse_parameters: whether a loss with a learnable parameter of its own is refused.
    """

    variant: Variant
    structure: Structure
    labels: Int[Tensor, " N"]
    models: dict[str, Tensor | Head | TopK]
    fields: dict[str, Tensor]
    tile: int
    gradients: bool = True
    refuse_parameters: bool = False

    @property
    def needs_all_rows(self) -> bool:
        """Whether the label probabilities of all rows are collected before any gradient is computed."""
        return self.structure == "label" and self.variant.scope not in ALONE

    @property
    def mixes_uniform(self) -> bool:
        """Whether the label is mixed with the uniform distribution."""
        return isinstance(self.structure, GeometricMixture) and self.structure.model is None

    def fields_at(self, rows: slice) -> dict[str, Tensor]:
        """The per-token fields of some rows."""
        return {name: value[rows] for name, value in self.fields.items()}

    def losses(self, tokens: Tokens) -> Float[Tensor, " n"]:
        """The losses of some rows without a graph.

        Those of a user's method are computed with one, in which a learnable parameter of its own shows.
        """
        with torch.set_grad_enabled(self.refuse_parameters and not self.variant.built_in):
            losses = self.variant.loss(tokens)
        refuse_learned(self.variant.spec, losses)
        return losses

    def selected(self, target: Target) -> Tensor:
        """The number of rows with a trust other than 0, for methods that divide by it; else 0."""
        if self.variant.denominator == "selected":
            return target.selected
        return torch.zeros((), dtype=torch.long, device=target.labels.device)

    def not_finite(self, *values: Tensor | None) -> Bool[Tensor, " n"] | None:
        """The rows at which one of the values is NaN or infinite; None for a built-in method, which is not checked."""
        masks = [] if self.variant.built_in else [~value.isfinite() for value in values if value is not None]
        return torch.stack(masks).any(0) if masks else None


class RowGradients(NamedTuple):
    """The result of a structure function in addition to g', which it leaves in place of the logits; g = scale g'.

    Attributes:
        scale: (n,).
        losses: (n,).
        selected: number of rows with a trust other than 0, a scalar.
        invalid: number of rows whose logits hold NaN or +inf, a scalar.
        not_finite: rows whose trust, scale or label gradient is not finite, (n,), or None.
        label_weight: a in g = a (p - d), (n,), for structure "label"; else None.
        uniform: 1 - t, (n,), where (1 - t) / V is still to be subtracted from every entry of g'; else None.
    """

    scale: Float[Tensor, " n"]
    losses: Float[Tensor, " n"]
    selected: Tensor
    invalid: Tensor
    not_finite: Bool[Tensor, " n"] | None
    label_weight: Float[Tensor, " n"] | None = None
    uniform: Float[Tensor, " n"] | None = None


def joined(tiles: list[RowGradients]) -> RowGradients:
    """The results of consecutive tiles as one; they have no ``label_weight`` and no ``uniform``."""
    if len(tiles) == 1:
        return tiles[0]
    flags = [tile.not_finite for tile in tiles if tile.not_finite is not None]
    return RowGradients(
        scale=torch.cat([tile.scale for tile in tiles]),
        losses=torch.cat([tile.losses for tile in tiles]),
        selected=torch.stack([tile.selected for tile in tiles]).sum(),
        invalid=torch.stack([tile.invalid for tile in tiles]).sum(),
        not_finite=torch.cat(flags) if flags else None,
    )


def tile_rows(vocabulary: int, device: torch.device) -> int:
    """Rows of logits that are worked on at a time."""
    return max(1, (TILE_ENTRIES if device.type == "cpu" else DEVICE_TILE_ENTRIES) // vocabulary)


def chunk_rows(inputs: RowInputs, head: Head) -> int:
    """Rows of a chunk by default, in nearly even parts: small products cost more per row."""
    rows, device, vocabulary = len(inputs.labels), head.weight.device, len(head.weight)
    if device.type == "cpu":
        most = CHUNK_ENTRIES // vocabulary
    else:
        raw = uses_triton(inputs.structure, head.hidden)
        buffers = 1 + sum(isinstance(model, Head) for model in inputs.models.values())
        buffers += not raw and head.softcap is not None
        row = buffers * vocabulary * (head.hidden.element_size() if raw else max(4, head.hidden.element_size()))
        most = max(_device_bytes(device), head.weight.nbytes) // row
    return math.ceil(rows / math.ceil(rows / max(1, most))) if rows else 1


@cache
def _device_bytes(device: torch.device) -> int:
    """``DEVICE_BYTES``, less on a device of little memory."""
    if device.type != "cuda":
        return DEVICE_BYTES
    return min(DEVICE_BYTES, torch.cuda.get_device_properties(device).total_memory // 64)


def slices(rows: int, size: int) -> list[slice]:
    """Consecutive slices of ``size`` rows, the last one shorter."""
    return [slice(start, min(start + size, rows)) for start in range(0, rows, max(size, 1))]


def shown_inputs(variant: Variant, inputs: dict[str, Any]) -> dict[str, Any]:
    """The models and per-token fields that a method is shown: those it declares; all of them for a user's method."""
    if not variant.built_in:
        return inputs
    return {name: value for name, value in inputs.items() if name in (*variant.needs, "weight", "sequence", "pair")}
