"""Jobs: one training and its scores each, independent of the others, written to a file of its own when finished."""

import hashlib
import json
import re
import shutil
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import joblib
import numpy as np
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from transformers import PreTrainedModel

from qlens.analysis.grounds import Ground, Source, open_ground
from qlens.analysis.held import diagnostics, reading
from qlens.files import write_text
from qlens.fitting import fit, isolated
from qlens.registry import Variant, resolve
from qlens.sources import quiet


@dataclass(frozen=True)
class Job:
    """A method at a seed in a setting; without a variant the start is scored as it is.

    Args:
        source: the setting.
        method: the name in all tables.
        variant: what to train with, a spec where the worker can make it anew; None for ``base``.
        seed: of the batches and of the sampling in the score.
        reads: whether to read trust and targets at the start too (once per setting and method).
        folder: the run folder.
        keep: where the trained model goes; None to drop it.
    """

    source: Source
    method: str
    variant: Variant | str | None
    seed: int
    reads: bool
    folder: Path
    keep: Path | None = None

    @property
    def path(self) -> Path:
        """The job's file."""
        return self.folder / "jobs" / f"{self.source.name}--{slug(self.method)}--{self.seed}.json"

    def finished(self) -> dict[str, Any] | None:
        """What the job's file holds; None if it is not there, not readable, or the model to be kept is not."""
        if self.keep is not None and not self.keep.is_dir():
            return None
        try:
            return json.loads(self.path.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return None

    def run(self) -> None:
        """Train, score, look, and write it all down."""
        began, ground = time.perf_counter(), open_ground(self.source)
        variant = None if self.variant is None else resolve(self.variant)
        with isolated(self.seed):
            model = ground.start()
            if variant is not None:
                train(model, variant, ground, self.seed)
            if self.keep is not None:
                _keep(model, ground, self.keep)
            start, teacher = ground.start(), ground.teacher() if ground.teacher else None
            record = {
                "setting": self.source.name,
                "method": self.method,
                "seed": self.seed,
                "scores": np.round(ground.score(model, self.seed), 6).tolist(),
                "diagnostics": diagnostics(model, start, teacher, variant, ground.held),
            }
            if self.reads and variant is not None:
                record["reading"] = reading(start, teacher, variant, ground.held, ground.tokenizer)
        record["diagnostics"]["steps"] = ground.steps if variant is not None else 0
        record["diagnostics"]["seconds"] = round(time.perf_counter() - began, 2)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        write_text(self.path, json.dumps(record))


def run_all(jobs: Sequence[Job], processes: int | None, progress: bool) -> None:
    """Run jobs in parallel processes (joblib: loky unless ``joblib.parallel_config`` says otherwise), one thread each."""
    run = joblib.Parallel(
        n_jobs=processes or joblib.cpu_count(), return_as="generator_unordered", batch_size=1, pre_dispatch="n_jobs"
    )
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, TimeRemainingColumn(), console=Console(stderr=True), disable=not progress) as bar:
        for _ in bar.track(run(joblib.delayed(Job.run)(job) for job in jobs), len(jobs), description="training"):
            pass


def train(model: PreTrainedModel, variant: Variant, ground: Ground, seed: int) -> None:
    """Train a model in place: the ground's steps, batch size and learning rate, whatever the method."""
    others = {"teacher": ground.teacher, "reference": ground.start}
    fit(
        model,
        ground.train,
        steps=ground.steps,
        batch_size=ground.batch_size,
        learning_rate=ground.learning_rate,
        seed=seed,
        variant=variant,
        **{need: make() for need, make in others.items() if need in variant.needs and make is not None},
    )


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
