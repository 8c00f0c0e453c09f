"""The command line as a user meets it: output, JSON, and one line with exit code 2 for a mistake."""

import json
from pathlib import Path

import pandas as pd
import pytest
from cases import case

import qlens

DATA = Path(__file__).parents[3] / "shared" / "data"
needs_data = pytest.mark.skipif(not DATA.is_dir(), reason="needs ../shared/data: two tiny checkpoints and GSM8K")


@pytest.fixture
def my_loss(tmp_path):
    file = tmp_path / "my_loss.py"
    file.write_text(
        "def f(logits, labels, factor=2.0):\n    return -factor * logits.log_softmax(-1).gather(1, labels[:, None]).mean()\n"
    )
    return file


def test_list_names_every_method(run):
    code, out, _ = run("list")
    assert code == 0 and all(name in out for name in qlens.names())
    code, out, _ = run("list", "--json")
    assert code == 0 and [row["name"] for row in json.loads(out)] == list(qlens.names())


def test_show_and_bibtex(run):
    code, out, _ = run("show", "label_smoothing(epsilon=0.2)")
    assert code == 0 and "epsilon = 0.2 (default 0.1)" in out and "uniform" in out
    code, out, _ = run("show", "target_sft", "--bibtex")
    assert code == 0 and out.startswith("@misc{xie2026targetsft")
    code, _, err = run("show", "sft", "--bibtex")
    assert code == 2 and "sft has no citation" in err


def test_explain_reads_a_user_file(run, my_loss, tmp_path):
    code, out, err = run("explain", "my_loss.py:f")
    assert code == 0, err
    assert "sft x 2: the same gradient up to this factor" in out
    assert "--full" in out and "Scope:" not in out and len(out.splitlines()) <= 30
    assert (tmp_path / "explain-my_loss-f.png").stat().st_size > 10_000
    frame = pd.read_csv(tmp_path / "explain-my_loss-f.csv")
    assert {"p_y", "q_label", "label_weight"} <= set(frame) and len(frame) == 57
    assert {"time", "p_0"} <= set(pd.read_csv(tmp_path / "explain-my_loss-f-destination.csv"))
    assert not list(tmp_path.glob(".*partial"))


def test_explain_in_full(run, my_loss):
    code, out, _ = run("explain", "my_loss.py:f", "--full")
    words = ("Trust (the label's coefficient in Q)", "Simplex", "Scope", "Range covered", "Fixed point")
    assert code == 0 and all(f"\n{word}: " in out for word in words), out


def test_explain_as_json_writes_no_figure_unasked(run, my_loss, tmp_path):
    code, out, _ = run("explain", "my_loss.py:f(factor=1.0)", "--json")
    assert code == 0 and json.loads(out)["nearest"][0]["relation"] == "identical"
    assert not list(tmp_path.glob("*.png"))
    code, out, _ = run("explain", "dft", "--json", "--figure", "here.pdf")
    assert code == 0 and json.loads(out)["loss"] == "dft" and (tmp_path / "here.pdf").is_file()


def test_the_exit_code_of_check_reports_failures(run, my_loss):
    code, out, _ = run("check", "my_loss.py:f")
    assert code == 0 and " passed, 0 failed" in out
    code, out, _ = run("check", "dft", "--json")
    assert code == 0 and json.loads(out)["ok"] is True
    my_loss.write_text(
        "def f(logits, labels):\n    return -logits.softmax(-1).gather(1, labels[:, None]).log().mean()\n"
    )
    code, out, _ = run("check", "my_loss.py:f", "--json")
    assert code == 1 and {row["state"] for row in json.loads(out)["items"] if row["id"] == "extremes"} == {"failed"}
    code, out, _ = run("check", "my_loss.py:f")
    assert code == 1 and "consequence: one sure or hopeless token turns the weights NaN" in out
    my_loss.write_text("def f(logits, labels):\n    return logits.detach().sum()\n")
    code, out, err = run("check", "my_loss.py:f")
    assert code == 2 and out == "" and "without a graph" in err


def test_distances_are_drawn_as_a_tree_with_their_data(run, tmp_path):
    code, out, err = run("list", "--distances", "--figure", "atlas.png")
    assert code == 0 and "Figure: atlas.png" in out, err
    assert set(pd.read_csv(tmp_path / "atlas.csv").columns) >= {"left", "sft", "dft"}
    assert (tmp_path / "atlas.png").stat().st_size > 10_000


@needs_data
def test_explain_on_a_real_model_and_text(run, tmp_path):
    models = DATA / "models"
    code, out, err = run(
        "explain", "target_sft", "--model", models / "llama2xs-279k", "--teacher", models / "stories260k",
        "--data", DATA / "gsm8k" / "train.jsonl", "--rows", 4,
    )  # fmt: skip
    assert code == 0, err
    assert "4 of 7473 rows read" in err and "dropped 390: too long" in err
    assert "V = 512" in out and "Nearest methods" in out


def test_usage_errors_are_one_line_with_exit_code_2(run, my_loss, tmp_path):
    for words, says in [
        (["show", "sftt"], "Did you mean sft"),
        (["explain", "kd(temperature=0)"], "temperature = 0"),
        (["check", "sftt"], "Did you mean sft"),
        (["check", "dft", "--model", "nowhere"], "--model"),
        (["explain", "missing.py:f"], "there is no file missing.py"),
        (["explain", "my_loss.py:g"], "unknown function in my_loss.py 'g'"),
        (["explain", "dft", "--model", "nowhere"], "--model and --data go together"),
        (["explain", "dft", "--model", "./nowhere", "--data", "my_loss.py"], "my_loss.py, line 1: not JSON"),
        (["explain", "dft", "--figure", "no/such/folder.png"], "there is no folder"),
        (["list", "--figure", "atlas.png"], "--figure go with --distances"),
        (["list", "--distances", "--figure", "no/atlas.png"], "there is no folder"),
        (["explain", "dft", "--figure", "figure.xyz"], "ends in one of .png, .pdf, .svg"),
        (["compare", "--settings", "strong"], "strong-prior"),
        (
            ["compare", "--model", "nowhere", "--data", "my_loss.py", "--variants", "sft"],
            "my_loss.py, line 1: not JSON",
        ),
        (["compare", "--model", "nowhere", "--data", "ok.jsonl", "--variants", "sft"], "'nowhere' is not there"),
        (["compare", "--model", "./nowhere", "--data", "ok.jsonl", "--variants", "sft"], "'./nowhere' is not there"),
        (["compare", "--model", "nowhere", "--data", "ok.jsonl"], "need a teacher"),
        (["compare", "--variants", "sft,dftt"], "Did you mean dft"),
        (["compare", "--variants", "label_smoothing(epsilon=3)"], "epsilon = 3"),
        (["compare", "--seeds", "0"], "seeds"),
        (["compare", "--frobnicate"], "frobnicate"),
        (["frobnicate"], "frobnicate"),
    ]:
        with case(words, says):
            (tmp_path / "ok.jsonl").write_text('{"prompt": "2 + 2 =", "completion": "4"}\n' * 4)
            before = sorted(tmp_path.rglob("*"))
            code, out, err = run(*words)
            assert code == 2 and says in err and "Traceback" not in err and out == ""
            assert (
                sorted(p for p in tmp_path.rglob("*") if "__pycache__" not in p.parts) == before
            )  # nothing half-written


def test_lab_settings_are_refused_with_a_user_model(run):
    for own in (("--model", "m"), ("--teacher", "m"), ("--data", "d.jsonl")):
        code, out, err = run("compare", "--settings", "strong-prior", *own)
        assert (code, out) == (2, "") and err.startswith("qlens: --settings are the lab's") and err.count("\n") == 1
