"""Symmetric cross-entropy: alpha CE(d, p) + beta CE(p, d), with log 0 read as a finite number."""

from typing import Annotated

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from qlens.core.target import Target
from qlens.core.tokens import Tokens
from qlens.registry import register
from qlens.registry.params import Between, Weight

LogZero = Annotated[float, Between(high=0)]


@register(
    "sce",
    title="Symmetric cross-entropy",
    paper="Wang et al. 2019, arXiv 1908.06112",
    structure="label",
    trusted="alpha - beta log_zero p_y",
    residual="student",
    simplex=lambda alpha, beta, log_zero: alpha - beta * log_zero <= 1,
    limits="beta = 0 is alpha times sft; alpha = 0 is -beta log_zero times dft",
    differences=("No default of alpha and beta is confirmed; log 0 is read as -4.",),
    cites=("wang2019sce",),
)
def sce(tokens: Tokens, *, alpha: Weight = 0.1, beta: Weight = 1.0, log_zero: LogZero = -4.0) -> Target:
    r"""Cross-entropy both ways, with log 0 read as a finite number A.

    .. math:: \ell = -\alpha \log p_y - \beta A (1 - p_y), \qquad Q = a d + (1 - a) p, \quad a = \alpha - \beta A p_y

    Args:
        tokens: logits (N, V) and labels (N,).
        alpha: weight of the cross-entropy.
        beta: weight of the reverse cross-entropy.
        log_zero: A, the value of log 0.

    Returns:
        Q (N, V) at scale 1, signed where a > 1. Losses (N,) are in nats.

    Source: Wang et al. 2019 (arXiv 1908.06112).

    Example:
        >>> import torch
        >>> sce(Tokens(logits=torch.zeros(1, 4), labels=torch.tensor([0])), alpha=0.0, beta=0.5).trust
        tensor([0.5000])
    """
    return Target.push(tokens, alpha - beta * log_zero * tokens.label_probs.detach())


@sce.loss
def sce_loss(tokens: Tokens, *, alpha, beta, log_zero) -> Float[Tensor, " N"]:
    """alpha CE(d, p) + beta CE(p, d)."""
    nll = F.cross_entropy(tokens.logits, tokens.labels.long(), reduction="none")
    p = F.softmax(tokens.logits, -1)
    off_label = 1 - F.one_hot(tokens.labels.long(), p.shape[-1]).to(p)
    backward = -(p * off_label * log_zero).sum(-1)
    return alpha * nll + beta * backward
