"""Jobs: independent trainings with their scores, each recorded in a file of its own."""

import hashlib
import json
import re
import time
import traceback
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from transformers import PreTrainedModel

from qlens.analysis.compare.environments import Environment, open_environment
from qlens.analysis.compare.evaluation import diagnostics, reading, separation
from qlens.analysis.compare.recipes import Recipe
from qlens.analysis.compare.stored_models import save
from qlens.analysis.compare.user_source import Source
from qlens.analysis.study.frames import record_fault
from qlens.core.errors import InputError
from qlens.core.files import make_folder, read_json, write_text
from qlens.training.fitting import fit, isolated

MARKS = (0.25, 0.5, 0.75, 1.0)  # shares of the steps at which the learning curve is measured
FAILED = "failed"
EVALUATION, FORWARD = 50, 0.3  # duration of an evaluation, and of a forward pass, in training steps


@dataclass(frozen=True, kw_only=True)
class Task(ABC):
    """A recipe at a learning rate and a seed in a setting, with a file for its record.

    Args:
        folder: the run folder.
        source: the setting.
        method: the name in all tables.
        recipe: variant, guide and compute.
        learning_rate: 0 without training.
        seed: of batches and samples.
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
        """Name of its files."""
        return f"{self.source.name}--{slug(self.method)}--{self.seed}"

    @property
    def path(self) -> Path:
        """File of the record."""
        return self.folder / self.part / f"{self.name}.json"

    @property
    def trace(self) -> Path:
        """File of the traceback, if it fails."""
        return self.folder / FAILED / f"{self.part}--{self.name}.txt"

    def finished(self) -> dict[str, Any] | None:
        """The record; None if its file is missing or damaged."""
        return None if not self.path.is_file() or self.damage() else read_json(self.path)

    def damage(self) -> str:
        """The fault of the record's file in words; empty if it is intact or missing."""
        if not self.path.is_file():
            return ""
        try:
            return self.fault(read_json(self.path))
        except InputError as error:
            return str(error)

    @abstractmethod
    def fault(self, record: Any) -> str:
        """The fault of a record in words; empty if there is none."""

    @abstractmethod
    def work(self) -> dict[str, Any]:
        """Run the task; returns its record."""

    def run(self) -> None:
        """Run the task and write its record; an exception is written to ``trace``, so that other tasks continue."""
        self.trace.unlink(missing_ok=True)
        try:
            record = self.work()
        except (Exception, SystemExit):  # sys.exit in a user's loss is a failure too
            make_folder(self.trace.parent)
            write_text(self.trace, traceback.format_exc())
            return
        make_folder(self.path.parent)
        write_text(self.path, json.dumps(record))

    def train(self, environment: Environment, model: PreTrainedModel, marks: Sequence[int] = ()) -> list[list[float]]:
        """Train a model in place; returns [step, validation score] at the start and after the steps in ``marks``."""

        def tick() -> None:
            nonlocal step
            step += 1
            if step in marks:
                curve.append([step, round(float(environment.monitor(model, self.seed).mean()), 6)])

        step, curve = 0, []
        if marks:
            curve.append([step, round(environment.start_score(model, self.seed), 6)])
        if self.recipe.variant is not None:
            fit(
                model,
                environment.train,
                steps=environment.steps_of(self.recipe),
                batch_size=environment.batch_size,
                learning_rate=self.learning_rate,
                seed=self.seed,
                variant=self.recipe.variant,
                tick=tick,
                **environment.options,
                **environment.models(self.recipe, self.recipe.variant.needs, model),
            )
        return curve


@dataclass(frozen=True, kw_only=True)
class Job(Task):
    """A row of the table at one seed; without a variant, the starting model is scored.

    Args:
        reads: whether to record label weights and targets at the start too (once per setting and method).
        keep: folder for the trained model; None to drop it.
    """

    reads: bool
    keep: Path | None = None

    part: ClassVar[str] = "jobs"

    def finished(self) -> dict[str, Any] | None:
        """The record; None if it is missing, damaged or of another recipe or rate, or if its model is missing."""
        record = super().finished()
        has_model = self.keep is None or self.keep.is_dir()
        return record if record is not None and has_model and record.get("made_with") == self.made_with else None

    def fault(self, record: Any) -> str:
        """The fault of a record in words; empty if there is none."""
        return record_fault(record)

    @property
    def cost(self) -> int:
        """Duration of training and evaluation, in training steps."""
        if self.recipe.variant is None:
            return EVALUATION
        models = sum(name in self.recipe.variant.needs for name in ("teacher", "reference"))
        return round(self.source.training_steps * (1 + FORWARD * models)) + EVALUATION

    @property
    def made_with(self) -> dict[str, Any]:
        """Inputs that a record of this job must have."""
        return {"recipe": self.recipe.spec, "learning_rate": self.learning_rate, "reads": self.reads}

    def work(self) -> dict[str, Any]:
        """Train, score and evaluate."""
        began, environment, variant = time.perf_counter(), open_environment(self.source), self.recipe.variant
        steps = environment.steps_of(self.recipe)
        with isolated(self.seed):
            model = environment.start()
            curve = self.train(environment, model, [round(mark * steps) for mark in MARKS])
            if self.keep is not None:
                save(model, environment.tokenizer, self.keep)
            models = environment.models(self.recipe, ("teacher", "reference"), model)
            scores = environment.score(model, self.seed)
            if not np.isfinite(scores).all():
                raise FloatingPointError(f"{int((~np.isfinite(scores)).sum())} of {len(scores)} scores are not finite")
            record: dict[str, Any] = {
                "setting": self.source.name,
                "method": self.method,
                "seed": self.seed,
                "made_with": self.made_with,
                "scores": np.round(scores, 6).tolist(),
                "curve": curve,
                "diagnostics": diagnostics(model, variant, environment.held_out, **models),
                "truth": [],
            }
            held_out, correct = environment.held_out, environment.correct
            if variant is not None and correct is not None:
                record["truth"] += separation(model, variant, held_out, correct, "end", **models)
            if self.reads and variant is not None:
                start, teacher = models["reference"], environment.teacher() if environment.teacher else None
                record["reading"] = reading(start, variant, held_out, correct, environment.tokenizer, teacher, models)
                if correct is not None:
                    record["truth"] += separation(start, variant, held_out, correct, "start", **models)
        record["diagnostics"]["steps"] = steps
        record["diagnostics"]["seconds"] = round(time.perf_counter() - began, 2)
        return record


def slug(method: str) -> str:
    """A unique file name for a method: the name itself if it is fit for one, else with a digest."""
    plain = re.sub(r"[^A-Za-z0-9_.]+", "-", method).strip("-.")[-60:]
    return method if plain == method else f"{plain}-{hashlib.sha256(method.encode()).hexdigest()[:6]}"
