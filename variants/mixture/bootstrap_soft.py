"""Soft bootstrapping: cross-entropy toward the label mixed with the student's own distribution."""

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from qlens.core.target import Target
from qlens.core.tokens import Tokens
from qlens.registry import register
from qlens.registry.params import Share

PAPER = "Reed et al. 2014, arXiv 1412.6596"
CODE = "vfdev-5/BootstrappingLoss bootstrapping_loss/loss.py"


@register(
    "bootstrap_soft",
    title="Soft bootstrapping",
    paper=PAPER,
    trusted="beta",
    residual="student; not detached: p (1 + log p + H)",
    simplex=lambda beta, detach: detach or beta == 1,
    limits="beta = 1 is sft; detached it is sft with a constant trust",
    modes={"attached": {"detach": False}},
    differences=(
        "With the student's part not detached the alternatives are reshaped too: the weak lose mass, down to below zero.",
        "The released code does not mask ignored positions in its second term.",
    ),
    code=CODE,
    cites=("reed2014bootstrapping",),
)
def bootstrap_soft(tokens: Tokens, *, beta: Share = 0.95, detach: bool = True) -> Target:
    r"""Cross-entropy toward beta d + (1 - beta) p.

    .. math:: \ell = -\sum_k (\beta d_k + (1 - \beta) p_k) \log p_k, \qquad Q = \beta d + (1 - \beta) p

    Args:
        tokens: logits (N, V) and labels (N,).
        beta: trust in the label.
        detach: stop the gradient of the p in the target; otherwise Q = beta d + (1 - beta) p (1 + log p + H), signed.

    Returns:
        Q (N, V) at scale 1. Losses (N,) are in nats.

    Source: Reed et al. 2014 (arXiv 1412.6596).

    Example:
        >>> import torch
        >>> bootstrap_soft(Tokens(logits=torch.zeros(1, 2), labels=torch.tensor([0])), beta=0.5).q
        tensor([[0.7500, 0.2500]])
    """
    if detach:
        return Target.mix(tokens, trust=beta, residual="student")
    log_p = tokens.log_probs.detach().masked_fill(tokens.log_probs == -torch.inf, 0.0)
    return Target.slope(tokens, -(1 - beta) * log_p, label_weight=beta)


@bootstrap_soft.loss
def bootstrap_soft_loss(tokens: Tokens, *, beta, detach) -> Float[Tensor, " N"]:
    """-sum_k (beta d_k + (1 - beta) p_k) log p_k."""
    log_p = F.log_softmax(tokens.logits, -1)
    p = log_p.exp().detach() if detach else log_p.exp()
    own = -(p * log_p.masked_fill(log_p == -torch.inf, 0.0)).sum(-1)
    return beta * F.nll_loss(log_p, tokens.labels.long(), reduction="none") + (1 - beta) * own
