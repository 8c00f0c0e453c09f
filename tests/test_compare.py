"""Comparisons on miniature models: equal conditions, resuming, refusals, and what the run folder holds."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from mini_lab import MINI
from numpy.testing import assert_allclose
from tiny import VOCAB, letters, llama

import qlens
from qlens import InputError
from qlens.analysis.folder import code, versions
from qlens.analysis.grounds import Lab, Real, open_ground
from qlens.analysis.held import held_tokens
from qlens.analysis.jobs import Job, slug
from qlens.analysis.search import Choice
from qlens.analysis.study import FILES, Study
from qlens.fitting import fit
from qlens.lab import Setting
from qlens.lab.setting import Author
from qlens.sources import load_model

OWN_LOSS = """
import torch.nn.functional as F
def mild(logits, labels, *, factor=0.5):
    return factor * F.cross_entropy(logits, labels)
"""


@pytest.fixture(scope="module")
def own(tmp_path_factory):
    """A model, a teacher and data of one's own, as folders and a file."""
    folder = tmp_path_factory.mktemp("own")
    for seed, name in enumerate(("model", "teacher")):
        llama(seed).save_pretrained(folder / name)
        letters().save_pretrained(folder / name)
    words = [a + b + c for a in "bdfgk" for b in "ae" for c in ("n", "rs", "ll", "m")]
    rows = [{"question": f"what is {word}", "answer": word[::-1]} for word in words]
    rows.append({"question": "a" * 40, "answer": "too long for the context"})
    (folder / "words.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    return {"model": folder / "model", "teacher": folder / "teacher", "data": folder / "words.jsonl"}


@pytest.fixture
def compare(own, tmp_path):
    """Two methods, two seeds, three steps, in one process."""

    def run(variants=("dft", "target_sft"), **given):
        options = dict(seeds=2, steps=3, jobs=1, progress=False, out=tmp_path / "run") | own | given
        return qlens.compare(variants, **options)

    return run


def same(one, other):
    """Whether two studies found the same, to the last digit."""
    pd.testing.assert_frame_equal(one.results, other.results)
    pd.testing.assert_frame_equal(one.table(), other.table())
    return True


def test_the_run_folder_holds_all_of_it_and_reads_back(compare, tmp_path):
    study = compare(save=True)
    folder = tmp_path / "run"
    files = ["config.json", "table.md", "report.html", *FILES.values(), "figures/scores.csv"]
    files += [f"figures/{name}.{kind}" for name in ("scores", "frontier", "curves", "trust") for kind in ("png", "csv")]
    assert all((folder / file).stat().st_size for file in files)
    assert not list(folder.rglob("*.partial"))
    assert study.results.columns.tolist() == ["setting", "method", "seed", "item", "score"]
    assert len(study.results) == 3 * 2 * 8 and study.results["setting"].unique() == ["words"]
    assert study.table()["method"].tolist() == ["base", "dft", "target_sft"]
    loaded = Study.load(folder)
    for name in FILES:
        pd.testing.assert_frame_equal(
            getattr(loaded, name), getattr(study, name), check_dtype=len(getattr(study, name)) > 0
        )
    assert str(loaded) == str(study) and loaded.to_markdown() == study.to_markdown()
    kept = load_model(folder / "models" / "dft-1")
    (nll,) = study.diagnostics.query("method == 'dft' and seed == 1")["nll"]
    held = open_ground(Real.of(*(str(p) for p in own_paths(study)), steps=3)).held
    (tokens,) = held_tokens(kept, held)
    assert_allclose(-tokens.label_log_probs.mean(), nll, rtol=1e-5)


def own_paths(study):
    """model, data and teacher as the study was given them."""
    given = study.config["settings"]["words"]
    return given["model"], given["data"], given["teacher"]


def test_the_base_is_the_start_and_training_moves_away_from_it(compare):
    study = compare()
    found = study.diagnostics.set_index(["method", "seed"])
    assert_allclose(found.loc["base", "kl_start"], 0, atol=1e-7)
    assert found.loc["base", "trust"].isna().all() and (found.loc["base", "steps"] == 0).all()
    assert (found.drop("base")["kl_start"] > 1e-5).all() and (found.drop("base")["steps"] == 3).all()
    base = study.results.query("method == 'base'").pivot(index="seed", columns="item", values="score")
    assert_allclose(base.loc[0], base.loc[1])
    other = study.results.query("method == 'dft'").pivot(index="seed", columns="item", values="score")
    assert not np.allclose(other.loc[0], other.loc[1]), "seeds must change the batches"


def test_a_method_that_draws_random_numbers_still_sees_the_same_batches(compare):
    def calm(logits, labels):
        return torch.nn.functional.cross_entropy(logits, labels)

    def drawing(logits, labels):
        return torch.nn.functional.cross_entropy(logits, labels) + 0 * torch.rand(7).sum()

    scores = compare([calm, drawing], steps=5).results.pivot(index=["seed", "item"], columns="method", values="score")
    assert_allclose(scores["calm"], scores["drawing"], rtol=1e-6)


def test_a_stopped_comparison_goes_on_and_ends_with_the_same_table(compare, tmp_path):
    whole = compare()
    jobs = tmp_path / "run" / "jobs"
    lost, cut = jobs / "words--dft--1.json", jobs / "words--target_sft--0.json"
    untouched = jobs / "words--dft--0.json"
    before = untouched.stat().st_mtime_ns
    lost.unlink()
    cut.write_text(cut.read_text(encoding="utf-8")[:50], encoding="utf-8")
    assert same(compare(), whole)
    assert untouched.stat().st_mtime_ns == before, "what had finished must not run again"


def test_an_interrupt_keeps_what_has_finished(compare, tmp_path, monkeypatch):
    whole = compare(out=tmp_path / "whole")
    run, count = Job.run, []

    def stopped(job):
        if len(count) == 3:
            raise KeyboardInterrupt
        count.append(job)
        run(job)

    monkeypatch.setattr(Job, "run", stopped)
    with pytest.raises(KeyboardInterrupt):
        compare()
    assert len(list((tmp_path / "run" / "jobs").glob("*.json"))) == 3
    assert not (tmp_path / "run" / "report.html").exists()
    with pytest.raises(InputError, match="no finished study"):
        Study.load(tmp_path / "run")
    monkeypatch.setattr(Job, "run", run)
    assert same(compare(), whole)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"steps": 4}, r"settings.words.steps was 3, now 4"),
        ({"seeds": [0, 5]}, r"seeds was \[0, 1\], now \[0, 5\]"),
        ({"variants": ["dft"]}, r"methods.target_sft was .*now .not there"),
        ({"learning_rate": 0.5}, r"learning_rate was 0.001, now 0.5"),
    ],
    ids=str,
)
def test_a_folder_of_another_configuration_is_refused_naming_the_key(compare, tmp_path, change, named):
    compare(seeds=2)
    before = (tmp_path / "run" / "config.json").read_bytes()
    with pytest.raises(InputError, match=named):
        compare(**change)
    assert (tmp_path / "run" / "config.json").read_bytes() == before


def test_folders_of_another_version_of_strangers_or_of_changed_data_are_refused(compare, own, tmp_path, monkeypatch):
    data = tmp_path / "words.jsonl"
    data.write_bytes(own["data"].read_bytes())
    compare("dft", data=data, seeds=1)
    data.write_text(data.read_text(encoding="utf-8").replace("ban", "pan"), encoding="utf-8")
    with pytest.raises(InputError, match="digest was"):
        compare("dft", data=data, seeds=1)
    with monkeypatch.context() as patch, pytest.raises(InputError, match=r"versions\.torch was .*9\.9\.9"):
        patch.setattr("qlens.analysis.plan.versions", lambda: versions() | {"torch": "9.9.9"})
        compare("dft", data=data, seeds=1)
    with monkeypatch.context() as patch, pytest.raises(InputError, match=r"code was .*, now .edited"):
        patch.setattr("qlens.analysis.plan.code", lambda: "edited")
        compare("dft", data=data, seeds=1)
    strange = tmp_path / "strange"
    strange.mkdir()
    (strange / "thesis.txt").write_text("precious", encoding="utf-8")
    with pytest.raises(InputError, match="no run folder"):
        compare(out=strange)
    assert [path.name for path in strange.iterdir()] == ["thesis.txt"]


def test_what_cannot_work_is_refused_before_anything_is_written(compare, tmp_path):
    for given, named in (
        ({"teacher": None}, "target_sft need a teacher"),
        ({"data": None}, "both model and data"),
        ({"model": None}, "both model and data"),
        ({"steps": 0}, "steps must be at least 1, got 0"),
        ({"jobs": 0}, "jobs"),
        ({"seeds": 0}, "seeds"),
        ({"seeds": [1, 1]}, "distinct"),
        ({"learning_rate": -1.0}, "learning_rate"),
        ({"learning_rate": float("inf")}, "finite, got inf"),
        ({"variants": ["kd_hybrid_tuned"]}, "only the lab has"),
        ({"variants": ["dft", "dft()"]}, "'dft' twice"),
        ({"variants": ["dtf"]}, "Did you mean dft"),
        ({"variants": [lambda tokens, old: tokens.label_log_probs]}, "needs 'old'"),
        ({"model": tmp_path / "nowhere"}, "nowhere"),
        ({"model": None, "data": None, "teacher": None, "settings": "strong-piror"}, "Did you mean strong-prior"),
    ):
        with pytest.raises(InputError, match=named):
            compare(**given)
        assert not (tmp_path / "run").exists(), named


def test_losses_of_a_file_and_of_a_notebook_reach_other_processes(compare, tmp_path):
    file = tmp_path / "own.py"
    file.write_text(OWN_LOSS, encoding="utf-8")
    strength = 0.5

    def mine(logits, labels):
        return strength * torch.nn.functional.cross_entropy(logits, labels)

    spec = f"{file}:mild"
    alone, pair = (compare([spec, mine], seeds=1, jobs=jobs, out=tmp_path / f"{jobs}") for jobs in (1, 2))
    assert same(alone, pair)
    scores = pair.results.pivot(index="item", columns="method", values="score")
    assert_allclose(scores[spec], scores["mine"], rtol=1e-5, err_msg="they are one loss")
    strength = 0.25
    with pytest.raises(InputError, match="methods.mine was"):
        compare([spec, mine], seeds=1, out=tmp_path / "1")
    file.write_text(OWN_LOSS.replace("0.5", "0.7"), encoding="utf-8")
    with pytest.raises(InputError, match="own.py:mild was"):
        compare([spec, mine], seeds=1, out=tmp_path / "1")


def test_any_edited_file_makes_other_code(tmp_path, monkeypatch):
    before, package = code(), tmp_path / "variants"
    shutil.copytree(Path(qlens.variants.__path__[0]).resolve(), package)
    monkeypatch.setattr(qlens.variants, "__path__", [str(package)])
    assert code() == before
    with (package / "dft.py").open("a") as file:
        file.write("#")
    assert code() != before


def test_the_code_of_a_file_is_its_text_whatever_the_hash_seed(tmp_path):
    (tmp_path / "own.py").write_text(
        "def f(logits, labels):\n    return -logits[:, 0] if labels in {'a', 'b'} else 0\n"
    )
    look = "from qlens.analysis import plan, recipes; print(plan._code(recipes.recipes('own.py:f')['own.py:f']))"
    told = {
        subprocess.run(
            [sys.executable, "-c", look], cwd=tmp_path, env=os.environ | {"PYTHONHASHSEED": seed}, capture_output=True,
            text=True, check=True,
        ).stdout
        for seed in ("1", "2")
    }  # fmt: skip
    assert len(told) == 1 and "code " in told.pop()


def test_jobs_train_with_what_was_chosen(tmp_path_factory, tmp_path, monkeypatch):
    monkeypatch.setenv("QLENS_CACHE", str(tmp_path_factory.mktemp("cache")))
    seen = {}

    def spied(model, examples, **given):
        seen[given["variant"].spec, given["steps"]] = given["learning_rate"]
        return fit(model, examples, **given)

    monkeypatch.setattr("qlens.analysis.jobs.fit", spied)
    monkeypatch.setattr("qlens.analysis.compare.settle_all", chosen_by_hand)
    study = qlens.compare(
        ["sft", "dft", "sft_equal_compute"],
        settings=MINI,
        seeds=1,
        steps=3,
        jobs=1,
        progress=False,
        out=tmp_path / "run",
    )
    rates = study.rates[study.rates["chosen"]].set_index("method")["learning_rate"]
    assert seen == {("sft", 3): 0.01, ("dft", 3): 0.02, ("sft", 4): 0.03}
    assert rates[["sft", "dft", "sft_equal_compute"]].tolist() == [0.01, 0.02, 0.03]
    record = tmp_path / "run" / "jobs" / "mini--dft--0.json"
    assert json.loads(record.read_text())["made_with"] == {"recipe": "dft", "learning_rate": 0.02, "reads": True}
    seen.clear()
    record.write_text(record.read_text().replace("0.02", "0.5", 1))  # as if a search had chosen otherwise
    qlens.compare(
        ["sft", "dft", "sft_equal_compute"],
        settings=MINI,
        seeds=1,
        steps=3,
        jobs=1,
        progress=False,
        out=tmp_path / "run",
    )
    assert seen == {("dft", 3): 0.02}, "what was made at another rate is made again"


def chosen_by_hand(rows, sources, learning_rate, lr_grid):
    """Every method another rate."""
    rates = {"base": 0.0, "sft": 0.01, "dft": 0.02, "sft_equal_compute": 0.03}
    return {
        ("mini", name): Choice(recipe=among[0], learning_rate=rates[name], origin="given", scores={})
        for name, among in rows.items()
    }


def test_truth_stands_at_the_digits_it_judges(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("QLENS_CACHE", str(tmp_path_factory.mktemp("cache")))
    ground = open_ground(Lab(MINI))
    tokens = list(held_tokens(ground.start(), ground.held))
    labels = torch.cat([each.labels for each in tokens])
    assert len(labels) == len(ground.truth)
    words = np.array(ground.tokenizer.convert_ids_to_tokens(labels.tolist()))
    assert all(word.isdigit() for word in words[~np.isnan(ground.truth)])
    world = qlens.lab.World(MINI)
    shown = [each.completion for each in world.demonstrations[-len(ground.held) :]]
    assert " ".join(words) == " ".join(f"{text} <eos>" for text in shown)
    known = {"plus": lambda a, b: a + b, "minus": lambda a, b: a - b, "times": lambda a, b: a * b}
    for at in np.flatnonzero(~np.isnan(ground.truth)):
        a, operation, b = words[at - 4 : at - 1]
        if operation in known:
            assert ground.truth[at] == (known[operation](int(a), int(b)) % MINI.modulus == int(words[at]))
        else:
            assert words[at - 1] == "answer"


def test_without_out_the_folder_goes_by_the_configuration(compare, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for _ in range(2):
        compare("sft", seeds=1, out=None)
    compare("sft", seeds=1, out=None, steps=1)
    assert len(list((tmp_path / "runs").iterdir())) == 2


def test_rows_beyond_the_smaller_context_are_dropped_and_counted(compare, own, tmp_path, capsys):
    study = compare("sft", seeds=1, progress=True)
    said = capsys.readouterr()
    assert "1 of 41 rows exceed the context of 32" in said.err.replace("\n", " ") and not said.out
    assert study.config["noted"]["settings"]["words"]["dropped"] == 1
    llama(1, context=17).save_pretrained(tmp_path / "short")
    letters().save_pretrained(tmp_path / "short")
    ground = open_ground(Real.of(str(own["model"]), str(own["data"]), str(tmp_path / "short")))
    assert ground.noted["context"] == 17 and ground.noted["dropped"] > 1


def test_held_out_rows_are_the_same_whatever_else_and_never_trained_on(own):
    grounds = [open_ground(Real.of(str(own["model"]), str(own["data"]), None, steps=steps)) for steps in (1, 2)]
    assert grounds[0].held == grounds[1].held and len(grounds[0].held) == 8
    assert not any(example in grounds[0].train for example in grounds[0].held)
    assert len(grounds[0].train) + len(grounds[0].held) == 40


def test_a_lab_of_ones_own_is_compared_too(tmp_path_factory, tmp_path, monkeypatch):
    monkeypatch.setenv("QLENS_CACHE", str(tmp_path_factory.mktemp("cache")))
    tiny = dict(depth=2, demonstrations=60, validation=4, test=6, width=16, layers=1, heads=2, k=2)
    quick = dict(pretrain_steps=4, teach_steps=2, pretrain_batch=8, steps=2, batch_size=4)
    mini = Setting(name="mini", corpus=Author(), tutor=Author(), noise=0.5, **tiny, **quick)
    study = qlens.compare(["sft", "kd"], settings=mini, seeds=2, jobs=1, progress=False, out=tmp_path / "run")
    assert study.config["metric"]["name"] == "avg@2" and study.config["noted"]["settings"]["mini"]["base"] <= 1
    table = study.table()
    assert table["method"].tolist() == ["base", "sft", "kd"] and set(table["n"]) == {"2 x 6"}
    assert study.results["score"].isin([0, 0.5, 1]).all()
    ground = open_ground(Lab(mini))
    assert len(ground.held) == 12 and len(ground.train) == 48
    assert "mini" in study.to_latex() and study.plot().axes
    assert (study.table()["pass_at_k"] >= study.table()["mean"]).all()
    assert all(sense in str(study) for sense in ("known: ", "noisy: errors asked for 0.5", "not unique: ", "missing: "))
    counts = study.truths()[["good", "noisy"]].sum(axis=1)
    assert set(counts) == {12 * 3}, "two results and an answer for each of 12 held-out demonstrations"


def test_the_report_needs_nothing_else_and_escapes_what_it_is_given(compare, tmp_path):
    file = tmp_path / "own.py"
    file.write_text(OWN_LOSS.replace("factor=0.5", 'factor=0.5, name="x"'), encoding="utf-8")
    study = compare([f'{file}:mild(name="<script>alert(1)</script>")'], seeds=1)
    page = (tmp_path / "run" / "report.html").read_text(encoding="utf-8")
    assert "<script" not in page and "&lt;script&gt;" in page
    assert not re.search(r"""(src|href)=["'](?!data:)""", page) and page.count("data:image/png;base64,") == 6
    assert "viewport" in page and "prefers-color-scheme: dark" in page
    assert f"{study.table()['mean'][0]:.3f}" in page and "transformers" in page


def test_file_names_of_methods_never_meet():
    names = ["dft", "kd(temperature=2.0)", "kd(temperature=2)", "a/b.py:f", "a-b.py:f", "..", "x" * 200, "x" * 201]
    assert len({slug(name) for name in names}) == len(names)
    assert slug("dft") == "dft" and all(re.fullmatch(r"[\w.-]{1,80}", slug(name)) for name in names)
    assert VOCAB == len(letters())
