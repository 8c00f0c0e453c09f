"""Brier score: squared distance between the student's distribution and the one-hot label."""

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from qlens.core.target import Target
from qlens.core.tokens import Tokens
from qlens.registry import register


@register(
    "brier",
    title="Brier score",
    paper="Brier 1950, Monthly Weather Review 78",
    trusted="2 p_y (1 + sum_k p_k^2 - 2 p_y) / (1 - p_y)",
    residual="Q = p - 2 p (p - d - sum_k p_k^2 + p_y)",
    simplex=True,
    limits="no update where p is one-hot, right or wrong",
    cites=("brier1950",),
)
def brier(tokens: Tokens) -> Target:
    r"""Squared distance of p from the one-hot label, over the whole vocabulary.

    .. math:: \ell = \sum_k (p_k - d_k)^2, \qquad Q = p - 2 p \odot \Big(p - d - \sum_j p_j^2 + p_y\Big)

    No entry of Q is below 0, since p_k + p_y - sum_j p_j^2 is at most p_k (1 - p_k) + p_y (1 - p_y). Strong
    alternatives lose more than their share.

    Args:
        tokens: logits (N, V) and labels (N,).

    Returns:
        Q (N, V) at scale 1, always a distribution. Losses (N,) have no unit.

    Source: Brier 1950.

    Example:
        >>> import torch
        >>> brier(Tokens(logits=torch.zeros(1, 2), labels=torch.tensor([0]))).q
        tensor([[1., 0.]])
    """
    return Target.slope(tokens, 2 * (tokens.probs.detach() - tokens.one_hot))


@brier.loss
def brier_loss(tokens: Tokens) -> Float[Tensor, " N"]:
    """sum_k (p_k - d_k)^2."""
    p = F.softmax(tokens.logits, -1)
    return (p - F.one_hot(tokens.labels.long(), p.shape[-1])).square().sum(-1)
