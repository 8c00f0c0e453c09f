"""Environments: what a comparison trains and scores on; those of the lab."""

import functools
from collections.abc import Callable, Collection, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, ClassVar, Protocol

import numpy as np
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from qlens.analysis.compare.evaluation import HeldOut
from qlens.analysis.compare.recipes import Recipe
from qlens.core.errors import InputError
from qlens.data.base_models import WithoutAdapters, has_adapters
from qlens.data.examples import encode
from qlens.lab import Problem, Setting, world
from qlens.lab.environment import VERSION, World

LAB_HELD_OUT = 256  # rows, and never more than a fifth of all

Example = dict[str, list[int]]


@dataclass(frozen=True)
class Environment:
    """One setting, ready for training and scoring.

    Args:
        train, held_out: encoded examples; no method is trained on ``held_out``.
        start: makes a fresh starting model, to be trained.
        reference, teacher: make a model that is not trained; ``teacher`` is None without one.
        score, validate: (model, seed) -> one number per item, (I,); nothing is chosen by ``score``.
        monitor: as ``validate``, from fewer samples, for learning curves.
        tokenizer: of all models.
        steps, batch_size: of every training.
        learning_rate: for methods without a searched one.
        options: further arguments of ``fit``.
        correct: of every held-out supervised label 1 (correct), 0 (noisy) or NaN (no fact decides); None if not known.
        metadata: measurements and notes for the report.
    """

    train: Sequence[Example]
    held_out: HeldOut
    start: Callable[[], PreTrainedModel]
    reference: Callable[[], PreTrainedModel]
    teacher: Callable[[], PreTrainedModel] | None
    score: Callable[[PreTrainedModel, int], np.ndarray]
    validate: Callable[[PreTrainedModel, int], np.ndarray]
    monitor: Callable[[PreTrainedModel, int], np.ndarray]
    tokenizer: PreTrainedTokenizerBase
    steps: int
    batch_size: int
    learning_rate: float
    correct: np.ndarray | None
    metadata: dict[str, Any]
    options: dict[str, Any] = field(default_factory=dict)

    def models(self, recipe: Recipe, needs: Collection[str], model: PreTrainedModel) -> dict[str, Any]:
        """Teacher and reference for a recipe, as far as they are needed and available.

        The reference of a model with adapters is the model without them: no second model is in memory.
        """
        start = functools.partial(WithoutAdapters, model) if has_adapters(model) else self.reference
        makers = {"teacher": start if recipe.guide == "base" else self.teacher, "reference": start}
        return {name: make() for name, make in makers.items() if name in needs and make is not None}

    def start_score(self, start: PreTrainedModel, seed: int) -> float:
        """The first point of the learning curves at a seed; computed once, for it is that of every method."""
        if seed not in self._start_scores:
            self._start_scores[seed] = float(self.monitor(start, seed).mean())
        return self._start_scores[seed]

    @functools.cached_property
    def _start_scores(self) -> dict[int, float]:
        return {}

    def steps_of(self, recipe: Recipe) -> int:
        """Training steps of a recipe; 0 without a variant.

        With equal compute, the steps that the teacher's forward passes would pay for: a step counts as three forward
        passes, and a forward pass is proportional to the number of parameters.
        """
        if recipe.variant is None:
            return 0
        if not recipe.equal_compute:
            return self.steps
        if self.teacher is None:
            raise InputError(
                "sft_equal_compute needs a teacher, whose forward passes it is compared with: give teacher="
            )
        return round(self.steps * (1 + self.teacher().num_parameters() / (3 * self.start().num_parameters())))


@dataclass(frozen=True)
class LabSource:
    """A lab setting, optionally with other steps; small enough to send to a worker."""

    setting: Setting
    steps: int | None = None

    has_teacher = True
    columns: ClassVar[tuple[str, ...]] = ()

    @property
    def name(self) -> str:
        """Name of the setting."""
        return self.setting.name

    @property
    def metric(self) -> dict[str, str]:
        """Name and direction of the score."""
        return {"name": f"avg@{self.setting.k}", "better": "higher", "note": ""}

    @property
    def training_steps(self) -> int:
        """Steps of every training."""
        return self.steps or self.setting.steps

    @property
    def learning_rate(self) -> float:
        """For methods without a searched one."""
        return self.setting.learning_rate

    @property
    def metadata(self) -> dict[str, Any]:
        """Measurements of the environment, which is built."""
        return {name: round(value, 4) for name, value in World(self.setting).measured.items()}

    def identity(self) -> dict[str, Any]:
        """All inputs of the results except the code."""
        return {"lab": VERSION, **asdict(self.setting)} | ({"steps": self.steps} if self.steps else {})

    def open(self, progress: bool = False) -> Environment:
        """The environment, built on first use."""
        lab, setting = world(self.setting, progress), self.setting
        rows = [{"prompt": d.prompt, "completion": d.completion} for d in lab.demonstrations]
        held_out = min(LAB_HELD_OUT, len(rows) // 5)
        examples = encode(rows, lab.tokenizer, progress=False).examples

        judgements = [each.correct for each in lab.demonstrations[len(rows) - held_out :]]
        end = None  # the end token of every row
        correct = [np.nan if right is None else float(right) for row in judgements for right in (*row, end)]

        def scored(problems: Sequence[Problem], k: int) -> Callable[[PreTrainedModel, int], np.ndarray]:
            return lambda model, seed: lab.score(model, problems, k, seed)

        return Environment(
            train=examples[: len(rows) - held_out],
            held_out=HeldOut(examples[len(rows) - held_out :]),
            start=lab.base,
            reference=functools.cache(lab.base),
            teacher=functools.cache(lab.teacher),
            score=scored(lab.test, setting.k),
            validate=scored(lab.validation, setting.k),
            monitor=scored(lab.validation, max(setting.k // 2, 1)),
            tokenizer=lab.tokenizer,
            steps=self.training_steps,
            batch_size=setting.batch_size,
            learning_rate=setting.learning_rate,
            correct=np.array(correct),
            metadata=self.metadata,
        )


class Openable(Protocol):
    """Where an environment comes from."""

    def open(self) -> Environment:
        """The environment."""
        ...


@functools.lru_cache(maxsize=8)  # more than there are settings, which jobs take in turns
def open_environment(source: Openable) -> Environment:
    """A source's environment, opened once per process."""
    return source.open()
