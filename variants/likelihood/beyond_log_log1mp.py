"""Beyond log-likelihood, log(1 - p_y): label weight p_y / (1 - p_y)."""

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from qlens.core.target import Target
from qlens.core.tokens import Tokens
from qlens.registry import register
from qlens.variants.likelihood.beyond_log import CODE, PAPER


@register(
    "beyond_log_log1mp",
    title="Beyond log-likelihood, log(1 - p)",
    paper=PAPER,
    structure="label",
    trusted="p_y / (1 - p_y)",
    residual="student",
    simplex=False,
    limits="label weight above 1 where p_y > 1/2; g_y = -p_y",
    differences=(
        "The authors' table gives trust in [0, 1] for the whole row; here it is above 1 wherever p_y is above 1/2.",
    ),
    code=CODE,
    cites=("beyondlog2025",),
)
def beyond_log_log1mp(tokens: Tokens) -> Target:
    r"""Loss log(1 - p_y), label weight p_y / (1 - p_y).

    .. math:: \ell = \log(1 - p_y), \qquad Q = \frac{p_y}{1 - p_y} d + \left(1 - \frac{p_y}{1 - p_y}\right) p

    The gradient is g = p_y (p_{-y} - d), with p_{-y} the distribution of the other tokens.

    Args:
        tokens: logits (N, V) and labels (N,).

    Returns:
        Signed Q (N, V) at scale 1. Losses (N,) are in nats, negative, and unbounded as p_y -> 1.

    Source: Li et al. 2025 (arXiv 2510.00526).

    Example:
        >>> import torch
        >>> beyond_log_log1mp(Tokens(logits=torch.zeros(1, 4), labels=torch.tensor([0]))).q
        tensor([[0.5000, 0.1667, 0.1667, 0.1667]])
    """
    p_y = tokens.label_probs.detach()[:, None]
    return Target.from_grad(tokens, p_y * (tokens.others - tokens.one_hot))


@beyond_log_log1mp.loss
def beyond_log_log1mp_loss(tokens: Tokens) -> Float[Tensor, " N"]:
    """log(1 - p_y)."""
    label = F.one_hot(tokens.labels.long(), tokens.logits.shape[-1]).bool()
    return tokens.logits.masked_fill(label, -torch.inf).logsumexp(-1) - tokens.logits.logsumexp(-1)
