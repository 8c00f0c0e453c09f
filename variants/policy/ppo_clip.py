"""PPO: clipped ratio to an old policy times an advantage."""

import math

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from qlens.core.target import Target
from qlens.core.tokens import Tokens
from qlens.registry import register
from qlens.registry.params import Positive, Share, Weight


@register(
    "ppo_clip",
    title="PPO's clipped surrogate",
    paper="Schulman et al. 2017, arXiv 1707.06347",
    needs=("advantage", "old"),
    structure="label",
    trusted="A r where A r <= A min(max(r, 1 - eps_low), 1 + eps_high), else 0, with r = p_y / old_y",
    residual="student",
    simplex=None,
    limits="student = old is reinforce; every advantage 1 is psft",
    modes={"verl": {"dual": 3.0}},
    differences=(
        "The upper end of the clip acts on positive advantages only, the lower end on negative ones.",
        "verl adds a dual clip at 3 for negative advantages and clamps the log-ratio to 20 (ratio_clamp).",
    ),
    code="verl-project/verl verl/trainer/ppo/core_algos.py",
    cites=("schulman2017ppo",),
)
def ppo_clip(
    tokens: Tokens,
    *,
    eps_low: Share = 0.2,
    eps_high: Weight = 0.2,
    dual: Positive | None = None,
    ratio_clamp: Positive | None = 20.0,
) -> Target:
    r"""Clipped ratio to the sampling policy times the advantage A.

    .. math:: \ell = -\min(A \rho, A\, \mathrm{clip}(\rho, 1 - \epsilon_l, 1 + \epsilon_h)), \quad
              \rho = p_y / \pi_{old,y}, \qquad Q = a d + (1 - a) p, \quad a = A \rho\, 1[\text{active}]

    Active: rho <= 1 + eps_high for A > 0; rho >= 1 - eps_low, and rho <= dual if given, for A < 0.

    Args:
        tokens: logits (N, V), labels (N,), advantage (N,) and old (N, V), constants.
        eps_low: lower end of the clip.
        eps_high: upper end of the clip.
        dual: cap of the ratio for negative advantages.
        ratio_clamp: bound of the log-ratio, in nats, with no gradient beyond.

    Returns:
        Q (N, V) at scale 1. Losses (N,) are in the advantage's unit.

    Raises:
        InputError: ``tokens.advantage`` or ``tokens.old`` is missing.

    Source: Schulman et al. 2017 (arXiv 1707.06347); dual clip from released code.

    Example:
        >>> import torch
        >>> z = torch.zeros(1, 2)
        >>> ppo_clip(Tokens(logits=z, labels=torch.tensor([0]), old=z, advantage=torch.tensor([0.5]))).trust
        tensor([0.5000])
    """
    advantage = tokens.require("advantage").detach()
    log_ratio = tokens.label_log_probs.detach() - tokens.gather(tokens.log_probs_of("old"))
    up, down = log_ratio <= math.log1p(eps_high), log_ratio >= (math.log1p(-eps_low) if eps_low < 1 else -math.inf)
    if dual is not None:
        down &= log_ratio <= math.log(dual)
    active = torch.where(advantage > 0, up, down & (advantage < 0))
    if ratio_clamp is not None:
        active &= log_ratio.abs() <= ratio_clamp
    return Target.push(tokens, advantage * torch.where(active, log_ratio, -torch.inf).exp())


@ppo_clip.loss
def ppo_clip_loss(tokens: Tokens, *, eps_low, eps_high, dual, ratio_clamp) -> Float[Tensor, " N"]:
    """-min(A rho, A clip(rho)), and for A < 0 at most -A dual."""
    labels = tokens.labels.long()
    now = F.cross_entropy(tokens.logits, labels, reduction="none")
    before = F.cross_entropy(tokens.require("old"), labels, reduction="none").detach()
    advantage = tokens.require("advantage").detach().to(now)
    log_ratio = before - now
    if ratio_clamp is not None:
        log_ratio = log_ratio.clamp(-ratio_clamp, ratio_clamp)
    ratio = log_ratio.exp()
    loss = torch.maximum(-advantage * ratio, -advantage * ratio.clamp(1 - eps_low, 1 + eps_high))
    if dual is not None:
        loss = torch.where(advantage < 0, torch.minimum(loss, -advantage * dual), loss)
    return loss
