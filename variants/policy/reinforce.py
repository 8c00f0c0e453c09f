"""REINFORCE: log-likelihood times an advantage."""

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from qlens.core.target import Target
from qlens.core.tokens import Tokens
from qlens.registry import register


@register(
    "reinforce",
    title="REINFORCE",
    paper="Williams 1992, Machine Learning 8",
    needs=("advantage",),
    structure="label",
    trusted="A",
    residual="student",
    simplex=None,
    limits="every advantage 1 is sft; a negative one pushes the label down in favour of all others alike",
    cites=("williams1992reinforce",),
)
def reinforce(tokens: Tokens) -> Target:
    r"""Log-likelihood of a sampled token times its advantage A.

    .. math:: \ell = -A \log p_y, \qquad Q = A d + (1 - A) p

    Args:
        tokens: logits (N, V), labels (N,) and advantage (N,), a constant.

    Returns:
        Q (N, V) at scale 1, a distribution where A is within [-p_y / (1 - p_y), 1]. Losses (N,) are in nats times the
        advantage's unit.

    Raises:
        InputError: ``tokens.advantage`` is missing.

    Source: Williams 1992.

    Example:
        >>> import torch
        >>> reinforce(Tokens(logits=torch.zeros(1, 2), labels=torch.tensor([0]), advantage=torch.tensor([0.5]))).q
        tensor([[0.7500, 0.2500]])
    """
    return Target.push(tokens, tokens.require("advantage").detach())


@reinforce.loss
def reinforce_loss(tokens: Tokens) -> Float[Tensor, " N"]:
    """-A log p_y."""
    nll = F.cross_entropy(tokens.logits, tokens.labels.long(), reduction="none")
    return tokens.require("advantage").detach().to(nll) * nll
