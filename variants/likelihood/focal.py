"""Focal loss: log-likelihood weighted by (1 - p_y)^gamma."""

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from qlens.core.target import Target
from qlens.core.tokens import Tokens
from qlens.registry import register
from qlens.registry.params import Weight


@register(
    "focal",
    title="Focal loss",
    paper="Lin et al. 2017, arXiv 1708.02002",
    structure="label",
    trusted="(1 - p_y)^gamma - gamma p_y (1 - p_y)^(gamma - 1) log p_y; detached: (1 - p_y)^gamma",
    residual="student",
    simplex=lambda gamma, detach: detach or gamma == 0,
    limits="gamma = 0 is sft; label weight up to 1.13 (gamma 1), 1.22 (2), 1.39 (5)",
    modes={"detached": {"detach": True}, "strong": {"gamma": 5.0}},
    differences=(
        "Detached, the weight never exceeds 1; as printed, it does for small p_y.",
        "One published port for text zeroes the logits of masked positions, which leaves a constant in the mean.",
        "fvcore's focal loss is the binary one and does not apply.",
    ),
    code="DarthReca/segmentation-losses-nlp loss/focal_loss.py",
    cites=("lin2017focal",),
)
def focal(tokens: Tokens, *, gamma: Weight = 2.0, detach: bool = False) -> Target:
    r"""Log-likelihood weighted by (1 - p_y)^gamma.

    .. math:: \ell = -(1 - p_y)^\gamma \log p_y, \qquad Q = a d + (1 - a) p, \quad
              a = (1 - p_y)^\gamma - \gamma p_y (1 - p_y)^{\gamma - 1} \log p_y

    Args:
        tokens: logits (N, V) and labels (N,).
        gamma: exponent of the weight.
        detach: stop the gradient of the weight, so that a = (1 - p_y)^gamma.

    Returns:
        Q (N, V) at scale 1, signed where a > 1. Losses (N,) are in nats.

    Source: Lin et al. 2017 (arXiv 1708.02002).

    Example:
        >>> import torch
        >>> focal(Tokens(logits=torch.zeros(1, 2), labels=torch.tensor([0])), detach=True).trust
        tensor([0.2500])
    """
    log_y, log_rest = tokens.label_log_probs.detach(), tokens.rest_log_probs.detach()
    other_mass = log_rest.exp()
    push = torch.where(log_rest > -torch.inf, gamma * log_rest, -torch.inf if gamma else 0.0).exp()
    if not detach:
        ratio = torch.where(
            other_mass > 0, -torch.where(other_mass < 0.5, torch.log1p(-other_mass), log_y) / other_mass, 1.0
        )  # -log p / (1 - p)
        push = push * (1 + gamma * log_y.exp() * ratio)
    return Target.push(tokens, push)


@focal.loss
def focal_loss(tokens: Tokens, *, gamma, detach) -> Float[Tensor, " N"]:
    """-(1 - p_y)^gamma log p_y."""
    nll = F.cross_entropy(tokens.logits, tokens.labels.long(), reduction="none")
    # log(1 - p_y), added up over the others where p_y is near 1; finite where there are none
    other_log_p = (
        F.log_softmax(tokens.logits, -1).scatter(1, tokens.labels.long()[:, None], -torch.inf).clamp(min=-1e30)
    )
    p_y = torch.exp(-nll)
    log_rest = torch.where(p_y < 0.5, torch.log1p(-p_y.clamp(max=0.5)), other_log_p.logsumexp(-1))
    weight = torch.exp(gamma * log_rest)
    return (weight.detach() if detach else weight) * nll
