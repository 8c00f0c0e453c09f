"""Geometric mixtures of label, student and one other model or the uniform distribution: g = s (p - t d - (1 - t) r)."""

import torch
from torch import Tensor

from qlens.engine.heads import Head
from qlens.engine.kernels.plain import mixed_loss, mixture_gradient_, mixture_terms_, uniform_gradient_, uniform_terms_
from qlens.engine.kernels.raw import raw_mixture_gradient_, raw_mixture_terms
from qlens.engine.kernels.raw_logits import RawLogits
from qlens.engine.label_only import Logits, LogProbs, two_entry_target
from qlens.engine.row_inputs import RowGradients, RowInputs, joined, slices
from qlens.registry.structure import GeometricMixture


def mixture_gradients(inputs: RowInputs, rows: slice, z: Logits, other_logits: dict[str, Logits]) -> RowGradients:
    """Overwrite a chunk's logits with g' = p - t d - (1 - t) r, for r made of the student and one other model.

    Args:
        inputs: the batch.
        rows: which of its rows the chunk holds.
        z: their logits, (n, V).
        other_logits: the other models' logits at these rows.
    """
    structure = inputs.structure
    assert isinstance(structure, GeometricMixture) and structure.model is not None
    other = other_logits[structure.model]
    if isinstance(z, RawLogits):
        assert isinstance(other, RawLogits)
        return _raw_gradients(inputs, rows, z, other)
    assert isinstance(other, Tensor)
    writable = isinstance(inputs.models[structure.model], Head)  # computed into a buffer; logits passed in are not
    tiles = []
    for tile in slices(len(z), inputs.tile):
        at = slice(rows.start + tile.start, rows.start + tile.stop)
        labels, logits = inputs.labels[at, None], z[tile]
        with torch.no_grad():
            terms = mixture_terms_(logits, other[tile] if writable else other[tile].clone(), labels, structure)
            trust, scale, counts = _trust_and_scale(inputs, at, (terms.log_p, terms.log_rest))
            losses = mixture_gradient_(logits, labels, terms, trust)
            tiles.append(counts._replace(scale=scale, losses=scale * losses))
    return joined(tiles)


def uniform_gradients(inputs: RowInputs, rows: slice, z: Logits, other_logits: dict[str, Logits]) -> RowGradients:
    """Overwrite a chunk's logits with g' = p - t d; the uniform part (1 - t) / V is left to the caller, as ``uniform``.

    Args:
        inputs: the batch.
        rows: which of its rows the chunk holds.
        z: their logits, (n, V).
        other_logits: not used.
    """
    structure = inputs.structure
    assert isinstance(structure, GeometricMixture)
    if isinstance(z, RawLogits):
        return _raw_gradients(inputs, rows, z, None)
    labels = inputs.labels[rows, None]
    with torch.no_grad():
        terms = uniform_terms_(z, labels)
        trust, scale, counts = _trust_and_scale(inputs, rows, (terms.log_p, terms.log_rest))
        losses = uniform_gradient_(z, labels, terms, trust, structure)
        return counts._replace(scale=scale, losses=scale * losses, uniform=1 - trust)


def _raw_gradients(inputs: RowInputs, rows: slice, z: RawLogits, other: RawLogits | None) -> RowGradients:
    """Overwrite the values of raw logits with g' = p - t d - (1 - t) r, the uniform part included."""
    structure, labels = inputs.structure, inputs.labels[rows]
    with torch.no_grad():
        terms = raw_mixture_terms(z, other, labels, structure)
        trust, scale, counts = _trust_and_scale(inputs, rows, (terms.log_p, terms.log_rest))
        raw_mixture_gradient_(z, other, labels, terms, trust, structure)
        losses = mixed_loss(trust, terms.log_p, terms.residual_loss)
        return counts._replace(scale=scale, losses=scale * losses)


def _trust_and_scale(inputs: RowInputs, rows: slice, student: LogProbs) -> tuple[Tensor, Tensor, RowGradients]:
    """t and s of some rows, (n,), from the method itself on two entries; and the counts and flags of these rows.

    Both are functions of the student's label probability alone, so that any numbers will do for the other models.
    """
    log_p = student[0]
    target = two_entry_target(inputs, rows, dict.fromkeys(("logits", *inputs.models), student))[1]
    counts = RowGradients(
        scale=log_p,
        losses=log_p,
        selected=inputs.selected(target),
        invalid=log_p.isnan().sum(),
        not_finite=inputs.not_finite(target.trust, target.scale),
    )
    return target.trust.to(log_p), target.scale.to(log_p), counts
