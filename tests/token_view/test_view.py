"""The token view from Python and from the command line, and its error messages."""

import json

import numpy as np
import pandas as pd
import pytest
import torch
import torch.nn.functional as F
from tiny_models import letters, llama

import qlens
from qlens import InputError
from qlens.analysis.token_view.summary import summarise
from qlens.data.models import load_model, load_tokenizer

PAIRS = [("what is ban", "nab"), ("what is gell", "lleg"), ("a" * 40, "too long for it"), ("what is fars", "sraf")]


@pytest.fixture(scope="module")
def models():
    return {"model": llama(0), "teacher": llama(1), "tokenizer": letters()}


@pytest.fixture(scope="module")
def token_view(models):
    return qlens.view(text=PAIRS, **models)


def test_a_view_holds_the_summary_of_its_tokens(token_view, models):
    assert token_view.methods == ("sft", "dft", "target_sft", "kd") and len(token_view.texts) == 3
    pairs_shown = [pair for number, pair in enumerate(PAIRS) if number != 2]
    tokens = qlens.Tokens.from_text(models["model"], models["tokenizer"], pairs_shown, teacher=models["teacher"])
    whole = summarise(tokens, [qlens.get(name) for name in token_view.methods])
    pd.testing.assert_frame_equal(token_view.summary.models, whole.models, rtol=1e-3, atol=1e-5)
    for name in token_view.methods:
        pd.testing.assert_frame_equal(token_view.summary.methods[name], whole.methods[name], rtol=1e-3, atol=1e-4)


def test_rows_keep_their_numbers_and_skipped_rows_are_noted(token_view):
    assert token_view.skipped == {3: "longer than the context of 32 tokens"}
    assert [text.row for text in token_view.texts] == [1, 2, 4]
    assert token_view.notes == ["left out, longer than the context of 32 tokens: row 3"]
    assert token_view.notes[0] in str(token_view.rank())
    assert [len(text.places) for text in token_view.texts] == [4, 5, 5], "the answer and its end"


def test_the_table_has_a_line_per_token_and_method(token_view):
    table = token_view.table
    assert len(table) == 4 * 14 and set(table["method"]) == set(token_view.methods)
    first = table.iloc[0]
    assert (first["row"], first["position"], first["label"]) == (1, 14, "n")
    lines = [json.loads(line) for line in token_view.to_jsonl().splitlines()]
    assert len(lines) == len(table) and lines[0]["label"] == "n" and lines[0]["method"] == "sft"


def test_the_ranking_is_of_its_rows(token_view):
    ranking = token_view.rank()
    dft = ranking.rows[ranking.rows["by"] == "dft"].set_index("row")
    label_weight = (
        token_view.summary.methods["dft"]["label_gradient"][:4].sum() / token_view.summary.models["p_other"][:4].sum()
    )
    assert dft.loc[1, "label_weight"] == pytest.approx(label_weight, abs=1e-5) and dft.loc[1, "text"] == "nab</s>"
    assert dft["rank"].tolist() == [1, 2, 3] and dft["label_weight"].is_monotonic_increasing
    tokens = ranking.tokens[ranking.tokens["by"] == "dft"]
    assert tokens.loc[tokens["row"] == 1, "context"].str.startswith("<s>what is ban").all()
    few = token_view.top(1)
    assert {text.row for text in few.texts} == ranking.first(1) and few.rank() is ranking
    assert len(few.summary) == sum(len(text.places) for text in few.texts)
    assert "<iframe" in few._repr_html_()


def test_many_forms_of_text_and_methods(models):
    model, tokenizer = models["model"], models["tokenizer"]
    assert len(qlens.view(model, tokenizer, "a word", "dft").summary) == 6
    assert len(qlens.view(model, tokenizer, {"prompt": "a", "completion": "b"}).summary) == 2
    assert qlens.view(model, tokenizer, ["ab", "cd", "ef"], max_rows=2).texts[-1].row == 2
    ids = [{"input_ids": [4, 5, 6], "labels": [4, -100, 6]}, {"input_ids": [4, 5], "labels": [4, -100]}]
    token_view = qlens.view(model, tokenizer, ids, [lambda logits, labels: 2 * F.cross_entropy(logits, labels)])
    assert len(token_view.summary) == 1 and token_view.skipped == {2: "no supervised token"}
    assert token_view.summary.methods["<lambda>"]["label_weight"].item() == pytest.approx(2, abs=1e-4)
    reference = llama(1)
    both = qlens.view(model, tokenizer, ["a word", "another"], ["iw_sft", "psft", "unlikelihood"], reference=reference)
    ratio = qlens.Tokens.from_text(model, tokenizer, ["another"], reference=reference)
    expected = qlens.get("iw_sft").target(ratio).label_weight
    torch.testing.assert_close(
        torch.tensor(both.summary.methods["iw_sft"]["label_weight"][6:].to_numpy()), expected, rtol=1e-3, atol=1e-4
    )


def test_mistakes_are_named(models):
    for arguments, message in (
        ({"text": []}, "text must be a text"),
        ({"text": ["a"], "variants": []}, "variants is empty"),
        ({"text": ["abc"], "variants": ["sft", "sft"]}, "sft is given twice"),
        ({"text": ["abc"], "variants": ["kd"]}, "kd needs a teacher: give teacher=, on the command line --teacher"),
        ({"text": ["abc"], "variants": ["cft"]}, "cft needs 'critical', which a text does not have"),
        ({"text": ["abc"], "candidates": 0}, "candidates must be a whole number of at least 1, got 0"),
        ({"text": ["abc"], "max_rows": 0}, "max_rows must be a whole number of at least 1, got 0"),
        ({"text": [""]}, "none of its 1 rows can be shown (row 1: no supervised token)"),
        ({"text": [{"prompt": "a"}]}, "row 1: columns"),
        ({"text": ["abc"], "teacher": 3}, "teacher must be a loaded model"),
        ({"text": ["abc"], "teacher": "./nowhere"}, "nowhere"),
        ({"text": ["abc"], "tokenizer": None}, "give tokenizer"),
        ({"text": ["abc"], "after": llama(1, vocab=40)}, "after has a vocabulary of 40"),
    ):
        with pytest.raises(InputError) as error_info:
            qlens.view(**({"model": models["model"], "tokenizer": models["tokenizer"]} | arguments))
        assert message in str(error_info.value), arguments


def test_a_missing_folder_is_named(token_view, tmp_path):
    with pytest.raises(InputError, match="there is no folder"):
        token_view.save(tmp_path / "no" / "view.html")
    assert not list(tmp_path.iterdir())


def test_the_command_writes_a_page(run, user_files, tmp_path):
    code, out, err = run(
        "view",
        "--model",
        user_files["model"],
        "--data",
        user_files["data"],
        "--teacher",
        user_files["teacher"],
        "--rows",
        3,
    )
    assert code == 0 and out.startswith("View: view.html (") and "3 rows: sft, dft, target_sft, kd" in err
    assert "<!doctype html>" in (tmp_path / "view.html").read_text()
    code, out, _ = run("view", "--model", user_files["model"], "--text", "a word", "--variants", "dft", "--json")
    assert code == 0 and [json.loads(line)["label"] for line in out.splitlines()] == list("a word")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["view.html"], "with --json no page unasked"


def test_the_commands_mistakes_are_one_line_and_exit_code_2(run, tmp_path):
    for words, message in (
        (["--model", "nowhere"], "--model and --data go together"),
        (["--model", "./nowhere", "--text", "a"], "'./nowhere' is not there"),
        (["--model", "nowhere", "--text", "a", "--data", "b"], "--text and --data: give one of them"),
        (["--model", "nowhere", "--text", "a", "--out", "no/view.html"], "there is no folder no"),
    ):
        code, out, err = run("view", *words)
        assert code == 2 and message in err and "Traceback" not in err and out == "", words
    assert not list(tmp_path.iterdir())


def test_rounded_scores_do_not_depend_on_the_order_of_rows(models):
    rows = [("what is ban", "nab"), ("what is gell", "lleg"), ("what is fars", "sraf")]
    forward, back = (qlens.view(text=texts, **models).rank().rows for texts in (rows, rows[::-1]))
    back = back.assign(row=4 - back["row"])
    both = forward.merge(back, on=["by", "row"])
    assert len(both) == len(forward)
    np.testing.assert_allclose(both["score_x"], both["score_y"], rtol=1e-4, atol=1e-5)
    assert (both["rank_x"] == both["rank_y"]).all()


def test_models_are_folders_or_modules(user_files):
    modules = {name: load_model(user_files[name]) for name in ("model", "teacher")}
    loaded = qlens.view(tokenizer=load_tokenizer(user_files["model"]), text=PAIRS, **modules)
    from_folders = qlens.view(user_files["model"], None, PAIRS, teacher=str(user_files["teacher"]))
    pd.testing.assert_frame_equal(from_folders.table, loaded.table)
    with pytest.warns(DeprecationWarning, match="max_rows="):
        assert len(qlens.view(user_files["model"], user_files["model"], PAIRS, rows=1).texts) == 1


def test_every_export_is_of_the_table(token_view):
    assert token_view.to_frame() is token_view.table and repr(token_view).startswith(
        "<TokenView of 14 tokens in 3 rows"
    )
    record = json.loads(json.dumps(token_view.to_dict()))
    assert len(record["table"]) == len(token_view.table) and record["notes"] == token_view.notes
    assert "1 & 14 & n & sft" in token_view.to_latex(caption="Targets.") and "Targets." in token_view.to_latex(
        caption="Targets."
    )
    figure = token_view.plot(row=4)
    names = [tick.get_text() for ax in figure.axes for tick in ax.get_xticklabels()]
    assert "".join(names[-5:]) == "sraf</s>"
    with pytest.raises(InputError, match="row must be one of 1, 2, 4, got 3"):
        token_view.plot(row=3)
