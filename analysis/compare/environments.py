"""Environments: what a comparison trains and scores on, from the lab or from the user's model and data."""

import functools
import hashlib
from collections.abc import Callable, Collection, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from qlens.analysis.compare.evaluation import HeldOut, row_nll
from qlens.analysis.compare.recipes import Recipe
from qlens.core.errors import InputError
from qlens.core.files import from_here, here, refusal, shown_path, user_path
from qlens.data import compatibility
from qlens.data import models as loading
from qlens.data.collator import COLUMNS
from qlens.data.examples import encode
from qlens.data.rows import ignored_keys, load_rows, split
from qlens.data.vocabularies import match_vocabulary
from qlens.engine.models.causality import check_causal
from qlens.lab import Problem, Setting, world
from qlens.lab.environment import VERSION, World

HELD_OUT, LAB_HELD_OUT = 64, 256  # rows, and never more than a fifth of all
# defaults on a user's model; RATE from SMALL parameters up
STEPS, BATCH, RATE, SMALL, SMALL_RATE = 100, 16, 5e-5, 10_000_000, 1e-3

MODEL_FILES = (".json", ".jsonl", ".safetensors", ".model", ".txt", ".jinja", ".tiktoken")
"""Endings of the files of models and tokenizers."""

Example = dict[str, list[int]]


@dataclass(frozen=True)
class Environment:
    """One setting, ready for training and scoring.

    Args:
        train, held_out: encoded examples; no method is trained on ``held_out``.
        start: makes a fresh starting model, to be trained.
        reference, teacher: make a model that is not trained; ``teacher`` is None without one.
        score, validate: (model, seed) -> one number per item, (I,); nothing is chosen by ``score``.
        tokenizer: of all models.
        steps, batch_size: of every training.
        learning_rate: for methods without a searched one.
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
    tokenizer: PreTrainedTokenizerBase
    steps: int
    batch_size: int
    learning_rate: float
    correct: np.ndarray | None
    metadata: dict[str, Any]

    def models(self, recipe: Recipe, needs: Collection[str]) -> dict[str, PreTrainedModel]:
        """Teacher and reference for a recipe, as far as they are needed and available."""
        makers = {"teacher": self.reference if recipe.guide == "base" else self.teacher, "reference": self.reference}
        return {name: make() for name, make in makers.items() if name in needs and make is not None}

    def start_score(self, start: PreTrainedModel, seed: int) -> float:
        """The mean validation score of the starting model at a seed; computed once, for it is that of every method."""
        if seed not in self._start_scores:
            self._start_scores[seed] = float(self.validate(start, seed).mean())
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
        examples = encode(rows, lab.tokenizer, None).examples

        judgements = [each.correct for each in lab.demonstrations[len(rows) - held_out :]]
        end = None  # the end token of every row
        correct = [np.nan if right is None else float(right) for row in judgements for right in (*row, end)]

        def scored(problems: Sequence[Problem]) -> Callable[[PreTrainedModel, int], np.ndarray]:
            return lambda model, seed: lab.score(model, problems, setting.k, seed)

        return Environment(
            train=examples[: len(rows) - held_out],
            held_out=HeldOut(examples[len(rows) - held_out :]),
            start=lab.base,
            reference=functools.cache(lab.base),
            teacher=functools.cache(lab.teacher),
            score=scored(lab.test),
            validate=scored(lab.validation),
            tokenizer=lab.tokenizer,
            steps=self.training_steps,
            batch_size=setting.batch_size,
            learning_rate=setting.learning_rate,
            correct=np.array(correct),
            metadata=self.metadata,
        )


@dataclass(frozen=True)
class UserSource:
    """The user's model, teacher and data; small enough to send to a worker.

    Relative paths begin at ``folder``, in every process.
    """

    model: str
    data: str
    teacher: str | None = None
    steps: int | None = None
    device: str = "cpu"
    dtype: str = "float32"
    files: tuple[tuple[str, str], ...] = ()
    folder: str = ""

    @classmethod
    def of(cls, model: str, data: str, teacher: str | None, **options: Any) -> "UserSource":
        """A source with the present digests of its files, so that no process reads changed ones."""
        files = {file: digest(file) for path in (model, data, teacher) if path for file in _files(path)}
        digests = tuple((str(shown_path(file)), value) for file, value in files.items())
        return cls(model, data, teacher, files=digests, folder=str(here()), **options)

    @property
    def has_teacher(self) -> bool:
        """Whether there is a teacher."""
        return self.teacher is not None

    @property
    def columns(self) -> tuple[str, ...]:
        """Per-token columns of the data."""
        return tuple(name for name in COLUMNS if name in open_environment(self).train[0])

    @property
    def name(self) -> str:
        """Name of the data file."""
        return Path(self.data).stem

    @property
    def metric(self) -> dict[str, str]:
        """Name and direction of the score."""
        note = "held-out NLL is a diagnostic, not a ranking: it is SFT's own objective"
        return {"name": "held-out NLL", "better": "lower", "note": note}

    @property
    def training_steps(self) -> int:
        """Steps of every training."""
        return open_environment(self).steps

    @property
    def learning_rate(self) -> float:
        """For methods without a searched one."""
        return open_environment(self).learning_rate

    @property
    def metadata(self) -> dict[str, Any]:
        """Measurements and notes for the report."""
        return open_environment(self).metadata

    def identity(self) -> dict[str, Any]:
        """All inputs of the results except the code and the contents of the files."""
        environment = open_environment(self)
        resolved = {"steps": environment.steps, "batch_size": environment.batch_size}
        own = {name: value for name, value in asdict(self).items() if name not in ("files", "folder")}
        return {**own, **resolved, "held_out": len(environment.held_out)}

    def open(self, progress: bool = False) -> Environment:
        """The environment: models checked against each other, rows encoded and split.

        Raises:
            InputError: unreadable files, models that do not fit together, or fewer than two rows.
        """
        with from_here(self.folder):
            rows, tokenizer = load_rows(self.data), loading.load_tokenizer(self.model)
            teacher_tokenizer = None if self.teacher is None else loading.load_tokenizer(self.teacher)
        models, matched = {"model": self._load(self.model)}, ""
        if self.teacher is not None and teacher_tokenizer is not None:
            compatibility.check_same_tokenizer(tokenizer, teacher_tokenizer)
            models["teacher"] = self._load(self.teacher)
            width = compatibility.vocabulary_size(models["model"])
            matched = match_vocabulary(width, models["teacher"], "teacher", tokenizer, teacher_tokenizer)
        limit = compatibility.shortest_context(*models.values())
        encoded = encode(rows, tokenizer, limit)
        size = compatibility.vocabulary_size(models["model"])
        if (top := max(max(example["input_ids"]) for example in encoded.examples)) >= size:
            raise InputError(f"{self.data} has a token {top}, but the vocabulary of {self.model} is {size}")
        if len(encoded.examples) < 2:
            raise InputError(
                f"{self.data}: only one row fits into {limit} tokens; at least two are needed, one is held out"
            )
        for name, model in models.items():
            check_causal(
                model, {"input_ids": torch.tensor([encoded.examples[0]["input_ids"]], device=model.device)}, name
            )
        ignored = ignored_keys(rows)
        train, held_out = split(encoded.examples, max(1, min(HELD_OUT, len(encoded.examples) // 5)), seed=0)
        parameters = models["model"].num_parameters()
        metadata = {"rows": len(rows), "context": limit, "dropped": encoded.dropped, "trained on": len(train)}
        return Environment(
            train=train,
            held_out=HeldOut(held_out),
            start=functools.partial(self._load, self.model),
            reference=functools.partial(self._load, self.model),
            teacher=functools.partial(self._load_teacher, compatibility.vocabulary_size(models["model"]), tokenizer)
            if self.teacher is not None
            else None,
            score=lambda model, seed: row_nll(model, held_out),
            validate=lambda model, seed: row_nll(model, held_out),
            tokenizer=tokenizer,
            steps=self.steps or STEPS,
            batch_size=BATCH,
            learning_rate=SMALL_RATE if parameters < SMALL else RATE,
            correct=None,
            metadata=metadata
            | {"held out": len(held_out), "parameters": parameters}
            | ({"ignored keys": ", ".join(ignored)} if ignored else {})
            | ({"vocabulary": matched} if matched else {}),
        )

    def _load_teacher(self, width: int, tokenizer: PreTrainedTokenizerBase) -> PreTrainedModel:
        """The teacher, with the vocabulary size of the model."""
        assert self.teacher is not None
        teacher = self._load(self.teacher)
        match_vocabulary(width, teacher, "teacher", tokenizer, tokenizer)
        return teacher

    def _load(self, path: str) -> PreTrainedModel:
        with from_here(self.folder):
            return loading.load_model(path, self.device, self.dtype)


Source = LabSource | UserSource


@functools.lru_cache(maxsize=8)  # more than there are settings, which jobs take in turns
def open_environment(source: Source) -> Environment:
    """A source's environment, opened once per process."""
    return source.open()


def _files(path: str) -> list[Path]:
    """A file, or the files of a model and its tokenizer in a folder."""
    place = user_path(path, "path")
    return [place] if place.is_file() else sorted(p for p in place.glob("*") if p.suffix in MODEL_FILES and p.is_file())


def digest(file: Path) -> str:
    """A digest of a file's content; computed once per process, size and time of the file.

    Raises:
        InputError: the file cannot be read.
    """
    try:
        state = file.stat()
        return _digest(file, state.st_size, state.st_mtime_ns, state.st_ino)
    except OSError as error:
        raise refusal("file", file, error, "read") from error


@functools.lru_cache(maxsize=1024)
def _digest(file: Path, *state: int) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()[:16]
