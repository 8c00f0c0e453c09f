"""Losses that centre or standardise their rewards over the batch: read with the statistics of the batch."""

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


def test_batch_statistics_pass_the_repeated_rows_rule():
    for loss in (standardised_rewards, standardised_log_probs, whitened_tokens, leave_one_out):
        assert qlens.check(loss)["row_count"].state in ("passed", "remark"), loss


def test_raw_advantages_are_not_centred():
    def reinforce(logits, labels, advantages):
        return (advantages * F.cross_entropy(logits, labels, reduction="none")).mean()

    text = qlens.explain(reinforce).text(full=True)
    assert "This is reinforce" in text and "takes their mean off" not in text
    assert torch.equal(qlens.explain(reinforce).tokens.advantage, qlens.probes().advantage)


def test_a_softmax_of_advantages_takes_no_mean_off():
    """A constant added to all of them changes nothing, and yet no advantage below the mean lowers a label."""

    def weighted(logits, labels, advantage):
        return ((2 * advantage).softmax(0) * F.cross_entropy(logits, labels, reduction="none")).sum()

    assert "takes their mean off" not in qlens.explain(weighted).text(full=True)


def in_groups(rewards, size, deviation):
    table = rewards.view(-1, size)
    centred = table - table.mean(1, keepdim=True)
    return (centred / (deviation(table) + 1e-6)).flatten()


def group_loss(size, deviation):
    def loss(logits, labels, rewards):
        log_probs, mask = label_log_probs(logits, labels)
        return -(in_groups(rewards, size, deviation)[:, None] * log_probs * mask).sum() / mask.sum().clamp(min=1)

    return loss


def of_a_sample(table):
    return table.std(1, keepdim=True)


grpo_groups, grpo_groups_of_6 = group_loss(4, of_a_sample), group_loss(6, of_a_sample)
grpo_groups_of_7 = group_loss(7, of_a_sample)
population_groups = group_loss(4, lambda table: table.std(1, keepdim=True, correction=0))
centred_groups = group_loss(8, lambda table: 1 - 1e-6)


def leave_one_out_groups(logits, labels, rewards, num_generations=4):
    log_probs, mask = label_log_probs(logits, labels)
    table = rewards.view(-1, num_generations)
    baseline = (table.sum(1, keepdim=True) - table) / (num_generations - 1)
    return -((table - baseline).flatten() * (log_probs * mask).sum(1)).mean()


def masked_whitening(log_prob, advantages, response_mask):
    number = response_mask.sum()
    mean = (advantages * response_mask).sum() / number
    variance = ((advantages - mean).square() * response_mask).sum() / number * number / (number - 1)
    whitened = (advantages - mean) * torch.rsqrt(variance + 1e-8)
    return -(whitened * log_prob * response_mask).sum() / number


def strided_groups(per_token_logps, rewards, completion_mask):
    table = rewards.view(4, -1)
    advantages = ((table - table.mean(0)) / (table.std(0) + 1e-6)).view(-1, 1)
    return -((advantages * per_token_logps * completion_mask).sum(1) / completion_mask.sum(1).clamp(min=1)).mean()


def rewards_in_the_batch(model, inputs):
    logits = model(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"]).logits
    return grpo_groups(logits, inputs["labels"], inputs["rewards"])


def test_groups_of_texts_are_found_with_the_statistic_taken_over_them():
    words = {
        grpo_groups: "divides by their standard deviation (of a sample), over groups of 4 texts",
        grpo_groups_of_6: "divides by their standard deviation (of a sample), over groups of 6 texts",
        grpo_groups_of_7: "divides by their standard deviation (of a sample), over groups of 7 texts",
        population_groups: "divides by their standard deviation (of all values), over groups of 4 texts",
        centred_groups: "takes their mean off, over groups of 8 texts",
        leave_one_out_groups: "groups of 4 texts, the mean of the others, so that advantages are 1.333 times as large",
        masked_whitening: "divides by their standard deviation (of a sample), over all tokens of its batch",
        strided_groups: "over groups of 4 texts at distances of 2",
        rewards_in_the_batch: "divides by their standard deviation (of a sample), over groups of 4 texts",
    }
    for loss, description in words.items():
        notes = qlens.registry.resolve(loss).account(qlens.probes()).notes
        assert any(description in note for note in notes), (description, notes)


def test_losses_of_groups_are_named_and_pass():
    for loss, summary in (
        (grpo_groups, "This is reinforce."),
        (leave_one_out_groups, "This is reinforce times 1.3333"),
    ):
        explained = qlens.explain(loss)
        assert explained.summary.startswith(summary)
        assert explained.scope is not None and explained.scope.of == "batch"
        assert "advantage" in explained.scope.through
    for loss in (grpo_groups, grpo_groups_of_7, masked_whitening):
        report = qlens.check(loss)
        assert report.ok, report.failures
