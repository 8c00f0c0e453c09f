"""Rows of text as encoded examples, for trainers that take examples."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from qlens.core.errors import InputError, brief
from qlens.core.supervised import IGNORE
from qlens.data.collator import COLUMNS, TEACHER_PROMPT
from qlens.data.encoding.compact import Examples
from qlens.data.examples import Encoded, encode
from qlens.data.rows import load_rows
from qlens.training.datasets.privileged import PROMPT, check_template, with_teacher_prompt


def keys_of(rows: Any) -> tuple[str, ...]:
    """The column names of a data set, or the keys of the first of a list of rows; () where they are not known."""
    names = getattr(rows, "column_names", None)
    if isinstance(names, Sequence) and not isinstance(names, str):
        return tuple(names)
    if isinstance(rows, Sequence) and len(rows) and isinstance(rows[0], Mapping):
        return tuple(rows[0])
    return ()


def read_file(rows: Any, name: str) -> Any:
    """The rows of a data file (``qlens.data.load_rows``) where its path is given; anything else as it is.

    Raises:
        InputError: no such file, or one that cannot be read; ``name`` begins the message.
    """
    if not isinstance(rows, str | Path):
        return rows
    try:
        return load_rows(rows)
    except InputError as error:
        raise InputError(f"{name}: {error}") from error


def encoded_rows(rows: Any, tokenizer: Callable[[], Any], name: str, template: str | None = None) -> Any:
    """The examples of a data set whose rows are text; encoded data as they are.

    Args:
        rows: a ``datasets.Dataset``, a list of rows or examples, an ``Encoded``, or anything that the Trainer takes.
        tokenizer: returns that of the model, None where there is none; called where it is needed.
        name: of the argument, for messages.
        template: of the teacher's prompt, see ``qlens.training.datasets.privileged``.

    Raises:
        InputError: rows of text without a tokenizer, or that ``qlens.data.encode`` refuses.
    """
    if isinstance(rows, Encoded):
        return rows.examples
    keys = keys_of(rows)
    if not keys or "input_ids" in keys or not hasattr(rows, "__len__"):
        if template is not None and keys and TEACHER_PROMPT not in keys:
            raise InputError(
                f"teacher_template is written from the text of rows, and {name} is encoded: give rows of text"
            )
        return rows
    pieces = tokenizer()
    check_tokenizer(pieces, name, keys)
    try:
        if template is None and PROMPT not in keys:
            return encode(rows, pieces).examples
        return _with_teacher_prompts(list(rows), pieces, template)
    except InputError as error:
        raise InputError(f"{name}: {error}") from error


def _with_teacher_prompts(
    rows: list[Mapping[str, Any]], tokenizer: PreTrainedTokenizerBase, template: str | None
) -> list[dict[str, Any]]:
    """Examples with what their teacher sees."""
    if template is not None:
        check_template(template, tuple(rows[0]))
    texts = [{key: v for key, v in row.items() if key not in COLUMNS or not isinstance(v, str)} for row in rows]
    prompt_ids = partial(_prompt_ids, tokenizer=tokenizer)
    pairs = zip(rows, encode(texts, tokenizer).examples, strict=True)
    return [{**example, **with_teacher_prompt(row, example, template, prompt_ids)} for row, example in pairs]


def _prompt_ids(prompt: Any, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The tokens of a prompt, text or turns, up to where an answer begins."""
    row = {"prompt": prompt, "completion": "?"}
    if isinstance(prompt, list):
        row = {"messages": [*prompt, {"role": "assistant", "content": "?"}]}
    example = encode([row], tokenizer).examples[0]
    before = [at for at, label in enumerate(example["labels"]) if label != IGNORE][0]
    return example["input_ids"][:before]


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
    """A sequence of rows or an ``Encoded`` as a ``datasets.Dataset``; anything else as it is."""
    from datasets import Dataset

    if isinstance(rows, str | Path):
        raise InputError(
            f"train_dataset is the path {brief(str(rows))}: give datasets.load_dataset('json', data_files={brief(str(rows))}, "
            "split='train'), or a list of rows"
        )
    rows = rows.examples if isinstance(rows, Encoded) else rows
    if isinstance(rows, Examples):
        return rows.to_dataset()
    if hasattr(rows, "column_names") or not isinstance(rows, Sequence):
        return rows
    return Dataset.from_list(list(rows))
