"""Identification of methods from their loss alone; the whole table is rebuilt by a slow test."""

from pathlib import Path

import pandas as pd
import pytest

import qlens
from qlens.analysis.maintenance.identification import identify, random_variants, report, roundtrip
from qlens.registry import methods

STORED = Path(__file__).parents[2] / "analysis" / "results" / "roundtrip.csv"


def test_every_method_is_identified_at_its_defaults():
    rows = pd.DataFrame([identify(qlens.get(name)) for name in qlens.names()])
    wrong = rows[(rows["verdict"] != "itself") | (rows["relation"] != "identical")]
    assert wrong.empty, wrong


def test_random_variants_are_reproducible_and_distinct():
    specs = [variant.spec for variant in random_variants(methods()["uft"])]
    assert specs == [variant.spec for variant in random_variants(methods()["uft"])] and len(set(specs)) == 3


def test_the_report_counts_verdicts_and_lists_confusions():
    rows = [identify(qlens.get(spec)) for spec in ("dft", "beyond_log(alpha=0.3)")]
    rows.append({"method": "x", "shown": "x(a=1)", "verdict": "unknown", "found": "", "relation": ""})
    text = report(pd.DataFrame(rows), "command")
    assert "2 itself, 1 unknown, of 3 points." in text and "| `x(a=1)` | nothing |" in text


def test_the_stored_table_covers_every_method_and_identifies_nearly_all():
    stored = pd.read_csv(STORED)
    assert set(stored["method"]) == set(qlens.names())
    taught = stored[stored["verdict"] != "no gradient"]
    assert (taught["verdict"] == "itself").mean() > 0.98


@pytest.mark.slow
def test_the_stored_table_is_reproduced():
    stored = pd.read_csv(STORED)[["shown", "verdict"]]
    pd.testing.assert_frame_equal(roundtrip()[["shown", "verdict"]], stored)
