"""From rows of text to supervised examples: JSON Lines in, token ids and labels out."""

import json
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from qlens.core.errors import InputError, brief
from qlens.core.files import refusal, shown_path, user_path
from qlens.core.supervised import IGNORE
from qlens.data.chat_templates import check_text, rendered
from qlens.data.collator import COLUMNS

KINDS = (("question", "answer"), ("prompt", "completion"), ("messages",), ("text",))
ROLES = ("system", "developer", "user", "assistant", "tool")

Row = Mapping[str, Any]
Piece = tuple[list[int], bool]  # token ids, and whether they are supervised


@dataclass(frozen=True)
class Encoded:
    """Examples ``{"input_ids", "labels"}`` ready for ``batching.collate``, and how many rows were too long."""

    examples: list[dict[str, Any]]
    dropped: int


def read_rows(path: str | Path) -> list[dict[str, Any]]:
    """The rows of a JSON Lines file, all of one kind: question/answer, prompt/completion, messages, or text.

    ``messages`` is a list of ``{"role", "content"}`` with at least one assistant turn. Blank lines are skipped. Beside these
    keys a row may carry columns, as ``batching.COLUMNS`` names them (weight, critical, advantage, hint, chosen, pair): one
    value, or one per token, in every row. Other keys are ignored (``ignored_keys``).

    Raises:
        InputError: no such file, nothing in it, or a line that is malformed, of the wrong types, or of another kind or
            with other columns than the first; the message names file and line.
    """
    path = user_path(path, "data file")
    shown = shown_path(path)
    if not path.is_file():
        raise InputError(f"data file {brief(str(shown))} is not there, or is no file")
    try:
        lines = path.read_bytes().splitlines()
    except OSError as error:
        raise refusal("data file", path, error, "read") from error
    rows, kind, columns = [], None, None
    for number, line in enumerate(lines, 1):
        where = f"{shown}, line {number}"
        if not line.strip():
            continue
        try:
            row = json.loads(line.decode("utf-8-sig"), object_pairs_hook=_once)
        except (ValueError, RecursionError) as error:  # malformed or too deep JSON, or not UTF-8
            raise InputError(f"{where}: not JSON: {error}") from None
        found, carried = check_row(row, where), set(COLUMNS) & set(row)
        if kind not in (None, found):
            raise InputError(f"{where}: a row of {_named(found)}, but the rows before are of {_named(kind)}")
        if columns not in (None, carried):
            other = sorted(columns ^ carried)[0]
            raise InputError(f"{where}: column {other!r} must be in every row or in none")
        rows.append(row)
        kind, columns = found, carried
    if not rows:
        raise InputError(f"data file {str(shown)!r} is empty: it needs a JSON object per line")
    return rows


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object whose keys are all different."""
    made = dict(pairs)
    if len(made) < len(pairs):
        twice = next(key for at, (key, _) in enumerate(pairs) if key in [other for other, _ in pairs[:at]])
        raise ValueError(f"the key {brief(twice)} is there twice")
    return made


def check_row(row: Any, where: str) -> tuple[str, ...]:
    """The kind of a row, by its keys, once its types have been checked.

    Raises:
        InputError: it is of no kind; ``where`` begins the message.
    """
    if not isinstance(row, Mapping):
        raise InputError(f"{where}: a row must be an object, got {type(row).__name__}")
    kinds = [kind for kind in KINDS if set(kind) <= set(row)]
    if len(kinds) != 1:
        known = "; ".join(map(_named, KINDS))
        why = f"of two kinds, {' and '.join(map(_named, kinds))}" if kinds else f"of no known kind ({known})"
        raise InputError(f"{where}: keys {brief(sorted(map(str, row)))} are {why}")
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
                wanted = {torch.bool: "true or false", torch.long: "a whole number"}.get(
                    COLUMNS[name], "a finite number"
                )
                raise InputError(f"{where}: {name} must be {wanted}, or a list of such, got {brief(row[name])}")
    return kind


def ignored_keys(rows: Sequence[Row]) -> list[str]:
    """The keys of rows that nothing is made of: neither their kind's nor a column (``batching.COLUMNS``)."""
    known = {key for kind in KINDS for key in kind} | set(COLUMNS)
    return sorted({str(key) for row in rows for key in row} - known)


def _fits(value: Any, dtype: torch.dtype) -> bool:
    """Whether a value can stand in a column."""
    if dtype == torch.bool:
        return value in (True, False) if isinstance(value, int | float) else False
    number = isinstance(value, int | float) and not isinstance(value, bool)
    return (
        number and abs(value) < 2**63
        if dtype != torch.long
        else isinstance(value, int) and number and abs(value) < 2**63
    )


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


def _named(kind: tuple[str, ...]) -> str:
    return "/".join(kind)


def split(rows: Sequence[Any], held_out: int | float, seed: int) -> tuple[list, list]:
    """Rows for training and rows held out, each in their old order; the same for the same seed.

    Args:
        rows: at least two.
        held_out: how many rows (an int), or which part of them (a float between 0 and 1).
        seed: of the choice.

    Raises:
        InputError: nothing would be left on one side.
    """
    count = round(held_out * len(rows)) if isinstance(held_out, float) else held_out
    if not 0 < count < len(rows):
        raise InputError(f"held_out={held_out} of {len(rows)} rows leaves nothing to train on or nothing to hold out")
    held = set(random.Random(seed).sample(range(len(rows)), count))
    return [row for i, row in enumerate(rows) if i not in held], [row for i, row in enumerate(rows) if i in held]


def encode(rows: Sequence[Row], tokenizer: PreTrainedTokenizerBase, max_length: int | None) -> Encoded:
    """Token ids and labels of rows, and their columns; labels are -100 except on completions and assistant turns.

    With a chat template (question/answer and prompt/completion are a user and an assistant turn): exactly what the
    template writes; every assistant turn is supervised from where its generation prompt ends up to its end token.
    Without one: ``BOS prompt \\n completion EOS``; of messages, ``turn \\n`` for others and ``turn EOS`` for the
    assistant, one after the other, no role names. BOS and EOS only where the tokenizer has them. A text row is
    ``BOS text``, every token but the first supervised. Turns after the last assistant's are left out. Pieces are
    tokenized so that a prompt has the same tokens as when it stands alone.

    Rows longer than ``max_length`` tokens are dropped and counted, never truncated.

    Raises:
        InputError: a malformed row, a row without supervised tokens, every row dropped, or a chat template that writes
            the beginning of a conversation differently once it goes on.
    """
    if max_length is not None and max_length < 2:
        raise InputError(f"max_length must be at least 2, got {max_length}")
    if not rows:
        raise InputError("rows is empty: nothing to encode")
    examples = [example(row, tokenizer, f"row {number}") for number, row in enumerate(rows, 1)]
    for number, made in enumerate(examples, 1):
        if all(label == IGNORE for label in made["labels"]):
            raise InputError(f"row {number}: no token of it would be supervised")
    kept = [made for made in examples if max_length is None or len(made["input_ids"]) <= max_length]
    if not kept:
        shortest = min(len(made["input_ids"]) for made in examples)
        raise InputError(f"max_length={max_length} drops all {len(rows)} rows: the shortest has {shortest} tokens")
    return Encoded(kept, len(examples) - len(kept))


def example(row: Any, tokenizer: PreTrainedTokenizerBase, where: str) -> dict[str, Any]:
    """Token ids, labels and columns of one row, as ``encode`` writes them, of any length; perhaps nothing is supervised.

    Raises:
        InputError: a malformed row, or a chat template as in ``encode``; ``where`` begins the message.
    """
    _check_tokenizer(tokenizer)
    kind = check_row(row, where)
    if kind == ("text",):
        pieces = [(_optional(tokenizer.bos_token_id), False), (_ids(tokenizer, row["text"]), True)]
    elif tokenizer.chat_template:
        pieces = list(_templated(_turns(row, kind), tokenizer, where))
    else:
        pieces = list(_joined(_turns(row, kind), tokenizer))
    ids = [token for piece, _ in pieces for token in piece]
    labels = [token if supervised else IGNORE for piece, supervised in pieces for token in piece]
    labels[:1] = [IGNORE] * len(labels[:1])  # nothing predicts the first token
    columns = {name: row[name] for name in COLUMNS if name in row}
    for name, values in columns.items():
        if isinstance(values, Sequence) and len(values) != len(ids):
            raise InputError(f"{where}: {name} has {len(values)} values, but the row has {len(ids)} tokens")
    return {"input_ids": ids, "labels": labels, **columns}


def _check_tokenizer(tokenizer: Any) -> None:
    if not isinstance(tokenizer, PreTrainedTokenizerBase):
        raise InputError(
            f"tokenizer must be a loaded tokenizer, got {brief(tokenizer)}: load it by AutoTokenizer.from_pretrained(FOLDER)"
        )


def _turns(row: Row, kind: tuple[str, ...]) -> list[dict[str, str]]:
    if kind == ("messages",):
        last = max(number for number, turn in enumerate(row["messages"]) if turn["role"] == "assistant")
        return row["messages"][: last + 1]
    return [{"role": role, "content": row[key]} for role, key in zip(("user", "assistant"), kind, strict=True)]


def _joined(turns: list[dict[str, str]], tokenizer: PreTrainedTokenizerBase) -> Iterator[Piece]:
    """Turns one after the other, for tokenizers without a chat template."""
    yield _optional(tokenizer.bos_token_id), False
    before = ""
    for turn in turns:
        supervised = turn["role"] == "assistant"
        text = turn["content"] if supervised else turn["content"] + "\n"
        known, both = _ids(tokenizer, before), _ids(tokenizer, before + text)
        # Together where that leaves the earlier tokens alone (no spurious space before the text), else by itself.
        ids = both[len(known) :] if both[: len(known)] == known else _ids(tokenizer, text)
        yield ids + (_optional(tokenizer.eos_token_id) if supervised else []), supervised
        before = text


def _templated(turns: list[dict[str, str]], tokenizer: PreTrainedTokenizerBase, where: str) -> Iterator[Piece]:
    """What the chat template writes."""

    def written(upto: int, prompt: bool) -> list[int]:
        ids = _ids(tokenizer, rendered(turns[:upto], tokenizer, prompt, where))
        if ids[: len(seen)] != seen:
            raise InputError(
                f"{where}: the chat template writes what comes before turn {upto + prompt} differently once that turn "
                "is there, so its tokens cannot be told apart"
            )
        return ids

    seen: list[int] = []
    for number, turn in enumerate(turns):
        if turn["role"] != "assistant":
            continue
        prompt = written(number, prompt=True)
        yield prompt[len(seen) :], False
        seen = prompt
        turn_ids = written(number + 1, prompt=False)
        answer, seen = turn_ids[len(seen) :], turn_ids
        stops = [at for at, token in enumerate(answer) if token == tokenizer.eos_token_id]
        end = stops[-1] + 1 if stops else len(answer)  # what a template writes after the end token is not learned
        yield answer[:end], True
        yield answer[end:], False


def _ids(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    return tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]


def _optional(token: int | None) -> list[int]:
    return [] if token is None else [token]
