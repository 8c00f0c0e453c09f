"""UFT: log-likelihood on hints of the solution, policy gradient on the rest, and the schedule of hints."""

import math
from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from qlens.core.errors import InputError
from qlens.core.numerics import log_softmax
from qlens.core.target import Target
from qlens.core.tokens import Tokens
from qlens.registry import register
from qlens.registry.params import Positive, Share, Weight

Reduction = Literal["sum", "mean"]


def hint_probability(step: int, *, hinted: int = 300, low: float = 0.05, high: float = 0.95) -> float:
    r"""The chance that a chunk of the solution is shown: low + (high - low) (1 + cos(pi step / hinted)) / 2, then 0.

    Source: arXiv 2505.16984, the cosine schedule.

    Example:
        >>> hint_probability(0), round(hint_probability(150), 3), hint_probability(300)
        (0.95, 0.5, 0.0)
    """
    if step < 0 or hinted < 1:
        raise InputError(f"step must be at least 0 and hinted at least 1, got {step} and {hinted}")
    return 0.0 if step >= hinted else low + 0.5 * (high - low) * (1 + math.cos(math.pi * step / hinted))


def hint_cuts(length: int, chunks: int = 5) -> tuple[int, ...]:
    """Where a solution of ``length`` tokens may be cut: the ends of its chunks, 0 first; never more chunks than tokens.

    Example:
        >>> hint_cuts(12), hint_cuts(2)
        ((0, 2, 5, 7, 10, 12), (0, 1, 2))
    """
    number = min(chunks, length)
    return tuple(round(i / number * length) for i in range(number + 1)) if number else (0,)


def hint_length(length: int, probability: float, *, chunks: int = 5, generator: torch.Generator | None = None) -> int:
    """How many tokens of a solution to show: every chunk adds one with the given probability.

    Example:
        >>> hint_length(12, 1.0), hint_length(12, 0.0)
        (12, 0)
    """
    if not 0 <= probability <= 1:
        raise InputError(f"probability must be in [0, 1], got {probability}")
    cuts = hint_cuts(length, chunks)
    return cuts[int((torch.rand(len(cuts) - 1, generator=generator) < probability).sum())]


@register(
    "uft",
    title="Unified supervised and reinforcement fine-tuning",
    paper="Liu et al. 2025, arXiv 2505.16984",
    scope=lambda reduction, **_: "batch" if reduction == "mean" else "token",
    needs=("hint", "advantage", "old", "reference"),
    structure=lambda entropy_weight, logit_clamp, **_: (
        "dense" if entropy_weight or logit_clamp is not None else "label"
    ),
    trusted=(
        "weight where hint, else a + kl_weight (reference_y / p_y - 1), "
        "with r = p_y / old_y, a = A r where A r <= A min(max(r, 1 - eps_low), 1 + eps_high), else 0"
    ),
    residual="student; entropy_weight > 0: and the entropy's slope",
    simplex=None,
    invariant=lambda logit_clamp, **_: logit_clamp is None,
    limits="all hints is weight times sft; no hints is ppo_clip with a k3 penalty",
    modes={
        "code": {"reduction": "mean", "entropy_weight": 0.001, "logit_clamp": 100.0, "value_clamp": 10.0},
        "r3": {"weight": 0.0},
    },
    differences=(
        "The paper sums over the hint's steps, the code takes means over hint and response tokens of a micro-batch "
        "(reduction).",
        "The paper has one coefficient for likelihood and divergence; the code two, both .001.",
        "The code adds an entropy bonus of .001 that the objective does not print, and clamps the hint's logits to "
        "100.",
        "The code clamps the k3 penalty at 10, beyond which it has no gradient.",
    ),
    code="liumy2010/UFT verl/workers/actor/dp_actor.py::update_policy",
    cites=("uft2025",),
)
def uft(
    tokens: Tokens,
    *,
    weight: Weight = 0.001,
    kl_weight: Weight = 0.001,
    entropy_weight: Weight = 0.0,
    eps_low: Share = 0.2,
    eps_high: Weight = 0.2,
    reduction: Reduction = "sum",
    logit_clamp: Positive | None = None,
    value_clamp: Positive | None = None,
    ratio_clamp: Positive | None = 20.0,
) -> Target:
    r"""Log-likelihood on hint tokens, PPO with a k3 penalty on the student's own tokens.

    .. math:: \ell_{hint} = -\lambda \log p_y, \qquad
              \ell_{response} = -\min(A \rho, A\, \mathrm{clip}(\rho)) + \lambda_{KL} k_3 - \lambda_H H(p), \qquad
              Q = p - g

    Args:
        tokens: logits (N, V), labels (N,), hint (N,), advantage (N,), old (N, V) and reference (N, V).
        weight: lambda, of the log-likelihood on hints.
        kl_weight: lambda_KL, of the k3 penalty to the reference.
        entropy_weight: lambda_H, of the entropy bonus.
        eps_low: lower end of the clip.
        eps_high: upper end of the clip.
        reduction: "sum", or "mean" over the hint tokens and over the response tokens given.
        logit_clamp: bound of the logits of hint rows; where it acts, sum(Q) is not 1.
        value_clamp: bound of the value of k3, in nats, with no gradient beyond.
        ratio_clamp: bound of log-ratios, in nats, with no gradient beyond.

    Returns:
        Q (N, V) at scale 1. Losses (N,) are in nats on hints, in the advantage's unit elsewhere.

    Raises:
        InputError: a field is missing.

    Source: Liu et al. 2025 (arXiv 2505.16984), equation 3.3; the rest from released code.

    Example:
        >>> import torch
        >>> z, one = torch.zeros(1, 2), torch.ones(1)
        >>> uft(Tokens(logits=z, labels=torch.tensor([0]), hint=one.bool(), advantage=one, old=z, reference=z), weight=0.5).trust
        tensor([0.5000])
    """
    hint, advantage = tokens.require("hint").bool(), tokens.require("advantage").detach()
    log_p = tokens.log_probs.detach()
    own = tokens.gather(log_p)
    log_ratio = own - tokens.gather(tokens.log_probs_of("old"))
    low = math.log1p(-eps_low) if eps_low < 1 else -math.inf
    active = torch.where(advantage > 0, log_ratio <= math.log1p(eps_high), log_ratio >= low)
    bound = ratio_clamp or math.inf
    push = advantage * torch.where(active & (log_ratio.abs() <= bound), log_ratio, -torch.inf).exp()
    gap = tokens.gather(tokens.log_probs_of("reference")) - own
    inside = gap.abs() <= bound
    if value_clamp is not None:
        inside &= torch.expm1(gap.clamp(-bound, bound)) - gap.clamp(-bound, bound) <= value_clamp
    push = push + kl_weight * torch.where(inside, torch.expm1(gap.clamp(-bound, bound)), 0.0)
    bonus = Target.slope(tokens, entropy_weight * log_p.masked_fill(log_p == -torch.inf, 0.0)).grad
    response = Target.push(tokens, push).grad + bonus
    z, unclamped = tokens.logits.detach().to(log_p), torch.ones_like(log_p, dtype=torch.bool)
    if logit_clamp is not None:
        z, unclamped = z.clamp(-logit_clamp, logit_clamp), z.abs() <= logit_clamp
    likelihood = weight * torch.where(unclamped, log_softmax(z).exp() - tokens.one_hot, 0.0)
    grad = torch.where(hint[:, None], likelihood, response)
    if reduction == "mean":
        grad = grad / _counts(hint, grad)[:, None]
    return Target.from_grad(tokens, grad)


@uft.loss
def uft_loss(
    tokens: Tokens,
    *,
    weight,
    kl_weight,
    entropy_weight,
    eps_low,
    eps_high,
    reduction,
    logit_clamp,
    value_clamp,
    ratio_clamp,
) -> Float[Tensor, " N"]:
    """Hints: -weight log p_y; responses: the clipped surrogate + kl_weight k3 - entropy_weight H."""
    labels = tokens.labels.long()
    bounded = tokens.logits if logit_clamp is None else torch.clamp(tokens.logits, -logit_clamp, logit_clamp)
    hints = weight * F.cross_entropy(bounded, labels, reduction="none")
    log_p = F.log_softmax(tokens.logits, -1)
    own = log_p.gather(1, labels[:, None])[:, 0]
    before, base = (
        -F.cross_entropy(tokens.require(name), labels, reduction="none").detach() for name in ("old", "reference")
    )
    advantage = tokens.require("advantage").detach().to(own)
    log_ratio, gap = own - before, base - own
    if ratio_clamp is not None:
        log_ratio, gap = (x.clamp(-ratio_clamp, ratio_clamp) for x in (log_ratio, gap))
    ratio = log_ratio.exp()
    surrogate = -torch.minimum(advantage * ratio, advantage * ratio.clamp(1 - eps_low, 1 + eps_high))
    k3 = gap.exp() - gap - 1
    if value_clamp is not None:
        k3 = k3.clamp(-value_clamp, value_clamp)
    entropy = -(log_p.exp() * log_p.masked_fill(log_p.detach() == -torch.inf, 0.0)).sum(-1)
    rows = torch.where(tokens.require("hint").bool(), hints, surrogate + kl_weight * k3 - entropy_weight * entropy)
    return rows / _counts(tokens.require("hint").bool(), rows) if reduction == "mean" else rows


def _counts(hint: Tensor, like: Tensor) -> Float[Tensor, " N"]:
    """The number of hint tokens at hint tokens, of response tokens elsewhere."""
    hints = hint.sum()
    return torch.where(hint, hints, len(hint) - hints).to(like)
