"""Rows of text as encoded examples, for trainers that take examples."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from transformers import PreTrainedTokenizerBase

from qlens.core.errors import InputError, brief
from qlens.data.examples import Encoded, encode


def keys_of(rows: Any) -> tuple[str, ...]:
    """The column names of a data set, or the keys of the first of a list of rows; () where they are not known."""
    names = getattr(rows, "column_names", None)
    if isinstance(names, Sequence) and not isinstance(names, str):
        return tuple(names)
    if isinstance(rows, Sequence) and len(rows) and isinstance(rows[0], Mapping):
        return tuple(rows[0])
    return ()


def encoded_rows(rows: Any, tokenizer: Callable[[], Any], name: str) -> Any:
    """The examples of a data set whose rows are text; encoded data as they are.

    Args:
        rows: a ``datasets.Dataset``, a list of rows or examples, an ``Encoded``, or anything that the Trainer takes.
        tokenizer: returns that of the model, None where there is none; called where it is needed.
        name: of the argument, for messages.

    Raises:
        InputError: rows of text without a tokenizer, or that ``qlens.data.encode`` refuses.
    """
    if isinstance(rows, Encoded):
        return rows.examples
    keys = keys_of(rows)
    if not keys or "input_ids" in keys or not hasattr(rows, "__len__"):
        return rows
    pieces = tokenizer()
    check_tokenizer(pieces, name, keys)
    try:
        return encode(list(rows), pieces).examples
    except InputError as error:
        raise InputError(f"{name}: {error}") from error


def check_tokenizer(tokenizer: Any, name: str, keys: Sequence[str]) -> None:
    """Check that there is a tokenizer for rows of text.

    Raises:
        InputError: there is none; the line to write is named.
    """
    if not isinstance(tokenizer, PreTrainedTokenizerBase):
        has = "there is no tokenizer" if tokenizer is None else f"processing_class is {brief(tokenizer)}"
        raise InputError(
            f"{name} has rows of text ({', '.join(keys)}), and {has}: give processing_class=AutoTokenizer.from_pretrained("
            f"FOLDER), or {name}=qlens.encode(rows, tokenizer).examples"
        )


def as_dataset(rows: Any) -> Any:
    """A list of rows or an ``Encoded`` as a ``datasets.Dataset``; anything else as it is."""
    from datasets import Dataset

    rows = rows.examples if isinstance(rows, Encoded) else rows
    return Dataset.from_list(list(rows)) if isinstance(rows, list | tuple) else rows
