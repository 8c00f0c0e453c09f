"""Hybrid distillation: log-likelihood and KL from the teacher in fixed shares."""

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from qlens.core.numerics import kl
from qlens.core.target import Target
from qlens.core.tokens import Tokens
from qlens.registry import register
from qlens.registry.params import Positive, Share, Weight
from qlens.registry.structure import GeometricMixture
from qlens.variants.distillation.kd import kd


@register(
    "kd_hybrid",
    title="Hybrid distillation",
    paper="Hinton et al. 2015, arXiv 1503.02531",
    needs=("teacher",),
    structure=lambda temperature, **_: GeometricMixture("teacher") if temperature == 1 else "dense",
    trusted="1 - weight",
    residual="teacher",
    scale="1; hard given: hard + weight",
    simplex=lambda weight, temperature, square, hard: True if temperature == 1 else None,
    limits="weight = 0 is sft; weight = 1 is kd",
    modes={
        "liger": {"temperature": 2.0, "square": False},
        "ms-swift": {"hard": 1.0, "weight": 1.0},
    },
    differences=(
        "The authors' table is exact at T = 1 only.",
        "Liger and axolotl leave out the factor T squared; Liger's labels stay at T = 1, and its mean is over valid tokens.",
        "ms-swift adds the label's loss to a whole distillation loss: the weights do not add up to 1 (hard).",
    ),
    code="linkedin/Liger-Kernel src/liger_kernel/chunked_loss/fused_linear_distillation.py",
    cites=("hinton2015distilling",),
)
def kd_hybrid(
    tokens: Tokens,
    *,
    weight: Share = 0.5,
    temperature: Positive = 1.0,
    square: bool = True,
    hard: Weight | None = None,
) -> Target:
    r"""Log-likelihood and KL from the teacher in fixed shares.

    .. math:: \ell = -(1 - \lambda) \log p_y + \lambda\, KL(\pi_T \| p), \qquad Q = (1 - \lambda) d + \lambda \pi_T

    Args:
        tokens: logits (N, V), labels (N,) and teacher (N, V).
        weight: lambda, the share of the teacher.
        temperature: T of the divergence; at T != 1 the residual is not the teacher.
        square: multiply the divergence by T squared.
        hard: weight of the log-likelihood; by default 1 - weight.

    Returns:
        Q (N, V) at scale 1, or hard + weight. Losses (N,) are in nats.

    Raises:
        InputError: ``tokens.teacher`` is missing.

    Source: Hinton et al. 2015 (arXiv 1503.02531).

    Example:
        >>> import torch
        >>> z = torch.zeros(1, 2)
        >>> kd_hybrid(Tokens(logits=z, labels=torch.tensor([0]), teacher=z)).q
        tensor([[0.7500, 0.2500]])
    """
    label = 1 - weight if hard is None else hard
    if temperature == 1:
        scale = 1.0 if hard is None else hard + weight
        trust = label / scale if scale else 1.0
        return Target.mix(tokens, trust=trust, residual=tokens.log_probs_of("teacher").exp(), scale=scale)
    soft = kd(tokens, temperature=temperature, square=square).grad
    return Target.from_grad(tokens, label * (tokens.probs.detach() - tokens.one_hot) + weight * soft)


@kd_hybrid.loss
def kd_hybrid_loss(tokens: Tokens, *, weight, temperature, square, hard) -> Float[Tensor, " N"]:
    """-(1 - weight) log p_y + weight KL(teacher || student), the second at the temperature."""
    nll = F.cross_entropy(tokens.logits, tokens.labels.long(), reduction="none")
    log_t = F.log_softmax(tokens.require("teacher") / temperature, -1).detach()
    soft = kl(log_t, F.log_softmax(tokens.logits / temperature, -1)) * (temperature**2 if square else 1)
    return (1 - weight if hard is None else hard) * nll + weight * soft
