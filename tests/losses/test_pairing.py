"""Losses of pairs by the order of a batch: chosen texts in the first half, or each before its rejected one."""

import torch
import torch.nn.functional as F

import qlens
from qlens.losses.layout.pairing import pairing


def text_log_probs(logits, labels, mean=True):
    mask = labels[:, 1:] != -100
    chosen = labels[:, 1:].clamp(min=0)
    log_probs = logits[:, :-1].log_softmax(-1).gather(-1, chosen[..., None])[..., 0] * mask
    return log_probs.sum(-1) / mask.sum(-1) if mean else log_probs.sum(-1)


def simpo_halves(outputs, labels):
    chosen, rejected = text_log_probs(outputs.logits, labels).chunk(2)
    return -F.logsigmoid(2.0 * (chosen - rejected) - 1.0).mean()


def simpo_unreduced(logits, labels):
    scores = text_log_probs(logits, labels)
    chosen, rejected = torch.split(scores, len(scores) // 2)
    return -F.logsigmoid(2.0 * (chosen - rejected) - 1.0)


def simpo_alternate(logits, labels):
    scores = text_log_probs(logits, labels).view(-1, 2)
    return -F.logsigmoid(2.0 * (scores[:, 0] - scores[:, 1]) - 1.0).mean()


class SimpoTrainer:
    def compute_loss(self, model, inputs, return_outputs=False):
        outputs = model(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"])
        scores = text_log_probs(outputs.logits, inputs["labels"])
        half = len(scores) // 2
        return -F.logsigmoid(2.0 * (scores[:half] - scores[half:]) - 1.0).mean()


def dpo_with_reference_model(model, ref_model, batch):
    logits = model(batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    with torch.no_grad():
        reference = ref_model(batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    ratios = text_log_probs(logits, batch["labels"], False) - text_log_probs(reference, batch["labels"], False)
    chosen, rejected = ratios.chunk(2)
    return -F.logsigmoid(0.1 * (chosen - rejected)).mean()


def dpo_masked(per_token_logps, ref_per_token_logps, mask):
    ratios = ((per_token_logps - ref_per_token_logps) * mask).sum(-1)
    half = len(ratios) // 2
    return -F.logsigmoid(0.1 * (ratios[:half] - ratios[half:])).mean()


def dpo_of_text_sums(all_logps, ref_logps):
    chosen, rejected = (all_logps - ref_logps).chunk(2)
    return -F.logsigmoid(0.1 * (chosen - rejected)).mean()


def margin(logits, labels):
    chosen, rejected = text_log_probs(logits, labels, False).chunk(2)
    return -(chosen - rejected).mean()


def weighted_by_reward(logits, labels, rewards):
    return -(rewards * text_log_probs(logits, labels)).mean()


def symmetric_halves(logits, labels):
    cross_entropy = F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
    first, second = logits[:, :-1].log_softmax(-1).chunk(2)
    return cross_entropy + 0.5 * F.kl_div(first, second, log_target=True, reduction="batchmean")


def test_pair_losses_are_identified():
    specs = {
        simpo_halves: "simpo(gamma=1.0)",
        simpo_unreduced: "simpo(gamma=1.0)",
        SimpoTrainer: "simpo(gamma=1.0)",
        dpo_with_reference_model: "dpo",
        dpo_masked: "dpo",
        dpo_of_text_sums: "dpo",
    }
    for loss, spec in specs.items():
        explained = qlens.explain(loss)
        assert explained.nearest[0].same and explained.nearest[0].spec == spec, loss
        assert explained.scope is not None and explained.scope.of == "pair", loss
        assert "chosen texts are its first half" in explained.called_as, loss
    explained = qlens.explain(simpo_alternate)
    assert explained.nearest[0].same and explained.nearest[0].spec == "simpo(gamma=1.0)"
    assert "each chosen text is followed by its rejected one" in explained.called_as


def simpo_rejected_first(logits, labels):
    rejected, chosen = text_log_probs(logits, labels).chunk(2)
    return -F.logsigmoid(2.0 * (chosen - rejected) - 1.0).mean()


def dpo_rejected_alternate(per_token_logps, ref_per_token_logps, mask):
    ratios = ((per_token_logps - ref_per_token_logps) * mask).sum(-1).view(-1, 2)
    return -F.logsigmoid(0.1 * (ratios[:, 1] - ratios[:, 0])).mean()


def dpo_with_a_wrong_sign(per_token_logps, ref_per_token_logps, mask):
    chosen, rejected = ((per_token_logps - ref_per_token_logps) * mask).sum(-1).chunk(2)
    return F.logsigmoid(0.1 * (chosen - rejected)).mean()


def hinge(policy_chosen_logps, policy_rejected_logps, reference_chosen_logps, reference_rejected_logps):
    margin = policy_chosen_logps - reference_chosen_logps - policy_rejected_logps + reference_rejected_logps
    return torch.relu(1 - 0.1 * margin).mean()


def test_rejected_texts_may_come_first():
    assert pairing(simpo_rejected_first, {}) == "rejected halves"
    assert pairing(dpo_with_a_wrong_sign, {}) == "halves"
    for loss, spec in ((simpo_rejected_first, "simpo(gamma=1.0)"), (dpo_rejected_alternate, "dpo")):
        explained = qlens.explain(loss)
        assert explained.nearest[0].same and explained.nearest[0].spec == spec, loss
        assert "rejected text" in explained.called_as and "which it lower" in explained.called_as, loss


def test_a_hinge_loss_is_not_called_normalised():
    text = qlens.explain(hinge).text(full=True)
    assert "largest weight" not in text and "no effect" not in text


def test_pair_losses_pass_the_check():
    for loss in (simpo_halves, simpo_alternate, SimpoTrainer, dpo_with_reference_model, dpo_masked, margin):
        assert qlens.check(loss).ok, (loss, qlens.check(loss).failures)


def test_losses_of_single_texts_are_not_pair_losses():
    assert pairing(margin, {}) == "halves"
    for loss in (F.cross_entropy, weighted_by_reward, symmetric_halves):
        assert pairing(loss, {}) == "", loss


def test_an_input_that_is_a_model_has_an_effect():
    def distillation(model, teacher_model, batch):
        student = model(batch["input_ids"]).logits[:, :-1]
        with torch.no_grad():
            teacher = teacher_model(batch["input_ids"]).logits[:, :-1]
        supervised = batch["labels"][:, 1:] != -100
        return F.kl_div(student[supervised].log_softmax(-1), teacher[supervised].softmax(-1), reduction="sum")

    assert qlens.check(distillation)["inputs_have_effect"].state == "passed"
