"""R-Drop: log-likelihood under two dropout passes, and half the divergence between them both ways."""

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from qlens.core.target import Target
from qlens.core.tokens import Tokens
from qlens.registry import register
from qlens.registry.params import Weight


@register(
    "r_drop",
    title="R-Drop",
    paper="Liang et al. 2021, arXiv 2106.14448",
    needs=("second",),
    trusted="nll - weight (p_y - second_y + p_y (log(p_y / second_y) - KL(p || second))) / (2 (1 - p_y))",
    residual="Q = p - nll (p - d) - weight / 2 (p - second + p (log(p / second) - KL(p || second)))",
    simplex=lambda weight, nll: weight == 0 and nll <= 1,
    limits="weight = 0 is nll times sft; equal passes (no dropout): nll times sft",
    modes={"readme": {"nll": 0.5}, "summarization": {"weight": 0.7}},
    differences=(
        "The paper adds the two likelihood terms, the README averages them: its weight is half the paper's for the same ratio.",
        "Paper and code let the gradient through both passes; here the second is a constant, which by symmetry gives half of "
        "the gradient in expectation.",
    ),
    code="dropreg/R-Drop fairseq_src/examples/language_model_rdrop/language_model_rdrop_src/loss/reg_cross_entropy.py",
    cites=("liang2021rdrop",),
)
def r_drop(tokens: Tokens, *, weight: Weight = 1.0, nll: Weight = 1.0) -> Target:
    r"""Log-likelihood under two passes p and p', plus half their divergence both ways.

    .. math:: \ell = -n \log p_y - n \log p'_y + \tfrac{\alpha}{2} (KL(p \| p') + KL(p' \| p)), \qquad
              Q = p - n (p - d) - \tfrac{\alpha}{2} \big[(p - p') + p \odot (\log (p / p') - KL(p \| p'))\big]

    Args:
        tokens: logits (N, V), labels (N,) and second (N, V), the pass p', a constant.
        weight: alpha, the weight of the divergences.
        nll: n, the weight of the log-likelihoods.

    Returns:
        Q (N, V) at scale 1. Losses (N,) are in nats.

    Raises:
        InputError: ``tokens.second`` is missing.

    Source: Liang et al. 2021 (arXiv 2106.14448).

    Example:
        >>> import torch
        >>> z = torch.zeros(1, 2)
        >>> r_drop(Tokens(logits=z, labels=torch.tensor([0]), second=z)).q
        tensor([[1., 0.]])
    """
    log_p, log_other = tokens.log_probs.detach(), tokens.log_probs_of("second")
    gap = torch.where(log_p > -torch.inf, log_p - log_other, 0.0)
    backward = Target.slope(tokens, weight / 2 * gap, label_weight=nll)
    return Target.from_grad(tokens, backward.grad + weight / 2 * (log_p.exp() - log_other.exp()))


@r_drop.loss
def r_drop_loss(tokens: Tokens, *, weight, nll) -> Float[Tensor, " N"]:
    """-nll (log p_y + log p'_y) + weight/2 (KL(p || p') + KL(p' || p))."""
    log_p = F.log_softmax(tokens.logits, -1)
    log_second = F.log_softmax(tokens.require("second"), -1).detach()
    labels = tokens.labels.long()
    nlls = F.nll_loss(log_p, labels, reduction="none") + F.nll_loss(log_second, labels, reduction="none")
    # a token that is impossible in a pass adds nothing to that pass's divergence
    forward = (log_p.exp() * (log_p - log_second).masked_fill(log_p == -torch.inf, 0.0)).sum(-1)
    backward = (log_second.exp() * (log_second - log_p).masked_fill(log_second == -torch.inf, 0.0)).sum(-1)
    return nll * nlls + weight / 2 * (forward + backward)
