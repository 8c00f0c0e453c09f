"""Dynamic fine-tuning: log-likelihood weighted by the label's own probability, Q = p_y d + (1 - p_y) p."""

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from qlens.core.target import Target
from qlens.core.tokens import Tokens
from qlens.registry import register


@register(
    "dft",
    title="Dynamic Fine-Tuning (p-loss)",
    paper="Wu et al. 2025, arXiv 2508.05629",
    structure="label",
    trusted="p_y",
    residual="student",
    simplex=True,
    limits="p_y -> 1 gives sft; p_y -> 0 gives Q = p (no update)",
    differences=(
        "The paper sums over a sequence; the official code takes the token mean of every micro-batch.",
        "TRL computes the probability in the logits' own dtype, Liger in the model's: in bfloat16 the weight has three digits.",
        "In the official code the sequence-parallel branch is plain cross-entropy.",
    ),
    code="yongliang-wu/DFT verl/verl/trainer/fsdp_dft_trainer.py; huggingface/trl trl/trainer/sft_trainer.py::dft_loss",
    cites=("wu2025dft",),
)
def dft(tokens: Tokens) -> Target:
    r"""Log-likelihood weighted by the detached label probability p_y.

    .. math:: \ell = -\mathrm{sg}(p_y) \log p_y, \qquad Q = p_y d + (1 - p_y) p

    Args:
        tokens: logits (N, V) and labels (N,).

    Returns:
        Q (N, V) at scale 1. Losses (N,) are in nats, without clamp or clip.

    Source: Wu et al. 2025 (arXiv 2508.05629); the p-loss of Xie et al. 2026 (arXiv 2606.11189).

    Example:
        >>> import torch
        >>> dft(Tokens(logits=torch.zeros(1, 2), labels=torch.tensor([0]))).q
        tensor([[0.7500, 0.2500]])
    """
    return Target.mix(tokens, trust=tokens.label_probs.detach(), residual="student")


@dft.loss
def dft_loss(tokens: Tokens) -> Float[Tensor, " N"]:
    """-sg(p_y) log p_y."""
    nll = F.cross_entropy(tokens.logits, tokens.labels.long(), reduction="none")
    return (-nll.detach()).exp() * nll
