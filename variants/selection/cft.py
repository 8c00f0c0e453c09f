"""Critical-token fine-tuning: log-likelihood of the tokens marked as critical."""

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from qlens.core.target import Target
from qlens.core.tokens import Tokens
from qlens.registry import register


@register(
    "cft",
    title="Critical Token Fine-Tuning",
    paper="Ruan et al. 2025, arXiv 2510.10974",
    needs=("critical",),
    trusted="1 where critical, else 0",
    residual="student",
    simplex=True,
    denominator="selected",
    structure="label",
    limits="all tokens critical is sft",
    differences=(
        "The paper finds critical tokens by regenerating the rest of an answer after each substitute; the authors' table "
        "writes the criterion with the original rest.",
        "No official code is known; the paper does not say what the mean divides by.",
    ),
    cites=("cft2025",),
)
def cft(tokens: Tokens) -> Target:
    r"""Log-likelihood of the tokens marked as critical.

    .. math:: \ell = -c \log p_y, \qquad Q = d \text{ where } c = 1, \quad Q = p \text{ where } c = 0

    A token is critical if every likely substitute leads the model's greedy continuation to a wrong answer.

    Args:
        tokens: logits (N, V), labels (N,) and critical (N,), the mask c.

    Returns:
        Q (N, V) at scale 1. Losses (N,) are in nats; a mean divides by the critical tokens.

    Raises:
        InputError: ``tokens.critical`` is missing.

    Source: Ruan et al. 2025 (arXiv 2510.10974).

    Example:
        >>> import torch
        >>> cft(Tokens(logits=torch.zeros(1, 2), labels=torch.tensor([0]), critical=torch.tensor([False]))).q
        tensor([[0.5000, 0.5000]])
    """
    return Target.mix(tokens, trust=tokens.require("critical").to(tokens.label_probs), residual="student")


@cft.loss
def cft_loss(tokens: Tokens) -> Float[Tensor, " N"]:
    """-critical log p_y."""
    labels = tokens.labels.long().masked_fill(~tokens.require("critical").bool(), -100)
    return F.cross_entropy(tokens.logits, labels, ignore_index=-100, reduction="none")
