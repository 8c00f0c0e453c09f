"""GIFT: cross-entropy toward the reference tilted by a reward of beta on the label."""

import math

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from qlens.core.numerics import log_softmax
from qlens.core.target import Target
from qlens.core.tokens import Tokens
from qlens.registry import register
from qlens.registry.params import Share, Weight


@register(
    "gift",
    title="GIFT, finite-temperature Gibbs initialisation",
    paper="Zhao et al. 2026, arXiv 2601.09233",
    needs=("reference",),
    trusted="1 - 1 / Z, with Z = 1 + (exp(beta) - 1) (reference_y + floor); smooth > 0: reference smoothed",
    residual="reference",
    simplex=True,
    limits="beta -> infinity is sft; beta = 0 is kd with the reference as teacher",
    modes={"exact": {"floor": 0.0}},
    differences=(
        "The released code adds 1e-10 to every probability before the logarithm and renormalises (floor).",
        "At the default beta of 20 the target is all but one-hot unless the base gives the label less than about 1e-8.",
        "The released validation is plain cross-entropy.",
    ),
    code="zzy1127/GIFT verl/verl/trainer/fsdp_gift_trainer.py",
    cites=("gift2026",),
)
def gift(tokens: Tokens, *, beta: Weight = 20.0, smooth: Share = 0.0, floor: Weight = 1e-10) -> Target:
    r"""Cross-entropy toward softmax(log r + beta d), the reference r tilted by a reward on the label.

    .. math:: \ell = CE(\mathrm{sg}\,Q, p), \qquad Q = \mathrm{softmax}\big(\log ((1 - s) r + s / V + \epsilon) + \beta d\big)
              = (1 - 1/Z) d + r' / Z

    r' is the smoothed and floored reference, renormalised. Tokens impossible to the student (-inf) get neither.

    Args:
        tokens: logits (N, V), labels (N,) and reference (N, V).
        beta: reward of the label, an inverse temperature.
        smooth: s, the share of the uniform distribution in the reference.
        floor: epsilon, added to every probability of the reference as in the released code.

    Returns:
        Q (N, V) at scale 1. Losses (N,) are in nats.

    Raises:
        InputError: ``tokens.reference`` is missing.

    Source: Zhao et al. 2026 (arXiv 2601.09233); smoothing and floor from released code.

    Example:
        >>> import torch
        >>> z = torch.zeros(1, 2)
        >>> gift(Tokens(logits=z, labels=torch.tensor([0]), reference=z), beta=0.0).q
        tensor([[0.5000, 0.5000]])
    """
    log_r = tokens.log_probs_of("reference")
    if smooth or floor:
        added = (smooth / log_r.shape[-1] + floor) * (tokens.logits > -torch.inf).to(log_r)
        log_r = log_softmax(((1 - smooth) * log_r.exp() + added).log())
    # 1 - 1/Z = (e^beta - 1) r_y / (1 + (e^beta - 1) r_y), in logs: beta = 100 does not overflow
    odds = beta + math.log(-math.expm1(-beta)) if beta else -math.inf
    return Target.mix(tokens, trust=torch.sigmoid(odds + tokens.gather(log_r)), residual=log_r.exp())


@gift.loss
def gift_loss(tokens: Tokens, *, beta, smooth, floor) -> Float[Tensor, " N"]:
    """-sum_k sg(Q_k) log p_k."""
    log_p = F.log_softmax(tokens.logits, -1)
    with torch.no_grad():
        r = F.softmax(tokens.require("reference"), -1)
        raised = torch.log(
            torch.where(log_p.isinf(), (1 - smooth) * r, (1 - smooth) * r + smooth / r.shape[-1] + floor)
        )
        raised = raised + beta * F.one_hot(tokens.labels.long(), r.shape[-1]).to(r)
        q = F.softmax(raised, -1)
    return -(q * log_p.masked_fill(q == 0, 0.0)).sum(-1)
