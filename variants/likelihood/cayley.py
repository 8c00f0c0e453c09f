"""Cayley gate: power loss whose exponent is a rational function of p_y."""

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from qlens.core.target import Target
from qlens.core.tokens import Tokens
from qlens.registry import register
from qlens.variants.likelihood.deft import CAYLEY_EPSILON, CODE, PAPER

LEAST, FLOOR_SHARE = 0.001, 0.5


@register(
    "cayley",
    title="Cayley transform gate",
    paper=PAPER,
    scope="batch",
    structure="label",
    trusted="p_y^a a / (a + 1e-8), with f = mean(p_y) / 2, a = f + (1 - f) p_y / (2 - p_y)",
    residual="student",
    simplex=True,
    limits="near sft where p_y is small throughout the batch, dft as p_y -> 1",
    differences=("The floor is that of a micro-batch, so that accumulation changes the gradient.",),
    code=CODE,
    cites=("deft2026",),
)
def cayley(tokens: Tokens) -> Target:
    r"""Power loss (1 - p_y^a) / a whose exponent a grows with p_y, from a floor set by the batch.

    .. math:: \ell = \frac{1 - p_y^\alpha}{\alpha + 10^{-8}}, \quad
              \alpha = \mathrm{clamp}\Big(f + (1 - f) \frac{p_y}{2 - p_y}\Big), \quad f = \tfrac12 \overline{p_y}, \qquad
              Q = \gamma d + (1 - \gamma) p, \quad \gamma = p_y^\alpha \frac{\alpha}{\alpha + 10^{-8}}

    a is detached and clamped to [0.001, 1]; the mean runs over all tokens given.

    Args:
        tokens: logits (N, V) and labels (N,).

    Returns:
        Q (N, V) at scale 1. Losses (N,) have no unit.

    Source: Wang et al. 2026 (arXiv 2602.11424); constants from released code.

    Example:
        >>> import torch
        >>> cayley(Tokens(logits=torch.zeros(1, 2), labels=torch.tensor([0]))).trust
        tensor([0.7071])
    """
    log_y = tokens.label_log_probs.detach()
    p_y = log_y.exp()
    floor = FLOOR_SHARE * p_y.mean() if len(p_y) else p_y
    alpha = (floor + (1 - floor) * (p_y / (2 - p_y + CAYLEY_EPSILON))).clamp(LEAST, 1.0)
    return Target.mix(tokens, trust=(alpha * log_y).exp() * (alpha / (alpha + CAYLEY_EPSILON)), residual="student")


@cayley.loss
def cayley_loss(tokens: Tokens) -> Float[Tensor, " N"]:
    """-(p_y^alpha - 1) / (alpha + 1e-8)."""
    nll = F.cross_entropy(tokens.logits, tokens.labels.long(), reduction="none")
    with torch.no_grad():
        p = torch.exp(-nll)
        base = 0.5 * p.sum() / max(len(p), 1)
        local = p / (2.0 - p + 1e-8)
        alpha = torch.clamp(base + (1.0 - base) * local, min=0.001, max=1.0)
    return -torch.expm1(-alpha * nll) / (alpha + 1e-8)
