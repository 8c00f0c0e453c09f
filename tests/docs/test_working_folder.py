"""Paths of a command are relative to the folder it was called in, whatever folder user code changes to."""

import json

import pytest
from tiny_models import VOCAB, letters, llama

from qlens import InputError, compare
from qlens.core.files import from_here, output_file, user_path

OWN = """
import os
import torch.nn.functional as F

os.chdir("elsewhere")


def own(logits, labels):
    os.chdir("/")
    return 2 * F.cross_entropy(logits, labels)
"""
SECOND = """
import torch.nn.functional as F


def second(logits, labels):
    return F.cross_entropy(logits, labels, label_smoothing=0.3)
"""


@pytest.fixture
def here(tmp_path, monkeypatch):
    """A folder with a model, data and two files of losses; it is the working one again at the end."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "own.py").write_text(OWN)
    (tmp_path / "second.py").write_text(SECOND)
    llama(vocab=VOCAB).save_pretrained("model")
    letters().save_pretrained("model")
    texts = [{"prompt": "ab", "completion": letter * 3} for letter in "cdefgh"]
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in texts))
    return tmp_path


READS = ("--model", "model", "--data", "data.jsonl")
COMMANDS = {
    ("show", "own.py:own"): (),
    ("check", "own.py:own"): (),
    ("explain", "own.py:own", *READS, "--teacher", "./model"): ("explain-own-own.png", "explain-own-own.csv"),
    ("view", *READS, "--variants", "own.py:own,second.py:second"): ("view.html",),
    ("view", *READS, "--variants", "own.py:own", "--out", "page.html"): ("page.html",),
}


@pytest.mark.parametrize("words", COMMANDS, ids=" ".join)
def test_a_user_file_that_changes_the_working_folder_moves_no_path(here, run, monkeypatch, words):
    code, out, err = run(*words)
    assert code == 0, err
    assert all((here / name).stat().st_size for name in COMMANDS[words])
    assert not list((here / "elsewhere").iterdir())
    if COMMANDS[words]:
        assert f"{words[0].replace('explain', 'figure').title()}: {COMMANDS[words][0]}" in out
    monkeypatch.chdir(here)


def test_a_study_is_saved_to_the_requested_folder(here):
    options = {"model": "model", "data": "data.jsonl", "seeds": 1, "steps": 1, "jobs": 1, "progress": False}
    compare(["own.py:own", "second.py:second"], out="run", save=True, **options)
    assert (here / "run" / "config.json").is_file() and not list((here / "elsewhere").iterdir())


def test_relative_paths_start_at_the_callers_folder(tmp_path, monkeypatch):
    (tmp_path / "a").mkdir()
    monkeypatch.chdir(tmp_path)
    assert user_path("a", "out") == tmp_path / "a"
    with from_here():
        monkeypatch.chdir("a")
        assert user_path("b", "out") == tmp_path / "b"
        with from_here():
            assert user_path("b", "out") == tmp_path / "b"
        with from_here(tmp_path / "a"):
            assert user_path("b", "out") == tmp_path / "a" / "b"
    assert user_path("b", "out") == tmp_path / "a" / "b"
    with pytest.raises(InputError, match="'no/b': there is no folder no"):
        output_file("no/b", "out")


def test_a_deleted_working_folder_is_reported(tmp_path, run, monkeypatch):
    deleted = tmp_path / "gone"
    deleted.mkdir()
    monkeypatch.chdir(deleted)
    deleted.rmdir()
    code, _, err = run("show", "sft")
    assert (code, err.count("\n")) == (2, 1) and "working folder is gone" in err
    monkeypatch.chdir(tmp_path)
