"""Evaluation on held-out tokens, against the formulas."""

import numpy as np
import pytest
import torch
from numpy.testing import assert_allclose
from tiny_models import letters, llama

import qlens
from qlens.analysis.compare.evaluation import (
    HeldOut,
    diagnostics,
    held_out_tokens,
    label_scores,
    reading,
    row_nll,
    separation,
)
from qlens.data.examples import encode
from qlens.data.from_text import token_batches

ROWS = [
    {"question": f"what is {word}", "answer": word[::-1]} for word in ("sun", "moon", "star", "tree", "river", "sea")
]


def test_diagnostics_match_their_formulas():
    model, start, teacher = llama(5), llama(0), llama(1)
    examples = encode(ROWS[:4], letters(), None).examples
    actual = diagnostics(model, qlens.get("target_sft"), examples, reference=start, teacher=teacher)
    (tokens,) = held_out_tokens(model, examples, reference=start, teacher=teacher)
    p, p_y = tokens.probs, tokens.label_probs
    q_y = tokens.gather(qlens.get("target_sft").target(tokens).q)
    started = tokens.log_probs_of("reference").exp()
    expected = {
        "nll": -p_y.log().mean(),
        "entropy": torch.distributions.Categorical(probs=p).entropy().mean(),
        "kl_start": (started * (started / p).log()).sum(-1).mean(),
        "label_weight": (q_y - p_y).sum() / (1 - p_y).sum(),
        "negative_mass": 0.0,
    }
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        assert_allclose(actual[name], float(value), rtol=1e-4, atol=1e-6, err_msg=name)
    assert diagnostics(model, qlens.get("sft"), examples, reference=start)["label_weight"] == pytest.approx(1)
    rows = [-row_tokens.label_log_probs.mean() for row in examples for row_tokens in held_out_tokens(model, [row])]
    assert_allclose(row_nll(model, examples), rows, rtol=1e-5)


def test_readings_of_methods_use_the_same_tokens():
    start, teacher = llama(0), llama(1)
    examples = encode(ROWS, letters(), None).examples
    models = {"sft": {}, "dft": {"teacher": start}, "target_sft": {"teacher": teacher}}  # a control may have its own
    readings = {m: reading(start, qlens.get(m), examples, None, letters(), teacher, o) for m, o in models.items()}
    assert len({tuple(r["label_weight"]["p_y"]) for r in readings.values()}) == 1
    assert len({(tuple(r["target"]["token"]), tuple(r["target"]["p"])) for r in readings.values()}) == 1
    assert_allclose(*readings["dft"]["label_weight"].values(), rtol=1e-4)
    for r in readings.values():
        assert sum(r["target"]["label"]) == 1 and r["target"]["token"][-1] == "(rest)"
        assert_allclose([sum(r["target"]["p"]), sum(r["target"]["q"])], 1, rtol=1e-5)
    at = readings["sft"]["target"]["label"].index(True)
    assert_allclose(readings["sft"]["target"]["q"][at], 1, rtol=1e-6)


def test_label_scores_match_the_targets():
    start, teacher = llama(0), llama(1)
    examples = encode(ROWS, letters(), None).examples
    (tokens,) = held_out_tokens(start, examples)
    dft = label_scores(start, qlens.get("dft"), examples)
    assert_allclose(dft["p"], tokens.label_probs, rtol=1e-5)
    assert_allclose(dft["trust"], dft["p"], rtol=1e-5)
    assert_allclose(dft["Q"], dft["p"] * (2 - dft["p"]), rtol=1e-5)
    kd = label_scores(start, qlens.get("kd"), examples, teacher=teacher)
    assert_allclose(kd["Q"], next(held_out_tokens(teacher, examples)).label_probs, rtol=1e-5)
    assert_allclose(kd["trust"], 0)
    smoothed = qlens.registry.resolve(
        lambda logits, labels: torch.nn.functional.cross_entropy(logits, labels, label_smoothing=0.1)
    )
    derived, registered = (label_scores(start, v, examples) for v in (smoothed, qlens.get("label_smoothing")))
    assert np.isnan(derived["trust"]).all(), "whose construction is not known"
    assert len(set(registered["Q"])) == 1 and set(registered["Q"]) == set(derived["Q"]), "rounding makes no order"


def test_separation_counts_unjudged_labels_as_good():
    start, examples = llama(0), encode(ROWS, letters(), None).examples
    p = label_scores(start, qlens.get("dft"), examples)["p"]
    truth = np.full(len(p), np.nan)
    truth[:10] = p[:10] > np.median(p[:10])  # p tells them apart without an error
    rows = {
        (row["belief"], row["labels"]): row for row in separation(start, qlens.get("dft"), examples, truth, "start")
    }
    judged, everything = rows["trust", "judged"], rows["p", "all"]
    assert judged["auroc"] == 1 and (judged["good"], judged["noisy"]) == (5, 5)
    assert everything["noisy"] == 5 and everything["good"] == len(p) - 5
    low = np.sort(p[:10])[:5]
    wins = (np.delete(p, np.flatnonzero(truth == 0))[:, None] > low).mean()
    assert_allclose(everything["auroc"], wins, rtol=1e-6)
    (sft,) = [row for row in separation(start, qlens.get("sft"), examples, truth, "start") if row["belief"] == "Q"][:1]
    assert_allclose(sft["auroc"], 0.5)


def test_kept_predictions_are_those_of_a_fresh_pass(monkeypatch):
    student, teacher = llama(0), llama(1)
    examples = encode(ROWS, letters(), None).examples
    kept, passes = HeldOut(examples), []
    monkeypatch.setattr(
        "qlens.analysis.compare.evaluation.token_batches",
        lambda *each, **o: passes.append(each[0]) or token_batches(*each, **o),
    )
    for _ in range(2):
        for name, models in (("dft", {}), ("kd", {"teacher": teacher}), ("psft", {}), ("unlikelihood", {})):
            variant = qlens.get(name)
            (actual,) = held_out_tokens(student, kept, variant, **models)
            (expected,) = token_batches(student, examples, len(examples), variant.needs, **models)
            assert actual.fields().keys() == expected.fields().keys()
            assert all(torch.equal(value, expected.fields()[key]) for key, value in actual.fields().items()), name
    derived = 2 * 2  # psft's old policy and unlikelihood's negatives follow from the student, each time
    assert len(passes) == 2 + derived
