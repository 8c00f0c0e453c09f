"""Grounds: what a comparison trains and scores on, a world of the lab or a user's own model and data."""

import functools
import hashlib
from collections.abc import Callable, Collection, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from qlens.analysis.compare.evaluation import row_nll
from qlens.analysis.compare.recipes import Recipe
from qlens.core.errors import InputError
from qlens.core.files import from_here, here, refusal, shown_path, user_path
from qlens.data import compatibility
from qlens.data import models as loading
from qlens.data.collator import COLUMNS
from qlens.data.examples import encode
from qlens.data.rows import ignored_keys, read_rows, split
from qlens.data.vocabularies import match_vocabulary
from qlens.engine.models.causality import check_causal
from qlens.lab import Problem, Setting, world
from qlens.lab.environment import VERSION

HELD_OUT, LAB_HELD_OUT = 64, 256  # rows that nothing is trained on; never more than a fifth of them
# On a user's own model; RATE from SMALL parameters up.
STEPS, BATCH, RATE, SMALL, SMALL_RATE = 100, 16, 5e-5, 10_000_000, 1e-3

READ = (".json", ".jsonl", ".safetensors", ".model", ".txt", ".jinja", ".tiktoken")
"""Endings of the files that models and tokenizers are read from."""

Example = dict[str, list[int]]


@dataclass(frozen=True)
class Ground:
    """One setting, ready: what to train on, from which start, and how to score.

    Args:
        train, held: encoded examples; ``held`` are never trained on.
        start, teacher: give a fresh model; ``teacher`` is None where there is none.
        score, validate: of a model at a seed, one number per item, (I,); nothing is chosen by ``score``.
        tokenizer: of all models.
        steps, batch_size: of every training, whatever the method.
        learning_rate: where nobody has searched for a better one.
        truth: of every held-out supervised token, whether its label is right, NaN where that is no question; or None.
        noted: what a reader should know of it, in numbers and words.
    """

    train: Sequence[Example]
    held: Sequence[Example]
    start: Callable[[], PreTrainedModel]
    teacher: Callable[[], PreTrainedModel] | None
    score: Callable[[PreTrainedModel, int], np.ndarray]
    validate: Callable[[PreTrainedModel, int], np.ndarray]
    tokenizer: PreTrainedTokenizerBase
    steps: int
    batch_size: int
    learning_rate: float
    truth: np.ndarray | None
    noted: dict[str, Any]

    def others(self, recipe: Recipe, needs: Collection[str]) -> dict[str, PreTrainedModel]:
        """Fresh models for those of ``needs`` that there are, as the recipe wants them."""
        makers = {"teacher": self.start if recipe.guide == "base" else self.teacher, "reference": self.start}
        return {name: make() for name, make in makers.items() if name in needs and make is not None}

    def steps_of(self, recipe: Recipe) -> int:
        """How many steps a recipe takes; none if there is nothing to train with.

        With equal compute, as many as pay for the teacher's forward passes too, a step of the student being worth three
        forward passes of a model of its size, and a model's pass being in proportion to its parameters.
        """
        if recipe.variant is None:
            return 0
        if not recipe.equal_compute:
            return self.steps
        if self.teacher is None:
            raise InputError("equal compute is that of a method with a teacher, and there is none here")
        return round(self.steps * (1 + self.teacher().num_parameters() / (3 * self.start().num_parameters())))


@dataclass(frozen=True)
class Lab:
    """A world of the lab, with other steps where given; small enough to send to a worker."""

    setting: Setting
    steps: int | None = None

    has_teacher = True
    columns: ClassVar[tuple[str, ...]] = ()

    @property
    def name(self) -> str:
        """The setting's."""
        return self.setting.name

    @property
    def metric(self) -> dict[str, str]:
        """What is scored, and which way is up."""
        return {"name": f"avg@{self.setting.k}", "better": "higher", "note": ""}

    def identity(self) -> dict[str, Any]:
        """Everything the results follow from, the code apart."""
        return {"lab": VERSION, **asdict(self.setting)} | ({"steps": self.steps} if self.steps else {})

    def open(self, progress: bool = False) -> Ground:
        """The world, built on first use."""
        here, setting = world(self.setting, progress), self.setting
        rows = [{"prompt": d.prompt, "completion": d.completion} for d in here.demonstrations]
        held = min(LAB_HELD_OUT, len(rows) // 5)
        examples = encode(rows, here.tokenizer, None).examples

        judged = [each.truth for each in here.demonstrations[len(rows) - held :]]
        truth = [
            np.nan if right is None else float(right) for each in judged for right in (*each, None)
        ]  # None: the end

        def scored(problems: Sequence[Problem]) -> Callable[[PreTrainedModel, int], np.ndarray]:
            return lambda model, seed: here.score(model, problems, setting.k, seed)

        return Ground(
            train=examples[: len(rows) - held],
            held=examples[len(rows) - held :],
            start=here.base,
            teacher=here.teacher,
            score=scored(here.test),
            validate=scored(here.validation),
            tokenizer=here.tokenizer,
            steps=self.steps or setting.steps,
            batch_size=setting.batch_size,
            learning_rate=setting.learning_rate,
            truth=np.array(truth),
            noted={name: round(value, 4) for name, value in here.measured.items()},
        )


@dataclass(frozen=True)
class Real:
    """A user's own model, teacher and data; small enough to send to a worker.

    Relative paths begin at ``folder``, in whatever process they are read.
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
    def of(cls, model: str, data: str, teacher: str | None, **given: Any) -> "Real":
        """With digests of the files as they are now, so that no process mistakes new ones for those it has read."""
        files = {file: digest(file) for path in (model, data, teacher) if path for file in _files(path)}
        found = tuple((str(shown_path(file)), each) for file, each in files.items())
        return cls(model, data, teacher, files=found, folder=str(here()), **given)

    @property
    def has_teacher(self) -> bool:
        """Whether one was given."""
        return self.teacher is not None

    @property
    def columns(self) -> tuple[str, ...]:
        """The columns that the data carry."""
        return tuple(name for name in COLUMNS if name in open_ground(self).train[0])

    @property
    def name(self) -> str:
        """The data file's."""
        return Path(self.data).stem

    @property
    def metric(self) -> dict[str, str]:
        """What is scored, and which way is up."""
        note = "held-out NLL is a diagnostic, not a ranking: it is SFT's own objective"
        return {"name": "held-out NLL", "better": "lower", "note": note}

    def identity(self) -> dict[str, Any]:
        """Everything the results follow from, the code and the contents of the files apart."""
        ground = open_ground(self)
        resolved = {"steps": ground.steps, "batch_size": ground.batch_size}
        own = {name: value for name, value in asdict(self).items() if name not in ("files", "folder")}
        return {**own, **resolved, "held_out": len(ground.held)}

    def open(self, progress: bool = False) -> Ground:
        """Models checked against each other, rows encoded and split; ``progress`` is not needed here.

        Raises:
            InputError: anything that cannot be read, does not fit together, or leaves too few rows.
        """
        with from_here(self.folder):
            rows, tokenizer = read_rows(self.data), loading.load_tokenizer(self.model)
            its = None if self.teacher is None else loading.load_tokenizer(self.teacher)
        models, matched = {"model": self._load(self.model)}, ""
        if self.teacher is not None and its is not None:
            compatibility.check_same_tokenizer(tokenizer, its)
            models["teacher"] = self._load(self.teacher)
            width = compatibility.vocabulary_size(models["model"])
            matched = match_vocabulary(width, models["teacher"], "teacher", tokenizer, its)
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
        train, held = split(encoded.examples, max(1, min(HELD_OUT, len(encoded.examples) // 5)), seed=0)
        parameters = models["model"].num_parameters()
        noted = {"rows": len(rows), "context": limit, "dropped": encoded.dropped, "trained on": len(train)}
        return Ground(
            train=train,
            held=held,
            start=functools.partial(self._load, self.model),
            teacher=functools.partial(self._load_teacher, compatibility.vocabulary_size(models["model"]), tokenizer)
            if self.teacher is not None
            else None,
            score=lambda model, seed: row_nll(model, held),
            validate=lambda model, seed: row_nll(model, held),
            tokenizer=tokenizer,
            steps=self.steps or STEPS,
            batch_size=BATCH,
            learning_rate=SMALL_RATE if parameters < SMALL else RATE,
            truth=None,
            noted=noted
            | {"held out": len(held), "parameters": parameters}
            | ({"ignored keys": ", ".join(ignored)} if ignored else {})
            | ({"vocabulary": matched} if matched else {}),
        )

    def _load_teacher(self, width: int, tokenizer: PreTrainedTokenizerBase) -> PreTrainedModel:
        """The teacher, its logits as wide as the model's."""
        assert self.teacher is not None
        teacher = self._load(self.teacher)
        match_vocabulary(width, teacher, "teacher", tokenizer, tokenizer)
        return teacher

    def _load(self, path: str) -> PreTrainedModel:
        with from_here(self.folder):
            return loading.load_model(path, self.device, self.dtype)


Source = Lab | Real


@functools.lru_cache(maxsize=8)  # more than there are settings, which jobs take in turns
def open_ground(source: Source) -> Ground:
    """A source's ground, opened once per process."""
    return source.open()


def _files(path: str) -> list[Path]:
    """A file, or what a model or a tokenizer is read from in a folder."""
    place = user_path(path, "path")
    return [place] if place.is_file() else sorted(p for p in place.glob("*") if p.suffix in READ and p.is_file())


def digest(file: Path) -> str:
    """A digest of a file's whole content; read once per process and state (size and time) of the file.

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
