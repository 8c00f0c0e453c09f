"""Part weights: the weights of the parts of a decomposition at any tokens, by least squares."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from qlens.core.tokens import Tokens
from qlens.lens.decompose.mixture import RAW, Mixture
from qlens.lens.decompose.residuals import Residual, dictionary
from qlens.lens.rounding import TOLERANCE, Noise


@dataclass(frozen=True, eq=False)
class PartWeights:
    """The weights of the parts of a decomposition at some tokens.

    Args:
        values: one column per part, (N, J).
        unique: where they are identifiable, (N,).
        noise: their absolute precision, (N,).
        misfit: |g - sum| / |g|, in which rounding counts as the tolerance, (N,).
    """

    values: Float[Tensor, "N J"]
    unique: Bool[Tensor, " N"]
    noise: Float[Tensor, " N"]
    misfit: Float[Tensor, " N"]

    @classmethod
    def joined(cls, parts: Sequence["PartWeights"]) -> "PartWeights":
        """The weights at the tokens of several blocks."""
        return cls(*(torch.cat([getattr(part, field.name) for part in parts]) for field in fields(cls)))


def weights_of_parts(
    mixture: Mixture, grad: Float[Tensor, "N V"], tokens: Tokens, residuals: Mapping[str, Tensor], noise: Noise
) -> PartWeights:
    """The weights of the parts of a decomposition at other tokens, whether or not it holds there.

    Args:
        mixture: the decomposition.
        grad: logit gradients at these tokens, (N, V).
        tokens: these tokens, in float64.
        residuals: further distributions at these tokens, (N, V) by name.
        noise: rounding error of the gradient.
    """
    value = mixture.parameter and mixture.parameter[1]
    entries = [Residual(RAW, lambda t: torch.zeros_like(t.probs)), *dictionary(tokens, residuals)]
    by_name = {entry.name_at(value): entry for entry in entries}
    p = tokens.probs.detach().double()
    columns = torch.stack([p - by_name[name].at(tokens, value) for name in mixture.parts], -1)
    lengths = columns.norm(dim=1)
    columns = columns / lengths[:, None].clamp(min=1e-300)
    unit, residual = _least_squares(columns, grad)
    apart = distance_apart(columns)
    size = grad.norm(dim=-1) + noise.rows / TOLERANCE
    return PartWeights(
        torch.where(lengths > 0, unit / lengths.clamp(min=1e-300), 0.0).cpu(),
        identifiable(apart, lengths).cpu(),
        weight_noise(noise.rows, apart, lengths).cpu(),
        (residual.norm(dim=-1) / size.clamp(min=1e-300)).cpu(),
    )


def _least_squares(columns: Float[Tensor, "N V J"], grad: Float[Tensor, "N V"]) -> tuple[Tensor, Tensor]:
    """The coefficients of unit columns, (N, J), and what they leave of the gradient, (N, V)."""
    q, r = torch.linalg.qr(columns)
    on = q.mT @ grad[..., None]
    return solved(r, on), grad - (q @ on)[..., 0]


def solved(r: Float[Tensor, "N J J"], on: Float[Tensor, "N J 1"]) -> Float[Tensor, "N J"]:
    """The solution of r x = on; where it is not unique, one of them."""
    r = r + torch.diag_embed(torch.where(r.diagonal(dim1=-2, dim2=-1).abs() < 1e-12, 1e-12, 0.0))
    return torch.linalg.solve_triangular(r, on, upper=True)[..., 0]


def distance_apart(columns: Float[Tensor, "N V J"]) -> Float[Tensor, " N"]:
    """The smallest singular value of unit columns: 0 where some coincide."""
    return torch.linalg.eigvalsh(columns.mT @ columns)[:, 0].clamp(min=0).sqrt()


def identifiable(apart: Tensor, lengths: Tensor) -> Bool[Tensor, " N"]:
    """Where weights are identifiable: no two columns coincide, and none is zero."""
    return (apart > 1e-4) & (lengths > 1e-13).all(-1)


def weight_noise(rounding: Tensor, apart: Tensor, lengths: Tensor) -> Float[Tensor, " N"]:
    """The absolute precision of the weights."""
    return rounding / (lengths.amin(-1) * apart).clamp(min=1e-300)
