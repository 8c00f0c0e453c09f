"""Arguments of a token view: models and tokenizers from folders, resolved variants, encoded rows."""

from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import nn
from transformers import PreTrainedTokenizerBase

from qlens.core.errors import InputError
from qlens.core.progress import track
from qlens.core.supervised import IGNORE
from qlens.data.collator import COLUMNS
from qlens.data.compatibility import check_model, vocabulary_size
from qlens.data.examples import example
from qlens.data.models import load_to_read, load_tokenizer
from qlens.data.rows import BadRow, Columns, Rows, load_rows
from qlens.data.vocabularies import Vocabularies
from qlens.registry import Variant, resolve

SHOWN = 1000  # rows from which on their encoding shows its progress
DEFAULT, WITH_TEACHER = ("sft", "dft"), ("target_sft", "kd")
FIELDS = ("old", "second", "sequence", "negatives")  # that a text and its model provide


def loaded_model(model: Any, name: str) -> nn.Module:
    """A model, loaded if it is a folder."""
    loaded = load_to_read(model) if isinstance(model, str | Path) else model
    check_model(loaded, name)
    return loaded


def loaded_models(
    model: Any, tokenizer: Any, **others: Any
) -> tuple[nn.Module, PreTrainedTokenizerBase, dict[str, nn.Module]]:
    """The student, its tokenizer, and the other models that are given, by name; folders are loaded.

    Raises:
        InputError: a module without a tokenizer, or models with different vocabularies.
    """
    student, own_tokenizer = loaded_model(model, "model"), tokenizer_of(model, tokenizer)
    models = {name: loaded_model(each, name) for name, each in others.items() if each is not None}
    for name, other in models.items():
        Vocabularies().check(student, other, name, own_tokenizer)
        sizes = vocabulary_size(other), vocabulary_size(student)
        if name == "after" and sizes[0] != sizes[1]:
            raise InputError(
                f"after has a vocabulary of {sizes[0]}, the model of {sizes[1]}: give a later checkpoint of the model"
            )
    return student, own_tokenizer, models


def places_of(example: Mapping[str, Any]) -> tuple[int, ...]:
    """The indices of a row's supervised labels; nothing predicts the first token."""
    return tuple(at for at, label in enumerate(example["labels"]) if at and label != IGNORE)


def tokenizer_of(model: Any, tokenizer: Any) -> PreTrainedTokenizerBase:
    """The tokenizer, loaded if it is a folder, or from the folder of the model.

    Raises:
        InputError: a module without a tokenizer.
    """
    if tokenizer is None and not isinstance(model, str | Path):
        raise InputError("tokenizer is None, and model is a module, which does not know its tokenizer: give tokenizer")
    source = model if tokenizer is None else tokenizer
    return load_tokenizer(source) if isinstance(source, str | Path) else source


def rows_of(text: Any) -> Sequence[Any]:
    """The rows of a text, of one row, or of a list of rows.

    Raises:
        InputError: no rows.
    """
    rows = [text] if isinstance(text, (str, Mapping)) else text
    rows = load_rows(rows) if hasattr(rows, "with_format") else rows
    if not isinstance(rows, Sequence) or not len(rows):
        raise InputError("text must be a text, or a non-empty list of texts, pairs or rows of data")
    return rows


def columns_of(text: Any) -> list[str]:
    """Per-token columns that all rows have."""
    rows = [text] if isinstance(text, Mapping) else text
    if not isinstance(rows, Sequence) or isinstance(rows, str) or not len(rows):
        return []
    return [name for name in COLUMNS if all(_has(rows, at, name) for at in range(len(rows)))]


def _has(rows: Sequence[Any], at: int, name: str) -> bool:
    """Whether a row has a column; a row that cannot be read has all, for it is left out."""
    try:
        row = rows[at]
    except BadRow:
        return True
    return isinstance(row, Mapping) and name in row


def variants_of(variants: Any, teacher: Any, reference: Any, fields: Collection[str]) -> list[Variant]:
    """The resolved variants, checked for repetitions and for the fields that they need."""
    if variants is None:
        variants = DEFAULT + WITH_TEACHER * (teacher is not None)
    single = isinstance(variants, str | Variant) or callable(variants)
    chosen = [resolve(each) for each in ([variants] if single else variants)]
    if not chosen:
        raise InputError("variants is empty: give at least one method, like 'sft'")
    specs = [variant.spec for variant in chosen]
    for variant in chosen:
        if specs.count(variant.spec) > 1:
            raise InputError(f"variants: {variant.spec} is given twice")
        for need in variant.needs:
            models = {"teacher": teacher, "reference": reference}
            if need in models and models[need] is None:
                raise InputError(f"variants: {variant.spec} needs a {need}: give {need}=, on the command line --{need}")
            if need not in (*models, *fields):
                raise InputError(f"variants: {variant.spec} needs {need!r}, which a text does not have")
    return chosen


def check_number(name: str, value: Any) -> None:
    """Check that an argument is a whole number of at least 1.

    Raises:
        InputError: it is not.
    """
    if not isinstance(value, int) or value < 1:
        raise InputError(f"{name} must be a whole number of at least 1, got {value!r}")


def encoded_rows(
    text: Any, tokenizer: Any, limit: int | None, max_rows: int | None, progress: bool = False
) -> tuple[dict[int, dict], dict[int, str]]:
    """Encoded rows, and the reasons why others cannot be shown; both by number, from 1."""
    rows, examples, skipped = rows_of(text), {}, {}
    for number in track(range(1, len(rows) + 1), len(rows), "Encode rows", progress and len(rows) > SHOWN):
        try:
            encoded_row = _encoded(rows, number, tokenizer)
        except BadRow as error:
            if getattr(rows, "on_bad", "error") == "error":
                raise
            skipped[number] = error.reason
            continue
        if limit is not None and len(encoded_row["input_ids"]) > limit:
            skipped[number] = f"longer than the context of {limit} tokens"
        elif not places_of(encoded_row):
            skipped[number] = "no supervised token"
        else:
            examples[number] = encoded_row
        if len(examples) == max_rows:
            break
    if not examples:
        reasons = "; ".join(f"row {row}: {reason}" for row, reason in list(skipped.items())[:3])
        raise InputError(f"text: none of its {len(rows)} rows can be shown ({reasons})")
    return examples, skipped


def _encoded(rows: Sequence[Any], number: int, tokenizer: Any) -> Mapping[str, Any]:
    """A row, encoded if it is not."""
    row = rows[number - 1]
    if isinstance(row, Mapping) and {"input_ids", "labels"} <= set(row):
        return row
    where = rows.where(number - 1) if isinstance(rows, Rows) else f"row {number}"
    return example(row, tokenizer, where, getattr(rows, "columns", Columns()))


def left_out(skipped: Mapping[int, str]) -> list[str]:
    """The numbers of rows that are left out, a line per reason."""
    lines = []
    for reason in dict.fromkeys(skipped.values()):
        rows = [row for row, other in skipped.items() if other == reason]
        more = f" and {len(rows) - 10} more" if len(rows) > 10 else ""
        lines.append(f"left out, {reason}: row {', '.join(map(str, rows[:10]))}{more}")
    return lines
