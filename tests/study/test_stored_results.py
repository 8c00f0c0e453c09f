"""The stored results: their configuration is current, and their settings distinguish the methods."""

import dataclasses
import json
from pathlib import Path

import pytest

import qlens
from qlens.analysis.compare.config import configuration, lab_sources, settle_all
from qlens.analysis.compare.recipes import recipes
from qlens.analysis.study.study import Study
from qlens.lab import SETTINGS

RESULTS = Path(qlens.__file__).parent / "analysis" / "results"
KEPT = {"compare-default": ("default", ("strong-prior", "weak-prior"), 3), "compare-all": (None, "all", 5)}


@pytest.fixture(params=KEPT, scope="module")
def stored(request):
    folder = RESULTS / request.param
    return folder, Study.load(folder), KEPT[request.param]


def test_the_stored_configuration_is_current(stored):
    folder, study, (variants, settings, seeds) = stored
    rows = recipes([variants] if variants else ["default", "controls"])
    sources = lab_sources(settings, None)
    expected = configuration(rows, sources, settle_all(rows, sources, None, False), range(seeds))
    actual = {name: study.config.get(name) for name in expected}
    for key in ("code", "versions"):  # which code it was is recorded; comments may have changed since
        assert actual.pop(key) and expected.pop(key)
    assert actual == expected, f"{folder.name} is of another configuration: run its command in results/README.md again"
    assert study.config["noted"]["failed"] == []
    assert len(study.results) == len(rows) * len(sources) * seeds * 100


def test_the_stored_tables_match_the_scores(stored):
    folder, study, _ = stored
    assert (folder / "table.md").read_text(encoding="utf-8") == study.to_markdown()


def test_no_setting_is_saturated():
    study = Study.load(RESULTS / "compare-all")
    means = study.table().set_index(["setting", "method"])["mean"]
    for name, measured in study.config["noted"]["settings"].items():
        for who, share in (("base", measured["base"]), ("teacher", measured["teacher"]), ("sft", means[name, "sft"])):
            assert 0.1 < share < 0.9, f"{who} in {name}"
    assert set(study.settings) == set(SETTINGS)


def test_settings_differ_as_their_names_say():
    strong, weak, wrong, poor, clean = SETTINGS.values()
    assert dataclasses.replace(poor, name=strong.name, tutor=strong.tutor) == strong
    assert wrong.corpus.false[2] == 1 and max(weak.corpus.false) < 0.1 < weak.corpus.slip[2]
    assert clean.noise == 0 and clean.scribe == type(clean.scribe)()
    measured = {
        n: json.loads(json.dumps(v)) for n, v in Study.load(RESULTS / "compare-all").config["noted"]["settings"].items()
    }
    assert measured["poor-teacher"]["teacher"] < measured["poor-teacher"]["base"]
    assert measured["clean-labels"]["noise"] == 0 < measured["strong-prior"]["noise"]


def test_outputs_that_are_unpacked_are_refused_with_the_line_to_write():
    def unpacked(model, idx, targets):
        _, loss = model(idx, targets)
        return loss

    with pytest.raises(
        qlens.InputError, match=r"returns str, as where .*write outputs = model\(\.\.\.\) and outputs\.loss"
    ):
        qlens.explain(unpacked)
