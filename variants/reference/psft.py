"""Proximal SFT: clipped ratio of the label's probability to the old policy's."""

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
    "psft",
    title="Proximal SFT",
    paper="Zhu et al. 2025, arXiv 2508.17784",
    needs=("old",),
    structure="label",
    trusted="p_y / old_y where p_y / old_y <= 1 + eps_high, else 0",
    residual="student",
    simplex=False,
    limits="student = old is sft; ppo_clip with every advantage 1",
    modes={"paper": {"ratio_clamp": None}, "tight": {"eps_high": 0.14}, "wide": {"eps_high": 0.42}},
    differences=(
        "The authors' table names the old policy as residual; the gradient's residual is the current student, and the old "
        "policy enters by the label's ratio alone.",
        "With every advantage 1 the lower end of the clip does nothing.",
        "The released code clamps the log-ratio to 20 either way (ratio_clamp), which ends the gradient below exp(-20).",
        "Where a mini-batch is the whole batch, the released code's ratio is 1 throughout: plain SFT.",
    ),
    code="zwhong714/PSFT verl/verl/trainer/ppo/core_algos.py::compute_policy_loss_vanilla",
    cites=("psft2025",),
)
def psft(
    tokens: Tokens, *, eps_low: Share = 0.2, eps_high: Weight = 0.28, ratio_clamp: Positive | None = 20.0
) -> Target:
    r"""Clipped ratio of p_y to the old policy's probability, PPO's surrogate with advantage 1.

    .. math:: \ell = -\min(\rho, \mathrm{clip}(\rho, 1 - \epsilon_l, 1 + \epsilon_h)), \quad \rho = p_y / \pi_{old,y}, \qquad
              Q = \rho d + (1 - \rho) p \text{ where } \rho \le 1 + \epsilon_h, \quad Q = p \text{ above}

    Args:
        tokens: logits (N, V), labels (N,) and old (N, V), the student at the last refresh.
        eps_low: lower end of the clip; without effect here.
        eps_high: upper end of the clip, beyond which there is no gradient.
        ratio_clamp: bound of the log-ratio, in nats, with no gradient beyond.

    Returns:
        Q (N, V) at scale 1, signed where the ratio is above 1. Losses (N,) have no unit.

    Raises:
        InputError: ``tokens.old`` is missing.

    Source: Zhu et al. 2025 (arXiv 2508.17784).

    Example:
        >>> import torch
        >>> z = torch.zeros(1, 2)
        >>> psft(Tokens(logits=z, labels=torch.tensor([0]), old=z)).q
        tensor([[1., 0.]])
    """
    log_ratio = tokens.label_log_probs.detach() - tokens.gather(tokens.log_probs_of("old"))
    active = log_ratio <= math.log1p(eps_high)
    if ratio_clamp is not None:
        active &= log_ratio.abs() <= ratio_clamp
    return Target.mix(tokens, trust=torch.where(active, log_ratio, -torch.inf).exp(), residual="student")


@psft.loss
def psft_loss(tokens: Tokens, *, eps_low, eps_high, ratio_clamp) -> Float[Tensor, " N"]:
    """-min(ratio, clip(ratio, 1 - eps_low, 1 + eps_high))."""
    labels = tokens.labels.long()
    before = F.cross_entropy(tokens.require("old"), labels, reduction="none").detach()
    log_ratio = before - F.cross_entropy(tokens.logits, labels, reduction="none")
    bound = max(1.0, 2 * eps_high + 1)  # above the clip nothing but overflow is at stake
    log_ratio = log_ratio.clamp(max=bound) if ratio_clamp is None else log_ratio.clamp(-ratio_clamp, ratio_clamp)
    ratio = log_ratio.exp()
    return -torch.minimum(ratio, ratio.clamp(1 - eps_low, 1 + eps_high))
