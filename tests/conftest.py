"""Fixtures for all tests: one torch thread, user models and data as files, a small comparison, a browser, a command."""

import functools
import gc
import json
import os
import sys

os.environ.setdefault("TRITON_INTERPRET", "1")  # before whatever imports Triton: its kernels run on a CPU

import pytest
import torch
from tiny_models import letters, llama, trainer_in

import qlens
from qlens.cli import app

torch.set_num_threads(1)
os.environ["OMP_NUM_THREADS"] = "1"  # also for the processes that tests start: every core already has a worker


@pytest.fixture(autouse=True)
def own_garbage():
    """A Trainer ends by collecting garbage: the test's own, not in all that was ever imported, which takes longer."""
    gc.freeze()
    yield
    gc.collect()
    gc.unfreeze()


@pytest.fixture(scope="module")
def user_files(tmp_path_factory):
    """Paths of a saved model, a teacher and a data file, as a user would give them."""
    folder = tmp_path_factory.mktemp("user")
    for seed, name in enumerate(("model", "teacher")):
        llama(seed).save_pretrained(folder / name)
        letters().save_pretrained(folder / name)
    words = [a + b + c for a in "bdfgk" for b in "ae" for c in ("n", "rs", "ll", "m")]
    rows = [{"question": f"what is {word}", "answer": word[::-1]} for word in words]
    rows.append({"question": "a" * 40, "answer": "too long for the context"})
    (folder / "words.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    return {"model": folder / "model", "teacher": folder / "teacher", "data": folder / "words.jsonl"}


@pytest.fixture
def compare(user_files, tmp_path):
    """Two methods, two seeds, three steps, in one process."""

    def run(variants=("dft", "target_sft"), **overrides):
        options = dict(seeds=2, steps=3, jobs=1, progress=False, out=tmp_path / "run") | user_files | overrides
        return qlens.compare(variants, **options)

    return run


@pytest.fixture
def make(tmp_path):
    """Trainers that write to a folder of their own."""
    return functools.partial(trainer_in, tmp_path)


@pytest.fixture(scope="session")
def chromium():
    """A headless Chromium, or a reason to skip."""
    from browser import launched

    with launched() as browser:
        yield browser


@pytest.fixture
def open_page(chromium):
    """Open a file in a fresh window: a page that fails the test if it logs an error or asks for anything beyond itself."""
    from browser import RecordedPage

    pages = []

    def call(path, **window):
        pages.append(RecordedPage(chromium, path, window))
        return pages[-1].page

    yield call
    for each in pages:
        each.close()


@pytest.fixture
def run(monkeypatch, capsys, tmp_path):
    """Run a command in an empty folder: (exit code, output, errors)."""
    monkeypatch.chdir(tmp_path)

    def call(*words):
        monkeypatch.setattr(sys, "argv", ["qlens", *map(str, words)])
        with pytest.raises(SystemExit) as exit_info:
            app.main()
        output = capsys.readouterr()
        return exit_info.value.code, output.out, output.err

    return call
