"""Label smoothing: a fixed share of the trust goes to all tokens alike."""

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from qlens.params import Share
from qlens.registry import register
from qlens.target import Target
from qlens.tokens import Tokens


@register(
    "label_smoothing",
    title="Label smoothing",
    paper="Szegedy et al. 2016; for SFT: arXiv 2508.00264",
    family="fixed mixture",
    trusted="1 - epsilon",
    residual="uniform",
    simplex=True,
    limits="epsilon = 0 is sft",
    bibtex="""@misc{labelsmoothing2025calibrated,
  title = {Calibrated Language Models and How to Find Them with Label Smoothing},
  year = {2025}, eprint = {2508.00264}, archivePrefix = {arXiv},
}""",
)
def label_smoothing(tokens: Tokens, *, epsilon: Share = 0.1) -> Target:
    r"""Cross-entropy toward the label mixed with the uniform distribution over all V entries, the label among them.

    .. math:: \ell = -(1 - \epsilon) \log p_y - \frac{\epsilon}{V} \sum_k \log p_k,
              \qquad Q = (1 - \epsilon) d + \epsilon / V

    Takes ``tokens.logits`` and ``tokens.labels``; gives (N,) losses in nats and Q (N, V) at s = 1. V is the width of the
    logits, padding rows of the vocabulary included; an impossible token (-inf) makes the loss infinite.

    Example:
        >>> import torch
        >>> label_smoothing(Tokens(logits=torch.zeros(1, 2), labels=torch.tensor([0])), epsilon=0.2).q
        tensor([[0.9000, 0.1000]])
    """
    return Target.mix(tokens, trust=1 - epsilon, residual="uniform")


@label_smoothing.loss
def label_smoothing_loss(tokens: Tokens, *, epsilon: Share = 0.1) -> Float[Tensor, " N"]:
    """-(1 - epsilon) log p_y - epsilon mean_k log p_k."""
    log_p = F.log_softmax(tokens.logits, -1)
    nll = F.nll_loss(log_p, tokens.labels.long(), reduction="none")
    return (1 - epsilon) * nll - epsilon * log_p.mean(-1)
