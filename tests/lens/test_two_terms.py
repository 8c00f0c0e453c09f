"""Losses of two terms, registered methods or divergences, each with a coefficient of either sign."""

import torch
from losses import label_log_probs

import qlens
from qlens.core.probes import probes, trials
from qlens.lens.identify.two_terms import two_terms
from qlens.lens.reading import Reading
from qlens.registry import resolve


def reverse_kl(logits, other):
    log_p, log_q = logits.log_softmax(-1), other.log_softmax(-1)
    return (log_p.exp() * (log_p - log_q)).sum(-1)


def away_from_teacher(logits, labels, teacher_logits):
    return (-label_log_probs(logits, labels) - 0.1 * reverse_kl(logits, teacher_logits)).mean()


def away_from_reference(logits, labels, ref_logits):
    return (-label_log_probs(logits, labels) - 0.1 * reverse_kl(logits.float(), ref_logits.float())).mean()


def two_weights(logits, labels):
    loss = -label_log_probs(logits, labels)
    p = (-loss).exp()
    return (0.3 * loss * p.detach() + (1 - p) ** 2 * loss).mean()


def rewarded(logits, labels, advantages, ref_logits):
    return (-label_log_probs(logits, labels) * advantages - 0.02 * reverse_kl(logits, ref_logits)).mean()


def away_from_two(logits, labels, old_logits, teacher_logits):
    old = (old_logits.softmax(-1) * (old_logits.log_softmax(-1) - logits.log_softmax(-1))).sum(-1)
    return (reverse_kl(logits, teacher_logits) - 0.5 * old).mean()


def another_weight_by_entropy(logits, labels):
    p = logits.softmax(-1)
    entropy = -(p * logits.log_softmax(-1)).sum(-1)
    return (-label_log_probs(logits, labels) * (1 + 0.1 * entropy.detach())).mean()


def terms_of(loss):
    readings = [Reading.of(resolve(loss), tokens) for tokens in (probes(torch.float64), trials(torch.float64))]
    return str(two_terms(readings[0][1::2], readings))


def test_two_term_losses_are_decomposed():
    assert terms_of(away_from_teacher) == "sft minus 0.1 times reverse_kl"
    assert terms_of(away_from_reference) == "sft minus 0.1 times KL(p || the reference)"
    assert terms_of(two_weights) == "0.3 times dft plus focal"
    assert terms_of(rewarded) == "reinforce minus 0.02 times KL(p || the reference)"
    assert terms_of(away_from_two) == "reverse_kl minus 0.5 times KL(the old policy || p)"


def test_no_terms_are_named_without_a_fit():
    assert terms_of(another_weight_by_entropy) == "None"


def test_explain_describes_the_two_terms():
    e = qlens.explain(away_from_teacher)
    assert e.summary.startswith("No registered method alone has this gradient: it is sft minus 0.1 times reverse_kl.")
    assert e.to_dict()["two_terms"] == {"terms": ("sft", "reverse_kl"), "factors": (1.0, -0.1)}


def test_two_plain_terms_are_preferred_to_an_odd_parameter():
    def loss(logits, labels):
        log_p = logits.log_softmax(-1)
        return (-label_log_probs(logits, labels) - 0.1 * (log_p.exp() * log_p).sum(-1)).mean()

    e = qlens.explain(loss)
    assert e.nearest[0].same
    assert e.summary.startswith("This is sft plus 0.1 times the entropy of p; bootstrap_soft("), e.summary


def test_models_that_some_tokens_lack_are_no_terms():
    def away_from_reference(logits, labels, ref_logits):
        return -label_log_probs(logits, labels) - 0.1 * reverse_kl(logits, ref_logits)

    few = Reading.of(resolve(away_from_reference), probes())
    assert "the reference" in str(two_terms(few, [few]))
    without = few.with_gradient(few.grad, few.inputs.replace(reference=None))
    assert two_terms(few, [few, without]) is None
