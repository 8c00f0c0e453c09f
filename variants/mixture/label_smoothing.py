"""Label smoothing: cross-entropy toward the label mixed with the uniform distribution."""

from typing import Literal

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from qlens.core.target import Target
from qlens.core.tokens import Tokens
from qlens.registry import register
from qlens.registry.params import Share
from qlens.registry.structure import GeometricMixture

Over = Literal["all", "others"]


@register(
    "label_smoothing",
    title="Label smoothing",
    paper="Szegedy et al. 2016; for SFT: arXiv 2508.00264",
    structure=lambda over, **_: GeometricMixture.uniform() if over == "all" else "dense",
    trusted="1 - epsilon",
    residual="uniform",
    simplex=True,
    limits="epsilon = 0 is sft; epsilon = 1 is the uniform distribution",
    modes={"fairseq": {"over": "others"}},
    differences=(
        "The linked paper (arXiv 2508.00264) has released no code.",
        "torch, transformers and Liger smooth over all V entries, the label among them; newer fairseq over the V - 1 others.",
        "Older transformers ignored num_items_in_batch here, so that the scale was wrong under accumulation.",
        "Padding rows of the vocabulary take their share of the smoothing everywhere.",
    ),
    code="huggingface/transformers src/transformers/trainer_pt_utils.py::LabelSmoother",
    cites=("szegedy2016rethinking", "smoothing2025"),
)
def label_smoothing(tokens: Tokens, *, epsilon: Share = 0.1, over: Over = "all") -> Target:
    r"""Cross-entropy toward (1 - epsilon) d + epsilon / V.

    .. math:: \ell = -(1 - \epsilon) \log p_y - \frac{\epsilon}{V} \sum_k \log p_k,
              \qquad Q = (1 - \epsilon) d + \epsilon / V

    V is the width of the logits, padding rows of the vocabulary included; an impossible token (-inf) makes the loss
    infinite.

    Args:
        tokens: logits (N, V) and labels (N,).
        epsilon: mass of the uniform distribution.
        over: "all" entries, the label among them, or the V - 1 "others", so that Q_y = 1 - epsilon.

    Returns:
        Q (N, V) at scale 1. Losses (N,) are in nats.

    Source: Szegedy et al. 2016 (arXiv 1512.00567); for SFT, arXiv 2508.00264.

    Example:
        >>> import torch
        >>> label_smoothing(Tokens(logits=torch.zeros(1, 2), labels=torch.tensor([0])), epsilon=0.2).q
        tensor([[0.9000, 0.1000]])
    """
    v = tokens.logits.shape[-1]
    return Target.mix(tokens, trust=1 - (epsilon if over == "all" else epsilon * v / (v - 1)), residual="uniform")


@label_smoothing.loss
def label_smoothing_loss(tokens: Tokens, *, epsilon, over) -> Float[Tensor, " N"]:
    """-(1 - epsilon) log p_y - epsilon mean_k log p_k, the mean over all or over the others."""
    log_p = F.log_softmax(tokens.logits, -1)
    nll = F.nll_loss(log_p, tokens.labels.long(), reduction="none")
    if over == "all":
        return (1 - epsilon) * nll - epsilon * log_p.mean(-1)
    per_entry = epsilon / (log_p.shape[-1] - 1)
    return (1 - epsilon - per_entry) * nll - per_entry * log_p.sum(-1)
