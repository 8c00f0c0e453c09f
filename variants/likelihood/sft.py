"""Standard SFT: cross-entropy on the observed token, Q = d."""

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from qlens.core.target import Target
from qlens.core.tokens import Tokens
from qlens.registry import register


@register(
    "sft",
    title="Standard SFT",
    paper="common practice",
    structure="label",
    trusted="1",
    residual="student",
    simplex=True,
    limits="every weighted method at weight 1",
    differences=("Frameworks differ in what the mean divides by, and in nothing else.",),
)
def sft(tokens: Tokens) -> Target:
    r"""Cross-entropy on the observed token.

    .. math:: \ell = -\log p_y, \qquad Q = d

    Args:
        tokens: logits (N, V) and labels (N,).

    Returns:
        Q (N, V), the one-hot label, at scale 1. Losses (N,) are in nats.

    Source: common practice.

    Example:
        >>> import torch
        >>> sft(Tokens(logits=torch.zeros(1, 3), labels=torch.tensor([1]))).q
        tensor([[0., 1., 0.]])
    """
    return Target.mix(tokens, trust=1.0, residual="student")


@sft.loss
def sft_loss(tokens: Tokens) -> Float[Tensor, " N"]:
    """-log p_y."""
    return F.cross_entropy(tokens.logits, tokens.labels.long(), reduction="none")
