"""Comparisons that are killed, that fail in part, or that share a folder with another process."""

import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from filelock import FileLock
from mini_lab import MINI

import qlens
from qlens import InputError
from qlens.analysis.compare.run_folder import LOCK, locked
from qlens.analysis.study.study import FILES, Study
from qlens.cli import app

CHILD = """
import sys
sys.path.insert(0, {tests!r})
from mini_lab import MINI
import qlens
qlens.compare(["sft", "kd"], settings=MINI, seeds=2, steps=1, jobs=1, progress=False, out={out!r})
"""
FICKLE = """
import pathlib
import torch.nn.functional as F
def fickle(logits, labels):
    if pathlib.Path({switch!r}).exists():
        raise RuntimeError("out of luck")
    return F.cross_entropy(logits, labels)
"""


@pytest.fixture
def compare(lab_cache, tmp_path, monkeypatch):
    """A small comparison in the miniature environment, in one process; a step, since every curve point is sampled."""
    monkeypatch.setenv("QLENS_CACHE", str(lab_cache))

    def run(variants, **overrides):
        options = {"settings": MINI, "seeds": 3, "steps": 1, "jobs": 1, "progress": False, "out": tmp_path / "run"}
        return qlens.compare(variants, **options | overrides)

    return run


def test_a_killed_comparison_resumes_to_the_same_table(compare, lab_cache, tmp_path):
    whole = compare(["sft", "kd"], seeds=2, out=tmp_path / "whole")
    out, tests = tmp_path / "run", str(Path(__file__).parents[1] / "helpers")
    script = tmp_path / "child.py"
    script.write_text(CHILD.format(tests=tests, out=str(out)))
    environment = os.environ | {"QLENS_CACHE": str(lab_cache)}
    with subprocess.Popen([sys.executable, script], env=environment, start_new_session=True) as child:
        while child.poll() is None and not list(out.glob("jobs/*.json")):
            time.sleep(0.01)
        assert child.poll() is None, "the comparison must be stopped half-way"
        os.killpg(child.pid, signal.SIGKILL)
    resumed = compare(["sft", "kd"], seeds=2, out=out)
    pd.testing.assert_frame_equal(resumed.results, whole.results)
    pd.testing.assert_frame_equal(resumed.table(), whole.table())
    assert not [path for path in out.rglob("*.partial")]
    assert (out / "table.md").read_bytes() == (tmp_path / "whole" / "table.md").read_bytes()


def test_a_failed_job_is_reported_the_others_finish_and_the_next_call_tries_again(compare, tmp_path):
    switch, file = tmp_path / "switch", tmp_path / "own.py"
    file.write_text(FICKLE.format(switch=str(switch)))
    switch.touch()
    spec = f"{file}:fickle"
    study = compare(["sft", spec])
    folder = tmp_path / "run"
    assert study.methods == ["base", "sft"] and set(study.table()["n"]) == {"3 x 12"}
    traces = sorted((folder / "failed").iterdir())
    assert len(traces) == 3
    text = traces[0].read_text()
    assert "Traceback" in text and 'raise RuntimeError("out of luck")' in text
    assert len(study.config["noted"]["failed"]) == 3
    for report_text in (str(study), (folder / "report.html").read_text(), (folder / "table.md").read_text()):
        assert "RuntimeError: out of luck" in report_text and traces[0].name in report_text
    assert str(Study.load(folder)) == str(study)
    switch.unlink()
    mended = compare(["sft", spec])
    assert mended.methods == ["base", "sft", spec] and not list((folder / "failed").iterdir())
    assert mended.config["noted"]["failed"] == []


def test_a_nan_score_is_a_failure(compare, tmp_path, monkeypatch):
    from qlens.analysis.compare.environments import LabSource, open_environment

    ground = open_environment(LabSource(MINI, 1))
    scores = iter([ground.score(ground.start(), 0), np.full(12, np.nan)])
    monkeypatch.setattr(
        "qlens.analysis.compare.jobs.open_environment",
        lambda source: dataclasses.replace(ground, score=lambda *_: next(scores)),
    )
    study = compare("sft", seeds=1)
    assert study.methods == ["base"]
    assert "FloatingPointError: 12 of 12 scores are not finite" in str(study)


def test_an_error_is_raised_when_every_job_fails(compare, tmp_path, monkeypatch):
    from qlens.analysis.compare.jobs import Job

    def hopeless(job):
        raise RuntimeError("nothing works")

    monkeypatch.setattr(Job, "work", hopeless)
    with pytest.raises(
        InputError, match="every job failed; the first: base in mini at seed 0: RuntimeError: nothing works"
    ):
        compare("sft", seeds=1)
    assert not (tmp_path / "run" / "report.html").exists()


def test_the_command_line_exits_with_1_after_a_failure(monkeypatch, capsys, tmp_path):
    class Failed:
        config = {"noted": {"failed": ["x"]}}

    monkeypatch.setattr(qlens, "compare", lambda *args, **kwargs: Failed())
    monkeypatch.setattr(sys, "argv", ["qlens", "compare"])
    with pytest.raises(SystemExit) as exit_info:
        app.main()
    assert exit_info.value.code == 1 and capsys.readouterr().out


def test_two_processes_in_one_folder_are_refused(compare, tmp_path):
    out = tmp_path / "run"
    compare("sft", seeds=1)
    script = f"from filelock import FileLock; x = FileLock({str(out / LOCK)!r}); x.acquire(); print('held', flush=True); input()"
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen([sys.executable, "-c", script], **pipes) as other:
        assert other.stdout.readline() == "held\n"
        with pytest.raises(InputError, match="another process is using"):
            compare("sft", seeds=1)
        other.kill()
    assert len(compare("sft", seeds=1).table()) == 2, "the lock of a killed process is released"


def test_a_locked_folder_holds_its_configuration_and_is_released(tmp_path):
    for _ in range(2):
        with locked(tmp_path / "run", {"a": 1}):
            assert json.loads((tmp_path / "run" / "config.json").read_text()) == {"a": 1}
            with pytest.raises(InputError, match="another process"), locked(tmp_path / "run", {"a": 1}):
                pass
    FileLock(tmp_path / "run" / LOCK).acquire(timeout=0)
    with pytest.raises(InputError, match="a was 1, now 2"), locked(tmp_path / "run", {"a": 2}):
        pass


def test_a_study_with_a_missing_file_is_refused(tmp_path):
    for file in (*FILES.values(), "config.json"):
        for name in (*FILES.values(), "config.json"):
            (tmp_path / name).parent.mkdir(exist_ok=True)
            (tmp_path / name).touch()
        (tmp_path / file).unlink()
        with pytest.raises(InputError, match=f"no finished study: {file} missing"):
            Study.load(tmp_path)


def test_a_damaged_record_is_computed_again_and_reported(compare, tmp_path, capsys):
    study = compare("sft", seeds=1)
    jobs = sorted((tmp_path / "run" / "jobs").iterdir())
    whole = {path: json.loads(path.read_text(encoding="utf-8")) for path in jobs}
    strange = json.dumps(whole[jobs[1]] | {"scores": ["a"]})
    for damages in (("[]", jobs[1].read_text()[:200]), ("null", strange)):
        for path, damage in zip(jobs, damages, strict=True):
            path.write_text(damage, encoding="utf-8")
        resumed = compare("sft", seeds=1, progress=True)
        assert capsys.readouterr().err.count("is damaged and computed again") == 2
        assert resumed.results.equals(study.results)
    for content in ("[]", "null", "{"):
        (tmp_path / "run" / "config.json").write_text(content, encoding="utf-8")
        with pytest.raises(InputError, match=r"config.json.* is damaged"):
            compare("sft", seeds=1)
