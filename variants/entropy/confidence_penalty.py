"""Confidence penalty: log-likelihood minus a multiple of the student's entropy."""

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from qlens.core.target import Target
from qlens.core.tokens import Tokens
from qlens.registry import register
from qlens.registry.params import Weight


@register(
    "confidence_penalty",
    title="Confidence penalty",
    paper="Pereyra et al. 2017, arXiv 1701.06548",
    trusted="1 - weight p_y (log p_y + H) / (1 - p_y)",
    residual="Q = d - weight p (log p + H)",
    simplex=lambda weight: weight == 0,
    limits="weight = 0 is sft",
    cites=("pereyra2017penalty",),
)
def confidence_penalty(tokens: Tokens, *, weight: Weight = 0.1) -> Target:
    r"""Log-likelihood minus ``weight`` times the entropy of p.

    .. math:: \ell = -\log p_y - \lambda H(p), \qquad Q = d - \lambda\, p \odot (\log p + H)

    Args:
        tokens: logits (N, V) and labels (N,).
        weight: lambda, the weight of the entropy.

    Returns:
        Signed Q (N, V) at scale 1. Losses (N,) are in nats.

    Source: Pereyra et al. 2017 (arXiv 1701.06548).

    Example:
        >>> import torch
        >>> confidence_penalty(Tokens(logits=torch.zeros(1, 2), labels=torch.tensor([0]))).q
        tensor([[1., 0.]])
    """
    log_p = tokens.log_probs.detach()
    return Target.slope(tokens, weight * log_p.masked_fill(log_p == -torch.inf, 0.0), label_weight=1.0)


@confidence_penalty.loss
def confidence_penalty_loss(tokens: Tokens, *, weight) -> Float[Tensor, " N"]:
    """-log p_y + weight sum_k p_k log p_k."""
    log_p = F.log_softmax(tokens.logits, -1)
    nll = F.nll_loss(log_p, tokens.labels.long(), reduction="none")
    return nll + weight * (log_p.exp() * log_p.masked_fill(log_p == -torch.inf, 0.0)).sum(-1)
