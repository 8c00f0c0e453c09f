"""Mean absolute error: loss 2 (1 - p_y), label weight 2 p_y."""

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from qlens.core.target import Target
from qlens.core.tokens import Tokens
from qlens.registry import register


@register(
    "mae",
    title="Mean absolute error",
    paper="Ghosh et al. 2017, arXiv 1712.09482",
    structure="label",
    trusted="2 p_y",
    residual="student",
    simplex=False,
    limits="2 times dft",
    cites=("ghosh2017mae",),
)
def mae(tokens: Tokens) -> Target:
    r"""Absolute error sum_k |p_k - d_k| = 2 (1 - p_y).

    .. math:: \ell = \sum_k |p_k - d_k| = 2 (1 - p_y), \qquad Q = 2 p_y d + (1 - 2 p_y) p

    Args:
        tokens: logits (N, V) and labels (N,).

    Returns:
        Q (N, V) at scale 1, signed where p_y > 1/2. Losses (N,) have no unit.

    Source: Ghosh et al. 2017 (arXiv 1712.09482).

    Example:
        >>> import torch
        >>> mae(Tokens(logits=torch.zeros(1, 2), labels=torch.tensor([0]))).q
        tensor([[1., 0.]])
    """
    return Target.push(tokens, 2 * tokens.label_probs.detach())


@mae.loss
def mae_loss(tokens: Tokens) -> Float[Tensor, " N"]:
    """sum_k |p_k - d_k|, the label's term being 1 - p_y."""
    p = F.softmax(tokens.logits, -1)
    p_y = p.gather(1, tokens.labels.long()[:, None])[:, 0]
    return 1 - p_y + (p.sum(-1) - p_y)
