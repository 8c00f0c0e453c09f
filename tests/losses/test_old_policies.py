"""Losses of two old policies: the one that ratios are taken to, and the one that sampled the texts."""

import torch

import qlens
from qlens.losses.layout.signature import inputs


def truncated_weight(logprobs, old_logprobs, rollout_logprobs, advantages, mask, cap=1.01):
    weight = torch.exp(old_logprobs - rollout_logprobs).clamp(max=cap).detach()
    ratio = torch.exp(logprobs - old_logprobs)
    surrogate = torch.min(ratio * advantages, ratio.clamp(0.8, 1.2) * advantages)
    return -(weight * surrogate * mask).sum() / mask.sum().clamp(min=1)


def decoupled(logprobs, proximal_logprobs, old_logprobs, advantages, loss_mask):
    ratio = torch.exp(logprobs - proximal_logprobs)
    weight = torch.exp(proximal_logprobs - old_logprobs)
    surrogate = torch.min(ratio * advantages, ratio.clamp(0.8, 1.2) * advantages)
    return -(weight * surrogate * loss_mask).sum() / loss_mask.sum().clamp(min=1)


def test_two_old_policies_are_given_different_values_and_named():
    assert inputs(truncated_weight).required["rollout_logprobs"] == "sampling old log probs"
    assert inputs(decoupled).required["old_logprobs"] == "sampling old log probs"
    assert inputs(decoupled).required["proximal_logprobs"] == "old log probs"


def test_the_ratio_of_two_old_policies_is_reported_as_a_factor():
    tokens = qlens.probes()
    for loss, capped in ((truncated_weight, True), (decoupled, False)):
        variant = qlens.registry.resolve(loss)
        note_text = " ".join(variant.account(tokens).notes)
        assert "is a factor of its gradient" in note_text and ("at most 1.01" in note_text) == capped, loss
        grpo = qlens.get("grpo").target(tokens).grad
        assert (variant.target(tokens).grad - grpo).norm() > 1e-3 * grpo.norm()
        assert qlens.check(loss).ok, loss


def test_without_a_second_policy_the_ratio_is_reported_as_one():
    tokens = qlens.probes().replace(second=None)
    assert "so that a ratio of the two is 1 here" in " ".join(qlens.registry.resolve(decoupled).account(tokens).notes)
