"""Divergences to teachers, policy gradients, preferences and UFT against what papers and released code compute."""

import math

import pytest
import torch
import torch.nn.functional as F
from oracle import (
    USUAL,
    assert_agrees,
    by_method,
    entropy,
    full,
    k3,
    kl,
    logp,
    members,
    sides,
)
from test_published_further_losses import ORACLES as FURTHER_LOSSES
from test_published_label_losses import ORACLES as LABEL_LOSSES

import qlens
from qlens.testing import random_tokens

SMALL = random_tokens(40, 32, spread=0.4, seed=8)  # ratios near 1, on both sides of every clip
POLICY = tuple(t.replace(advantage=t.advantage[t.sequence]) for t in (SMALL, USUAL))  # one advantage per sequence


def jsd(beta):
    """TRL's generalised Jensen-Shannon loss: its ends are the forward and the reverse KL."""

    def loss(t):
        student, teacher = full(t), full(t, "teacher")
        if beta in (0, 1):
            return kl(student, teacher) if beta else kl(teacher, student)
        mixed = torch.logsumexp(torch.stack([student + math.log(1 - beta), teacher + math.log(beta)]), 0)
        return beta * kl(teacher, mixed) + (1 - beta) * kl(student, mixed)

    return loss


def skewed(alpha, reverse):
    """DistiLLM: KL of one side to the mixture that holds a share alpha of it."""

    def loss(t):
        own, other = (full(t), full(t, "teacher")) if reverse else (full(t, "teacher"), full(t))
        return kl(own, torch.log(alpha * own.exp() + (1 - alpha) * other.exp()))

    return loss


def tvd(t):
    return 0.5 * (full(t).exp() - full(t, "teacher").exp()).abs().sum(-1)


def topk(tail, k=64, reverse=0.0, floor=None, cap=None):
    def loss(t):
        k_ = min(k, t.logits.shape[1])
        logs, ids = full(t, "teacher").topk(k_)
        own = full(t).gather(1, ids)
        q, p = logs.exp(), own.exp()
        spare, log_free = 1 - q.sum(-1), 1 - p.sum(-1)
        if tail in ("renorm", "renorm_both"):
            logs = logs.log_softmax(-1)
            own = own.log_softmax(-1) if tail == "renorm_both" else own
        value = (1 - reverse) * kl(logs, own) + (reverse * kl(own, logs) if reverse else 0)
        if k_ < t.logits.shape[1] and tail == "bucket":
            value = value + spare * (spare.log() - log_free.log())
        if k_ < t.logits.shape[1] and tail == "uniform":
            each = spare / (t.logits.shape[1] - k_)
            value = value + each * (each.log()[:, None] - full(t).scatter(1, ids, 0.0)).sum(-1)
            value = value - each * k_ * each.log()  # the k rows that scatter set to 0
        return value if floor is None and cap is None else value.clamp(floor, cap)

    return loss


def on_policy(divergence, clip):
    return lambda t: (logp(t) - logp(t, "old")).exp().detach().clamp(max=clip) * divergence(t)


def reference_gap(t):
    return logp(t, "reference") - logp(t)


def clipped(ratio, advantage, low=0.2, high=0.2, dual=None):
    """verl's policy loss: the worse of plain and clipped, and no worse than -A c where A < 0."""
    worse = torch.max(-advantage * ratio, -advantage * ratio.clamp(1 - low, 1 + high))
    return worse if dual is None else torch.where(advantage < 0, torch.min(-advantage * dual, worse), worse)


def ppo(low=0.2, high=0.2, dual=None):
    return lambda t: clipped((logp(t) - logp(t, "old")).clamp(-20, 20).exp(), t.advantage, low, high, dual)


def grpo(objective=clipped, sequence=False, weight=0.0, share=lambda t: 1.0, **options):
    def loss(t):
        gap = logp(t) - logp(t, "old")
        if sequence:
            means = torch.stack([gap[own].mean() for own in members(t.sequence)])
            gap = means[t.sequence.unique(return_inverse=True)[1]]
        rows = objective(gap.exp(), t.advantage, **options) if objective is not cispo else cispo(gap, t, **options)
        return (rows + weight * k3(reference_gap(t))) / share(t)

    return loss


def cispo(gap, t, high=5.0):
    return -gap.exp().clamp(max=high).detach() * t.advantage * logp(t)


def sapo(ratio, advantage, positive=1.0, negative=1.05):
    tau = torch.where(advantage > 0, torch.full_like(ratio, positive), negative)
    return -advantage * (4 / tau) * torch.sigmoid(tau * (ratio - 1))


def lengths(t):
    return torch.bincount(t.sequence)[t.sequence]


def pairwise(loss):
    """A loss of the chosen and the rejected sequence: their label log-probabilities and those of the reference."""

    def rows(t):
        policy, reference = logp(t), logp(t, "reference")
        return torch.stack([loss(policy[w], policy[r], reference[w], reference[r]) for w, r in sides(t)])

    return rows


def dpo(beta=0.1, smooth=0.0, average=False):
    def loss(w, r, rw, rr):
        gap = (w - rw).mean() - (r - rr).mean() if average else (w - rw).sum() - (r - rr).sum()
        return -(1 - smooth) * F.logsigmoid(beta * gap) - smooth * F.logsigmoid(-beta * gap)

    return pairwise(loss)


def simpo(beta=2.0, gamma=0.5, nll=0.0):
    return pairwise(lambda w, r, *_: -F.logsigmoid(beta * (w.mean() - r.mean()) - gamma) - nll * w.mean())


def log_odds(m):
    return m - torch.log1p(-torch.exp(m))


def orpo(weight=0.1):
    return pairwise(lambda w, r, *_: -w.mean() - weight * F.logsigmoid(log_odds(w.mean()) - log_odds(r.mean())))


def absolute(weight=1.0, nll=1.0, beta=1.0):
    def loss(w, r, *_):
        good, bad = (log_odds(side.mean().clamp(max=-1e-6)) for side in (w, r))
        return -nll * w.mean() - weight * (F.logsigmoid(beta * good) + F.logsigmoid(-beta * bad))

    return pairwise(loss)


def ipo(beta=0.1):
    return pairwise(lambda w, r, rw, rr: ((w - rw).mean() - (r - rr).mean() - 1 / (2 * beta)) ** 2)


def apo_zero(beta=0.1):
    def loss(w, r, rw, rr):
        return 1 - torch.sigmoid(beta * (w - rw).sum()) + torch.sigmoid(beta * (r - rr).sum())

    return pairwise(loss)


def uft(weight=0.001, kl_weight=0.001, bonus=0.0, mean=False, logit_clamp=None, value_clamp=None):
    def loss(t):
        z = t.logits if logit_clamp is None else t.logits.clamp(-logit_clamp, logit_clamp)
        hints = weight * F.cross_entropy(z, t.labels, reduction="none")
        rest = ppo()(t) + kl_weight * k3(reference_gap(t), 20.0, value_clamp) - bonus * entropy(t)
        count = torch.where(t.hint, t.hint.sum(), (~t.hint).sum()) if mean else 1.0
        return torch.where(t.hint, hints, rest) / count

    return loss


ROWS = {
    "reverse_kl": lambda t: kl(full(t), full(t, "teacher")),
    **{f"jsd(beta={b})": jsd(b) for b in (0.0, 0.1, 0.5, 0.9, 1.0)},
    "jsd@distillation-trainer": jsd(1),
    **{f"skew_fkl(alpha={a})": skewed(a, False) for a in (0.0, 0.1, 0.9)},
    **{f"skew_rkl(alpha={a})": skewed(a, True) for a in (0.0, 0.1, 0.9)},
    "tvd": tvd,
    **{f"topk_kd(k=5, tail={r!r})": topk(r, 5) for r in ("student", "renorm", "renorm_both", "bucket", "uniform")},
    **{f"topk_kd(tail={r!r})": topk(r) for r in ("student", "renorm", "renorm_both", "bucket", "uniform")},  # all V
    "topk_kd@verl(k=12)": topk("student", 12, floor=0.0),
    "topk_kd(k=12, cap=0.3)": topk("student", 12, cap=0.3),
    "topk_kd@axolotl(k=12)": topk("renorm", 12),
    "topk_kd@nemo-rl(k=12)": topk("renorm_both", 12, reverse=0.5),
    "topk_kd@nemo-rl(k=12, reverse=1.0)": topk("renorm_both", 12, reverse=1.0),
    "topk_kd@ms-swift(k=3)": topk("renorm_both", 3),
    "topk_kd@trl-server": topk("bucket", 1),
    **{f"opd(alpha={a})": jsd(a) for a in (0.0, 0.3, 1.0)},
    "opd@reverse": jsd(1),
    "opd@trl-sdft": on_policy(jsd(0.5), 2.0),
    "opd(alpha=0.0, clip=0.7)": on_policy(jsd(0), 0.7),
    "reinforce": lambda t: -t.advantage * logp(t),
    "ppo_clip": ppo(),
    "ppo_clip(eps_low=0.1, eps_high=0.4)": ppo(0.1, 0.4),
    "ppo_clip@verl": ppo(dual=3.0),
    "grpo": grpo(),
    "grpo@kl": grpo(weight=0.04),
    "grpo(dual=1.5, eps_high=0.28, weight=0.5)": grpo(weight=0.5, dual=1.5, high=0.28),
    "grpo@grpo-sequence-mean(weight=0.1)": grpo(weight=0.1, share=lengths),
    "grpo@dr_grpo": grpo(share=lambda t: 256),
    "grpo@cispo": grpo(cispo),
    "grpo@cispo(eps_high=0.9)": grpo(cispo, high=0.9),
    "grpo@sapo": grpo(sapo),
    "grpo@sapo(temperature=(0.5, 2.0))": grpo(sapo, positive=0.5, negative=2.0),
    "uft": uft(),
    "uft@code": uft(bonus=0.001, mean=True, logit_clamp=100, value_clamp=10),
    "uft@code(logit_clamp=1.0, value_clamp=0.1)": uft(bonus=0.001, mean=True, logit_clamp=1, value_clamp=0.1),
    "uft@r3(kl_weight=0.5, entropy_weight=0.2)": uft(0.0, 0.5, 0.2),
}
GROUPS = {
    "grpo@gspo": ("row", grpo(sequence=True)),
    "grpo@gspo(normalize='sequences', eps_high=0.05)": ("row", grpo(sequence=True, share=lengths, high=0.05)),
    "grpo@gspo(objective='sapo')": ("row", grpo(sapo, sequence=True)),
    "dpo": ("pair", dpo()),
    "dpo(beta=0.5)": ("pair", dpo(0.5)),
    "dpo@conservative": ("pair", dpo(smooth=0.1)),
    "dpo@sigmoid-norm": ("pair", dpo(average=True)),
    "simpo": ("pair", simpo()),
    "simpo@trl": ("pair", simpo(nll=1.0)),
    "simpo@official-scripts": ("pair", simpo(10.0, 3.0)),
    "orpo": ("pair", orpo()),
    "orpo@official": ("pair", orpo(1.0)),
    "asft_absolute": ("pair", absolute()),
    "asft_absolute(weight=0.3)": ("pair", absolute(0.3)),
    "asft_absolute@tempered": ("pair", absolute(nll=0.0, beta=0.1)),
    "ipo": ("pair", ipo()),
    "ipo(beta=0.7)": ("pair", ipo(0.7)),
    "apo_zero": ("pair", apo_zero()),
    "apo_zero(beta=0.5)": ("pair", apo_zero(0.5)),
}


@pytest.mark.parametrize("name", by_method(ROWS))
def test_losses_of_tokens_are_those_of_paper_and_released_code(name):
    for spec in by_method(ROWS)[name]:
        assert_agrees(spec, ROWS[spec], *(POLICY if name in ("ppo_clip", "grpo", "reinforce", "uft") else ()))


@pytest.mark.parametrize("name", by_method(GROUPS))
def test_losses_of_sequences_and_pairs_are_those_of_paper_and_released_code(name):
    for spec in by_method(GROUPS)[name]:
        kind, oracle = GROUPS[spec]
        assert_agrees(spec, oracle, *POLICY, value=kind)


def test_every_method_has_an_oracle():
    oracles = by_method({**ROWS, **GROUPS, **LABEL_LOSSES, **FURTHER_LOSSES})
    built_in = {n for n, m in qlens.registry.methods().items() if m.fn.__module__.startswith("qlens.variants")}
    assert built_in - set(oracles) == {"rpsft"}  # test_rpsft.py
