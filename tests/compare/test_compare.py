"""Comparisons on miniature models: equal conditions, resuming, refusals, and the run folder."""

import re

import numpy as np
import pandas as pd
import pytest
import torch
from numpy.testing import assert_allclose
from tiny_models import VOCAB, letters

from qlens import InputError
from qlens.analysis.compare.environments import open_environment
from qlens.analysis.compare.evaluation import held_out_tokens
from qlens.analysis.compare.jobs import Job, slug
from qlens.analysis.compare.user_source import UserSource
from qlens.analysis.study.study import FILES, Study
from qlens.data.models import load_model, load_tokenizer

OWN_LOSS = """
import torch.nn.functional as F
def mild(logits, labels, *, factor=0.5):
    return factor * F.cross_entropy(logits, labels)
"""


def same(one, other):
    """Whether two studies found the same, to the last digit."""
    pd.testing.assert_frame_equal(one.results, other.results)
    pd.testing.assert_frame_equal(one.table(), other.table())
    return True


def test_the_run_folder_round_trips(compare, tmp_path, figures):
    study = compare(save=True)
    folder = tmp_path / "run"
    files = ["config.json", "table.md", "report.html", *FILES.values(), "figures/scores.csv"]
    files += [
        f"figures/{name}.{kind}"
        for name in ("scores", "frontier", "curves", "label_weight")
        for kind in ("png", "pdf", "csv")
    ]
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
    saved_model = load_model(folder / "models" / "dft-1")
    (nll,) = study.diagnostics.query("method == 'dft' and seed == 1")["nll"]
    held_out = open_environment(UserSource.of(*(str(p) for p in own_paths(study)), steps=3)).held_out
    (tokens,) = held_out_tokens(saved_model, held_out)
    assert_allclose(-tokens.label_log_probs.mean(), nll, rtol=1e-5)


def own_paths(study):
    """model, data and teacher as the study was given them."""
    setting = study.config["settings"]["words"]
    return setting["model"], setting["data"], setting["teacher"]


def test_the_base_row_is_the_start_model(compare):
    study = compare()
    diagnostics = study.diagnostics.set_index(["method", "seed"])
    assert_allclose(diagnostics.loc["base", "kl_start"], 0, atol=1e-7)
    assert diagnostics.loc["base", "label_weight"].isna().all() and (diagnostics.loc["base", "steps"] == 0).all()
    assert (diagnostics.drop("base")["kl_start"] > 1e-5).all() and (diagnostics.drop("base")["steps"] == 3).all()
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


def test_a_stopped_comparison_resumes_to_the_same_table(compare, tmp_path):
    whole = compare()
    jobs = tmp_path / "run" / "jobs"
    deleted, cut = jobs / "words--dft--1.json", jobs / "words--target_sft--0.json"
    untouched = jobs / "words--dft--0.json"
    before = untouched.stat().st_mtime_ns
    deleted.unlink()
    cut.write_text(cut.read_text(encoding="utf-8")[:50], encoding="utf-8")
    assert same(compare(), whole)
    assert untouched.stat().st_mtime_ns == before, "what had finished must not run again"


def test_an_interrupt_keeps_finished_jobs_and_prints_their_table(compare, tmp_path, monkeypatch, capsys):
    whole = compare(out=tmp_path / "whole")
    run, count = Job.run, []

    def stopped(job):
        if len(count) == 4:
            raise KeyboardInterrupt
        count.append(job)
        run(job)

    monkeypatch.setattr(Job, "run", stopped)
    with pytest.raises(KeyboardInterrupt):
        compare(progress=True)
    _, heading, last = capsys.readouterr().err.partition("held-out NLL after 4 of 6 jobs")
    assert heading and "target_sft" in last and "the same call continues" in last
    assert len(list((tmp_path / "run" / "jobs").glob("*.json"))) == 4
    assert not (tmp_path / "run" / "report.html").exists()
    with pytest.raises(InputError, match="no finished study"):
        Study.load(tmp_path / "run")
    monkeypatch.setattr(Job, "run", run)
    assert same(compare(), whole)


def test_invalid_arguments_are_refused_before_anything_is_written(compare, tmp_path):
    for arguments, message in (
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
        ({"variants": [lambda tokens, advantage: tokens.label_log_probs]}, "needs 'advantage'"),
        ({"model": tmp_path / "nowhere"}, "nowhere"),
        ({"model": None, "data": None, "teacher": None, "settings": "strong-piror"}, "Did you mean strong-prior"),
    ):
        with pytest.raises(InputError, match=message):
            compare(**arguments)
        assert not (tmp_path / "run").exists(), message


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


def test_models_are_folders_or_modules(compare, user_files, tmp_path, monkeypatch):
    monkeypatch.setenv("QLENS_CACHE", str(tmp_path / "cache"))
    modules = {name: load_model(user_files[name]) for name in ("model", "teacher")}
    loaded_models = modules | {"tokenizer": load_tokenizer(user_files["model"])}
    from_folders, loaded = (
        compare("kd", seeds=1, out=tmp_path / "a"),
        compare("kd", seeds=1, out=tmp_path / "b", **loaded_models),
    )
    assert_allclose(loaded.results["score"], from_folders.results["score"])
    saved = sorted(path.name for path in (tmp_path / "cache" / "models").iterdir())
    assert len(saved) == 2, "model and teacher, once each"
    assert len(compare("kd", seeds=1, out=tmp_path / "b", **loaded_models).results) == len(loaded.results), "it resumes"
    assert sorted(path.name for path in (tmp_path / "cache" / "models").iterdir()) == saved
    with torch.no_grad():
        next(modules["model"].parameters()).add_(1e-3)
    with pytest.raises(InputError, match="of another configuration: the file .*models"):
        compare("kd", seeds=1, out=tmp_path / "b", **loaded_models)
    with pytest.raises(InputError, match="give tokenizer="):
        compare("kd", seeds=1, out=tmp_path / "c", **modules)
    with pytest.raises(InputError, match="model must be a folder or a transformers model, got 3"):
        compare("kd", seeds=1, out=tmp_path / "c", model=3)


def test_the_report_is_self_contained_and_escapes_names(compare, tmp_path, figures):
    file = tmp_path / "own.py"
    file.write_text(OWN_LOSS.replace("factor=0.5", 'factor=0.5, name="x"'), encoding="utf-8")
    study = compare([f'{file}:mild(name="<script>alert(1)</script>")'], seeds=1)
    page = (tmp_path / "run" / "report.html").read_text(encoding="utf-8")
    assert "<script" not in page and "&lt;script&gt;" in page
    assert not re.search(r"""(src|href)=["'](?!data:)""", page) and page.count("data:image/png;base64,") == 7
    assert "viewport" in page and "prefers-color-scheme: dark" in page
    assert f"{study.table()['mean'][0]:.3f}" in page and "transformers" in page


def test_file_names_of_methods_are_distinct():
    names = ["dft", "kd(temperature=2.0)", "kd(temperature=2)", "a/b.py:f", "a-b.py:f", "..", "x" * 200, "x" * 201]
    assert len({slug(name) for name in names}) == len(names)
    assert slug("dft") == "dft" and all(re.fullmatch(r"[\w.-]{1,80}", slug(name)) for name in names)
    assert VOCAB == len(letters())
