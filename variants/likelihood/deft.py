"""DEFT: power loss whose exponent is the concentration sum_k p_k^2."""

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from qlens.core.target import Target
from qlens.core.tokens import Tokens
from qlens.registry import register

PAPER = "Wang et al. 2026, arXiv 2602.11424"
CODE = "luludus/DEFT main_verl/trainer/fsdp_sft_trainer.py, trainer.objective_trans"
DEFT_EPSILON, CAYLEY_EPSILON = 1e-6, 1e-8  # of the released code: part of the gradient


@register(
    "deft",
    title="DEFT, dynamic entropic fine-tuning",
    paper=PAPER,
    trusted="p_y^a a / (a + 1e-6), with a = sum_k p_k^2",
    residual="student",
    simplex=True,
    limits="near sft where p is spread out, near dft where it is peaked",
    differences=(
        "The released code's 1e-6 lowers the trust of a uniform distribution over 151,936 entries to .87 of what it would be.",
        "Its sequence-parallel branch is plain cross-entropy.",
    ),
    code=CODE,
    cites=("deft2026",),
)
def deft(tokens: Tokens) -> Target:
    r"""Power loss (1 - p_y^a) / a whose detached exponent is a = sum_k p_k^2.

    .. math:: \ell = \frac{1 - p_y^\alpha}{\alpha + 10^{-6}}, \quad \alpha = \mathrm{sg} \sum_k p_k^2, \qquad
              Q = \gamma d + (1 - \gamma) p, \quad \gamma = p_y^\alpha \frac{\alpha}{\alpha + 10^{-6}}

    Args:
        tokens: logits (N, V) and labels (N,).

    Returns:
        Q (N, V) at scale 1. Losses (N,) have no unit.

    Source: Wang et al. 2026 (arXiv 2602.11424); the 1e-6 from released code.

    Example:
        >>> import torch
        >>> deft(Tokens(logits=torch.zeros(1, 2), labels=torch.tensor([0]))).trust
        tensor([0.7071])
    """
    log_p = tokens.log_probs.detach()
    alpha = (2 * log_p).logsumexp(-1).exp()
    trust = (alpha * tokens.gather(log_p)).exp() * (alpha / (alpha + DEFT_EPSILON))
    return Target.mix(tokens, trust=trust, residual="student")


@deft.loss
def deft_loss(tokens: Tokens) -> Float[Tensor, " N"]:
    """-(p_y^alpha - 1) / (alpha + 1e-6)."""
    nll = F.cross_entropy(tokens.logits, tokens.labels.long(), reduction="none")
    alpha = F.softmax(tokens.logits.detach(), -1).square().sum(-1)
    return -torch.expm1(-alpha * nll) / (alpha + DEFT_EPSILON)
