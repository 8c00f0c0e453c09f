"""Jobs: one training and its scores each, independent of the others, written to a file of its own when finished."""

import hashlib
import json
import re
import shutil
import time
import traceback
from abc import ABC, abstractmethod
from collections.abc import Sequence
from concurrent.futures import BrokenExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import joblib
import numpy as np
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from transformers import PreTrainedModel

from qlens.analysis.compare.environments import Ground, Source, open_ground
from qlens.analysis.compare.evaluation import diagnostics, reading, separation
from qlens.analysis.compare.recipes import Recipe
from qlens.analysis.study.frames import record_fault
from qlens.core.errors import InputError
from qlens.core.files import make_folder, read_json, write_text
from qlens.data.models import quiet
from qlens.training.fitting import fit, isolated

MARKS = (0.25, 0.5, 0.75, 1.0)  # of the training, where the learning curve is measured
FAILED = "failed"


@dataclass(frozen=True, kw_only=True)
class Task(ABC):
    """A recipe at a learning rate and a seed in a setting, and the file that says how it went.

    Args:
        folder: the run folder.
        source: the setting.
        method: the name in all tables.
        recipe: what to train with.
        learning_rate: 0 where nothing is trained.
        seed: of the batches and of the sampling in the score.
    """

    folder: Path
    source: Source
    method: str
    recipe: Recipe
    learning_rate: float
    seed: int

    part: ClassVar[str]

    @property
    def name(self) -> str:
        """The name of its files."""
        return f"{self.source.name}--{slug(self.method)}--{self.seed}"

    @property
    def path(self) -> Path:
        """The record's file."""
        return self.folder / self.part / f"{self.name}.json"

    @property
    def trace(self) -> Path:
        """Where the traceback goes if it fails."""
        return self.folder / FAILED / f"{self.part}--{self.name}.txt"

    def finished(self) -> dict[str, Any] | None:
        """What the file holds; None if it is not there or damaged."""
        return None if not self.path.is_file() or self.damage() else read_json(self.path)

    def damage(self) -> str:
        """What is wrong with the record's file; nothing where it is whole or not there."""
        if not self.path.is_file():
            return ""
        try:
            return self.fault(read_json(self.path))
        except InputError as error:  # cut off, or no JSON
            return str(error)

    @abstractmethod
    def fault(self, record: Any) -> str:
        """What is wrong with a record; nothing where it is one."""

    @abstractmethod
    def work(self) -> dict[str, Any]:
        """Do it; the record."""

    def run(self) -> None:
        """Do it and write the record down; what it raises is written down instead, for the others to go on."""
        self.trace.unlink(missing_ok=True)
        try:
            record = self.work()
        except (Exception, SystemExit):  # sys.exit in a user's loss is a failure too
            make_folder(self.trace.parent)
            write_text(self.trace, traceback.format_exc())
            return
        make_folder(self.path.parent)
        write_text(self.path, json.dumps(record))

    def train(self, ground: Ground, model: PreTrainedModel, marks: Sequence[int] = ()) -> list[list[float]]:
        """Train a model in place; [step, validation score] at the start and after each of the steps in ``marks``."""

        def measure() -> None:
            curve.append([done, round(float(ground.validate(model, self.seed).mean()), 6)])

        def tick() -> None:
            nonlocal done
            done += 1
            if done in marks:
                measure()

        done, curve = 0, []
        if marks:
            measure()
        if self.recipe.variant is not None:
            fit(
                model,
                ground.train,
                steps=ground.steps_of(self.recipe),
                batch_size=ground.batch_size,
                learning_rate=self.learning_rate,
                seed=self.seed,
                variant=self.recipe.variant,
                tick=tick,
                **ground.others(self.recipe, self.recipe.variant.needs),
            )
        return curve


@dataclass(frozen=True, kw_only=True)
class Job(Task):
    """A row of the table at one seed; without a variant the start is scored as it is.

    Args:
        reads: whether to read trust and targets at the start too (once per setting and method).
        keep: where the trained model goes; None to drop it.
    """

    reads: bool
    keep: Path | None = None

    part: ClassVar[str] = "jobs"

    def finished(self) -> dict[str, Any] | None:
        """What the job's file holds; None if it is not there, not readable, of another recipe or rate (a search may
        choose anew), or if the model to be kept is not there."""
        record = super().finished()
        there = self.keep is None or self.keep.is_dir()
        return record if record is not None and there and record.get("made_with") == self.made_with else None

    def fault(self, record: Any) -> str:
        """What is wrong with a record; nothing where it is one."""
        return record_fault(record)

    @property
    def made_with(self) -> dict[str, Any]:
        """What a record must have been made with to be this job's."""
        return {"recipe": self.recipe.spec, "learning_rate": self.learning_rate, "reads": self.reads}

    def work(self) -> dict[str, Any]:
        """Train, score and look."""
        began, ground, variant = time.perf_counter(), open_ground(self.source), self.recipe.variant
        steps = ground.steps_of(self.recipe)
        with isolated(self.seed):
            model = ground.start()
            curve = self.train(ground, model, [round(mark * steps) for mark in MARKS])
            if self.keep is not None:
                _keep(model, ground, self.keep)
            others = ground.others(self.recipe, ("teacher", "reference"))
            scores = ground.score(model, self.seed)
            if not np.isfinite(scores).all():
                raise FloatingPointError(f"{int((~np.isfinite(scores)).sum())} of {len(scores)} scores are not finite")
            record: dict[str, Any] = {
                "setting": self.source.name,
                "method": self.method,
                "seed": self.seed,
                "made_with": self.made_with,
                "scores": np.round(scores, 6).tolist(),
                "curve": curve,
                "diagnostics": diagnostics(model, variant, ground.held, **others),
                "truth": [],
            }
            if variant is not None and ground.truth is not None:
                record["truth"] += separation(model, variant, ground.held, ground.truth, "end", **others)
            if self.reads and variant is not None:
                start, known = ground.start(), (ground.truth, ground.tokenizer)
                teacher = ground.teacher() if ground.teacher else None
                record["reading"] = reading(start, variant, ground.held, *known, teacher, others)
                if ground.truth is not None:
                    record["truth"] += separation(start, variant, ground.held, ground.truth, "start", **others)
        record["diagnostics"]["steps"] = steps
        record["diagnostics"]["seconds"] = round(time.perf_counter() - began, 2)
        return record


def run_all(tasks: Sequence[Task], processes: int | None, progress: bool, says: str = "training") -> None:
    """Run tasks in parallel processes (joblib: loky unless ``joblib.parallel_config`` says otherwise), one thread each."""
    if not tasks:
        return
    workers = min(processes or joblib.cpu_count(), len(tasks))
    run = joblib.Parallel(n_jobs=workers, return_as="generator_unordered", batch_size=1, pre_dispatch="n_jobs")
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, TimeRemainingColumn(), console=Console(stderr=True), disable=not progress) as bar:
        try:
            for _ in bar.track(run(joblib.delayed(_run)(task) for task in tasks), len(tasks), description=says):
                pass
        except BrokenExecutor as error:
            raise InputError(
                "a worker process ended by itself: it was killed (out of memory?), or a loss ended it; the same call goes "
                "on from what is finished, with fewer jobs= it needs less memory"
            ) from error


def _run(task: Task) -> None:
    task.run()


def slug(method: str) -> str:
    """A file name for a method: the name itself where it can be one, else with a digest, so that no two are alike."""
    plain = re.sub(r"[^A-Za-z0-9_.]+", "-", method).strip("-.")[-60:]
    return method if plain == method else f"{plain}-{hashlib.sha256(method.encode()).hexdigest()[:6]}"


def _keep(model: PreTrainedModel, ground: Ground, folder: Path) -> None:
    partial = folder.with_name(f".{folder.name}.partial")
    for old in (folder, partial):  # of a job that was stopped half-way
        shutil.rmtree(old, ignore_errors=True)
    with quiet():
        model.save_pretrained(partial)
    ground.tokenizer.save_pretrained(partial)
    partial.rename(folder)
