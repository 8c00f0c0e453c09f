"""Encoding: rows of text as supervised examples of token ids and labels."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedTokenizerBase

from qlens.core.display import table_html
from qlens.core.errors import InputError, brief
from qlens.core.supervised import IGNORE
from qlens.data.chat_templates import rendered
from qlens.data.collator import COLUMNS
from qlens.data.rows import Row, check_row

Segment = tuple[list[int], bool]  # token ids, and whether they are supervised


@dataclass(frozen=True)
class Encoded:
    """Encoded rows.

    Attributes:
        examples: dicts of ``input_ids`` and ``labels``, and columns, ready for ``train_dataset`` and ``collate``.
        dropped: the number of rows that were longer than ``max_length``.
    """

    examples: list[dict[str, Any]]
    dropped: int

    def __len__(self) -> int:
        return len(self.examples)

    def __repr__(self) -> str:
        counts = self._counts()
        dropped = f", {self.dropped} rows dropped as too long" if self.dropped else ""
        return (
            f"<Encoded: {len(self)} examples, {counts['tokens']} tokens, {counts['supervised']} of them supervised{dropped}; "
            "use .examples, dicts of input_ids and labels>"
        )

    def _repr_html_(self) -> str:
        return table_html("Encoded", self._counts())

    def _counts(self) -> dict[str, int]:
        """Numbers of examples, tokens, supervised tokens and dropped rows."""
        tokens = sum(len(example["input_ids"]) for example in self.examples)
        supervised = sum(label != IGNORE for example in self.examples for label in example["labels"])
        return {"examples": len(self), "tokens": tokens, "supervised": supervised, "dropped": self.dropped}

    def to_dict(self) -> dict[str, Any]:
        """The examples and the number of dropped rows."""
        return {"examples": self.examples, "dropped": self.dropped}

    def to_frame(self) -> Any:
        """A row per example: its number of tokens and of supervised tokens."""
        import pandas as pd

        counts = [
            {"tokens": len(e["input_ids"]), "supervised": sum(label != IGNORE for label in e["labels"])}
            for e in self.examples
        ]
        return pd.DataFrame(counts, columns=["tokens", "supervised"])


def encode(rows: Sequence[Row], tokenizer: PreTrainedTokenizerBase, max_length: int | None = None) -> Encoded:
    """Token ids, labels and columns of rows; labels are -100 except on completions and assistant turns.

    With a chat template, the tokens are exactly what the template writes (question/answer and prompt/completion are a user
    and an assistant turn); every assistant turn is supervised from the end of its generation prompt up to its end token.
    Without one: ``BOS prompt \\n completion EOS``; of messages, ``turn \\n`` for other roles and ``turn EOS`` for the
    assistant, one after the other, without role names. BOS and EOS only where the tokenizer has them. A text row is
    ``BOS text``, every token but the first supervised. Turns after the last assistant's are left out. A prompt has the same
    tokens as when it stands alone.

    Args:
        rows: as ``read_rows`` returns them.
        tokenizer: of the model.
        max_length: most tokens of a row; longer rows are dropped and counted, never truncated. None: no limit.

    Returns:
        An ``Encoded``; its ``examples`` are a ``train_dataset``.

    Raises:
        InputError: a malformed row, a row without supervised tokens, all rows dropped, or a chat template that writes the
            beginning of a conversation differently once it goes on.

    Example:
        >>> encode([{"prompt": "2 + 2 =", "completion": "4"}], tokenizer).examples  # doctest: +SKIP
    """
    if max_length is not None and max_length < 2:
        raise InputError(f"max_length must be at least 2, got {max_length}")
    if not rows:
        raise InputError("rows is empty: nothing to encode")
    examples = [example(row, tokenizer, f"row {number}") for number, row in enumerate(rows, 1)]
    for number, encoded in enumerate(examples, 1):
        if all(label == IGNORE for label in encoded["labels"]):
            raise InputError(f"row {number}: no token of it would be supervised")
    short = [encoded for encoded in examples if max_length is None or len(encoded["input_ids"]) <= max_length]
    if not short:
        shortest = min(len(encoded["input_ids"]) for encoded in examples)
        raise InputError(f"max_length={max_length} drops all {len(rows)} rows: the shortest has {shortest} tokens")
    return Encoded(short, len(examples) - len(short))


def example(row: Any, tokenizer: PreTrainedTokenizerBase, where: str) -> dict[str, Any]:
    """Token ids, labels and columns of one row as in ``encode``, of any length; its labels may all be -100.

    Raises:
        InputError: a malformed row, or a chat template as in ``encode``; ``where`` begins the message.
    """
    _check_tokenizer(tokenizer)
    kind = check_row(row, where)
    if kind == ("text",):
        segments = [(_optional(tokenizer.bos_token_id), False), (_ids(tokenizer, row["text"]), True)]
    elif tokenizer.chat_template:
        segments = list(_templated(_turns(row, kind), tokenizer, where))
    else:
        segments = list(_joined(_turns(row, kind), tokenizer))
    ids = [token for segment, _ in segments for token in segment]
    labels = [token if supervised else IGNORE for segment, supervised in segments for token in segment]
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


def _joined(turns: list[dict[str, str]], tokenizer: PreTrainedTokenizerBase) -> Iterator[Segment]:
    """Segments of turns one after the other, for tokenizers without a chat template."""
    yield _optional(tokenizer.bos_token_id), False
    before, alone = "", {"": list[int]()}  # the tokens of a turn by itself
    for turn in turns:
        supervised = turn["role"] == "assistant"
        text = turn["content"] if supervised else turn["content"] + "\n"
        both = _ids(tokenizer, before + text)
        if not before:
            alone[text] = both
        earlier = alone[before] if before in alone else _ids(tokenizer, before)
        # Together where that leaves the earlier tokens alone (no spurious space before the text), else by itself.
        ids = both[len(earlier) :] if both[: len(earlier)] == earlier else _ids(tokenizer, text)
        yield ids + (_optional(tokenizer.eos_token_id) if supervised else []), supervised
        before = text


def _templated(turns: list[dict[str, str]], tokenizer: PreTrainedTokenizerBase, where: str) -> Iterator[Segment]:
    """Segments of what the chat template writes."""

    def tokens_of(upto: int, prompt: bool) -> list[int]:
        ids = _ids(tokenizer, rendered(turns[:upto], tokenizer, prompt, where))
        if ids[: len(before)] != before:
            raise InputError(
                f"{where}: the chat template writes what comes before turn {upto + prompt} differently once that turn "
                "is there, so that the tokens of its turns cannot be separated"
            )
        return ids

    before: list[int] = []
    for number, turn in enumerate(turns):
        if turn["role"] != "assistant":
            continue
        prompt = tokens_of(number, prompt=True)
        yield prompt[len(before) :], False
        before = prompt
        turn_ids = tokens_of(number + 1, prompt=False)
        answer, before = turn_ids[len(before) :], turn_ids
        stops = [at for at, token in enumerate(answer) if token == tokenizer.eos_token_id]
        end = stops[-1] + 1 if stops else len(answer)  # text of the template after the end token is not learned
        yield answer[:end], True
        yield answer[end:], False


def _ids(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    return tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]


def _optional(token: int | None) -> list[int]:
    return [] if token is None else [token]
