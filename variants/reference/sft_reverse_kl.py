"""SFT with a reverse KL anchor: log-likelihood plus KL(student || reference)."""

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from qlens.core.numerics import kl
from qlens.core.target import Target
from qlens.core.tokens import Tokens
from qlens.registry import register
from qlens.registry.params import Weight


@register(
    "sft_reverse_kl",
    title="SFT with a reverse KL anchor",
    paper="common practice; the baseline of arXiv 2605.10973's code",
    needs=("reference",),
    trusted="1 - weight p_y (log(p_y / reference_y) - KL(p || reference)) / (1 - p_y)",
    residual="Q = d - weight p (log(p / reference) - KL(p || reference))",
    simplex=False,
    limits="weight = 0 is sft; near p = r as sft_kl, to first order",
    differences=("Its target is no mixture of fixed parts, unlike that of the forward direction.",),
    code="jinhangzhan/RPSFT sft/src/training/trainer.py::_KLLossMixin",
    cites=("rpsft2026",),
)
def sft_reverse_kl(tokens: Tokens, *, weight: Weight = 0.1) -> Target:
    r"""Log-likelihood plus ``weight`` times KL(p || r) to the frozen reference r.

    .. math:: \ell = -\log p_y + \lambda\, KL(p \| r), \qquad Q = d - \lambda\, p\, (\log (p / r) - KL(p \| r))

    Args:
        tokens: logits (N, V), labels (N,) and reference (N, V).
        weight: lambda, the weight of the anchor.

    Returns:
        Signed Q (N, V) at scale 1. Losses (N,) are in nats.

    Raises:
        InputError: ``tokens.reference`` is missing.

    Source: released code; Xie et al. 2026 (arXiv 2606.11189) for Q = p - g.

    Example:
        >>> import torch
        >>> z = torch.zeros(1, 2)
        >>> sft_reverse_kl(Tokens(logits=z, labels=torch.tensor([0]), reference=z)).q
        tensor([[1., 0.]])
    """
    log_p = tokens.log_probs.detach()
    log_ratio = torch.where(log_p > -torch.inf, log_p - tokens.log_probs_of("reference"), 0.0)
    return Target.slope(tokens, weight * log_ratio, label_weight=1.0)


@sft_reverse_kl.loss
def sft_reverse_kl_loss(tokens: Tokens, *, weight) -> Float[Tensor, " N"]:
    """-log p_y + weight KL(student || reference)."""
    log_p = F.log_softmax(tokens.logits, -1)
    log_r = F.log_softmax(tokens.require("reference"), -1).detach()
    nll = F.nll_loss(log_p, tokens.labels.long(), reduction="none")
    return nll + weight * kl(log_p, log_r)
