"""Explanations and checks of losses as released code writes them."""

import losses
import pytest
import released_losses
import torch
import torch.nn.functional as F
from cases import case
from torch.testing import assert_close
from transformers import Trainer

import qlens


def first(explanation):
    return explanation.nearest[0].spec, explanation.nearest[0].relation


def test_eaft_without_its_normaliser_is_three_times_eaft_and_signed():
    explanation = qlens.explain(losses.eaft_without_normaliser)
    (factor,) = [m.factor for m in explanation.nearest if m.spec == "eaft" and m.relation == "up to a factor"]
    assert_close(factor, 2.995732, rtol=1e-6, atol=0)
    assert "which is eaft times 2.9957" in explanation.summary and "Q has negative entries" in explanation.summary
    assert explanation.law.formula == "H_top-20" and explanation.scope.detached


def test_a_single_token_estimate_anchors_to_nothing():
    explanation = qlens.explain(losses.single_token_k3)
    assert first(explanation) == ("label_kl", "identical")
    assert list(explanation.mixture.parts) == ["the label"] and explanation.residual == "the student"
    assert explanation.law.formula == "0.9 + 0.1 reference_y / p_y"


def test_a_clipped_ratio_is_trust_by_the_ratio_and_none_above_the_clip():
    explanation = qlens.explain(losses.clipped_ratio)
    assert first(explanation) == ("psft", "identical") and explanation.residual == "the student"
    assert explanation.law.formula.startswith(
        "(p_y / old_y) where p_y / old_y <= "
    ) and explanation.law.formula.endswith("0 elsewhere")
    assert 1.2219 < explanation.law.values["high"] < 1.3353


def test_a_truncated_top_k_leaves_the_rest_to_the_student():
    explanation = qlens.explain(losses.truncated_top_k)
    assert explanation.residual == "the teacher's top 4" and explanation.mixture.parameter == ("k", 4.0)
    tokens = explanation.tokens
    mass = tokens.teacher.softmax(-1).topk(4, -1).values.sum(-1)
    assert_close(explanation.mixture.pull, mass)  # 1 minus this stays with the student
    assert "mixed with the student's own distribution" in explanation.summary


def test_linear_gem_is_signed():
    explanation = qlens.explain(losses.gem_linear)
    assert first(explanation) == ("gem", "identical")
    assert explanation.mixture.signed and "It pushes away from the student at temperature 0.7" in explanation.summary
    assert "some w negative" in "\n".join(explanation.findings)


def test_a_forgotten_detach_is_negative_trust_below_one_in_e():
    explanation = qlens.explain(losses.forgot_detach)
    table = explanation.table
    assert (table["label_weight"] < 0).equals(table["p_y"] < 0.36787944)
    assert explanation.law.formula == "p_y (1 + log p_y), the undetached weight p_y"
    assert explanation.scope.detached is False
    assert explanation.destination.end[:2].max() < 0.01  # it ends on entries that never are labels


def test_reverse_kl_is_no_mixture():
    explanation = qlens.explain(losses.reverse_kl)
    assert not explanation.mixture.explains and explanation.mixture.closest > 0.3
    assert first(explanation) == ("reverse_kl", "identical") and "no mixture" in explanation.summary


def test_sums_other_than_one_have_their_cause_named():
    for loss, cause in [
        (losses.with_z_loss, "a z-loss: 0.0001 log(Z)^2"),
        (losses.behind_a_soft_cap, "a soft-cap: 30 tanh(z / 30)"),
        (losses.clamped, "clamped logits: no gradient below about -8"),
    ]:
        with case(loss, cause):
            explanation = qlens.explain(loss)
            assert explanation.shift_variance.cause == cause and "does not add up to one" in explanation.summary
            assert any(
                finding.startswith("WARNING: sum(Q) is not 1") and cause in finding for finding in explanation.findings
            )
            assert first(explanation) == ("sft", "identical")  # that apart
            assert explanation.law.formula == "1"


def test_the_root_of_p_comes_out_as_a_half():
    explanation = qlens.explain(losses.root_weighted)
    law = explanation.law
    assert "  R = the label: w = p_y^0.5" in explanation.findings
    assert_close(law.values["a"], 0.5, rtol=0, atol=5e-4)
    assert law.formula == "p_y^0.5"


def test_a_loss_that_forgets_the_count_fails_accumulation_by_exactly_the_factor():
    report = qlens.check(released_losses.forgets_the_count)
    (item,) = [item for item in report.failures if item.id == "accumulation"]
    assert "2x4 gives 2 and 8x1 8 times the gradient of 1x8" in item.evidence


def test_a_loss_that_shifts_twice_is_named_for_it():
    (item,) = [item for item in qlens.check(released_losses.shifts_twice).failures if item.id == "shift"]
    assert "t+2" in item.evidence


def test_fused_losses_and_trainers_are_read():
    for loss in [F.linear_cross_entropy, losses.fused, Trainer, torch.nn.CrossEntropyLoss]:
        with case(loss):
            explanation = qlens.explain(loss)
            assert first(explanation) == ("sft", "identical") and explanation.scope.of == "token"
            assert_close(explanation.target.q, explanation.tokens.one_hot, rtol=1e-5, atol=1e-6)


def test_bad_input_is_reported():
    for loss, says in [
        (lambda logits, labels: F.cross_entropy(logits.detach(), labels), "without a gradient"),
        (lambda logits, labels, costs: F.cross_entropy(logits, labels), "give 'costs' a default"),
        (lambda model, inputs: model(**inputs).logits.mean() * inputs["costs"], "costs"),
        (lambda logits, labels: F.cross_entropy(F.dropout(logits, 0.5), labels, reduction="none"), "is random"),
    ]:
        with case(loss, says):
            with pytest.raises(qlens.InputError, match=says):
                qlens.explain(loss)


def test_in_place_writes_are_reported():
    def writes(logits, labels):
        logits -= logits.max(-1, keepdim=True).values
        return F.cross_entropy(logits, labels)

    explanation = qlens.explain(writes)
    assert (
        "WARNING: the loss modifies its argument logits in place." in explanation.findings
        and first(explanation)[0] == "sft"
    )
    broken = qlens.explain(lambda logits, labels: F.cross_entropy(logits, labels) * torch.nan)
    assert "gradient is not a number" in broken.summary
