"""Brier score: the squared distance between the student's distribution and the label."""

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
    residual="the student's, the strong alternatives below their share",
    simplex=True,
    limits="no update where p is one-hot, right or wrong",
    cites=("brier1950",),
)
def brier(tokens: Tokens) -> Target:
    r"""The squared distance between the student's distribution and the one-hot label, over the whole vocabulary.

    .. math:: \ell = \sum_k (p_k - d_k)^2, \qquad Q = p - 2 p \odot \Big(p - d - \sum_j p_j^2 + p_y\Big)

    Takes ``tokens.logits`` and ``tokens.labels``; gives (N,) losses without a unit and Q (N, V) at s = 1, always a
    distribution: p_k + p_y - sum_j p_j^2 is at most p_k (1 - p_k) + p_y (1 - p_y), so no entry is below 0. The
    alternatives do not keep the student's proportions: the strong lose more than their share.

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
