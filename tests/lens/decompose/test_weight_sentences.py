"""Label weights in words: summary, findings and table agree on which tokens have which weight, and which none."""

import functools
import re

import torch
import torch.nn.functional as F
from cases import case
from losses import dft_by_sum, nll

import qlens


def capped(logits, labels):
    return nll(logits, labels).clamp(max=2.0).mean()


def masked_where_sure(logits, labels):
    return (nll(logits, labels) * ((-nll(logits, labels)).exp() < 0.3)).mean()


def hardest_half(logits, labels):
    return nll(logits, labels).topk(len(labels) // 2).values.mean()


def weighted_ids(logits, labels):
    weights = torch.ones(logits.shape[-1], dtype=logits.dtype)
    weights[2] = 10.0
    return F.cross_entropy(logits, labels, weights)


@functools.cache
def explained(loss):
    return qlens.explain(loss)


def trust_line(e):
    return next(line for line in e.findings if line.startswith(("Trust (", "Label weight (")))


def test_tokens_without_a_gradient_are_counted_in_every_sentence():
    for loss in [capped, masked_where_sure, hardest_half]:
        with case(loss):
            e = explained(loss)
            silent = int((e.table["label_weight"].abs() < 1e-12).sum())
            assert 0 < silent < len(e.table)
            for text in (e.summary, trust_line(e)):
                assert (
                    f"on {len(e.table) - silent} of 57 tokens" in text
                    and f"the other {silent} have no gradient" in text
                )
                assert "every" not in text.replace("every token's weight is divided", "")


def test_the_method_on_the_other_tokens_is_named_with_its_rule():
    assert (
        "This is sft on 51 of the 195 tokens tried; it is that method where p_y >= 0.13534;"
        in explained(capped).summary
    )
    assert "held at 2: a clamp" in explained(capped).summary


def test_batch_normalisations_are_stated_with_the_trust():
    e = explained(dft_by_sum)
    assert e.summary.startswith("This is dft divided by the batch's mean weight.")
    assert e.law.formula == "p_y" and "(times 2 in this batch)" in trust_line(e)
    assert "mae: the same gradient" not in e.text(full=True) and e.to_dict()["normalised"]["spec"] == "dft"


def test_label_id_weights_are_stated_with_the_trust():
    e = explained(weighted_ids)
    assert e.summary.startswith("This is sft (that apart).") and e.scope.through == ("labels",)
    assert "divided by the batch's mean weight: 10 for id 2, 1 for the others" in e.summary
    assert trust_line(e) == "Trust (the label's coefficient in Q): 1 on every token (times its class weight)."


def test_numbers_are_rounded_and_methods_listed_once():
    for loss in [capped, masked_where_sure, hardest_half, weighted_ids, dft_by_sum]:
        with case(loss):
            e = explained(loss)
            specs = [match.spec for match in e.nearest]
            assert len(specs) == len(set(specs))
            assert not re.search(r"(?<![\w.])-0(?![.\d])", " ".join([e.summary, *e.findings]))


def test_weights_blurred_by_rounding_are_not_called_equal():
    def coarse(logits, labels):
        log_p = logits.to(torch.bfloat16).log_softmax(-1).gather(1, labels[:, None])[:, 0]
        return -(log_p.exp().detach() * log_p).mean()

    e = explained(coarse)
    assert " to " in trust_line(e) and "alike" not in e.summary
    low, high = e.table["label_weight"].min(), e.table["label_weight"].max()
    assert low < 0.01 and high > 0.9


def test_a_gate_outside_the_tokens_shown_is_reported():
    def few_nats(logits, labels):
        log_p = logits.detach().log_softmax(-1)
        return nll(logits, labels) * (-(log_p.exp() * log_p).sum(-1) < 4)

    e = explained(few_nats)
    assert not bool((e.table["label_weight"].abs() < 1e-9).any())
    for text in (e.summary, trust_line(e)):
        assert "on every token shown; beyond these tokens it is 0 except where H <= 4" in text
