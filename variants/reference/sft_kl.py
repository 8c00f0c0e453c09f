"""SFT with a forward KL anchor: log-likelihood plus KL(reference || student)."""

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from qlens.core.numerics import kl
from qlens.core.target import Target
from qlens.core.tokens import Tokens
from qlens.registry import register
from qlens.registry.params import Weight
from qlens.registry.structure import GeometricMixture


@register(
    "sft_kl",
    title="SFT with a forward KL anchor",
    paper="Shenfeld et al. 2025, arXiv 2509.04259 (as the authors' table links it)",
    needs=("reference",),
    structure=GeometricMixture("reference"),
    trusted="1 / (1 + weight)",
    residual="reference",
    scale="1 + weight",
    simplex=True,
    limits="weight = 0 is sft; (1 + weight) times kd_hybrid(weight / (1 + weight)) with the reference as teacher",
    differences=(
        "The linked paper analyses forgetting and defines no such loss; the row has no official code.",
        "The authors' table leaves out the scale 1 + weight; in unit scale Q = d + weight r - weight p is signed.",
    ),
    code="zhuchichi56/ASFT train_v2.py, mode sft+kl (weight 0.1)",
    cites=("razor2025",),
)
def sft_kl(tokens: Tokens, *, weight: Weight = 0.1) -> Target:
    r"""Log-likelihood plus ``weight`` times KL(r || p) to the frozen reference r.

    .. math:: \ell = -\log p_y + \lambda\, KL(r \| p), \qquad Q = \frac{d + \lambda r}{1 + \lambda}, \quad s = 1 + \lambda

    Args:
        tokens: logits (N, V), labels (N,) and reference (N, V).
        weight: lambda, the weight of the anchor.

    Returns:
        Q (N, V) at scale 1 + weight. Losses (N,) are in nats.

    Raises:
        InputError: ``tokens.reference`` is missing.

    Source: the SFT + KL row of Xie et al. 2026 (arXiv 2606.11189).

    Example:
        >>> import torch
        >>> z = torch.zeros(1, 2)
        >>> sft_kl(Tokens(logits=z, labels=torch.tensor([0]), reference=z), weight=1.0).q
        tensor([[0.7500, 0.2500]])
    """
    reference = tokens.log_probs_of("reference").exp()
    return Target.mix(tokens, trust=1 / (1 + weight), residual=reference, scale=1 + weight)


@sft_kl.loss
def sft_kl_loss(tokens: Tokens, *, weight) -> Float[Tensor, " N"]:
    """-log p_y + weight KL(reference || student)."""
    log_p = F.log_softmax(tokens.logits, -1)
    log_r = F.log_softmax(tokens.require("reference"), -1).detach()
    nll = F.nll_loss(log_p, tokens.labels.long(), reduction="none")
    return nll + weight * kl(log_r, log_p)
