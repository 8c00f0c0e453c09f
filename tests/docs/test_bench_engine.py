"""Engine benchmark: a case in its own process, ratios within a round, and the figure of the stored rows."""

import json
from pathlib import Path

import pytest
from numpy.testing import assert_allclose

import qlens
from qlens.analysis.benchmarks import engine
from qlens.analysis.benchmarks.baselines import ONLY, WAYS, Inputs

STORED = json.loads((Path(qlens.__file__).parent / "analysis" / "results" / "engine" / "engine.json").read_text())


def test_a_case_takes_turns_and_reports_its_peak():
    case = engine.Case("qlens", "target_sft", (6, 4, 32))
    case.turn()
    case.measure()
    case.measure()
    row = case.row()
    assert len(row["turns"]) == 2 and min(row["turns"]) > 0 and row["peak"] >= 0
    assert_allclose(row["seconds"], sum(row["turns"]) / 2)
    assert case.process.returncode == 0


def test_a_failed_case_is_named_and_leaves_no_other_process():
    failure = pytest.raises(RuntimeError, match="torch linear_cross_entropy for sft ended with status 1")
    with failure, engine.Case("qlens", "sft", (6, 4, 32)) as other:
        engine.Case("torch linear_cross_entropy", "sft", (0, 4, -1)).measure()
    assert other.process.poll() is not None


def test_every_baseline_runs_and_fills_the_gradients():
    for way in WAYS.keys() - {"liger chunked"}:
        method = ONLY.get(way, ("target_sft",))[0]
        x = Inputs(6, 4, 32, other=bool(engine.METHODS[method]))
        WAYS[way](x, method)()
        assert x.hidden.grad.abs().sum() > 0 and x.head.grad.abs().sum() > 0, way


def test_ratios_are_medians_of_rounds():
    turns = {"bare products": [1.0, 2.0, 4.0], "plain path": [2.0, 8.0, 8.0], "qlens": [1.5, 2.0, 8.0]}
    peaks = {"bare products": 20.0, "plain path": 40.0, "qlens": 4.0}
    rows = engine._compared([{"way": way, "turns": each, "peak": peaks[way]} for way, each in turns.items()])
    assert_allclose([row["to products"] for row in rows], [1, 2, 1.5])
    assert_allclose([row["to plain"] for row in rows], [0.5, 1, 0.75])
    assert_allclose([row["memory to plain"] for row in rows], [0.5, 1, 0.1])


def test_the_stored_rows_are_drawn():
    figure, frame = engine.draw_engine(STORED)
    some = frame[(frame["way"] != "plain path")]
    assert len(some) == sum(len(ONLY.get(way, engine.METHODS)) for way in WAYS if way != "plain path")
    for ax, key in zip(figure.axes, ("to plain", "memory to plain"), strict=True):
        assert_allclose(sorted(bar.get_width() for bar in ax.patches), sorted(some[key]))
        assert ax.get_xlim()[0] == 0
    assert [label.get_text() for label in figure.axes[0].get_yticklabels()] == list(engine.METHODS)
    assert {text.get_text() for text in figure.legends[0].get_texts()} == {*set(some["way"]), "limit set for qlens"}
