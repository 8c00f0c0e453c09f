"""Export: the data with weights or without rows, trained by QTrainer, and refused inputs."""

import json

import numpy as np
import pytest
import torch
from tiny_models import letters, llama, parameters

import qlens
from qlens import InputError
from qlens.data import encode
from qlens.data.rows import load_rows

ROWS = [
    {"question": f"what is {word}", "answer": word[::-1], "id": at} for at, word in enumerate(["ban", "gell", "dim"])
]
ROWS += [{"question": "a" * 40, "answer": "é\u2028", "id": 3}, {"question": "what is k", "answer": "k", "id": 4}]


@pytest.fixture(scope="module")
def ranking(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("QLENS_CACHE", str(tmp_path_factory.mktemp("cache")))
        return qlens.rank(llama(), letters(), ROWS, ["sft", "dft"])


def test_rows_get_their_label_weight(ranking, tmp_path):
    written = ranking.export(tmp_path / "weighted.jsonl")
    rows = load_rows(tmp_path / "weighted.jsonl")
    assert [{key: row[key] for key in ROWS[0]} for row in rows] == ROWS, "every key is kept, in the order of the data"
    weights = ranking.rows[ranking.rows["by"] == "dft"].set_index("row")["label_weight"]
    for number in (1, 2, 3, 5):
        assert rows[number - 1]["weight"] == pytest.approx(weights[number], rel=1e-5)
    assert rows[3]["weight"] == pytest.approx(weights.mean(), rel=1e-5), "not ranked"
    assert written.by == "dft" and written.rows == (1, 2, 3, 4, 5) and not written.dropped
    assert "5 rows; weight is the row's label weight by dft; from 0." in str(written)
    assert "1 rows have none of their own (left out of the ranking, or NaN) and get the mean" in str(written)
    assert ranking.weights("dft").tolist() == [row["weight"] for row in rows]


def test_sft_with_the_weights_has_the_methods_sum_of_label_gradients(ranking):
    model, weights = llama(), ranking.weights("dft")
    for number in (1, 3):
        row = ROWS[number - 1]
        tokens = qlens.Tokens.from_text(model, letters(), [(row["question"], row["answer"])])
        sft, dft = (qlens.get(name).target(tokens).pull.sum() for name in ("sft", "dft"))
        assert float(weights[number] * sft) == pytest.approx(float(dft), rel=1e-4)


def test_by_the_margin_weights_are_geometric_means_of_ratios(ranking):
    weights, tokens = ranking.weights("negative_margin"), ranking.scores.models
    ratios = np.minimum(1, tokens["p_y"] / tokens["p_runner_up"]).groupby(tokens["row"])
    for row, values in ratios:
        assert weights[row] == pytest.approx(np.exp(np.log(values.astype(float)).mean()), rel=1e-4)
    assert weights.between(0, 1).all()


def test_negative_weights_are_zero_and_counted(tmp_path):
    def away(logits, labels):
        sign = torch.where(labels == labels[0], -1.0, 1.0)
        return sign * torch.nn.functional.cross_entropy(logits, labels, reduction="none")

    ranking = qlens.rank(llama(), letters(), ["aaaa", "abcdef"], [away])
    written = ranking.export(tmp_path / "w.jsonl")
    assert "1 rows have a negative label weight, written as 0" in str(written)
    assert [row["weight"] for row in load_rows(tmp_path / "w.jsonl")][0] == 0


def test_the_least_trusted_rows_are_left_out(ranking, tmp_path):
    written = ranking.export(tmp_path / "kept.jsonl", drop_least=0.5)
    least = ranking.rows[ranking.rows["by"] == "dft"]["row"].tolist()[:2]
    assert list(written.dropped) == least and sorted([*written.rows, *least]) == [1, 2, 3, 4, 5]
    kept = [json.loads(line) for line in (tmp_path / "kept.jsonl").read_text("utf-8").split("\n")[:-1]]
    assert kept == [ROWS[number - 1] for number in written.rows], "without weights"
    assert "3 of 5 rows; the first 2 by dft are left out; 1 rows without a rank are kept" in str(written)


def test_qtrainer_uses_the_weights(ranking, tmp_path, make):
    ranking.export(tmp_path / "weighted.jsonl")
    rows = [row for row in load_rows(tmp_path / "weighted.jsonl") if row["id"] != 3]

    def moved(rows):
        trainer = make("sft", examples=encode(rows, letters()).examples, batch=len(rows), steps=1)
        before = parameters(trainer.model)
        trainer.train()
        return parameters(trainer.model) - before

    without = [{**row, "weight": 0.0} if row["id"] == 0 else row for row in rows]
    changed = [{**row, "answer": "x" * 3} if row["id"] == 0 else row for row in without]
    assert not torch.equal(moved(rows), moved(without))
    torch.testing.assert_close(moved(changed), moved(without)), "a row of weight 0 has no gradient"
    half = [{**row, "weight": row["weight"] / 2} for row in rows]
    torch.testing.assert_close(moved(half), moved(rows) / 2, rtol=1e-4, atol=1e-7)


def test_exports_that_cannot_be_are_refused(ranking, tmp_path):
    of_view = qlens.view(llama(), letters(), ["abc", "bcd"], ["dft"]).rank()
    weighted = qlens.rank(llama(), letters(), [{"text": "abc", "weight": 1.0}, {"text": "bcd", "weight": 1.0}], ["dft"])
    tensors = qlens.rank(
        llama(), letters(), [{"input_ids": [4, 5], "labels": [4, 5], "x": {1}}, {"input_ids": [4, 6], "labels": [4, 6]}]
    )
    for each, options, message in (
        (ranking, {"path": "data.csv"}, "must end in .jsonl"),
        (ranking, {"by": "kd"}, "by='kd' is no order of this ranking: it has sft, dft, negative_margin"),
        (ranking, {"by": "sft"}, "by='sft': all rows tie.*choose 'dft' or 'negative_margin'"),
        (ranking, {"drop_least": 1.5}, "drop_least must be a share between 0 and 1"),
        (ranking, {"path": "no/data.jsonl"}, "there is no folder"),
        (of_view, {}, "this ranking is of a view"),
        (weighted, {}, "row 1 has a weight already.*--drop-least"),
        (tensors, {}, "row 1 cannot be written as JSON"),
    ):
        with pytest.raises(InputError, match=message):
            each.export(tmp_path / options.pop("path", "data.jsonl"), **options)
    assert not list(tmp_path.iterdir())
    assert weighted.export(tmp_path / "kept.jsonl", drop_least=0.5).rows


def test_the_command_writes_the_data(run, user_files, tmp_path):
    command = ["view", "--rank", "--model", user_files["model"], "--data", user_files["data"], "--top", 1]
    code, _, err = run(*command, "--out", "weighted.jsonl")
    assert code == 0 and "Data: weighted.jsonl: 41 rows; weight is the row's label weight by dft" in err
    assert len(load_rows(tmp_path / "weighted.jsonl")) == 41
    code, _, err = run(*command, "--out", "kept.jsonl", "--by", "negative_margin", "--drop-least", 0.1)
    assert code == 0 and "37 of 41 rows; the first 4 by negative_margin are left out" in err
    (tmp_path / "weighted.jsonl").unlink()
    (tmp_path / "kept.jsonl").unlink()
    for words, message in (
        (["--rank", "--out", "data.csv"], "end it in .jsonl for the data with weights, or in .html for the page"),
        (
            ["--rank", "--drop-least", "0.1"],
            "--drop-least is about the data that --out FILE.jsonl writes: give that too",
        ),
        (["--rank", "--out", "page.html", "--by", "dft"], "--by is about the data that --out FILE.jsonl writes"),
        (["--rank", "--out", "d.jsonl", "--drop-least", "2"], "--drop-least must be a share between 0 and 1"),
        (["--drop-least", "0.1"], "--drop-least goes with --rank --out FILE.jsonl"),
        (["--rank", "--out", "no/d.jsonl"], "there is no folder no"),
        (["--rank", "--top", "0"], "top"),
    ):
        code, out, err = run(*command[:1], *command[2:-2], *words)
        assert code == 2 and message in err and len(err.splitlines()) == 1 and out == "", (words, err)
    assert not list(tmp_path.iterdir())
