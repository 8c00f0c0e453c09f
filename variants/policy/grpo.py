"""GRPO, CISPO, GSPO and SAPO: ratio to the sampling policy times a group advantage, by token or by sequence."""

import math
from typing import Annotated, Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from qlens.core.errors import InputError
from qlens.core.segments import Groups
from qlens.core.target import Target
from qlens.core.tokens import Tokens
from qlens.registry import register
from qlens.registry.params import Between, Positive, Weight

Objective = Literal["clip", "cispo", "sapo"]
Level = Literal["token", "sequence"]
Normalize = Literal["tokens", "sequences"] | Annotated[int, Between(1)]


def _sequences(level: str, normalize: object) -> bool:
    return level == "sequence" or normalize == "sequences"


@register(
    "grpo",
    title="GRPO, CISPO, GSPO, SAPO",
    paper="Shao et al. 2024, arXiv 2402.03300",
    scope=lambda level, normalize, **_: "sequence" if _sequences(level, normalize) else "token",
    needs=lambda level, normalize, weight, **_: (
        "advantage",
        "old",
        *(("reference",) if weight else ()),
        *(("sequence",) if _sequences(level, normalize) else ()),
    ),  # fmt: skip
    coupled=lambda level, objective, **_: "sequence" if level == "sequence" and objective != "cispo" else "",
    structure="label",
    trusted=(
        "A r where A r <= A min(max(r, 1 - eps_low), 1 + eps_high), else 0, with r = p_y / old_y; "
        "weight > 0: plus weight (reference_y / p_y - 1)"
    ),
    residual="student",
    simplex=None,
    limits="student = old, weight = 0 is reinforce; objective clip by token is ppo_clip",
    modes={
        "grpo-sequence-mean": {"normalize": "sequences"},
        "dr_grpo": {"normalize": 256},
        "gspo": {"level": "sequence"},
        "cispo": {"objective": "cispo", "eps_high": 5.0},
        "sapo": {"objective": "sapo"},
        "kl": {"weight": 0.04},
    },
    differences=(
        "Normalisers differ: the paper's mean of sequence means, TRL's default over all tokens, Dr. GRPO's constant length.",
        "TRL's defaults: both clips .2, no penalty, one iteration, so that the ratio is 1 and the clip idle.",
        "cispo caps the ratio, detached, and never stops a gradient; its eps_high is the cap itself.",
        "A sequence's ratio counts once per token here, as TRL broadcasts it.",
    ),
    code="huggingface/trl trl/trainer/grpo_trainer.py::_compute_loss",
    cites=("shao2024grpo",),
)
def grpo(
    tokens: Tokens,
    *,
    objective: Objective = "clip",
    level: Level = "token",
    eps_low: Weight = 0.2,
    eps_high: Weight = 0.2,
    dual: Positive | None = None,
    weight: Weight = 0.0,
    normalize: Normalize = "tokens",
    temperature: tuple[float, float] = (1.0, 1.05),
    ratio_clamp: Positive | None = 20.0,
) -> Target:
    r"""Ratio to the sampling policy times the group's advantage, plus a k3 penalty to the reference.

    .. math:: \ell = -\min(A \rho, A\, \mathrm{clip}(\rho)), \quad -A\, \mathrm{sg} \min(\rho, \epsilon_h) \log p_y, \quad
              -\tfrac{4 A}{\tau} \sigma(\tau (\rho - 1)), \qquad Q = a d + (1 - a) p

    The three losses are those of objective "clip", "cispo" and "sapo", with a = A rho where active, A min(rho,
    eps_high), and 4 A rho sigma (1 - sigma).

    Args:
        tokens: logits (N, V), labels (N,), advantage (N,), old (N, V); where they are used, reference (N, V) and
            sequence (N,).
        objective: "clip" as in PPO, "cispo" with a capped and detached ratio, "sapo" with a sigmoid.
        level: ratio of each "token", or exp of the "sequence"'s mean log-ratio.
        eps_low: lower end of the clip.
        eps_high: upper end of the clip; for "cispo" the cap itself.
        dual: cap of the ratio for negative advantages.
        weight: of the k3 penalty to the reference.
        normalize: rows as they are ("tokens"), over their sequence's length ("sequences"), or over a constant.
        temperature: tau of "sapo" for A > 0 and for A <= 0.
        ratio_clamp: bound of log-ratios, in nats, with no gradient beyond.

    Returns:
        Q (N, V) at scale 1. Losses (N,) are in the advantage's unit.

    Raises:
        InputError: a field is missing, or ``dual`` is not above 1 + eps_high, where the clip would undo it.

    Source: Shao et al. 2024 (arXiv 2402.03300); TRL's options.

    Example:
        >>> import torch
        >>> z = torch.zeros(1, 2)
        >>> grpo(Tokens(logits=z, labels=torch.tensor([0]), old=z, advantage=torch.tensor([0.5]))).trust
        tensor([0.5000])
    """
    _check(dual, eps_high)
    advantage = tokens.require("advantage").detach().to(tokens.label_probs)
    groups = Groups(tokens.require("sequence")) if _sequences(level, normalize) else None
    own = tokens.label_log_probs.detach()
    log_ratio = own - tokens.gather(tokens.log_probs_of("old"))
    if level == "sequence" and groups is not None:
        log_ratio = groups.mean(log_ratio)[groups.index]
    inside, clamped = _clamped(log_ratio, ratio_clamp)
    ratio = clamped.exp()
    if objective == "cispo":
        push = advantage * ratio.clamp(max=eps_high)
    elif objective == "sapo":
        tau = torch.where(advantage > 0, *(torch.full_like(advantage, t) for t in temperature))
        u = tau * (ratio - 1)
        push = inside * 4 * advantage * ratio * torch.sigmoid(u) * torch.sigmoid(-u)
    else:
        low = math.log(1 - eps_low) if eps_low < 1 else -math.inf
        down = (log_ratio >= low) & (log_ratio <= (math.inf if dual is None else math.log(dual)))
        active = torch.where(advantage > 0, log_ratio <= math.log1p(eps_high), down)
        push = advantage * ratio * (active & inside)
    share = _share(normalize, groups, own)
    push = push * share
    if level == "sequence" and groups is not None and objective != "cispo":
        push = groups.mean(push)[groups.index]
    if weight:
        to_reference = tokens.gather(tokens.log_probs_of("reference")) - own
        near, bounded = _clamped(to_reference, ratio_clamp)
        push = push + weight * share * torch.where(near, torch.expm1(bounded), 0.0)
    return Target.push(tokens, push)


@grpo.loss
def grpo_loss(
    tokens: Tokens, *, objective, level, eps_low, eps_high, dual, weight, normalize, temperature, ratio_clamp
) -> Float[Tensor, " N"]:
    """The objective and the penalty, normalised."""
    _check(dual, eps_high)
    labels = tokens.labels.long()
    log_p = -F.cross_entropy(tokens.logits, labels, reduction="none")
    log_old = -F.cross_entropy(tokens.require("old"), labels, reduction="none").detach()
    advantage = tokens.require("advantage").detach().to(log_p)
    groups = Groups(tokens.require("sequence")) if _sequences(level, normalize) else None
    log_ratio = log_p - log_old
    if level == "sequence" and groups is not None:
        log_ratio = groups.mean(log_ratio)[groups.index]
    if ratio_clamp is not None:
        log_ratio = log_ratio.clamp(-ratio_clamp, ratio_clamp)
    ratio = log_ratio.exp()
    if objective == "cispo":
        loss = -torch.clamp(ratio, max=eps_high).detach() * advantage * log_p
    elif objective == "sapo":
        tau = torch.where(advantage > 0, *(torch.full_like(advantage, t) for t in temperature))
        loss = -advantage * torch.sigmoid(tau * (ratio - 1)) * 4 / tau
    else:
        clipped = ratio.clamp(1 - eps_low, 1 + eps_high)
        capped = ratio if dual is None else torch.where(advantage < 0, ratio.clamp(max=dual), ratio)
        loss = -torch.minimum(capped * advantage, clipped * advantage)
    if weight:
        gap = -F.cross_entropy(tokens.require("reference"), labels, reduction="none").detach() - log_p
        gap = gap if ratio_clamp is None else gap.clamp(-ratio_clamp, ratio_clamp)
        loss = loss + weight * (gap.exp() - gap - 1)
    if normalize == "sequences" and groups is not None:
        return loss / groups.size(loss)
    return loss if isinstance(normalize, str) else loss / normalize


def _clamped(log_ratio: Float[Tensor, " N"], clamp: float | None) -> tuple[Tensor, Tensor]:
    """A mask of the log-ratios within the clamp, and the clamped log-ratios."""
    if clamp is None:
        return torch.ones_like(log_ratio, dtype=torch.bool), log_ratio
    return log_ratio.abs() <= clamp, log_ratio.clamp(-clamp, clamp)


def _share(normalize: Normalize, groups: Groups | None, like: Float[Tensor, " N"]) -> Tensor | float:
    """The factor of each row."""
    if normalize == "sequences" and groups is not None:
        return 1 / groups.size(like)
    return 1.0 if isinstance(normalize, str) else 1 / normalize


def _check(dual: float | None, eps_high: float) -> None:
    if dual is not None and dual <= 1 + eps_high:
        raise InputError(f"grpo: dual must be above 1 + eps_high = {1 + eps_high:g}, got {dual:g}")
