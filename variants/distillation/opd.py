"""On-policy distillation: Jensen-Shannon divergence to a teacher on the student's own texts."""

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from qlens.core.target import Target
from qlens.core.tokens import Tokens
from qlens.registry import register
from qlens.registry.params import Positive, Share
from qlens.variants.distillation.jsd import jsd, jsd_loss


@register(
    "opd",
    title="On-policy and self-distillation",
    paper="Shenfeld et al. 2026, arXiv 2601.19897 (SDFT); Agarwal et al. 2023, arXiv 2306.13649 (GKD)",
    needs=lambda alpha, clip: ("teacher",) if clip is None else ("teacher", "old"),
    trusted=(
        "(1 - alpha) p_y (KL(p || m) - log(p_y / m_y)) / (1 - p_y), with m = alpha teacher + (1 - alpha) p; "
        "alpha = 0: 0"
    ),
    residual=(
        "Q = p (1 - (1 - alpha) (log(p / m) - KL(p || m))), with m = alpha teacher + (1 - alpha) p; alpha = 0: teacher"
    ),
    scale="1; clip given: min(p_y / old_y, clip)",
    simplex=lambda alpha, clip: alpha < 1,
    limits="jsd(beta=alpha); what is on-policy is the text, not the loss",
    modes={"trl-sdft": {"clip": 2.0}, "reverse": {"alpha": 1.0}},
    differences=(
        "The positions are to come from the student's own samples: a fixed data set makes it plain distillation.",
        "TRL also keeps the teacher's top 100 only; for that see topk_kd, whose tail rule has to be named.",
    ),
    code="huggingface/trl trl/experimental/sdft/loss_utils.py::compute_divergence",
    cites=("sdft2026", "agarwal2023gkd"),
)
def opd(tokens: Tokens, *, alpha: Share = 0.5, clip: Positive | None = None) -> Target:
    r"""Divergence to a teacher times w, the clipped ratio to the policy that wrote the text.

    .. math:: \ell = w\, JSD_\alpha(\pi_T, p), \quad w = \mathrm{sg} \min(p_y / \pi_{old,y}, c), \qquad
              Q = Q_{JSD_\alpha}, \quad s = w

    Args:
        tokens: logits (N, V), labels (N,), teacher (N, V); with ``clip`` also old (N, V).
        alpha: share of the teacher in the divergence; 0 is the forward, 1 the reverse KL.
        clip: c, the upper bound of the ratio; without it w = 1.

    Returns:
        Q (N, V) at scale w. Losses (N,) are in nats.

    Raises:
        InputError: ``tokens.teacher`` or ``tokens.old`` is missing.

    Source: released code for Shenfeld et al. 2026 (arXiv 2601.19897).

    Example:
        >>> import torch
        >>> z = torch.zeros(1, 2)
        >>> opd(Tokens(logits=z, labels=torch.tensor([0]), teacher=torch.tensor([[0.2, 0.8]]).log()), alpha=0.0).q
        tensor([[0.2000, 0.8000]])
    """
    target = jsd(tokens, beta=alpha)
    if clip is None:
        return target
    ratio = (tokens.label_log_probs.detach() - tokens.gather(tokens.log_probs_of("old"))).exp()
    return target.weighted(ratio.clamp(max=clip))


@opd.loss
def opd_loss(tokens: Tokens, *, alpha, clip) -> Float[Tensor, " N"]:
    """min(p_y / old_y, clip) JSD_alpha."""
    loss = jsd_loss(tokens, beta=alpha)
    if clip is None:
        return loss
    labels = tokens.labels.long()
    now, before = (F.cross_entropy(z, labels, reduction="none") for z in (tokens.logits, tokens.require("old")))
    return (before - now).exp().clamp(max=clip).detach() * loss
