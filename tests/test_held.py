"""Diagnostics and readings on held-out tokens, against their formulas written out."""

import pytest
import torch
from numpy.testing import assert_allclose
from tiny import letters, llama

import qlens
from qlens.analysis.held import diagnostics, held_tokens, reading, row_nll
from qlens.data import encode

ROWS = [
    {"question": f"what is {word}", "answer": word[::-1]} for word in ("sun", "moon", "star", "tree", "river", "sea")
]


def test_diagnostics_are_what_they_say():
    model, start, teacher = llama(5), llama(0), llama(1)
    examples = encode(ROWS[:4], letters(), None).examples
    found = diagnostics(model, start, teacher, qlens.get("target_sft"), examples)
    (tokens,) = held_tokens(model, examples, reference=start, teacher=teacher)
    p, p_y = tokens.probs, tokens.label_probs
    q_y = tokens.gather(qlens.get("target_sft").target(tokens).q)
    started = tokens.log_probs_of("reference").exp()
    wanted = {
        "nll": -p_y.log().mean(),
        "entropy": torch.distributions.Categorical(probs=p).entropy().mean(),
        "kl_start": (started * (started / p).log()).sum(-1).mean(),
        "trust": (q_y - p_y).sum() / (1 - p_y).sum(),
        "negative_mass": 0.0,
    }
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        assert_allclose(found[name], float(value), rtol=1e-4, atol=1e-6, err_msg=name)
    assert diagnostics(model, start, None, qlens.get("sft"), examples)["trust"] == pytest.approx(1)
    rows = [-held.label_log_probs.mean() for row in examples for held in held_tokens(model, [row])]
    assert_allclose(row_nll(model, examples), rows, rtol=1e-5)


def test_every_method_is_read_at_the_same_tokens():
    start, teacher = llama(0), llama(1)
    examples = encode(ROWS, letters(), None).examples
    read = {m: reading(start, teacher, qlens.get(m), examples, letters()) for m in ("sft", "dft", "target_sft")}
    assert len({tuple(r["trust"]["p_y"]) for r in read.values()}) == 1
    assert len({(tuple(r["target"]["token"]), tuple(r["target"]["p"])) for r in read.values()}) == 1
    assert_allclose(read["dft"]["trust"]["trust"], read["dft"]["trust"]["p_y"], rtol=1e-4)
    for r in read.values():
        assert sum(r["target"]["label"]) == 1 and r["target"]["token"][-1] == "(rest)"
        assert_allclose([sum(r["target"]["p"]), sum(r["target"]["q"])], 1, rtol=1e-5)
    at = read["sft"]["target"]["label"].index(True)
    assert_allclose(read["sft"]["target"]["q"][at], 1, rtol=1e-6)
