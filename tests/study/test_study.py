"""Studies from made-up scores: ranks, paired differences, corrections, controls, notes and exports."""

import dataclasses
import json

import numpy as np
import pandas as pd
import pytest
from example_study import MEANS, SETTINGS, example_study
from numpy.testing import assert_allclose
from scipy import stats

from qlens import InputError
from qlens.analysis.compare.learning_rates import GRID
from qlens.analysis.compare.recipes import CONTROLS
from qlens.analysis.study.stats import crossed_interval
from qlens.analysis.study.study import Study


def test_the_table_is_the_statistics_of_the_scores():
    study = example_study()
    table = study.table().set_index(["setting", "method"])
    scores = study.scores("two")["dft"].to_numpy()
    expected = crossed_interval(scores)
    row = table.loc[("two", "dft")]
    assert_allclose([row["mean"], row["low"], row["high"]], [expected.mean, expected.low, expected.high])
    assert_allclose(row["pass_at_k"], (scores > 0).mean())
    assert row["n"] == "3 x 40"
    ranks = table.loc["one"]
    assert ranks.loc["target_sft", ["rank", "best", "worst"]].tolist() == [1, 1, 1]
    assert ranks.loc["base", ["rank", "best", "worst"]].tolist() == [5, 5, 5]
    assert ranks.loc[["sft", "dft"], "best"].tolist() == [3, 3] and ranks.loc[["sft", "dft"], "worst"].tolist() == [
        4,
        4,
    ]


def test_differences_are_paired_and_corrected_over_methods_and_settings():
    study = example_study()
    differences = study.differences()
    assert set(differences["against"]) == {"sft"} and len(differences) == 8
    x = study.scores("one")
    gap = (x["dft"] - x["sft"]).to_numpy()
    (row,) = differences.query("setting == 'one' and method == 'dft'").itertuples()
    assert_allclose(row.mean, gap.mean())
    assert row.high - row.low < 2 * stats.norm.ppf(0.975) * np.hypot(x["dft"].std().mean(), x["sft"].std().mean())
    order = differences.sort_values("p")
    by_hand = np.maximum.accumulate(np.minimum(1, order["p"].to_numpy() * np.arange(len(order), 0, -1)))
    assert_allclose(order["p_holm"], by_hand)
    assert study.differences("base", ["dft"])["method"].tolist() == ["dft", "dft"]
    with pytest.raises(InputError, match="no results of 'kd'; there are base, sft"):
        study.differences("kd")


def test_without_sft_the_base_is_the_baseline():
    study = example_study({"base": 0.4, "dft": 0.6})
    assert set(study.differences()["against"]) == {"base"}
    assert len(example_study({"base": 0.4}).differences()) == 0
    assert "avg@8" in str(example_study({"base": 0.4}))


def test_control_differences_compare_a_method_with_its_controls():
    study = example_study()
    differences = study.control_differences()
    assert set(differences["method"]) == {"target_sft"} and set(differences["against"]) == {"target_sft_base_teacher"}
    assert (
        (differences["mean"] > 0.1).all()
        and (differences["low"] < differences["mean"]).all()
        and (differences["high"] > differences["mean"]).all()
    )
    assert set(differences["against"]) <= set(CONTROLS)
    assert "target_sft against its controls" in str(study)
    assert example_study({"base": 0.4, "target_sft": 0.8}).control_differences().empty


def test_a_missing_job_is_reported_and_the_rest_used():
    line = "dft in one at seed 1: RuntimeError: no luck (failed/x.txt)"
    study = example_study(missing=[("one", "dft", 1)], failed=[line])
    table = study.table().set_index(["setting", "method"])
    assert table.loc[("one", "dft"), "n"] == "2 x 40" and table.loc[("one", "sft"), "n"] == "3 x 40"
    assert study.differences().set_index(["setting", "method"]).loc[("one", "dft"), "n"] == "2 x 40"
    text = str(study)
    assert "dft: n = 2 x 40" in text and f"failed: {line}" in text and "n = 3 x 40 (seeds x items)" in text
    without_method = example_study(missing=[("one", "dft", 0), ("one", "dft", 1), ("one", "dft", 2)])
    assert ("one", "dft") not in without_method.table().set_index(["setting", "method"]).index
    assert ("two", "dft") in without_method.table().set_index(["setting", "method"]).index
    unequal = example_study(missing=[("one", "dft", 0), ("one", "dft", 1), ("one", "sft", 2)])
    ranks = unequal.table().query("setting == 'one'").set_index("method")["rank"]
    assert ranks[["dft", "sft"]].isna().all() and ranks.drop(["dft", "sft"]).tolist() == [3, 1, 2], (
        "of those with all seeds"
    )
    assert str(unequal)


def test_learning_rates_are_printed_with_their_caveats():
    study = example_study()
    text = str(study)
    assert f"{GRID[0]:g}*" in text and "* sft: best at the edge of the learning-rate grid" in text
    assert "dft, target_sft, target_sft_base_teacher: sft's learning rate, not searched" in text
    assert "prior knowledge: accuracy of the base model 0.4\n" in text and "measured: odd thing 1\n" in text
    rates = study.rates.query("setting == 'one' and method == 'sft'")
    assert rates["chosen"].tolist() == [True] + [False] * (len(GRID) - 1)
    assert_allclose(rates["validation"], 0.1)


def test_diagnostics_get_no_ranks():
    assert " rank " in str(example_study()) and " rank " not in str(example_study(better="lower", note="a diagnostic"))
    lower = example_study(better="lower").table().set_index(["setting", "method"])
    assert lower.loc[("one", "base"), "rank"] == 1 and lower.loc[("one", "target_sft"), "rank"] == 5


def test_aurocs_are_means_over_seeds_where_there_is_noise():
    study = example_study()
    aurocs = study.label_auroc().set_index(["setting", "method"])
    assert_allclose(aurocs.loc[("one", "dft"), ["trust", "Q", "p_end"]].astype(float), [0.5, 0.6, 0.8])
    assert aurocs.loc[("one", "dft"), ["good", "noisy"]].tolist() == [30, 10]
    assert aurocs["Q_end"].isna().all()
    assert "one: label noise found" in str(study) and "two: label noise found" not in str(study)


def test_curves_have_intervals_over_seeds():
    curve = example_study().curve().query("setting == 'one' and method == 'dft'").set_index("step")
    assert_allclose(curve.loc[10, "mean"], 0.3)
    half = stats.t.ppf(0.975, 2) * 0.1 / np.sqrt(3)
    assert_allclose([curve.loc[10, "low"], curve.loc[10, "high"]], [0.3 - half, 0.3 + half])


def test_every_export_has_every_method_and_number():
    study = example_study()
    for form in ("to_markdown", "to_latex", "__str__", "_repr_html_"):
        text = getattr(study, form)().replace("\\", "")
        assert all(name in text for name in MEANS) and all(name in text for name in SETTINGS), form
        assert all(f"{mean:.3f}" in text for mean in study.table()["mean"]), form
    record = json.loads(json.dumps(study.to_dict()))
    assert [row["method"] for row in record["table"][:5]] == list(MEANS) and record["table"][0]["label_weight"] is None
    assert len(record["differences"]) == len(study.differences()) and record["config"] == study.config
    assert study.to_frame().equals(study.table()) and len(repr(study)) < 200 and "5 methods x 2 settings" in repr(study)
    assert study.plot().axes


def test_latex_takes_columns_and_a_caption():
    source = example_study({"base": 0.4, "sft": 0.5, "a_b<c": 0.6}).to_latex(["method", "avg@8"], "Means & more.")
    assert source.count(r"\begin{table}") == 2 and source.count("Means & more.") == 2
    assert r"a\_b\textless{}c & 0." in source and "interval" not in source
    with pytest.raises(InputError, match="columns: no column 'trust'; there are method, avg@8"):
        example_study().to_latex(["method", "trust"])


def test_names_of_earlier_versions_are_served_with_a_warning(tmp_path):
    study = example_study()
    for old, new in (("truths", "label_auroc"), ("controlled", "control_differences")):
        with pytest.warns(DeprecationWarning, match=new):
            pd.testing.assert_frame_equal(getattr(study, old)(), getattr(study, new)())
    with pytest.warns(DeprecationWarning, match="label_weight"):
        assert study.table()["trust"].isna().all()
    study.save(tmp_path)
    frame = pd.DataFrame({"setting": ["one"], "method": ["sft"], "p_y": [0.1], "trust": [1.0]})
    frame.to_csv(tmp_path / "figures" / "trust.csv", index=False)
    (tmp_path / "figures" / "label_weight.csv").unlink()
    old = pd.read_csv(tmp_path / "diagnostics.csv").rename(columns={"label_weight": "trust"}).assign(trust=0.25)
    old.to_csv(tmp_path / "diagnostics.csv", index=False)
    loaded = Study.load(tmp_path)
    assert loaded.label_weight["label_weight"].tolist() == [1.0]
    assert set(loaded.table()["label_weight"]) == {0.25}
    with pytest.warns(DeprecationWarning, match="label_weight"):
        assert loaded.trust["trust"].tolist() == [1.0]


def test_a_study_round_trips_through_its_folder(tmp_path):
    study = example_study(missing=[("one", "dft", 1)])
    study.save(tmp_path)
    loaded = Study.load(tmp_path)
    for name in ("results", "diagnostics", "rates", "curves", "truth"):
        pd.testing.assert_frame_equal(getattr(loaded, name), getattr(study, name), check_dtype=False)
    assert str(loaded) == str(study)


def test_names_are_escaped_in_markdown_and_print():
    name = "own.py:a|b`c`\n| d | [e](f) <b>"
    study = example_study({"base": 0.4, "sft": 0.5, name: 0.6}, failed=[f"{name} in one at seed 1: no"])
    lines = study.to_markdown().splitlines()
    assert any(line.startswith(r"| own.py:a\|b\`c\` \| d \| \[e\](f) \<b> |") for line in lines)
    assert any(r"- failed: own.py:a|b\`c\` | d" in line for line in lines)
    cells = [line for line in lines[: lines.index("", 2)] if line.startswith("|")]  # of the first table
    assert len({line.replace(r"\|", "").count("|") for line in cells}) == 1, "every row has as many cells"
    printed = str(study).splitlines()
    assert sum("own.py:a|b`c` | d | [e](f) <b>" in line for line in printed) >= 4


def test_one_held_out_row_has_no_p_value_and_no_ranks():
    study = example_study()
    study = dataclasses.replace(study, results=study.results[study.results["item"] == 0])
    differences = study.differences()
    assert (differences["items"] == 1).all() and differences[["p", "p_holm"]].isna().all(axis=None)
    assert differences["low"].notna().any()
    table = study.table()
    assert (table["best"] == 1).all() and (table["worst"] == len(study.methods)).all()
    row = next(line for line in str(study).splitlines() if line.startswith("target_sft"))
    assert "<.001" not in row and "p (Holm): over" not in str(study)
