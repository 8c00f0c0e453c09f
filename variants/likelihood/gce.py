"""Generalised cross-entropy: loss (1 - p_y^q) / q, label weight p_y^q."""

from typing import Annotated

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from qlens.core.target import Target
from qlens.core.tokens import Tokens
from qlens.registry import register
from qlens.registry.params import Between, Share

Power = Annotated[float, Between(0, 1, open_low=True)]


@register(
    "gce",
    title="Generalised cross-entropy",
    paper="Zhang and Sabuncu 2018, arXiv 1805.07836",
    needs=lambda q, truncate: () if truncate is None else ("old",),
    structure="label",
    trusted="p_y^q",
    residual="student",
    simplex=True,
    limits="beyond_log(alpha=q); q = 1 is dft; q -> 0 is sft",
    modes={"truncated": {"truncate": 0.5}},
    differences=(
        "The released truncation keeps a weight per sample of a classification data set, refreshed now and then: here the "
        "label's probability under tokens.old decides, token by token.",
    ),
    code="AlanChou/Truncated-Loss TruncatedLoss.py",
    cites=("zhang2018gce",),
)
def gce(tokens: Tokens, *, q: Power = 0.7, truncate: Share | None = None) -> Target:
    r"""Loss (1 - p_y^q) / q, between the cross-entropy (q -> 0) and the absolute error (q = 1).

    .. math:: \ell = \frac{1 - p_y^q}{q}, \qquad Q = p_y^q d + (1 - p_y^q) p

    Args:
        tokens: logits (N, V) and labels (N,); with ``truncate`` also old (N, V).
        q: exponent, in (0, 1].
        truncate: threshold k: labels to which ``tokens.old`` gives at most k are dropped, and (1 - k^q) / q is
            subtracted.

    Returns:
        Q (N, V) at scale 1. Losses (N,) have no unit.

    Raises:
        InputError: ``truncate`` without ``tokens.old``.

    Source: Zhang and Sabuncu 2018 (arXiv 1805.07836).

    Example:
        >>> import torch
        >>> gce(Tokens(logits=torch.zeros(1, 2), labels=torch.tensor([0])), q=1.0).q
        tensor([[0.7500, 0.2500]])
    """
    trust = (q * tokens.label_log_probs.detach()).exp()
    if truncate is not None:
        trust = trust * (tokens.gather(torch.softmax(tokens.require("old").detach().to(trust), -1)) > truncate)
    return Target.mix(tokens, trust=trust, residual="student")


@gce.loss
def gce_loss(tokens: Tokens, *, q, truncate) -> Float[Tensor, " N"]:
    """(1 - p_y^q) / q, truncated: minus (1 - k^q) / q, times 1[old p_y > k]."""
    nll = F.cross_entropy(tokens.logits, tokens.labels.long(), reduction="none")
    loss = -torch.expm1(-q * nll) / q
    if truncate is None:
        return loss
    before = F.softmax(tokens.require("old").detach().to(nll), -1).gather(1, tokens.labels.long()[:, None])[:, 0]
    return (loss - (1 - truncate**q) / q) * (before > truncate)
