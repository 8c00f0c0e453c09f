"""The order of jobs, environments that are built on the way, and the table that is shown meanwhile."""

import io
from pathlib import Path
from types import SimpleNamespace

from mini_lab import MINI
from rich.console import Console

import qlens
from qlens.analysis.compare.environments import LabSource
from qlens.analysis.compare.jobs import Job
from qlens.analysis.compare.live_table import LiveTable
from qlens.analysis.compare.recipes import BASE, Recipe
from qlens.analysis.compare.schedule import _ready_first, in_turn, run_all
from qlens.core.progress import stderr
from qlens.lab.building import Construction

METHODS = (BASE, "sft", "target_sft")
SECOND = "second"


def jobs(seeds=(3, 1)):
    """Jobs of three methods in two settings."""
    sources = [LabSource(MINI), LabSource(MINI.__class__(**vars(MINI) | {"name": SECOND}))]
    return [
        Job(folder=Path("run"), source=source, method=method, learning_rate=1e-3, seed=seed, reads=False,
            recipe=Recipe(None if method == BASE else qlens.get(method)))
        for source in sources for method in METHODS for seed in seeds
    ]  # fmt: skip


def places(jobs):
    return [(job.seed, job.source.name, job.method) for job in jobs]


def test_the_first_seed_of_a_setting_comes_first_and_long_jobs_begin_early():
    expected = [(3, setting, method) for setting in ("mini", SECOND) for method in METHODS]
    expected += [(1, setting, method) for setting in ("mini", SECOND) for method in ("target_sft", "sft", BASE)]
    assert places(in_turn(jobs())) == expected


class Step:
    """A task that notes when it runs."""

    def __init__(self, setting, name, notes):
        self.source, self.name, self.notes = SimpleNamespace(name=setting), name, notes

    def run(self):
        self.notes.append(self.name)


class Building(SimpleNamespace):
    """An environment that is whole once it has run."""

    done, total = 0, 1

    def run(self):
        self.notes.append(f"build {self.name}")
        self.done = 1


def test_an_environment_is_built_by_its_first_task():
    notes = []
    tasks = [Step(setting, f"{setting}{number}", notes) for number in (1, 2) for setting in "abc"]
    built = {name: Building(name=name, notes=notes) for name in "ab"}
    assert list(run_all(tasks, 1, built)) == tasks
    assert notes == ["build a", "a1", "build b", "b1", "c1", "a2", "b2", "c2"]


def test_no_process_waits_for_an_environment_while_another_is_ready():
    tasks = [Step(setting, f"{setting}{number}", []) for setting in "abc" for number in (1, 2)]
    built = {name: Building(name=name) for name in "ab"}
    dispatched = _ready_first(tasks, built)
    names = [next(dispatched)[1].name for _ in range(3)]
    assert names == ["a1", "b1", "c1"], "a2 would wait for a"
    built["b"].done = 1
    assert [next(dispatched)[1].name for _ in range(3)] == ["b2", "c2", "a2"]


def test_the_table_holds_what_has_ended(tmp_path):
    all_jobs = jobs()
    shown = io.StringIO()
    console = Console(file=shown, force_terminal=True, width=200)
    construction = Construction(MINI, tmp_path / "count")
    construction.file.write_bytes(b"." * 3)
    table = LiveTable(all_jobs, {"mini": construction}, "avg@8", 2, console)
    with table.shown():
        assert "building mini: 3 of 11; 0 of 12 jobs" in table.status and "left" in table.status
        for job in all_jobs[:3]:
            table.add(job, {"scores": [0.25, 0.5]})
        table.add(all_jobs[3], None)
    lines = str(table).splitlines()
    assert "avg@8 after 3 of 12 jobs" in lines[0] and "intervals" in lines[0]
    assert [line.split() for line in lines[1:]] == [
        ["method", "mini", SECOND],
        ["base", "0.375", "(2)", "-"],
        ["sft", "0.375", "(1)", "-"],
    ]
    assert "4 of 12 jobs" in table.status
    assert "0.375 (2)" in shown.getvalue()


def test_without_a_terminal_the_table_follows_the_first_training_and_the_first_seed_of_a_setting(capsys):
    all_jobs = jobs()
    table = LiveTable(all_jobs, {}, "avg@8", 2, stderr())
    for job in in_turn(all_jobs):
        table.add(job, {"scores": [0.25]})
    headings = [line for line in capsys.readouterr().err.splitlines() if "avg@8 after" in line]
    assert [line.split()[2] for line in headings] == ["2", "3", "6"], "base alone is no table yet"
