"""Passes over rows: the ranking of a view, interruptions, other inputs, damaged files, passes of several rows."""

import json

import numpy as np
import pandas as pd
import pytest
import torch
import torch.nn.functional as F
from real_model import smollm2
from tiny_models import letters, llama

import qlens
from qlens import InputError
from qlens.analysis.ranking import passes, shards

WORDS = ["ban", "gell", "fars", "dim", "banana", "k", "lemon", "milk", "sugar"]
PAIRS = [(f"what is {word}", word[::-1]) for word in WORDS]
PAIRS.insert(2, ("a" * 40, "too long for it"))


@pytest.fixture(scope="module")
def models():
    return {"model": llama(0), "teacher": llama(1), "tokenizer": letters()}


@pytest.fixture(autouse=True)
def small_shards(monkeypatch):
    monkeypatch.setattr(passes, "SHARD", 2)


def ranked(models, rows=PAIRS, variants=("sft", "dft", "target_sft", "iw_sft"), **options):
    return qlens.rank(rows=rows, variants=variants, **{"reference": models["teacher"], **models, **options})


def assert_same(ranking, other):
    pd.testing.assert_frame_equal(ranking.rows, other.rows, check_exact=True, check_dtype=False)
    pd.testing.assert_frame_equal(ranking.tokens, other.tokens, check_exact=True, check_dtype=False)


@pytest.mark.parametrize("variants", [("sft", "dft", "target_sft"), ("dft", "iw_sft"), ("gem", "kd", "sft_kl")])
def test_rows_rank_as_in_a_view_of_all_of_them(models, variants):
    ranking = ranked(models, variants=variants)
    view = qlens.view(text=PAIRS, variants=variants, reference=models["teacher"], **models)
    assert_same(ranking, view.rank())
    assert ranking.skipped == {3: "longer than the context of 32 tokens"} and ranking.notes[0] == view.notes[0]
    assert "9 rows with " in ranking.notes[1] and "tokens per second" in ranking.notes[1]


def test_an_interrupted_ranking_continues_and_is_the_same(models, tmp_path, monkeypatch, capsys):
    write, written = shards.Shards.write, []

    def interrupted(self, number, arrays):
        write(self, number, arrays)
        written.append(number)
        if len(written) == 3:
            raise KeyboardInterrupt

    whole = ranked(models, store=tmp_path / "whole")
    monkeypatch.setattr(shards.Shards, "write", interrupted)
    with pytest.raises(KeyboardInterrupt):
        ranked(models, store=tmp_path / "store")
    assert "Interrupted: 4 of 9 rows are kept; the same command or call continues there" in capsys.readouterr().err
    resumed = ranked(models, store=tmp_path / "store")
    assert written == [0, 1, 2, 3, 4], "nothing is read twice"
    assert "6 of 9 rows are there" in capsys.readouterr().err
    assert_same(resumed, whole)
    for number in range(5):
        parts = [np.load(tmp_path / name / f"rows-{number:05}.npz") for name in ("whole", "store")]
        for name in set(parts[0]) - {"seconds"}:
            assert parts[0][name].tobytes() == parts[1][name].tobytes(), (number, name)
    assert ranked(models, store=tmp_path / "store").notes == resumed.notes and len(written) == 5


def test_a_damaged_file_is_read_anew(models, tmp_path):
    ranking = ranked(models, store=tmp_path)
    file = tmp_path / "rows-00001.npz"
    file.write_bytes(file.read_bytes()[:300])
    assert_same(ranked(models, store=tmp_path), ranking)
    assert set(np.load(file)["row"]) == {4, 5}


def test_other_inputs_are_refused_in_a_folder_and_begin_anew_in_the_cache(models, tmp_path, cache):
    changed = [*PAIRS[:-1], ("what is sugar", "sugar")]
    other = llama(0)
    other.lm_head.weight.data[0, 0] += 1e-3
    ranked(models, store=tmp_path)
    for key, models_then, options in (
        ("data was", models, {"rows": changed}),
        ("models.model was", {**models, "model": other}, {}),
        ("variants was", models, {"variants": ("sft", "dft")}),
        ("rows was 9, now 8", models, {"max_rows": 8}),
    ):
        with pytest.raises(InputError, match=f"store: .* is of another configuration: {key}"):
            ranked(models_then, store=tmp_path, **options)
        ranked(models_then, **options)
    assert len(list((cache / "rankings").iterdir())) == 4


def test_a_loss_that_changes_begins_anew(models, cache):
    for factor in (1, 2):
        ranking = ranked(models, variants=[lambda logits, labels, f=factor: f * F.cross_entropy(logits, labels)])
        assert ranking.rows["label_weight"].iloc[0] == pytest.approx(factor, abs=1e-4)
    assert len(list((cache / "rankings").iterdir())) == 2


def test_several_rows_per_pass_give_the_same_numbers(models):
    from qlens.analysis.token_view.inputs import encoded_rows

    examples, _ = encoded_rows(PAIRS, models["tokenizer"], 32, None)
    variants, others = [qlens.get("dft")], {"teacher": models["teacher"]}
    alone, together = (passes.Passes(models["model"], others, variants, False, tokens) for tokens in (0, 64))
    assert [len(batch) for batch in alone.batches(examples)] == [1] * 9
    batches = list(together.batches(examples))
    assert sorted(row for batch in batches for row in batch) == list(examples) and 1 < len(batches) < 9
    sizes = [len(batch) * max(len(examples[row]["input_ids"]) for row in batch) for batch in batches]
    assert all(size <= 64 or len(batch) == 1 for size, batch in zip(sizes, batches, strict=True))
    one, several = (each.run(examples, lambda rows: None) for each in (alone, together))
    for name in set(one) - {"seconds", "runner_up"}:
        np.testing.assert_allclose(several[name], one[name], rtol=1e-3, atol=1e-5, err_msg=name)


def test_a_file_of_rows_is_read(user_files):
    ranking = qlens.rank(user_files["model"], None, user_files["data"], "dft", max_rows=5)
    assert ranking.orders == ["dft", "negative_margin"] and ranking.rows["row"].nunique() == 5
    assert "rows from 6 on were not read (max_rows=5); an export ends there" in ranking.notes
    assert len(ranking.data) == 5 and ranking.row(1)["question"] == "what is ban"


def test_mistakes_are_named(models, tmp_path):
    (tmp_path / "file").touch()
    for options, message in (
        ({"rows": []}, "rows must be a data file or a non-empty list"),
        ({"rows": 3}, "must be a path, a data set or a list of rows, got 3"),
        ({"rows": "./nowhere.jsonl"}, "nowhere.jsonl' is not there"),
        ({"max_rows": 0}, "max_rows must be a whole number of at least 1"),
        ({"variants": ["cft"]}, "cft needs 'critical'"),
        ({"store": tmp_path / "file"}, "store: .* is a file, not a folder"),
        ({"store": tmp_path}, "store: .* holds files but no config.json"),
    ):
        with pytest.raises(InputError, match=message):
            ranked(models, **options)


def test_the_command_ranks(run, user_files, tmp_path):
    command = ["view", "--rank", "--model", user_files["model"], "--data", user_files["data"]]
    command += ["--variants", "sft,dft", "--top", 2]
    code, out, err = run(*command)
    assert code == 0 and "dft: smallest label weight first" in out and "rows (of 40):" in out
    assert "no row is there yet" in err and "40 of 40" in err
    assert "left out, longer than the context of 32 tokens: row 41" in out and not list(tmp_path.iterdir())
    code, out, err = run(*command, "--json", "--out", "least.html")
    lines = [json.loads(line) for line in out.splitlines()]
    assert code == 0 and len(lines) == 12 and "40 of 40 rows are there" in err and "View: least.html" in err
    page = (tmp_path / "least.html").read_text()
    data = json.loads(page.partition('id="data">')[2].partition("</script>")[0])
    assert data["ranked"] == 40 and 2 <= len(data["texts"]) <= 8
    assert {line["row"] for line in lines if line["by"] != "sft"} == {text["row"] for text in data["texts"]}


def test_a_ranking_of_many_rows_keeps_no_logits(models, monkeypatch):
    sizes = []
    columns = passes.token_columns

    def measured(tokens, variants):
        sizes.append(tokens.logits.numel())
        return columns(tokens, variants)

    monkeypatch.setattr(passes, "token_columns", measured)
    monkeypatch.setattr(passes, "ENTRIES", 3 * llama().config.vocab_size)
    ranking = ranked(models, variants=("dft",))
    assert max(sizes) == 3 * llama().config.vocab_size and torch.is_grad_enabled()
    frames = (ranking.scores.models, *ranking.scores.methods.values())
    assert {dtype.itemsize for frame in frames for dtype in frame.dtypes} == {4}


@pytest.mark.real
def test_rows_rank_on_smollm2_as_in_a_view_of_them():
    rows = [("What is 3 * 12?", "3*12=<<3*12=36>>36"), ("Name a colour.", "Blue."), ("Say hello.", "Hello! " * 60)]
    folder = smollm2()
    assert_same(qlens.rank(folder, None, rows, ["dft"]), qlens.view(folder, None, rows, ["dft"]).rank())
