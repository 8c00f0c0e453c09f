"""Skew reverse KL: divergence from the student to a mixture of teacher and student."""

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
from qlens.variants.distillation.skew_fkl import DISTILLM_CODE


@register(
    "skew_rkl",
    title="Skew reverse KL",
    paper="Ko et al. 2024, arXiv 2402.03898",
    needs=("teacher",),
    trusted="p_y (E_p[c] - c_y) / (1 - p_y), with m = (1 - alpha) teacher + alpha p, c = log(p / m) - alpha p / m",
    residual="Q = p (1 - c + E_p[c]), with m = (1 - alpha) teacher + alpha p, c = log(p / m) - alpha p / m",
    simplex=lambda alpha: None if alpha > 0.05 else False,
    limits="alpha = 0 is reverse_kl; alpha = 1 has no gradient",
    code=DISTILLM_CODE,
    cites=("ko2024distillm",),
)
def skew_rkl(tokens: Tokens, *, alpha: Share = 0.1) -> Target:
    r"""KL(p || m) with m = (1 - alpha) teacher + alpha p.

    .. math:: \ell = KL(p \| m), \quad m = (1 - \alpha) \pi_T + \alpha p, \qquad
              Q = p \odot (1 - c + \mathbb{E}_p c), \quad c = \log (p / m) - \alpha p / m

    Args:
        tokens: logits (N, V), labels (N,), which do not enter, and teacher (N, V).
        alpha: share of the student in m.

    Returns:
        Q (N, V) at scale 1, possibly signed. Losses (N,) are in nats.

    Raises:
        InputError: ``tokens.teacher`` is missing.

    Source: Ko et al. 2024 (arXiv 2402.03898).

    Example:
        >>> import torch
        >>> z = torch.zeros(1, 2)
        >>> skew_rkl(Tokens(logits=z, labels=torch.tensor([0]), teacher=z)).q
        tensor([[0.5000, 0.5000]])
    """
    log_p, log_t = tokens.log_probs.detach(), tokens.log_probs_of("teacher")
    if alpha in (0, 1):
        return Target.slope(tokens, (1 - alpha) * (log_p - log_t))
    log_m = torch.logaddexp(log_t + math.log1p(-alpha), log_p + math.log(alpha))
    return Target.slope(tokens, log_p - log_m - alpha * (log_p - log_m).exp())


@skew_rkl.loss
def skew_rkl_loss(tokens: Tokens, *, alpha) -> Float[Tensor, " N"]:
    """KL(student || alpha student + (1 - alpha) teacher)."""
    log_p, log_t = both(tokens)
    return kl(log_p, log_mix(log_p, log_t, alpha))
