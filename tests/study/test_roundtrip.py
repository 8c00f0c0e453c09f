"""The round trip: methods known again from their loss alone; the whole table is rebuilt by a slow test."""

from pathlib import Path

import pandas as pd
import pytest

import qlens
from qlens.analysis.maintenance.identification import drawn, known, roundtrip, written
from qlens.registry import methods

KEPT = Path(__file__).parents[2] / "analysis" / "results" / "roundtrip.csv"


@pytest.mark.parametrize("name", qlens.names())
def test_every_method_is_known_at_its_defaults(name):
    row = known(qlens.get(name))
    assert row["verdict"] == "itself" and row["relation"] == "identical", row


def test_draws_repeat_and_differ():
    specs = [variant.spec for variant in drawn(methods()["uft"])]
    assert specs == [variant.spec for variant in drawn(methods()["uft"])] and len(set(specs)) == 3


def test_the_table_says_what_was_taken_for_what():
    rows = [known(qlens.get(spec)) for spec in ("dft", "beyond_log(alpha=0.3)")]
    rows.append({"method": "x", "shown": "x(a=1)", "verdict": "unknown", "found": "", "relation": ""})
    text = written(pd.DataFrame(rows), "command")
    assert "2 itself, 1 unknown, of 3 points." in text and "| `x(a=1)` | nothing |" in text


def test_the_kept_table_covers_every_method_and_knows_nearly_all():
    kept = pd.read_csv(KEPT)
    assert set(kept["method"]) == set(qlens.names())
    taught = kept[kept["verdict"] != "no gradient"]
    assert (taught["verdict"] == "itself").mean() > 0.98


@pytest.mark.slow
def test_the_kept_table_is_what_comes_out():
    kept = pd.read_csv(KEPT)[["shown", "verdict"]]
    pd.testing.assert_frame_equal(roundtrip()[["shown", "verdict"]], kept)
