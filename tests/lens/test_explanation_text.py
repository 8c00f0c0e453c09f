"""Regressions of explain's sentences: wrong methods named, wrong dependences claimed, numbers that are NaN."""

from types import SimpleNamespace

import torch
import torch.nn.functional as F
from losses import label_log_probs

import qlens
from qlens.lens.exact import read_exactly
from qlens.lens.gradient_flow import destination
from qlens.lens.weights.class_weights import ClassWeights, with_usual_class
from qlens.registry import resolve


def test_the_usual_class_lies_within_the_vocabulary():
    loss = resolve(lambda logits, labels: F.cross_entropy(logits, labels, reduction="none"))
    variant, reading, _ = read_exactly(loss, None)
    same = with_usual_class(variant, reading, ClassWeights({0: 2.0, 5: 4.0, 74: 1.0}, 1.0))
    assert set(same.inputs.labels.tolist()) == {0}
    torch.testing.assert_close(same.grad.norm(dim=-1), reading.grad.norm(dim=-1) / 2)


def test_tokens_at_their_target_are_not_called_untrained():
    def smoothed(logits, labels, epsilon=0.1):
        log_p = logits.log_softmax(-1)
        own = label_log_probs(logits, labels)
        return -(1 - epsilon) * own - epsilon / (logits.shape[-1] - 1) * (log_p.sum(-1) - own)

    text = qlens.explain(smoothed).text(full=True)
    assert "is 0.8968 for every token" in " ".join(text.split()) and "no gradient" not in text


def test_a_negative_weight_is_not_called_a_pull():
    def normalised(logits, labels):
        log_p = logits.log_softmax(-1)
        return -label_log_probs(logits, labels) / -log_p.sum(-1)

    text = qlens.explain(normalised).summary
    assert "It pushes away from uniform." in text and "pulls toward uniform" not in text


def test_a_weight_by_the_loss_itself_is_a_law():
    def unit(logits, labels):
        nll = F.cross_entropy(logits, labels, reduction="none")
        return nll / nll.detach()

    assert qlens.explain(unit).law.formula == "(-log p_y)^-1"


def test_the_fixed_point_is_named_by_its_printed_digits():
    def sharper(logits, labels, ref_logits):
        log_p = logits.log_softmax(-1)
        reverse = (log_p.exp() * (log_p - ref_logits.log_softmax(-1))).sum(-1)
        return F.nll_loss(log_p, labels) - 0.1 * reverse.mean()

    end = destination(sharper)
    assert end.end[0].round(2) == 0.56 and "the label frequencies" not in end.sentence.removesuffix(
        "sharper than the label frequencies."
    )


def test_nan_rounding_is_not_printed():
    def half(logits, labels):
        return -torch.log(logits.half().softmax(-1).gather(-1, labels[:, None])).float().mean()

    text = qlens.explain(half).text(full=True)
    assert "float16 changes the gradient" in text and "nan" not in text


def test_refined_parameters_are_preferred_to_a_near_match():
    def ppo(old_log_prob, log_prob, advantages, response_mask, ref_log_prob):
        ratio = (log_prob - old_log_prob).clamp(-20, 20).exp()
        pg = torch.maximum(-advantages * ratio, -advantages * ratio.clamp(0.8, 1.28))
        kl = ref_log_prob - log_prob
        kl = kl.exp() - kl - 1
        return ((pg + 0.001 * kl) * response_mask).sum() / response_mask.sum()

    assert qlens.explain(ppo).nearest[0].spec == "grpo(eps_high=0.28, weight=0.001)"


def test_no_near_match_is_named_without_a_condition():
    def worst(logits, labels, old, advantage):
        ratio = (label_log_probs(logits, labels) - label_log_probs(old, labels)).exp()
        return -torch.max(ratio * advantage, ratio.clamp(0.8, 1.2) * advantage)

    def agreed(logits, labels, teacher_logits):
        teacher = teacher_logits.softmax(-1)
        log_p = logits.log_softmax(-1)
        kd = -(teacher * log_p).sum(-1)
        return torch.where(teacher.argmax(-1) == labels, -label_log_probs(logits, labels), kd)

    for loss in (worst, agreed):
        e = qlens.explain(loss)
        assert e.near_match is None and e.summary.startswith("No registered method has this gradient"), e.summary


def clipped(per_token_logps, old_per_token_logps, advantages):
    """The clipped policy loss of every token, with one advantage for each text."""
    ratio, advantage = (per_token_logps - old_per_token_logps).exp(), advantages.unsqueeze(1)
    return -torch.min(ratio * advantage, ratio.clamp(0.8, 1.2) * advantage)


def test_methods_are_compared_on_the_one_advantage_of_a_text():
    def policy(per_token_logps, old_per_token_logps, advantages, completion_mask):
        loss = clipped(per_token_logps, old_per_token_logps, advantages)
        return (loss * completion_mask).sum() / completion_mask.sum()

    e = qlens.explain(policy)
    assert e.nearest[0].spec == "grpo" and e.nearest[0].relation == "identical" and e.scope.of == "token"


def test_a_mean_over_texts_is_described():
    def policy(per_token_logps, old_per_token_logps, advantages, completion_mask):
        loss = clipped(per_token_logps, old_per_token_logps, advantages)
        return ((loss * completion_mask).sum(1) / completion_mask.sum(1)).mean()

    text = qlens.explain(policy).summary
    assert text.startswith("This is grpo(normalize='sequences') divided by the number of texts, not of tokens."), text


def test_a_ratio_cap_is_described_with_the_advantage():
    def cispo(logits, labels, old, advantage):
        log_p = label_log_probs(logits, labels)
        ratio = (log_p - label_log_probs(old, labels)).exp().clamp(max=1.28).detach()
        return -ratio * advantage * log_p

    assert qlens.explain(cispo).law.formula == "A ((p_y / old_y), at most 1.28)"


class Another(torch.nn.Module):
    """A model that says something of its own of every token id."""

    def forward(self, input_ids, size):
        return SimpleNamespace(logits=torch.sin(input_ids[..., None] * 0.7 + torch.arange(size) * 1.3))


def test_inputs_of_another_model_are_not_a_dependence():
    other_model = Another()

    def distill(model, inputs, return_outputs=False, num_items_in_batch=None):
        labels = inputs.pop("labels")
        logits = model(**inputs).logits
        teacher = other_model(inputs["input_ids"], logits.shape[-1]).logits
        supervised = labels[:, 1:] != -100
        kl = F.kl_div(logits[:, :-1].log_softmax(-1), teacher[:, :-1].softmax(-1), reduction="none").sum(-1)
        return (kl * supervised).sum() / supervised.sum()

    e = qlens.explain(distill)
    assert e.scope.of == "token" and not e.scope.through and e.class_weights is None
    assert "depends on" not in e.summary and "are not tested" in e.scope.evidence
    assert e.nearest[0].spec.startswith("kd") and e.nearest[0].same
