"""Single rules of the conformance report on special losses: rewards of texts, schedules, half precision, penalties."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import qlens
from qlens.registry import resolve
from qlens.testing import random_tokens


def log_probs(logits, labels):
    shifted = labels[:, 1:]
    supervised = shifted != -100
    return logits[:, :-1].log_softmax(-1).gather(-1, shifted.clamp(min=0)[..., None])[..., 0] * supervised, supervised


def rewarded(logits, labels, rewards):
    log_p, supervised = log_probs(logits, labels)
    return -(rewards.exp()[:, None] * log_p).sum() / supervised.sum()


def clipped(per_token_logps, old_per_token_logps, advantages, completion_mask):
    ratio = (per_token_logps - old_per_token_logps).exp()
    pull = torch.min(ratio * advantages[:, None], ratio.clamp(0.8, 1.2) * advantages[:, None])
    return -(pull * completion_mask).sum() / completion_mask.sum()


def over_root_of_length(outputs, labels, num_items_in_batch=None):
    log_p, supervised = log_probs(outputs.logits, labels)
    return -(log_p.sum(1) / supervised.sum(1).clamp(min=1).sqrt()).mean()


def unshifted(outputs, labels):
    return F.cross_entropy(outputs.logits.flatten(0, 1), labels.flatten())


def half_probabilities(logits, labels):
    p = logits.half().softmax(-1).gather(-1, labels[:, None])[:, 0]
    return -(p.float() + 1e-6).log().mean()


def scheduled(logits, labels, teacher_logits, step=0, total_steps=1000):
    kd = F.kl_div(logits.log_softmax(-1), teacher_logits.softmax(-1), reduction="batchmean")
    return F.cross_entropy(logits, labels) + step / total_steps * kd


def selects(logits, labels, ref_logits):
    losses = F.cross_entropy(logits, labels, reduction="none")
    excess = (losses - F.cross_entropy(ref_logits, labels, reduction="none")).detach()
    return losses[excess.topk(max(1, int(0.6 * len(losses)))).indices].mean()


def to_the_model_without_adapter(model, inputs):
    with torch.no_grad(), model.disable_adapter():
        reference = model(input_ids=inputs["input_ids"]).logits[:, :-1].log_softmax(-1)
    logits = model(input_ids=inputs["input_ids"]).logits
    log_p, supervised = log_probs(logits, inputs["labels"])
    own = logits[:, :-1].log_softmax(-1)
    kl = (reference.exp() * (reference - own)).sum(-1)
    return (kl * supervised - log_p).sum() / supervised.sum()


def with_a_penalty(model, inputs):
    return model(**inputs).loss + 1e-4 * sum(p.square().sum() for p in model.parameters())


class Step(nn.Module):
    def __init__(self, model=None):
        super().__init__()
        self.model = model

    def training_step(self, batch, batch_idx):
        assert self.model is not None
        logits = self.model(batch["input_ids"], attention_mask=batch["attention_mask"]).logits
        return F.cross_entropy(logits[:, :-1].transpose(1, 2), batch["labels"][:, 1:])


def test_rules_skip_texts_without_a_gradient_and_packing_of_row_rewards():
    for loss in (rewarded, clipped):
        report = qlens.check(loss)
        assert "it divides by the labels of each micro-batch" in report["accumulation"].evidence, loss.__name__
        assert report["packing"].state == "not applicable", loss.__name__
        assert report["label_ids"].state == "passed", loss.__name__


def test_the_loss_of_a_text_is_read_from_repeated_labels():
    report = qlens.check(over_root_of_length)
    assert "sum over tokens divided by the root of its length" in report["evaluation"].evidence
    assert report["row_count"].state == "remark" and "m^0.5 times" in report["row_count"].evidence


def test_unshifted_losses_are_not_reported_as_detached():
    report = qlens.check(unshifted)
    assert report["shift"].state == "failed" and "no factor is detached" in report["stop_gradient"].evidence
    assert "it shifts them" not in report.called_as


def test_half_precision_overflows_on_a_few_rare_tokens():
    report = qlens.check(half_probabilities)
    assert report["extremes"].state == "failed" and "on 8 tokens" in report["extremes"].evidence
    assert "float16" in report["stop_gradient"].evidence
    assert qlens.check(F.cross_entropy)["extremes"].state == "passed"


def test_an_input_unused_at_the_start_of_a_schedule_is_kept():
    item = qlens.check(scheduled)["inputs_have_effect"]
    assert item.state == "remark" and "at step=0, an effect at step=1" in item.evidence
    never = qlens.check(lambda logits, labels, teacher_logits, step=0: F.cross_entropy(logits, labels))
    assert never["inputs_have_effect"].state == "failed"


def test_a_selection_among_equal_rows_is_not_a_token_weight():
    def weighs(logits, labels, weight_of=3.0):
        return (F.cross_entropy(logits, labels, reduction="none") * (1 + weight_of * (labels == 5))).mean()

    assert qlens.check(selects)["label_ids"].state == "passed"
    assert "5: 4" in qlens.check(weighs)["label_ids"].evidence


def test_a_loss_of_another_shape_is_refused_by_check_and_explain():
    def square(logits, labels):
        return F.cross_entropy(logits, labels) * torch.ones(3, 3)

    for entry_point in (qlens.check, qlens.explain):
        with pytest.raises(qlens.InputError, match=r"returned shape \(3, 3\)"):
            entry_point(square)


def test_a_model_without_its_adapter_is_the_reference():
    tokens = random_tokens(12, 16)
    actual = qlens.implied_target(to_the_model_without_adapter, tokens)
    one_hot = F.one_hot(tokens.labels, 16)
    expected = one_hot + tokens.require("reference").softmax(-1) - tokens.logits.softmax(-1)
    torch.testing.assert_close(actual.q, expected, rtol=1e-9, atol=1e-9)
    assert "2 times" not in " ".join(resolve(to_the_model_without_adapter).account(tokens).notes)


def test_a_penalty_on_the_weights_of_the_model_is_named():
    tokens = random_tokens(12, 16)
    assert "a term of the model's own weights" in " ".join(resolve(with_a_penalty).account(tokens).notes)
    plain = resolve(lambda model, inputs: model(**inputs).loss)
    assert "weights" not in " ".join(plain.account(tokens).notes)


def test_a_training_step_runs_a_model_that_is_set_later():
    for loss in (Step, Step()):
        report = qlens.check(loss)
        assert report.kind == "model" and report["shift"].state == "passed"
