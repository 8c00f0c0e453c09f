"""The data of the command line: every kind of file for every verb, and what of it is learned as text."""

import json

import pytest
from cases import case
from tiny_models import letters, llama

from qlens.core.errors import InputError
from qlens.data import encode, load_rows
from qlens.data.examples import singles

TURNS = [[{"from": "human", "value": f"what is {word}"}, {"from": "gpt", "value": word[::-1]}] for word in
         ("bear", "bell", "fan", "farm", "gear", "kell")]  # fmt: skip


@pytest.fixture
def places(tmp_path, user_files):
    """The same rows in files of several kinds, a file of pairs, and one with bad rows."""
    rows = [{"conversations": turns, "id": at} for at, turns in enumerate(TURNS)]
    flat = [{"ask": turns[0]["value"], "reply": turns[1]["value"]} for turns in TURNS]
    (tmp_path / "chats.json").write_text(json.dumps(rows))
    lines = ["ask,reply", *(f"{row['ask']},{row['reply']}" for row in flat)]
    (tmp_path / "table.csv").write_text("\n".join(lines))
    pairs = [{"prompt": row["ask"], "chosen": row["reply"], "rejected": row["reply"][::-1]} for row in flat]
    (tmp_path / "pairs.jsonl").write_text("\n".join(map(json.dumps, pairs)))
    (tmp_path / "bad.jsonl").write_text("\n".join([json.dumps(rows[0]), "{", json.dumps(rows[1])]))
    return {"chats.json": (), "table.csv": ("--prompt-column", "ask", "--completion-column", "reply")}


def test_every_verb_takes_every_kind_of_file(run, user_files, places):
    model = ("--model", user_files["model"])
    results = {}
    for name, options in places.items():
        with case(name):
            data = ("--data", name, *options)
            code, out, err = run("explain", "dft", *model, *data, "--json")
            assert code == 0 and "6 of 6 rows read" in err and ("ignored: id" in err) == (name == "chats.json")
            view = run("view", *model, *data, "--json", "--variants", "sft")
            rank = run("view", "--rank", *model, *data, "--json", "--variants", "sft")
            assert view[0] == rank[0] == 0 and ("columns that are ignored: id" in view[2]) == (name == "chats.json")
            results[name] = (json.loads(out)["table"] if "table" in json.loads(out) else out, view[1], rank[1])
    assert results["chats.json"] == results["table.csv"]


def test_a_comparison_takes_them_too(compare, places, tmp_path, capsys):
    scores = []
    for name in places:
        columns = dict(prompt_column="ask", completion_column="reply") if name == "table.csv" else {}
        study = compare("sft", seeds=1, data=tmp_path / name, out=tmp_path / f"run-{name}", progress=True, **columns)
        scores.append(study.table().iloc[0].drop("setting", errors="ignore").astype(str).tolist())
        assert "6 examples of 6 rows" in capsys.readouterr().err
    assert scores[0] == scores[1]
    with pytest.raises(InputError, match="bad.jsonl, line 2: not JSON"):
        compare("sft", seeds=1, data=tmp_path / "bad.jsonl", out=tmp_path / "bad")
    compare("sft", seeds=1, data=tmp_path / "bad.jsonl", out=tmp_path / "good", on_bad="drop", progress=True)
    assert "dropped 1: malformed JSON (line 2)" in capsys.readouterr().err.replace("\n", " ")


def test_text_only_shows_what_is_learned(run, user_files, places, tmp_path):
    model = ("--model", user_files["model"], "--text-only")
    code, out, err = run("view", *model, "--data", "chats.json", "--rows", 1)
    assert code == 0 and out == "--- 1: 19 tokens, 5 learned\n<s>what is bear\n⟦raeb</s>⟧\n"
    assert "6 examples of 6 rows" in err and "ignored columns: id" in err
    code, out, err = run("view", *model, "--data", "bad.jsonl", "--json")
    report = json.loads(out)
    assert code == 0 and report["examples"] == 2 and report["counts"]["reason"] == ["malformed JSON"]
    assert run("view", *model, "--text", "abc")[1] == "--- 1: 4 tokens, 3 learned\n<s>⟦abc⟧\n"
    for words, says in (
        (("--rank",), "--rank is about the models' predictions"),
        ((), "--text-only needs --model, whose tokenizer is used, and either --data or --text"),
    ):
        code, out, err = run("view", *model, *words)
        assert code == 2 and says in err and not out


def test_pairs_and_bad_rows_on_the_command_line(run, user_files, places, tmp_path):
    model = ("--model", user_files["model"])
    code, out, err = run("view", *model, "--data", "pairs.jsonl", "--json", "--variants", "sft")
    assert code == 0 and {json.loads(line)["row"] for line in out.splitlines()} == set(range(1, 9))
    code, out, err = run("explain", "simpo", *model, "--data", "pairs.jsonl", "--json")
    assert code == 0, err
    code, out, err = run("view", *model, "--data", "bad.jsonl", "--json", "--variants", "sft")
    assert code == 2 and "bad.jsonl, line 2: not JSON" in err
    code, out, err = run("view", *model, "--data", "bad.jsonl", "--json", "--variants", "sft", "--on-bad", "drop")
    assert code == 0 and {json.loads(line)["row"] for line in out.splitlines()} == {1, 3}
    code, out, err = run("view", *model, "--data", "bad.jsonl", "--on-bad", "skip")
    assert code == 2 and "on_bad must be 'error' or 'drop', got 'skip'" in err


def test_rows_of_pairs_are_encoded_before_they_are_shown(places, tmp_path):
    rows = load_rows(tmp_path / "pairs.jsonl")
    assert singles(rows, letters()) == encode(rows, letters()).examples
    chats = load_rows(tmp_path / "chats.json")
    assert singles(chats, letters()) is chats
    import qlens

    with pytest.raises(InputError, match="row 1: a row of two answers, .* encode the rows first, by qlens.encode"):
        qlens.view(llama(), letters(), list(rows), ["sft"])
