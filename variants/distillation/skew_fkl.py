"""Skew forward KL: divergence from the teacher to a mixture of teacher and student."""

import math

import torch
from jaxtyping import Float
from torch import Tensor

from qlens.core.numerics import kl, log_mix
from qlens.core.target import Target
from qlens.core.tokens import Tokens
from qlens.registry import register
from qlens.registry.params import Share
from qlens.variants.distillation.reverse_kl import both

DISTILLM_CODE = "jongwooko/distillm distillm/losses.py"


@register(
    "skew_fkl",
    title="Skew forward KL",
    paper="Ko et al. 2024, arXiv 2402.03898",
    needs=("teacher",),
    trusted=(
        "p_y ((1 - alpha) teacher_y / m_y - a) / (1 - p_y), "
        "with m = alpha teacher + (1 - alpha) p, a = (1 - alpha) E_p[teacher / m]"
    ),
    residual=(
        "Q = p (1 - a + (1 - alpha) teacher / m), "
        "with m = alpha teacher + (1 - alpha) p, a = (1 - alpha) E_p[teacher / m]"
    ),
    simplex=True,
    limits="alpha = 0 is kd; alpha = 1 has no gradient",
    differences=(
        "The released value leaves out the teacher's entropy, so that it is no divergence; the gradient is right.",
    ),
    code=DISTILLM_CODE,
    cites=("ko2024distillm",),
)
def skew_fkl(tokens: Tokens, *, alpha: Share = 0.1) -> Target:
    r"""KL(teacher || m) with m = alpha teacher + (1 - alpha) p.

    .. math:: \ell = KL(\pi_T \| m), \quad m = \alpha \pi_T + (1 - \alpha) p, \qquad
              Q = p \odot \big(1 - A + (1 - \alpha) \pi_T / m\big), \quad A = (1 - \alpha) \mathbb{E}_p[\pi_T / m]

    Args:
        tokens: logits (N, V), labels (N,), which do not enter, and teacher (N, V).
        alpha: share of the teacher in m.

    Returns:
        Q (N, V) at scale 1, always a distribution. Losses (N,) are in nats.

    Raises:
        InputError: ``tokens.teacher`` is missing.

    Source: Ko et al. 2024 (arXiv 2402.03898).

    Example:
        >>> import torch
        >>> z = torch.zeros(1, 2)
        >>> skew_fkl(Tokens(logits=z, labels=torch.tensor([0]), teacher=z)).q
        tensor([[0.5000, 0.5000]])
    """
    log_p, log_t = tokens.log_probs.detach(), tokens.log_probs_of("teacher")
    if alpha == 0:
        return Target.mix(tokens, trust=0.0, residual=log_t.exp())
    if alpha == 1:
        return Target.slope(tokens, torch.zeros_like(log_p))
    log_m = torch.logaddexp(log_t + math.log(alpha), log_p + math.log1p(-alpha))
    return Target.slope(tokens, -(1 - alpha) * (log_t - log_m).exp())


@skew_fkl.loss
def skew_fkl_loss(tokens: Tokens, *, alpha) -> Float[Tensor, " N"]:
    """KL(teacher || alpha teacher + (1 - alpha) student)."""
    log_p, log_t = both(tokens)
    return kl(log_t, log_mix(log_t, log_p, alpha))
