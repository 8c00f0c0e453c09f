"""Hard bootstrapping: cross-entropy toward the label mixed with the student's most probable token."""

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from qlens.core.numerics import one_hot, top_ids
from qlens.core.target import Target
from qlens.core.tokens import Tokens
from qlens.registry import register
from qlens.registry.params import Share
from qlens.variants.mixture.bootstrap_soft import CODE, PAPER


@register(
    "bootstrap_hard",
    title="Hard bootstrapping",
    paper=PAPER,
    trusted="beta",
    residual="one_hot(argmax p)",
    simplex=True,
    limits="beta = 1 is sft",
    differences=(
        "Of equally probable tokens the one with the lowest id is taken here; released code leaves it to argmax.",
        "The released code does not mask ignored positions in its second term.",
    ),
    code=CODE,
    cites=("reed2014bootstrapping",),
)
def bootstrap_hard(tokens: Tokens, *, beta: Share = 0.8) -> Target:
    r"""Cross-entropy toward beta d + (1 - beta) d', with d' the one-hot of the most probable token.

    .. math:: \ell = -\beta \log p_y - (1 - \beta) \log \max_k p_k, \qquad Q = \beta d + (1 - \beta) d_{\arg\max p}

    Args:
        tokens: logits (N, V) and labels (N,).
        beta: trust in the label.

    Returns:
        Q (N, V) at scale 1; ties go to the lowest id. Losses (N,) are in nats.

    Source: Reed et al. 2014 (arXiv 1412.6596).

    Example:
        >>> import torch
        >>> bootstrap_hard(Tokens(logits=torch.tensor([[0.0, 1.0]]), labels=torch.tensor([0]))).q
        tensor([[0.8000, 0.2000]])
    """
    z = tokens.logits.detach()
    best = top_ids(z, 1)[:, 0]
    return Target.mix(tokens, trust=beta, residual=one_hot(best, z.shape[-1], tokens.log_probs.dtype))


@bootstrap_hard.loss
def bootstrap_hard_loss(tokens: Tokens, *, beta) -> Float[Tensor, " N"]:
    """-beta log p_y - (1 - beta) log max_k p_k."""
    log_p = F.log_softmax(tokens.logits, -1)
    top = tokens.logits.detach() == tokens.logits.detach().amax(-1, keepdim=True)
    own = -log_p.gather(1, top.to(torch.uint8).argmax(-1, keepdim=True))[:, 0]
    return beta * F.nll_loss(log_p, tokens.labels.long(), reduction="none") + (1 - beta) * own
