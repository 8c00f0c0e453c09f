"""Shapes of rows: the table of those that are known, and which one a row has."""

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from qlens.core.display import enumeration
from qlens.core.errors import InputError, brief
from qlens.data.collator import COLUMNS
from qlens.data.rows import samples
from qlens.data.rows.bad_rows import BadRow
from qlens.data.rows.samples import OPTIONAL, Sample

Row = Mapping[str, Any]


@dataclass(frozen=True)
class Shape:
    """A shape of rows.

    Args:
        keys: columns that every row of the shape has.
        read: a function of the row that returns its samples: one, or the chosen and the rejected one.
        also: columns that it may have.
        rank: of several shapes that a row fits, the lowest rank is read; two of one rank are refused.
    """

    keys: tuple[str, ...]
    read: Callable[[Row], list[Sample]]
    also: tuple[str, ...] = OPTIONAL
    rank: int = 1

    @property
    def name(self) -> str:
        """Its columns."""
        return "/".join(self.keys)

    @property
    def line(self) -> str:
        """The options that choose it."""
        if len(self.keys) == 1 or "rejected" in self.keys:
            return f"--completion-column {','.join(self.keys)}"
        return f"--prompt-column {self.keys[0]} --completion-column {self.keys[1]}"


SHAPES = (
    Shape(("messages",), lambda row: samples.conversation(row, "messages"), rank=0),
    Shape(("conversations",), lambda row: samples.conversation(row, "conversations"), rank=0),
    Shape(("chosen", "rejected"), samples.preference, ("prompt", *OPTIONAL), rank=0),
    Shape(("prompt", "completion"), lambda row: samples.continuation(row, "prompt", "completion")),
    Shape(("question", "answer"), lambda row: samples.continuation(row, "question", "answer")),
    Shape(("instruction", "output"), samples.instruction, ("input", "history", *OPTIONAL)),
    Shape(("problem", "solution"), lambda row: samples.continuation(row, "problem", "solution")),
    Shape(("text",), lambda row: samples.whole_text(row, "text"), (), rank=2),
)
"""Every shape that is read without being told; a new one is a line here."""


@dataclass(frozen=True)
class Columns:
    """The columns that a user names where a row does not say them itself.

    Args:
        prompt: the column of the prompt, a string or turns.
        completion: the column of what is learned: a string, turns, or (without a prompt) messages; or two names, of the
            chosen and the rejected answer.
    """

    prompt: str | None = None
    completion: str | tuple[str, str] | None = None

    @classmethod
    def of(cls, prompt: str | None, completion: str | Sequence[str] | None) -> "Columns":
        """The columns, checked; "a,b" are two names.

        Raises:
            InputError: a prompt without a completion, or no names.
        """
        names = completion.split(",") if isinstance(completion, str) else list(completion or ())
        names = [name.strip() if isinstance(name, str) else name for name in names]
        for name in ([] if prompt is None else [prompt]) + names:
            if not isinstance(name, str) or not name:
                raise InputError(
                    f"prompt_column and completion_column must be names of columns, got {brief((prompt, completion))}"
                )
        if len(names) > 2:
            raise InputError(
                f"completion_column must be one column, or the chosen and the rejected one, got {brief(completion)}"
            )
        if prompt is not None and not names:
            raise InputError(f"prompt_column={prompt!r} goes with completion_column, the column of what is learned")
        return cls(prompt, None if not names else names[0] if len(names) == 1 else (names[0], names[1]))

    def shape(self, row: Row) -> Shape:
        """The shape that they name."""
        names = () if self.completion is None else self.completion
        learned = (names,) if isinstance(names, str) else names
        keys = (*(() if self.prompt is None else (self.prompt,)), *learned)
        if missing := [name for name in keys if row.get(name) is None]:
            raise BadRow("no such column", f"there is no column {missing[0]!r}, only {_keys(row)}")
        if len(learned) == 2:
            chosen, rejected = learned
            prompt = self.prompt or "prompt"
            also = (*(() if self.prompt else ("prompt",)), *OPTIONAL)
            return Shape(keys, lambda row: samples.preference(row, chosen, rejected, prompt), also)
        completion = learned[0]
        if self.prompt is not None:
            prompt = self.prompt
            return Shape(keys, lambda row: samples.continuation(row, prompt, completion))
        if isinstance(row[completion], str):
            return Shape(keys, lambda row: samples.whole_text(row, completion), ())
        return Shape(keys, lambda row: samples.conversation(row, completion))


@dataclass(frozen=True)
class Reading:
    """A row as it is read.

    Args:
        shape: the name of its shape.
        used: the columns that are used, those of ``qlens.data.collator.COLUMNS`` among them.
        samples: what there is to learn.
    """

    shape: str
    used: frozenset[str]
    samples: list[Sample]


def read_row(row: Any, columns: Columns = Columns()) -> Reading:  # noqa: B008  immutable
    """What there is to learn in a row of data; columns of value None count as missing.

    Raises:
        BadRow: no object, of no known shape or of two, or with values of wrong types.
    """
    if not isinstance(row, Mapping):
        raise BadRow("wrong types", f"a row must be an object, got {type(row).__name__}")
    if any(value is None for value in row.values()):
        row = {key: value for key, value in row.items() if value is not None}
    shape = columns.shape(row) if columns.completion is not None else _shape(frozenset(row))
    read = shape.read(row)
    own = [name for name in COLUMNS if name in row and name not in shape.keys]
    for name in own:
        _check_column(row[name], name)
        for sample in read:
            sample.columns.setdefault(name, row[name])
    return Reading(shape.name, _used(shape.keys, shape.also, tuple(own)), read)


@functools.lru_cache(maxsize=256)
def _used(*names: tuple[str, ...]) -> frozenset[str]:
    return frozenset(name for each in names for name in each)


def _shape(keys: frozenset[Any]) -> Shape:
    """The shape of a row with these columns."""
    found = _shapes(keys)
    if len(found) == 1:
        return found[0]
    if found:
        names, lines = ([getattr(shape, what) for shape in found] for what in ("name", "line"))
        raise BadRow(
            "ambiguous shape", f"a row of two shapes, {enumeration(names)}: write {' or '.join(lines)} to choose"
        )
    raise BadRow(
        "unknown shape",
        f"columns {_keys(keys)} are of no known shape ({'; '.join(shape.name for shape in SHAPES)}): write "
        "--prompt-column NAME --completion-column NAME, in Python prompt_column= and completion_column=",
    )


@functools.lru_cache(maxsize=256)
def _shapes(keys: frozenset[Any]) -> tuple[Shape, ...]:
    """The shapes of the lowest rank that fit."""
    fits = [shape for shape in SHAPES if keys.issuperset(shape.keys)]
    return tuple(shape for shape in fits if shape.rank == min(each.rank for each in fits))


def _keys(keys: Any) -> str:
    return brief(sorted(map(str, keys)))


def _check_column(value: Any, name: str) -> None:
    values = value if isinstance(value, Sequence) and not isinstance(value, str) else [value]
    if not values or not all(_fits(each, COLUMNS[name]) for each in values):
        kinds = {torch.bool: "true or false", torch.long: "a whole number"}
        expected = kinds.get(COLUMNS[name], "a finite number")
        raise BadRow("wrong types", f"{name} must be {expected}, or a list of such, got {brief(value)}")


def _fits(value: Any, dtype: torch.dtype) -> bool:
    """Whether a value fits into a column of a dtype."""
    if dtype == torch.bool:
        return isinstance(value, int | float) and value in (True, False)
    kinds = int if dtype == torch.long else (int, float)
    return isinstance(value, kinds) and not isinstance(value, bool) and abs(value) < 2**63


def unused_keys(row: Row, reading: Reading) -> set[str]:
    """The columns of a row that are not used; those without a value are not there."""
    return {str(key) for key in row.keys() - reading.used if row[key] is not None}


def row_of(row: Any) -> Any:
    """A row of data from a text or a (prompt, completion) pair; a dict is returned as it is."""
    if isinstance(row, str):
        return {"text": row}
    if isinstance(row, (tuple, list)) and len(row) == 2:
        return {"prompt": row[0], "completion": row[1]}
    return row


def ignored_keys(rows: Sequence[Any]) -> list[str]:
    """The columns of rows that are not used; rows that cannot be read count for nothing."""
    ignored, columns = set[str](), getattr(rows, "columns", Columns())
    for at in range(len(rows)):
        try:
            row = row_of(rows[at])
            ignored |= unused_keys(row, read_row(row, columns))
        except BadRow:
            continue
    return sorted(ignored)
