"""Reverse KL: divergence from the student to a teacher."""

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from qlens.core.numerics import kl
from qlens.core.target import Target
from qlens.core.tokens import Tokens
from qlens.registry import register


@register(
    "reverse_kl",
    title="Reverse KL to a teacher",
    paper="Gu et al. 2023, arXiv 2306.08543 (MiniLLM's exact per-step term)",
    needs=("teacher",),
    trusted="p_y (log(teacher_y / p_y) + KL(p || teacher)) / (1 - p_y)",
    residual="Q = p (1 + log(teacher / p) + KL(p || teacher))",
    simplex=False,
    limits="jsd(beta=1); tokens with p near 0 get no push, whatever the teacher says",
    differences=(
        "MiniLLM trains by policy gradient with this as one part; TRL's port never masks padding.",
        "Infinite where the teacher excludes a token that the student does not.",
    ),
    code="microsoft/LMOps minillm/minillm/losses.py",
    cites=("gu2023minillm",),
)
def reverse_kl(tokens: Tokens) -> Target:
    r"""KL divergence from the student to the teacher.

    .. math:: \ell = KL(p \| \pi_T), \qquad Q = p \odot (1 + \log (\pi_T / p) + KL(p \| \pi_T))

    Args:
        tokens: logits (N, V), labels (N,), which do not enter, and teacher (N, V).

    Returns:
        Q (N, V) at scale 1, below zero where the student far exceeds the teacher. Losses (N,) are in nats.

    Raises:
        InputError: ``tokens.teacher`` is missing.

    Source: Gu et al. 2023 (arXiv 2306.08543).

    Example:
        >>> import torch
        >>> z = torch.zeros(1, 2)
        >>> reverse_kl(Tokens(logits=z, labels=torch.tensor([0]), teacher=z)).q
        tensor([[0.5000, 0.5000]])
    """
    return Target.slope(tokens, tokens.log_probs.detach() - tokens.log_probs_of("teacher"))


@reverse_kl.loss
def reverse_kl_loss(tokens: Tokens) -> Float[Tensor, " N"]:
    """KL(student || teacher)."""
    log_p, log_t = both(tokens)
    return kl(log_p, log_t)


def both(tokens: Tokens) -> tuple[Tensor, Tensor]:
    """log p, differentiable, and the teacher's, a constant."""
    return F.log_softmax(tokens.logits, -1), F.log_softmax(tokens.require("teacher"), -1).detach()
