"""Losses that centre or standardise their rewards over the batch themselves: read with the statistics of the batch kept."""

import torch
import torch.nn.functional as F

import qlens


def label_log_probs(logits, labels):
    mask = labels[:, 1:] != -100
    return logits[:, :-1].log_softmax(-1).gather(-1, labels[:, 1:].clamp(min=0)[..., None])[..., 0], mask


def standardised_rewards(logits, labels, rewards):
    log_probs, mask = label_log_probs(logits, labels)
    advantages = (rewards - rewards.mean()) / (rewards.std() + 1e-6)
    return -(advantages[:, None] * log_probs * mask).sum() / mask.sum().clamp(min=1)


def standardised_log_probs(log_probs, rewards, mask):
    advantages = (rewards - rewards.mean()) / (rewards.std() + 1e-6)
    return -(advantages.unsqueeze(-1) * log_probs * mask).sum() / mask.sum().clamp(min=1)


def whitened_tokens(logits, labels, advantages):
    whitened = (advantages - advantages.mean()) / (advantages.std(unbiased=False) + 1e-8)
    return (whitened * F.cross_entropy(logits, labels, reduction="none")).mean()


def leave_one_out(logits, labels, rewards):
    log_probs, mask = label_log_probs(logits, labels)
    baseline = (rewards.sum() - rewards) / (len(rewards) - 1)
    return -((rewards - baseline) * (log_probs * mask).sum(1)).mean()


def test_standardised_rewards_are_reinforce_with_a_statistic_of_the_batch():
    for loss in (standardised_rewards, standardised_log_probs, whitened_tokens):
        explained = qlens.explain(loss)
        assert explained.nearest[0].same and explained.nearest[0].spec == "reinforce", loss
        assert "takes their mean off and divides by their standard deviation" in explained.text(full=True), loss
        assert explained.scope is not None and explained.scope.of != "token", loss


def test_leave_one_out_is_reinforce_times_a_factor_of_the_batch():
    explained = qlens.explain(leave_one_out)
    assert explained.summary.startswith("This is reinforce times a factor of the batch")
    assert "takes their mean off, over all texts of its batch" in explained.text(full=True)


def test_rows_shown_twice_are_no_fault_of_a_statistic():
    for loss in (standardised_rewards, standardised_log_probs, whitened_tokens, leave_one_out):
        assert qlens.check(loss)["row_count"].state in ("passed", "remark"), loss


def test_advantages_that_are_taken_as_they_are_stay():
    def reinforce(logits, labels, advantages):
        return (advantages * F.cross_entropy(logits, labels, reduction="none")).mean()

    said = qlens.explain(reinforce).text(full=True)
    assert "This is reinforce" in said and "takes their mean off" not in said
    assert torch.equal(qlens.explain(reinforce).tokens.advantage, qlens.probes().advantage)


def test_a_softmax_of_advantages_takes_no_mean_off():
    """A constant added to all of them changes nothing, and yet no advantage below the mean lowers a label."""

    def weighted(logits, labels, advantage):
        return ((2 * advantage).softmax(0) * F.cross_entropy(logits, labels, reduction="none")).sum()

    assert "takes their mean off" not in qlens.explain(weighted).text(full=True)
