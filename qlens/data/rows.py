"""Rows of data: JSON Lines files of questions and answers, prompts and completions, messages, or texts."""

import json
import random
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from qlens.core.errors import InputError, brief
from qlens.core.files import refusal, shown_path, user_path
from qlens.data.chat_templates import check_text
from qlens.data.collator import COLUMNS

KINDS = (("question", "answer"), ("prompt", "completion"), ("messages",), ("text",))
ROLES = ("system", "developer", "user", "assistant", "tool")

Row = Mapping[str, Any]


def read_rows(path: str | Path) -> list[dict[str, Any]]:
    """Read a JSON Lines file whose rows are all of one kind: question/answer, prompt/completion, messages, or text.

    ``messages`` is a list of ``{"role", "content"}`` with at least one assistant turn. Blank lines are skipped. Beside these
    keys a row may have columns (weight, critical, advantage, hint, chosen, pair; see ``qlens.data.collator.COLUMNS``): one
    value, or one per token, in every row. Other keys are ignored (``ignored_keys``).

    Args:
        path: of the file, in UTF-8.

    Returns:
        The rows, as dicts.

    Raises:
        InputError: no such file, an empty one, or a line that is malformed, of the wrong types, or of another kind or with
            other columns than the first; the message names file and line.

    Example:
        >>> rows = read_rows("data.jsonl")  # doctest: +SKIP
    """
    path = user_path(path, "data file")
    name_of_file = shown_path(path)
    if not path.is_file():
        raise InputError(f"data file {brief(str(name_of_file))} is not there, or is no file")
    try:
        lines = path.read_bytes().splitlines()
    except OSError as error:
        raise refusal("data file", path, error, "read") from error
    rows, kind, columns = [], None, None
    for number, line in enumerate(lines, 1):
        where = f"{name_of_file}, line {number}"
        if not line.strip():
            continue
        try:
            row = json.loads(line.decode("utf-8-sig"), object_pairs_hook=_distinct_keys)
        except (ValueError, RecursionError) as error:  # malformed or too deep JSON, or not UTF-8
            raise InputError(f"{where}: not JSON: {error}") from None
        row_kind, row_columns = check_row(row, where), set(COLUMNS) & set(row)
        if kind not in (None, row_kind):
            raise InputError(
                f"{where}: a row of {_joined_keys(row_kind)}, but the rows before are of {_joined_keys(kind)}"
            )
        if columns not in (None, row_columns):
            name = sorted(columns ^ row_columns)[0]
            raise InputError(f"{where}: column {name!r} must be in every row or in none")
        rows.append(row)
        kind, columns = row_kind, row_columns
    if not rows:
        raise InputError(f"data file {str(name_of_file)!r} is empty: it needs a JSON object per line")
    return rows


def _distinct_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object, refused where a key occurs twice."""
    values = dict(pairs)
    if len(values) < len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for at, key in enumerate(keys) if key in keys[:at])
        raise ValueError(f"the key {brief(twice)} is there twice")
    return values


def check_row(row: Any, where: str) -> tuple[str, ...]:
    """The kind of a row by its keys, with the types of its values checked.

    Raises:
        InputError: it is of no kind, or of two; ``where`` begins the message.
    """
    if not isinstance(row, Mapping):
        raise InputError(f"{where}: a row must be an object, got {type(row).__name__}")
    kinds = [kind for kind in KINDS if set(kind) <= set(row)]
    if len(kinds) != 1:
        kinds_in_words = "; ".join(map(_joined_keys, KINDS))
        problem = (
            f"of two kinds, {' and '.join(map(_joined_keys, kinds))}"
            if kinds
            else f"of no known kind ({kinds_in_words})"
        )
        raise InputError(f"{where}: keys {brief(sorted(map(str, row)))} are {problem}")
    (kind,) = kinds
    for key in kind:
        if key != "messages":
            check_text(row[key], f"{where}: {key}")
    if kind == ("messages",):
        _check_messages(row["messages"], where)
    for name in COLUMNS:
        if name in row:
            values = row[name] if isinstance(row[name], Sequence) and not isinstance(row[name], str) else [row[name]]
            if not values or not all(_fits(value, COLUMNS[name]) for value in values):
                kinds_of = {torch.bool: "true or false", torch.long: "a whole number"}
                expected = kinds_of.get(COLUMNS[name], "a finite number")
                raise InputError(f"{where}: {name} must be {expected}, or a list of such, got {brief(row[name])}")
    return kind


def ignored_keys(rows: Sequence[Row]) -> list[str]:
    """The keys of rows that are not used: neither their kind's nor those of columns."""
    used_keys = {key for kind in KINDS for key in kind} | set(COLUMNS)
    return sorted({str(key) for row in rows for key in row} - used_keys)


def _fits(value: Any, dtype: torch.dtype) -> bool:
    """Whether a value fits into a column of a dtype."""
    if dtype == torch.bool:
        return isinstance(value, int | float) and value in (True, False)
    kinds = int if dtype == torch.long else (int, float)
    return isinstance(value, kinds) and not isinstance(value, bool) and abs(value) < 2**63


def _check_messages(messages: Any, where: str) -> None:
    if not isinstance(messages, list) or not messages:
        raise InputError(f"{where}: messages must be a list of turns with role and content, got {messages!r:.60}")
    for number, turn in enumerate(messages, 1):
        if not isinstance(turn, Mapping) or set(turn) != {"role", "content"}:
            raise InputError(f"{where}: turn {number} must have exactly role and content, got {turn!r:.60}")
        if turn["role"] not in ROLES or not isinstance(turn["content"], str):
            raise InputError(f"{where}: turn {number} needs a role of {ROLES} and a content string, got {turn!r:.60}")
        check_text(turn["content"], f"{where}: turn {number}")
    if not any(turn["role"] == "assistant" for turn in messages):
        raise InputError(f"{where}: messages have no assistant turn, so nothing to learn")


def _joined_keys(kind: tuple[str, ...]) -> str:
    return "/".join(kind)


def split(rows: Sequence[Any], held_out: int | float, seed: int) -> tuple[list, list]:
    """Split rows at random into training and held-out ones, each in their old order; the same at the same seed.

    Args:
        rows: at least two.
        held_out: the number of rows held out, or their share (a float between 0 and 1).
        seed: of the choice.

    Returns:
        Training rows and held-out rows.

    Raises:
        InputError: no row would be left on one side.

    Example:
        >>> split(["a", "b", "c", "d"], held_out=1, seed=0)
        (['a', 'b', 'c'], ['d'])
    """
    count = round(held_out * len(rows)) if isinstance(held_out, float) else held_out
    if not 0 < count < len(rows):
        raise InputError(f"held_out={held_out} of {len(rows)} rows leaves nothing to train on or nothing to hold out")
    chosen = set(random.Random(seed).sample(range(len(rows)), count))
    training = [row for number, row in enumerate(rows) if number not in chosen]
    return training, [row for number, row in enumerate(rows) if number in chosen]
