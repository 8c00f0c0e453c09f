"""Label probabilities, mixtures and their gradients from raw logits, by the Triton kernels; as ``kernels`` in plain torch."""

import math
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from qlens.engine.kernels.raw_logits import RawLogits
from qlens.registry.structure import GeometricMixture


def raw_label_log_probs(z: RawLogits, labels: Int[Tensor, " n"], write: bool = False) -> tuple[Tensor, Tensor]:
    """log p_y and log(1 - p_y), (n,); with ``write`` p_{-y} - d is left in place of the logits."""
    from qlens.engine.kernels.triton_kernels import statistics

    at_label, rest = statistics(z, labels, write=write)
    return _log_probs(at_label, rest)[:2]


class RawTerms(NamedTuple):
    """Of a chunk's rows, (n,) each: log p_y, log(1 - p_y), the loss toward r, r_y, and log sum exp of the logits of p and r."""

    log_p: Tensor
    log_rest: Tensor
    residual_loss: Tensor
    r_y: Tensor
    log_z: Tensor
    log_r_z: Tensor


def raw_mixture_terms(
    z: RawLogits, y: RawLogits | None, labels: Int[Tensor, " n"], mixture: GeometricMixture
) -> RawTerms:
    """What a mixture's loss and gradient need beside trust and scale; y: the other model's logits, None for a uniform r."""
    from qlens.engine.kernels.triton_kernels import MIXTURE, UNIFORM, statistics

    kl, vocabulary = mixture.value != "cross_entropy", z.values.shape[1]
    if y is None:
        at_label, rest, mean = statistics(z, labels, kind=UNIFORM)
        log_p, log_rest, log_z = _log_probs(at_label, rest)
        loss = log_z - mean - (math.log(vocabulary) if kl else 0.0)
        loss = loss.masked_fill(mean == -torch.inf, torch.inf)  # of an impossible token: no inf - inf
        return RawTerms(log_p, log_rest, loss, torch.full_like(log_p, 1 / vocabulary), log_z, torch.zeros_like(log_p))
    exponents = (mixture.own, mixture.other)
    at_label, rest, expected, r_at_label, log_r_z = statistics(z, labels, kind=MIXTURE, y=y, exponents=exponents, kl=kl)
    log_p, log_rest, log_z = _log_probs(at_label, rest)
    loss = expected + log_z - (log_r_z if kl else 0.0)
    return RawTerms(log_p, log_rest, loss, (r_at_label - log_r_z).exp(), log_z, log_r_z)


def raw_mixture_gradient_(
    z: RawLogits,
    y: RawLogits | None,
    labels: Int[Tensor, " n"],
    terms: RawTerms,
    trust: Float[Tensor, " n"],
    mixture: GeometricMixture,
) -> None:
    """p - t d - (1 - t) r in place of the logits."""
    from qlens.engine.kernels.triton_kernels import gradient_

    label_entry = (1 - trust) * (terms.log_p.exp() - terms.r_y) - trust * terms.log_rest.exp()  # uncancelled
    row_numbers = torch.stack([terms.log_z, 1 - trust, label_entry, terms.log_r_z])
    gradient_(z, labels, row_numbers, y, (mixture.own, mixture.other))


def _log_probs(at_label: Tensor, rest: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """log p_y, log(1 - p_y) and log sum exp of all logits, from the label's logit and log sum exp of the others."""
    log_z = torch.logaddexp(at_label, rest)
    return at_label - log_z, (rest - log_z).clamp(min=-1e30), log_z
