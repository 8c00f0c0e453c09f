"""Generalised Jensen-Shannon divergence between teacher and student."""

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


@register(
    "jsd",
    title="Generalised Jensen-Shannon divergence",
    paper="Agarwal et al. 2023, arXiv 2306.13649",
    needs=("teacher",),
    trusted="(1 - beta) p_y (KL(p || m) - log(p_y / m_y)) / (1 - p_y), with m = beta teacher + (1 - beta) p",
    residual="Q = p (1 - (1 - beta) (log(p / m) - KL(p || m))), with m = beta teacher + (1 - beta) p",
    simplex=lambda beta: beta < 1,
    limits="beta = 0 is kd, beta = 1 is reverse_kl, as TRL has it; near the ends the loss is smaller by beta, or 1 - beta",
    modes={"distillation-trainer": {"beta": 1.0}},
    differences=(
        "TRL takes beta 0 and 1 as the two divergences themselves, where the formula gives 0: the loss jumps there.",
        "TRL's GKD samples at temperature .9 and computes the loss at 1; its distillation trainer's beta is 1.",
        "DistiLLM's weight is 1 - beta.",
    ),
    code="huggingface/trl trl/experimental/gkd/gkd_trainer.py::GKDTrainer.generalized_jsd_loss",
    cites=("agarwal2023gkd",),
)
def jsd(tokens: Tokens, *, beta: Share = 0.5) -> Target:
    r"""Divergences of teacher and student from their mixture m.

    .. math:: \ell = \beta KL(\pi_T \| m) + (1 - \beta) KL(p \| m), \quad m = \beta \pi_T + (1 - \beta) p, \qquad
              Q = p \odot (1 - (1 - \beta)(\log (p / m) - KL(p \| m)))

    Args:
        tokens: logits (N, V), labels (N,) and teacher (N, V).
        beta: share of the teacher; 0 is KL(teacher || p), 1 is KL(p || teacher), as TRL has it.

    Returns:
        Q (N, V) at scale 1, a distribution for beta < 1. Losses (N,) are in nats.

    Raises:
        InputError: ``tokens.teacher`` is missing.

    Source: Agarwal et al. 2023 (arXiv 2306.13649); the ends from released code.

    Example:
        >>> import torch
        >>> z = torch.zeros(1, 2)
        >>> jsd(Tokens(logits=z, labels=torch.tensor([0]), teacher=z)).q
        tensor([[0.5000, 0.5000]])
    """
    log_p, log_t = tokens.log_probs.detach(), tokens.log_probs_of("teacher")
    if beta == 0:
        return Target.mix(tokens, trust=0.0, residual=log_t.exp())
    if beta == 1:
        return Target.slope(tokens, log_p - log_t)
    log_m = torch.logaddexp(log_t + math.log(beta), log_p + math.log1p(-beta))
    return Target.slope(tokens, (1 - beta) * (log_p - log_m))


@jsd.loss
def jsd_loss(tokens: Tokens, *, beta) -> Float[Tensor, " N"]:
    """beta KL(teacher || m) + (1 - beta) KL(student || m)."""
    log_p, log_t = both(tokens)
    if beta in (0, 1):
        return kl(log_p, log_t) if beta else kl(log_t, log_p)
    log_m = log_mix(log_t, log_p, beta)
    return beta * kl(log_t, log_m) + (1 - beta) * kl(log_p, log_m)
