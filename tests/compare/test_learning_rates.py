"""Learning rates: the rule, the record that ships with the lab, and the search."""

import dataclasses
import json
from pathlib import Path

import pytest
from mini_lab import MINI

import qlens
from qlens import InputError
from qlens.analysis.compare import learning_rates
from qlens.analysis.compare.environments import LabSource
from qlens.analysis.compare.learning_rates import (
    GRID,
    SEEDS,
    Choice,
    Trial,
    choose,
    chosen,
    gathered,
    recorded,
    settle,
    trials,
)
from qlens.analysis.compare.recipes import BASE, CONTROLS, DEFAULT, Recipe, recipes
from qlens.lab import SETTINGS
from qlens.lab.environment import VERSION

SFT = [Recipe(qlens.get("sft"))]
TUNED = list(CONTROLS["kd_hybrid_tuned"].recipes)


RULE = [
    ({"a": {"0.001": [0.1], "0.01": [0.5], "0.03": [0.4]}}, ("a", 0.01)),
    ({"a": {"0.001": [0.495], "0.01": [0.5]}}, ("a", 0.001)),  # within .01: the smaller
    ({"a": {"0.001": [0.489], "0.01": [0.5]}}, ("a", 0.01)),
    ({"a": {"0.001": [0.2, 0.8], "0.01": [0.4, 0.5]}}, ("a", 0.001)),  # means over seeds
    ({"a": {"0.001": [0.495], "0.01": [0.3]}, "b": {"0.001": [0.5], "0.01": [0.2]}}, ("b", 0.001)),
    ({"a": {"0.001": [0.3], "0.01": [0.5]}, "b": {"0.001": [0.495], "0.01": [0.2]}}, ("b", 0.001)),
]


def test_the_learning_rate_is_chosen_by_the_documented_rule():
    for scores, expected in RULE:
        assert choose(scores) == expected, scores


def test_an_optimum_at_the_edge_is_marked():
    rates = {"0.001": [0.1], "0.003": [0.5], "0.01": [0.3]}
    assert not chosen(SFT, {"sft": rates}, "record").at_edge
    close = chosen(SFT, {"sft": rates | {"0.001": [0.495]}}, "record")
    assert close.learning_rate == 0.001 and not close.at_edge, "taken for being small, not for being best"
    assert chosen(SFT, {"sft": rates | {"0.01": [0.7]}}, "record").at_edge
    assert chosen(SFT, {"sft": rates | {"0.001": [0.7]}}, "record").at_edge
    assert not Choice(recipe=SFT[0], learning_rate=1.0, origin="given", scores={}).at_edge


def test_the_record_covers_every_method_control_and_setting():
    for setting in SETTINGS.values():
        for name, among in recipes([*DEFAULT, *CONTROLS]).items():
            if name == BASE:
                continue
            scores = recorded(LabSource(setting), name)
            assert set(scores) == {recipe.spec for recipe in among}, (
                f"{name}: run python -m qlens.analysis.compare.learning_rates"
            )
            for of_recipe in scores.values():
                assert set(of_recipe) == {str(rate) for rate in GRID}
                assert all(len(by_seed) == len(SEEDS) for by_seed in of_recipe.values())
            choice = settle(LabSource(setting), name, among, None, False)
            assert choice.origin == "record" and choice.learning_rate in GRID


@pytest.fixture
def record(tmp_path, monkeypatch):
    """A record of sft and of one kd_hybrid in the miniature setting."""
    scores = {
        "sft": {"sft": {str(rate): [0.1 + rate] for rate in GRID}},
        "kd_hybrid_tuned": {TUNED[0].spec: {str(rate): [0.1] for rate in GRID}},
    }
    path = tmp_path / "rates.json"
    path.write_text(json.dumps({"settings": {"mini": {"key": MINI.key, "lab": VERSION, "scores": scores}}}))
    monkeypatch.setattr(learning_rates, "RECORD", path)


def test_the_origin_of_a_learning_rate(record):
    lab, other = LabSource(MINI), [Recipe(qlens.get("dft"))]
    best = 0.03  # .13 against .11: more than the margin
    assert settle(lab, BASE, [Recipe(None)], None, False).learning_rate == 0
    assert settle(lab, "sft", SFT, 0.5, False).to_dict() == {"recipe": "sft", "learning_rate": 0.5, "origin": "given"}
    assert settle(lab, "sft", SFT, None, False).to_dict() == {
        "recipe": "sft",
        "learning_rate": best,
        "origin": "record",
    }
    assert settle(lab, "dft", other, None, False).to_dict() == {
        "recipe": "dft",
        "learning_rate": best,
        "origin": "as sft",
    }
    assert settle(lab, "dft", other, None, True) == GRID
    assert settle(lab, "sft", SFT, None, True).origin == "record"
    changed = LabSource(dataclasses.replace(MINI, seed=9))
    assert settle(changed, "sft", SFT, None, False).to_dict() == {
        "recipe": "sft",
        "learning_rate": MINI.learning_rate,
        "origin": "default",
    }
    assert settle(LabSource(MINI, steps=3), "sft", SFT, None, False).origin == "record of other steps"
    assert settle(LabSource(MINI, steps=3), "sft", SFT, None, True) == GRID, "the record is of other steps"
    assert settle(LabSource(MINI, steps=MINI.steps), "sft", SFT, None, True).origin == "record"
    with pytest.raises(InputError, match="kd_hybrid_tuned is chosen on validation.*lr_grid"):
        settle(lab, "kd_hybrid_tuned", TUNED, None, False)
    assert settle(lab, "kd_hybrid_tuned", TUNED, None, True) == GRID
    assert settle(lab, "kd_hybrid_tuned", TUNED, 0.5, True) == (0.5,)


def test_a_rate_that_failed_at_a_seed_is_excluded(tmp_path):
    search_trials = trials(LabSource(MINI), "sft", SFT, (0.1, 0.2), tmp_path)
    assert len(search_trials) == 2 * len(SEEDS) and len({trial.path for trial in search_trials}) == len(search_trials)
    assert gathered(search_trials) == {}
    for number, trial in enumerate(search_trials[:-1]):
        trial.path.parent.mkdir(exist_ok=True)
        trial.path.write_text(json.dumps({"score": number / 10}))
    assert gathered(search_trials) == {"sft": {"0.1": [0.0, 0.1, 0.2]}}
    search_trials[-1].path.write_text(json.dumps({"score": 0.5}))
    assert gathered(search_trials)["sft"]["0.2"] == [0.3, 0.4, 0.5]


def test_a_search_is_part_of_the_comparison_and_resumes(tmp_path, monkeypatch, record):
    monkeypatch.setenv("QLENS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(learning_rates, "SEEDS", (100, 101))
    monkeypatch.setattr(learning_rates, "GRID", (1e-3, 1e-1))

    def compare(**overrides):
        options = {"settings": MINI, "seeds": 1, "steps": 1, "jobs": 1, "progress": False, "out": tmp_path / "run"}
        return qlens.compare(["dft", "kd_hybrid_tuned"], **options | overrides)

    study = compare(lr_grid=True)
    search_rates = study.rates[study.rates["origin"] == "search"]
    assert search_rates.groupby("method").size().to_dict() == {"dft": 2, "kd_hybrid_tuned": 2 * len(TUNED)}
    assert search_rates.groupby("method")["chosen"].sum().to_dict() == {"dft": 1, "kd_hybrid_tuned": 1}
    done = sorted((tmp_path / "run" / "search").iterdir())
    assert len(done) == 2 * 2 * (1 + len(TUNED))
    for method, rows in search_rates.groupby("method"):
        best = choose(
            {
                s: {str(r.learning_rate): [r.validation] for r in of.itertuples()}
                for s, of in rows.groupby("recipe", sort=False)
            }
        )
        (row,) = rows[rows["chosen"]].itertuples()
        assert (row.recipe, row.learning_rate) == best and row.at_edge, method
    assert f"kd_hybrid_tuned: {study.rates.query('chosen and method == @method')['recipe'].iloc[0]} was chosen" in str(
        study
    )
    assert "* dft, kd_hybrid_tuned: best at the edge" in str(study)
    monkeypatch.setattr(Trial, "work", lambda trial: pytest.fail(f"{trial.name} had finished"))
    assert compare(lr_grid=True).table().equals(study.table())
    with pytest.raises(InputError, match=r"rates\.mini\.dft\..* was"):
        compare(learning_rate=0.1, lr_grid=True)


def test_user_data_cannot_choose_a_learning_rate(tmp_path):
    with pytest.raises(InputError, match="lr_grid works in the lab only.*give learning_rate"):
        qlens.compare("sft", model=tmp_path, data=tmp_path / "x.jsonl", lr_grid=True)
    assert Path(learning_rates.RECORD).name == "rates.json"
