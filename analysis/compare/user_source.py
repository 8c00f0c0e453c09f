"""The environment of the user's model and data."""

import functools
import hashlib
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from qlens.analysis.compare.environments import Environment, LabSource, open_environment
from qlens.analysis.compare.evaluation import HeldOut, row_nll
from qlens.core.errors import InputError
from qlens.core.files import from_here, here, refusal, shown_path, user_path
from qlens.data import compatibility
from qlens.data import models as loading
from qlens.data.base_models import with_adapters
from qlens.data.collator import COLUMNS
from qlens.data.examples import encode
from qlens.data.rows import load_rows, local_files, split
from qlens.data.vocabularies import match_vocabulary
from qlens.engine.models.causality import check_causal

HELD_OUT = 64  # rows, and never more than a fifth of all
STEPS, BATCH = 100, 16
RATE, LORA_RATE, SMALL_RATE = 5e-5, 5e-4, 1e-3
SMALL = 10_000_000  # parameters below which a model is trained at SMALL_RATE

DTYPES = ("float32", "bfloat16", "float16")
MODEL_FILES = (".json", ".jsonl", ".safetensors", ".model", ".txt", ".jinja", ".tiktoken")
"""Endings of the files of models and tokenizers."""


@dataclass(frozen=True)
class UserSource:
    """The user's model, teacher and data, and how every method is trained on them; small enough to send to a worker.

    Relative paths begin at ``folder``, in every process.

    Args:
        model, data, teacher: paths; data as ``qlens.data.load_rows`` reads them.
        prompt_column, completion_column, on_bad: as in ``qlens.data.encode``.
        steps: of every training; None: ``STEPS``.
        batch_size: rows of an optimizer step.
        micro_batch_size: rows of a forward pass, a divisor of ``batch_size``; None: all of them.
        max_length, on_long: the most tokens of a row (None: what the models take), and what becomes of longer ones.
        lora_rank: the rank of LoRA adapters on all linear layers but the head, which alone are trained; None: all weights are.
        gradient_checkpointing: compute activations twice to hold fewer of them.
        chat_template: a file that replaces the tokenizer's.
        device: of all models.
        dtype: of all products; weights that are trained, and their optimizer, are in float32.
        files: digests of the files.
        folder: the working folder.
    """

    model: str
    data: str
    teacher: str | None = None
    steps: int | None = None
    batch_size: int = BATCH
    micro_batch_size: int | None = None
    max_length: int | None = None
    on_long: str = "drop"
    lora_rank: int | None = None
    gradient_checkpointing: bool = False
    chat_template: str | None = None
    prompt_column: str | None = None
    completion_column: str | tuple[str, str] | None = None
    on_bad: str | None = None
    device: str = "cpu"
    dtype: str = "float32"
    files: tuple[tuple[str, str], ...] = ()
    folder: str = ""

    @classmethod
    def of(cls, model: str, data: str, teacher: str | None, **options: Any) -> "UserSource":
        """A source with the present digests of its files, so that no process reads changed ones.

        Raises:
            InputError: ``micro_batch_size`` does not divide ``batch_size``, or a dtype that nothing is trained in.
        """
        own = cls(model, data, teacher, folder=str(here()), **options)
        if own.batch_size % own.rows_per_pass:
            raise InputError(
                f"micro_batch_size={own.micro_batch_size} does not divide batch_size={own.batch_size}: an optimizer step "
                "needs a whole number of forward passes"
            )
        dtypes = [each for each in DTYPES if each != "float16" or not str(own.device).startswith("cpu")]
        if own.dtype not in dtypes:
            raise InputError(f"dtype must be one of {', '.join(dtypes)} on {own.device}, got {own.dtype!r}")
        paths = (model, teacher, own.chat_template)
        own_files = [*local_files(data), *(file for path in paths if path for file in _files(path))]
        files = {file: digest(file) for file in own_files}
        digests = tuple((str(shown_path(file)), value) for file, value in files.items())
        return replace(own, files=digests)

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
            rows = load_rows(self.data, None, self.prompt_column, self.completion_column, self.on_bad)
            tokenizer = self._tokenizer()
            teacher_tokenizer = None if self.teacher is None else loading.load_tokenizer(self.teacher)
        models, matched = {"model": self._load(self.model)}, ""
        if self.teacher is not None and teacher_tokenizer is not None:
            compatibility.check_same_tokenizer(tokenizer, teacher_tokenizer)
            models["teacher"] = self._load(self.teacher)
            width = compatibility.vocabulary_size(models["model"])
            matched = match_vocabulary(width, models["teacher"], "teacher", tokenizer, teacher_tokenizer)
        contexts = (compatibility.shortest_context(*models.values()), self.max_length)
        limit = min((each for each in contexts if each is not None), default=None)
        encoded = encode(rows, tokenizer, limit, on_long=self.on_long)
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
        train, held_out = split(encoded.examples, max(1, min(HELD_OUT, len(encoded.examples) // 5)), seed=0)
        parameters = models["model"].num_parameters()
        metadata = {"rows": len(rows), "context": limit, "dropped": encoded.dropped, "trained on": len(train)}
        metadata["data"] = encoded.report.line()
        rate = SMALL_RATE if parameters < SMALL else RATE if self.lora_rank is None else LORA_RATE
        return Environment(
            train=train,
            held_out=HeldOut(held_out),
            start=self._start,
            reference=functools.partial(self._load, self.model),
            teacher=functools.partial(self._load_teacher, compatibility.vocabulary_size(models["model"]), tokenizer)
            if self.teacher is not None
            else None,
            score=lambda model, seed: row_nll(model, held_out),
            validate=lambda model, seed: row_nll(model, held_out),
            monitor=lambda model, seed: row_nll(model, held_out),
            tokenizer=tokenizer,
            steps=self.steps or STEPS,
            batch_size=self.batch_size,
            learning_rate=rate,
            options={
                "micro_batch_size": self.rows_per_pass,
                "gradient_checkpointing": self.gradient_checkpointing,
                "dtype": self.dtype,
            },
            correct=None,
            metadata=metadata
            | {"held out": len(held_out), "parameters": parameters}
            | ({} if self.lora_rank is None else {"adapters": f"LoRA of rank {self.lora_rank}"})
            | ({"vocabulary": matched} if matched else {}),
        )

    @property
    def rows_per_pass(self) -> int:
        """Rows of a forward pass."""
        return self.micro_batch_size or self.batch_size

    def _tokenizer(self) -> PreTrainedTokenizerBase:
        """The model's tokenizer, with the chat template that is to be used."""
        tokenizer = loading.load_tokenizer(self.model)
        if self.chat_template is not None:
            tokenizer.chat_template = _text(self.chat_template)
        return tokenizer

    def _start(self) -> PreTrainedModel:
        """A fresh model to be trained: all its weights in float32, or adapters on a model of ``dtype``."""
        if self.lora_rank is None:
            return self._load(self.model, "float32")
        return with_adapters(self._load(self.model), self.lora_rank)

    def _load_teacher(self, width: int, tokenizer: PreTrainedTokenizerBase) -> PreTrainedModel:
        """The teacher, with the vocabulary size of the model."""
        assert self.teacher is not None
        teacher = self._load(self.teacher)
        match_vocabulary(width, teacher, "teacher", tokenizer, tokenizer)
        return teacher

    def _load(self, path: str, dtype: str | None = None) -> PreTrainedModel:
        with from_here(self.folder):
            return loading.load_model(path, self.device, dtype or self.dtype)


Source = LabSource | UserSource


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


def _text(path: str) -> str:
    """The text of a chat template's file."""
    file = user_path(path, "chat_template")
    try:
        return file.read_text(encoding="utf-8")
    except OSError as error:
        raise refusal("chat_template", file, error, "read") from error
    except UnicodeDecodeError as error:
        raise InputError(f"chat_template {path!r} is no text in UTF-8: {error}") from error


@functools.lru_cache(maxsize=1024)
def _digest(file: Path, *state: int) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()[:16]
