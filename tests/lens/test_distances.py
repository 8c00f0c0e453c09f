"""Equivalences and distances between methods: known ones, and numbers checked by hand."""

import json

import numpy as np
import pytest
from cases import case
from numpy.testing import assert_allclose
from typer.testing import CliRunner

import qlens
from qlens.cli.app import app
from qlens.lens.equivalences import CIRCUMSTANCES, KINDS, Relation, distances
from qlens.testing import random_tokens


@pytest.fixture(scope="module")
def measured():
    return distances()


def together(measured, kind, where="always"):
    """The groups of one kind."""
    return [set(r.specs) for r in measured.relations if (r.kind, r.where) == (kind, where)]


def test_known_equivalences_are_found(measured):
    for kind, where, specs in [
        ("one gradient", 0, {"dft", "beyond_log", "gce(q=1.0)", "target_sft(eta=0.0)", "asft_anchored(weight=0.0)"}),
        ("one gradient", 0, {"dft", "idft(mix=0.0)"}),
        (
            "one gradient",
            0,
            {"sft", "rpsft", "beyond_log(alpha=0.0)", "focal(gamma=0.0)", "label_smoothing(epsilon=0.0)"},
        ),
        ("one gradient", 0, {"kd", "kd_hybrid(weight=1.0)", "jsd(beta=0.0)", "opd(alpha=0.0)"}),
        ("one up to a factor", 0, {"gem", "cross-entropy at temperature 0.7"}),
        ("one up to a factor", 0, {"dft", "mae"}),
        ("one up to a factor", 1, {"kd_hybrid", "sft_kl(weight=1.0)"}),
        ("one gradient", 2, {"sft", "psft", "iw_sft"}),
        ("one gradient", 2, {"reinforce", "grpo"}),
        ("one gradient", 3, {"sft", "reinforce"}),
        ("one gradient", 3, {"psft(eps_high=1.0)", "grpo(eps_high=1.0)"}),
        ("one target", 0, {"sft", "dft", "eaft", "beyond_log", "profit", "mae", "sce"}),
    ]:
        with case(kind, where):
            where = list(CIRCUMSTANCES)[where]
            finer = KINDS[: KINDS.index(kind) + 1]
            groups = [group for each in finer for group in together(measured, each, where)]
            assert any(specs <= group for group in groups), f"{sorted(specs)} not together in {groups}"


def test_factors_are_measured(measured):
    factor = {}
    for relation in measured.relations:
        if relation.kind == "one up to a factor" and relation.where == "always":
            size = dict(zip(relation.specs, relation.factors, strict=True))
            for spec in size:
                factor |= {(spec, other): size[spec] / size[other] for other in size}
    assert_allclose(factor["mae", "dft"], 2.0, rtol=1e-6)
    assert_allclose(factor["gem", "cross-entropy at temperature 0.7"], 0.7, rtol=1e-6)
    (axolotl,) = [spec for spec, other in factor if spec.startswith("eaft(normalizer=1.0") and other == "eaft"]
    assert_allclose(factor[axolotl, "eaft"], np.log(20), rtol=1e-6)


def test_different_targets_stay_apart(measured):
    for group in together(measured, "one target"):
        assert not {"sft", "kd"} <= group and not {"dft", "label_smoothing"} <= group and not {"gem", "sft"} <= group


def test_angles_and_scales_are_those_of_the_gradients():
    tokens = random_tokens(30, 9)
    measured = distances(tokens)
    a, b = (qlens.get(name).target(tokens).grad.flatten() for name in ("dft", "sft"))
    row = measured.table.query("left == 'dft' and right == 'sft'").iloc[0]
    assert_allclose(row["angle"], np.degrees(np.arccos(float(a @ b / (a.norm() * b.norm())))))
    assert_allclose(row["log_ratio"], np.log(float(a.norm() / b.norm())))
    square = measured.angles()
    assert_allclose(square, square.T)
    assert_allclose(np.diag(square), 0)
    name, angle, ratio = measured.neighbours(1)["sft"][0]
    assert_allclose(angle, square.loc["sft"].drop("sft").min())
    assert_allclose(ratio, np.log(float(b.norm() / qlens.get(name).target(tokens).grad.norm())), rtol=1e-6)


def test_methods_whose_fields_are_missing_are_left_out():
    tokens = random_tokens(12, 9)
    measured = distances(qlens.Tokens(logits=tokens.logits, labels=tokens.labels))
    assert {"kd", "dpo", "cft"} <= set(measured.left_out) and "dft" not in measured.left_out
    assert {r.where for r in measured.relations} == {"always"} and "Left out" in str(measured)


def test_a_relation_reads_as_an_equation():
    relation = Relation("one up to a factor", ("a", "b", "c"), (1.0, 2.0, 1.0), "always")
    assert str(relation) == "a = 0.5 x b = c"
    assert str(Relation("one target", ("a", "b"), (1.0, 3.0), "always")) == "a, b"


def test_the_command_prints_distances():
    result = CliRunner().invoke(app, ["list", "--distances"])
    assert result.exit_code == 0 and "The same gradient" in result.output and "Nearest other methods" in result.output
    parsed = json.loads(CliRunner().invoke(app, ["list", "--distances", "--json"]).output)
    assert set(parsed) == {"relations", "distances", "left_out"} and parsed["left_out"] == []
    refused = CliRunner().invoke(app, ["list", "--model", "here"])
    assert isinstance(refused.exception, qlens.InputError) and "--distances" in str(refused.exception)


def test_a_long_text_is_compared_some_rows_at_a_time(monkeypatch):
    tokens = random_tokens(60, 40)
    whole = distances(tokens)
    monkeypatch.setattr("qlens.lens.equivalences.WHOLE", 100)
    monkeypatch.setattr("qlens.lens.identify.angles.TOGETHER", 40 * 7 * 54)
    by_rows = distances(tokens, progress=False)
    assert whole.relations_on is None and by_rows.relations_on == (24, 60)
    assert list(by_rows.table["left"]) == list(whole.table["left"]) and by_rows.left_out == whole.left_out
    assert_allclose(by_rows.table["angle"], whole.table["angle"], atol=1e-5)  # acos near 1 halves the digits
    assert_allclose(by_rows.table["log_ratio"], whole.table["log_ratio"], atol=1e-9)
    assert "on 24 of 60 tokens" in str(by_rows)
    related = {spec for relation in by_rows.relations if relation.where == "always" for spec in relation.specs}
    assert {"dft", "beyond_log", "target_sft(eta=0.0)"} <= related
