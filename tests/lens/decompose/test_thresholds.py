"""Thresholds and clips of a loss, recovered to the digits in which they are written."""

import torch
from losses import nll

import qlens
from qlens.core.probes import trials
from qlens.lens.weights.thresholds import edges
from qlens.registry import resolve


def clipped(low, high):
    def loss(logits, labels, old, advantage):
        log_ratio = -nll(logits, labels) + nll(old, labels)
        ratio = log_ratio.exp()
        return -torch.minimum(ratio * advantage, ratio.clamp(low, high) * advantage).mean()

    return loss


def test_policy_clips_are_recovered_exactly():
    for low, high, spec in (
        (0.8, 1.28, "grpo(eps_high=0.28)"),
        (0.75, 1.27, "grpo(eps_low=0.25, eps_high=0.27)"),
    ):
        e = qlens.explain(clipped(low, high))
        assert e.nearest[0].spec == spec and e.nearest[0].same
        assert f"p_y / old_y <= {high} (A > 0) or >= {low} (A < 0)" in e.law.formula


def test_thresholds_are_recovered_exactly():
    def band(logits, labels):
        p = (-nll(logits, labels)).exp().detach()
        return ((p > 0.13) & (p < 0.87)).to(p) * nll(logits, labels)

    def clamped(logits, labels):
        return nll(logits, labels).clamp(max=1.7)

    assert qlens.explain(band).law.where == "where p_y >= 0.13 and p_y <= 0.87"
    low = qlens.explain(clamped).law.values["low"]
    assert abs(low - torch.tensor(-1.7).exp().item()) < 1e-6


def test_smooth_losses_have_no_thresholds():
    for loss in (
        nll,
        lambda logits, labels: torch.sigmoid(500 * ((-nll(logits, labels)).exp() - 0.5)).detach() * nll(logits, labels),
    ):
        assert edges(resolve(loss).loss, trials()) is None


def test_a_weight_that_changes_sign_is_no_threshold():
    """-p_y log p_y without a detach pulls down below p_y = 1/e and up above it."""

    def undetached(logits, labels):
        return nll(logits, labels) * (-nll(logits, labels)).exp()

    assert edges(resolve(undetached).loss, trials()) is None
    explanation = qlens.explain(undetached)
    assert "(weights fitted on 220 tokens" in explanation.text(full=True) and "the same at V = 160" in explanation.text(
        full=True
    )
