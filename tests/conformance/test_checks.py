"""The conformance report on released losses: correct ones pass every rule, each fault fails the rules it concerns."""

import json

import pytest
import torch
import torch.nn.functional as F
from cases import case
from released_losses import (
    Dft,
    Distils,
    breaks_in_float32,
    coarse_after_an_offset,
    compute_loss_that_writes,
    detached_weight,
    divides_by_positions,
    dropout,
    entropy_bonus,
    float32_only,
    forgets_the_count,
    half_inside,
    half_inside_a_batch,
    log_of_softmax,
    masks_no_prompt,
    mean_of_means,
    needs_the_count,
    no_graph_when_all_masked,
    one_hot_times_log,
    pulls_everywhere,
    shifts_across_rows,
    shifts_aligned_labels,
    shifts_nothing,
    shifts_twice,
    sound,
    sums,
    takes_no_count,
    unreduced,
    wants_contiguous,
    weighs_by_column,
    writes_on_labels,
    writes_on_logits,
)
from torch import nn
from torch.testing import assert_close
from transformers import Trainer

import qlens
from qlens.conformance import RULES
from qlens.conformance.harness import Specimen
from qlens.conformance.rules import rule
from qlens.conformance.synthetic_batches import PROMPTS, UNEQUAL, count
from qlens.registry import resolve

SHOWN = ("accumulation", "evaluation", "padding_side", "padding_amount", "packing", "all_masked", "prompt")


def states(report):
    return {item.id: item.state for item in report.items}


def failed(report):
    return {item.id: item.evidence for item in report.failures}


def test_a_correct_batch_loss_passes_every_rule():
    for loss in [sound, Trainer, Dft]:
        with case(loss):
            report = qlens.check(loss)
            assert report.ok, report
            assert [name for name, state in states(report).items() if state != "passed"] == ["stop_gradient"]
            assert list(states(report)) == list(RULES) and str(report).endswith("21 passed, 0 failed, 1 not applicable")


def test_batch_rules_do_not_apply_to_a_row_loss():
    for loss in [F.cross_entropy, nn.CrossEntropyLoss(), F.linear_cross_entropy]:
        with case(loss):
            report = qlens.check(loss)
            assert report.ok, report
            unasked = {name for name, state in states(report).items() if state != "passed"} - {
                "functions"
            }  # a fused kernel
            assert unasked == {*SHOWN, "stop_gradient"} - {"prompt"}
            assert "sees supervised rows only" in report["packing"].evidence
            assert "returns the mean over its rows" in report["accumulation"].evidence


def test_registered_methods_conform():
    """One of every scope and set of inputs; the identity of all of them is the contract's."""
    methods = {(qlens.get(name).scope, qlens.get(name).needs): name for name in qlens.names()}
    for name in methods.values():
        report = qlens.check(name)
        assert report.ok, report
        assert report["stop_gradient"].state == "passed" or qlens.get(name).derived


def test_label_smoothing_on_padded_columns_is_a_remark():
    """A share of its target goes to every entry of the vocabulary, padded or not."""
    report = qlens.check("label_smoothing")
    assert report.ok and [item.id for item in report.remarks][0] == "impossible"
    evidence = report["impossible"].evidence
    assert evidence.startswith("padded columns at -1e30 are pulled up by up to 0.0046 of the largest gradient")
    assert "no fault of the code" in evidence and "\nremark          impossible" in str(report)


COUNTED = "it divides by the {} of each micro-batch"
WRONG = {
    forgets_the_count: {
        "accumulation": "2x4 gives 2 and 8x1 8 times the gradient of 1x8 (unequal texts: 1.333 to 4 and 4 to 24 times): "
        + COUNTED.format("labels"),
        "all_masked": "loss nan",
    },
    takes_no_count: {"accumulation": "it takes no num_items_in_batch: 2x4 gives 2 and 8x1 8 times"},
    divides_by_positions: {
        "accumulation": COUNTED.format("positions"),
        "evaluation": "no mean over predicted tokens",
        "padding_amount": "0.7083 times the gradient",
        "packing": "times the gradient",
    },
    mean_of_means: {"accumulation": "(unequal texts: 2 and 8 times): " + COUNTED.format("texts")},
    sums: {"evaluation": "a sum, no mean"},
    unreduced: {"evaluation": "returns shape"},
    needs_the_count: {"evaluation": "raises TypeError: unsupported operand"},
    shifts_twice: {"shift": "row t learns label t+2: shifted twice"},
    shifts_nothing: {"shift": "row t learns its own label: it does not shift"},
    shifts_across_rows: {"shift": "it shifts across the batch"},
    shifts_aligned_labels: {"shift": "row t learns label t+1: it shifts labels that are already aligned"},
    masks_no_prompt: {
        "accumulation": "by no factor per text",
        "evaluation": "0.375 times the gradient",
        "padding_side": "padding on the right has a gradient",
        "padding_amount": "padding on the right has a gradient",
        "all_masked": "where both should be 0",
        "prompt": "31 of 32 positions labelled -100 are pulled",
    },
    no_graph_when_all_masked: {"all_masked": "it returns a value without a graph"},
    writes_on_logits: {"inputs": "it writes in place on outputs"},
    writes_on_labels: {"inputs": "it writes in place on labels"},
    compute_loss_that_writes: {"inputs": "it writes in place on the model's outputs"},
    log_of_softmax: {"extremes": "p_y near 0 in float64: the gradient is NaN or infinite on 24 of 24 tokens"},
    breaks_in_float32: {"float32": "where 2e-05 is rounding"},
    coarse_after_an_offset: {"bfloat16": "where 0.05 is rounding"},
    weighs_by_column: {
        "padding_side": "padded left instead of right",
        "padding_amount": "on the left",
        "packing": "by no common factor",
    },
}


def test_faulty_losses_fail_the_expected_rules():
    for loss in WRONG:
        with case(loss):
            report = qlens.check(loss)
            failures = failed(report)
            assert set(failures) == set(WRONG[loss]), report
            for name, evidence in WRONG[loss].items():
                assert evidence in failures[name]
                assert report[name].consequence.rpartition(" ")[2] in str(report)


def test_the_factor_of_a_forgotten_count_is_that_of_the_gradients():
    """2x4 against 1x8, by hand: 12 of 48 labels are in the first half, so that its texts count fourfold."""
    loss = Specimen(resolve(forgets_the_count))
    texts = loss.texts(UNEQUAL, PROMPTS)
    assert count(texts) == 48 and count(texts[:4]) == 12
    whole, half = loss.read_batch(texts, 48).grad, loss.read_batch(texts[:4], 48).grad
    assert_close(half, 4 * whole[: len(half)])
    assert not rule.same(loss, loss.read_batch(texts, 48), loss.read_batch(texts, 48), "itself")


def test_refusing_strided_logits_is_a_remark():
    report = qlens.check(wants_contiguous)
    assert report.ok and [item.id for item in report.remarks] == ["contiguous"]
    assert "wants_contiguous raises RuntimeError: view size" in report["contiguous"].evidence


def test_nan_at_infinite_logits_is_a_remark_if_finite_masks_work():
    for loss, evidence in {
        entropy_bonus: "the gradient is NaN or infinite",
        one_hot_times_log: "the loss is nan",
    }.items():
        report = qlens.check(loss)
        assert report.ok and [item.id for item in report.remarks][0] == "impossible"
        assert f"padded columns at -inf: {evidence}" in report["impossible"].evidence


def test_terms_beyond_the_labels_are_found_on_prompts_and_padding():
    failures = failed(qlens.check(pulls_everywhere))
    assert {"prompt", "padding_side", "padding_amount", "all_masked", "evaluation", "accumulation"} <= set(failures)


def test_rules_that_compare_calls_skip_a_random_loss():
    before = torch.get_rng_state()
    report = qlens.check(dropout)
    assert_close(torch.get_rng_state(), before)
    assert "two calls on the same input differ" in failed(report)["deterministic"]
    assert all(item.state == "not applicable" for item in report.items if RULES[item.id].compares)
    assert {"all_masked", "extremes", "inputs"} <= {name for name, s in states(report).items() if s == "passed"}


def test_teacher_inputs_and_low_precision_are_accepted():
    report = qlens.check(Distils())
    assert report.ok and report["impossible"].state == "remark"
    assert report["shift"].state == "not applicable" and report["packing"].state == "passed"
    assert qlens.check(half_inside).ok and qlens.check(half_inside_a_batch).ok
    report = qlens.check(float32_only)
    assert report["float32"].evidence.startswith("it refuses float64") and set(failed(report)) == {
        "bfloat16"
    }  # fmt: skip


def test_detached_factors_are_found_without_a_declared_target():
    assert "no factor is detached" in qlens.check(F.cross_entropy)["stop_gradient"].evidence
    assert "a factor is detached" in qlens.check(detached_weight)["stop_gradient"].evidence


def test_a_loss_that_is_not_its_declared_target_fails():
    @qlens.register("half_way_example")
    def half_way(tokens):
        return qlens.Target.mix(tokens, trust=0.5, residual="student")

    try:
        assert qlens.check(half_way)["stop_gradient"].state == "not applicable"
        half_way.loss(lambda tokens: -tokens.label_log_probs)
        assert set(failed(qlens.check(half_way))) == {"stop_gradient"}
    finally:
        del qlens.registry.registry._METHODS["half_way_example"]


def scaled_by_the_batch(outputs, labels, num_items_in_batch=None):
    weight = outputs.logits.detach()[labels != -100].abs().mean()  # one number for the batch
    return weight * sound(outputs, labels, num_items_in_batch)


def test_rules_that_a_scope_excludes_do_not_apply():
    for loss, scope, not_applicable in [
        (scaled_by_the_batch, "batch", {"accumulation", "row_order", "label_ids"}),
        (mean_of_means, "sequence", {"packing"}),
        (sound, "pair", {*SHOWN, "row_order", "label_ids"}),
    ]:
        with case(loss, scope):
            qlens.register("scope_example", scope=scope)(loss)
            try:
                report = qlens.check("scope_example")
            finally:
                del qlens.registry.registry._METHODS["scope_example"]
            by_item = states(report)
            assert {name for name, state in by_item.items() if state == "not applicable"} == not_applicable | {
                "stop_gradient"
            }
            assert f"scope {scope}" in report["accumulation" if scope == "pair" else "evaluation"].evidence


def test_every_micro_batch_gets_the_count_of_the_whole_batch():
    calls = []

    def counts(outputs, labels, num_items_in_batch=None):
        calls.append((len(labels), num_items_in_batch))
        return sound(outputs, labels, num_items_in_batch)

    accumulation = RULES["accumulation"].run
    specimen = Specimen(resolve(counts))
    assert specimen.laid_out  # found by trying
    calls.clear()
    assert "same gradient" in accumulation(specimen)
    assert sorted({size for size, _ in calls}) == [1, 4, 8] and {int(count) for _, count in calls} == {48}


def test_losses_that_cannot_be_called_are_refused_with_the_reason():
    def saved_then_written(logits, labels):
        p = logits.exp()
        logits_of = p.log()
        p.mul_(2)
        return F.cross_entropy(logits_of, labels)

    def written_then_needed(logits, labels):
        square = logits.square().mean()
        logits.zero_()
        return square

    cases = {
        "value is NaN": lambda logits, labels: logits.sum() * torch.nan,
        "gradient is zero": lambda logits, labels: logits.sum() * 0,
        "without a gradient": lambda logits, labels: F.cross_entropy(logits.detach(), labels),
        "does not depend on the logits it is given": lambda logits, labels: 1.0,
        "it returns NoneType: write return loss": lambda logits, labels: None,
        "ZeroDivisionError": lambda logits, labels: 1 / 0,
        r"reads inputs\['pixel_values'\], which qlens cannot fill": lambda model, inputs: model(inputs["pixel_values"]),
        "give 'extra' a default": lambda logits, labels, extra: logits.sum(),
        "modified by an inplace": saved_then_written,
        r"writes in place on logits\)": written_then_needed,
    }
    for says, loss in cases.items():
        with pytest.raises(qlens.InputError, match=says):
            qlens.check(loss)
    with pytest.raises(qlens.InputError, match="unknown method 'sftt'"):
        qlens.check("sftt")


def test_the_report_reads_as_a_table_and_as_json():
    report = qlens.check(forgets_the_count)
    lines = str(report).splitlines()
    assert lines[2].startswith("failed          accumulation        2x4 gives 2 and 8x1 8 times")
    assert any(line.strip().startswith("consequence: training with gradient accumulation") for line in lines)
    assert lines[-1] == "18 passed, 2 failed, 1 remark, 1 not applicable"
    assert not report.ok and [item.id for item in report.failures] == ["accumulation", "all_masked"]
    parsed = json.loads(json.dumps(report.to_dict()))
    assert parsed["loss"] == "forgets_the_count" and parsed["kind"] == "outputs" and parsed["ok"] is False
    assert [item["id"] for item in parsed["items"]] == list(RULES)
    assert parsed["items"][0]["evidence"] == report["accumulation"].evidence
