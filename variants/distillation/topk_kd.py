"""Top-k distillation: KL from the teacher's k most probable tokens, with a rule for the rest."""

import math
from typing import Annotated, Literal, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from qlens.core.errors import InputError
from qlens.core.numerics import kl, log_softmax, top_ids
from qlens.core.target import Target
from qlens.core.tokens import Tokens
from qlens.registry import register
from qlens.registry.params import Between, Positive, Share

Rank = Annotated[int, Between(1)]
Tail = Literal["student", "renorm", "renorm_both", "bucket", "uniform"]


@register(
    "topk_kd",
    title="Top-k distillation",
    paper="Hinton et al. 2015, arXiv 1503.02531, as frameworks truncate it",
    needs=("teacher",),
    trusted="0",
    residual="t + (1 - sum_k t_k) p, with t = top(teacher, k); other tails: by their rule",
    simplex=lambda tail, **_: None if tail == "renorm_both" else True,
    limits="k >= V is kd (renorm_both with reverse = 0 too)",
    modes={
        "verl": {"k": 32, "floor": True},
        "axolotl": {"tail": "renorm"},
        "nemo-rl": {"tail": "renorm_both", "reverse": 0.5},
        "ms-swift": {"tail": "renorm_both"},
        "trl-server": {"k": 1, "tail": "bucket"},
        "uniform": {"tail": "uniform"},
    },
    differences=(
        "Truncated (student): the tail's mass stays with the student. renorm: the tail is pushed to zero. "
        "renorm_both: the "
        "mass on the top k is not controlled at all. bucket: the tail's mass is kept, shared out as the student "
        "has it.",
        "verl clamps a row's value at 0 (floor) and at a maximum (cap): no gradient beyond; a truncated sum is no "
        "divergence "
        "and may be negative.",
        "verl ships k = 32 and has 128 in its dataclass; NeMo-RL mixes both directions in halves at k = 64; TRL's "
        "server "
        "has k = 1.",
    ),
    code="verl-project/verl verl/trainer/distillation/losses.py; NVIDIA-NeMo/RL nemo_rl/algorithms/loss/loss_functions.py",
    cites=("hinton2015distilling",),
)
def topk_kd(
    tokens: Tokens,
    *,
    k: Rank = 64,
    tail: Tail = "student",
    reverse: Share = 0.0,
    floor: bool = False,
    cap: Positive | None = None,
) -> Target:
    r"""Divergence from the teacher's top k, the set S, of mass M under the teacher and P under the student.

    .. math:: Q = q_S + (1 - M) p, \quad q_S / M, \quad q_S / M - p_S (1 - P) / P + p_{\bar S}, \quad
              q_S + (1 - M) p_{\bar S} / (1 - P), \quad q_S + \tfrac{1 - M}{V - k} 1_{\bar S}

    Q is listed for tail "student" (truncated), "renorm", "renorm_both", "bucket" and "uniform"; q_S is the teacher on
    S. Ties at the k-th place go to the lowest id.

    Args:
        tokens: logits (N, V), labels (N,), which do not enter, and teacher (N, V).
        k: number of the teacher's tokens.
        tail: rule for the other tokens.
        reverse: share of the reverse divergence, with "renorm_both" only.
        floor: clamp a row's loss at 0, with no gradient below.
        cap: upper bound of a row's loss, in nats, with no gradient above.

    Returns:
        Q (N, V) at scale 1. Losses (N,) are in nats.

    Raises:
        InputError: ``tokens.teacher`` is missing, or ``reverse`` with another tail.

    Source: released code, as named in the card.

    Example:
        >>> import torch
        >>> z, t = torch.zeros(1, 4), torch.tensor([[0.5, 0.3, 0.1, 0.1]]).log()
        >>> topk_kd(Tokens(logits=z, labels=torch.tensor([0]), teacher=t), k=2).q
        tensor([[0.5500, 0.3500, 0.0500, 0.0500]])
    """
    _check(tail, reverse)
    top = Top.of(tokens.log_probs.detach(), tokens.log_probs_of("teacher"), k)
    p, q = top.log_p.exp(), top.log_q.exp()
    inside = torch.zeros_like(p).scatter(1, top.ids, 1.0)
    tail_mass = top.log_q_rest.exp()[:, None]
    on = torch.zeros_like(p).scatter(1, top.ids, q)
    sharp = torch.zeros_like(p).scatter(1, top.ids, log_softmax(top.log_q).exp())
    if tail == "student":
        grad = q.sum(-1, keepdim=True) * p - on
    elif tail == "renorm":
        grad = p - sharp
    elif tail == "renorm_both":
        log_own = log_softmax(top.log_p.gather(1, top.ids))
        gap = (log_own - log_softmax(top.log_q)).masked_fill(log_own == -torch.inf, 0.0)
        back = log_own.exp() * (gap - (log_own.exp() * gap).sum(-1, keepdim=True))
        forward = log_own.exp() - log_softmax(top.log_q).exp()
        grad = torch.zeros_like(p).scatter(1, top.ids, (1 - reverse) * forward + reverse * back)
    else:
        outside = p.shape[1] - top.ids.shape[1]
        spread = (
            torch.full_like(p, 1 / max(outside, 1))
            if tail == "uniform"
            else (top.log_p - top.log_p_rest[:, None]).exp()
        )
        grad = p - on - tail_mass * torch.where(inside > 0, 0.0, spread)
    value = _value(tokens.log_probs.detach(), tokens.log_probs_of("teacher"), k, tail, reverse)
    counts = (value >= 0) if floor else torch.ones_like(value, dtype=torch.bool)
    if cap is not None:
        counts &= value <= cap
    return Target.from_grad(tokens, torch.where(counts[:, None], grad, 0.0))


@topk_kd.loss
def topk_kd_loss(tokens: Tokens, *, k, tail, reverse, floor, cap) -> Float[Tensor, " N"]:
    """The divergence on the teacher's top k, clamped."""
    _check(tail, reverse)
    log_t = F.log_softmax(tokens.require("teacher"), -1).detach()
    value = _value(F.log_softmax(tokens.logits, -1), log_t, k, tail, reverse)
    if floor:
        value = value.clamp(min=0.0)
    return value if cap is None else value.clamp(max=cap)


class Top(NamedTuple):
    """The teacher's top k: ids, log-probabilities there, and what is left under teacher and student."""

    ids: Int[Tensor, "N K"]
    log_q: Float[Tensor, "N K"]
    log_q_rest: Float[Tensor, " N"]
    log_p: Float[Tensor, "N V"]
    log_p_rest: Float[Tensor, " N"]

    @classmethod
    def of(cls, log_p: Tensor, log_t: Tensor, k: int) -> "Top":
        """Ties at the k-th place go to the lowest id."""
        index = top_ids(log_t, k)
        log_rest = [log.scatter(1, index, -torch.inf).logsumexp(-1) for log in (log_t, log_p)]
        return cls(index, log_t.gather(1, index), log_rest[0], log_p, log_rest[1])


def _value(log_p: Tensor, log_t: Tensor, k: int, tail: Tail, reverse: float) -> Float[Tensor, " N"]:
    """The divergence before clamping, differentiable in log_p."""
    top = Top.of(log_p, log_t, k)
    own, log_q = log_p.gather(1, top.ids), top.log_q
    if tail == "renorm":
        log_q = F.log_softmax(log_q, -1)
    if tail == "renorm_both":
        log_q, own = F.log_softmax(log_q, -1), F.log_softmax(own, -1)
        return (1 - reverse) * kl(log_q, own) + (reverse * kl(own, log_q) if reverse else 0.0)
    value = kl(log_q, own)
    if tail == "bucket":
        has_rest = top.log_q_rest > -torch.inf
        value = value + kl(top.log_q_rest[:, None], torch.where(has_rest, top.log_p_rest, 0.0)[:, None])
    if tail == "uniform" and top.ids.shape[1] < log_p.shape[1]:
        outside = log_p.shape[1] - top.ids.shape[1]
        log_share = (top.log_q_rest - math.log(outside))[:, None].expand_as(log_p)
        value = value + kl(log_share.scatter(1, top.ids, -torch.inf), log_p)
    return value


def _check(tail: Tail, reverse: float) -> None:
    if reverse and tail != "renorm_both":
        raise InputError(f"topk_kd: reverse = {reverse} goes with tail = 'renorm_both' only, got tail = {tail!r}")
