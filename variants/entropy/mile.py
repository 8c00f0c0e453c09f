"""MiLe loss: log-likelihood weighted by (1 + H)^gamma over its mean in the batch."""

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from qlens.core.target import Target
from qlens.core.tokens import Tokens
from qlens.registry import register
from qlens.registry.params import Weight

LEAST = 1e-8  # the released code's floor of every probability within the entropy


@register(
    "mile",
    title="MiLe loss",
    paper="Su et al. 2023, arXiv 2310.19531",
    scope=lambda gamma: "batch" if gamma else "token",
    trusted="w / mean(w), with w = (1 + H)^gamma",
    residual="student",
    simplex=lambda gamma: gamma == 0,
    limits="gamma = 0 is sft; label weight above 1 where H is above its mean in the batch",
    differences=(
        "The released mean runs over ignored positions too, which Tokens does not hold: here it runs over all tokens given.",
        "The released code averages the normaliser over devices; here it is the micro-batch's own.",
        "It was written for pre-training.",
    ),
    code="suu990901/LLaMA-MiLe-Loss utils/trainer.py::MiLeLoss",
    cites=("mile2023",),
)
def mile(tokens: Tokens, *, gamma: Weight = 1.0) -> Target:
    r"""Log-likelihood weighted by (1 + H)^gamma, normalised to mean 1 over the batch.

    .. math:: \ell = -\mathrm{sg}(w) \log p_y, \quad w = (1 + H)^\gamma / \overline{(1 + H)^\gamma}, \qquad Q = w d + (1 - w) p

    Every probability within H is at least 1e-8.

    Args:
        tokens: logits (N, V) and labels (N,).
        gamma: exponent.

    Returns:
        Q (N, V) at scale 1, signed where w > 1. Losses (N,) are in nats.

    Source: Su et al. 2023 (arXiv 2310.19531); the floor from released code.

    Example:
        >>> import torch
        >>> mile(Tokens(logits=torch.zeros(2, 2), labels=torch.tensor([0, 1]))).trust
        tensor([1., 1.])
    """
    log_p = tokens.log_probs.detach()
    entropy = -(log_p.exp().clamp(min=LEAST) * log_p.clamp(min=torch.tensor(LEAST, dtype=log_p.dtype).log())).sum(-1)
    share = torch.softmax(gamma * entropy.log1p(), 0)  # of the batch: in logs, for large gamma
    return Target.mix(tokens, trust=len(share) * share, residual="student")


@mile.loss
def mile_loss(tokens: Tokens, *, gamma) -> Float[Tensor, " N"]:
    """-sg(w) log p_y."""
    nll = F.cross_entropy(tokens.logits, tokens.labels.long(), reduction="none")
    with torch.no_grad():
        probs = F.softmax(tokens.logits, -1).clamp(min=1e-8)
        base = 1 - (probs * probs.log()).sum(-1)
        powers = torch.pow(base / base.max(), gamma) if len(base) else base
        weights = powers * (len(powers) / powers.sum())
    return weights * nll
