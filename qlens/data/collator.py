"""The collator: encoded examples padded to a batch, with the columns of the data."""

from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from qlens.core.errors import InputError, brief
from qlens.core.supervised import IGNORE, packed

COLUMNS = {
    "critical": torch.bool,
    "hint": torch.bool,
    "chosen": torch.bool,
    "pair": torch.long,
    "advantage": torch.float32,
    "weight": torch.float32,
}
"""Fields of Tokens that data may have as columns: one value per token, or one per example."""
TEACHER_PROMPT = "teacher_prompt_ids"
"""A column of token ids, of any number per row: what a teacher sees instead of the row's prompt."""
INPUTS = ("position_ids", "token_type_ids")
"""Model inputs with one integer per token."""


def collate(
    examples: Sequence[Mapping[str, Any]], pad_id: int = 0, inputs: Collection[str] = INPUTS
) -> dict[str, Tensor]:
    """A right-padded batch of ``{"input_ids", "labels"}``: input_ids, attention_mask and labels, each (B, T).

    Padding is neither attended to nor supervised, so that any ``pad_id`` works for a tokenizer that has none. Columns of
    ``COLUMNS`` (critical, advantage, weight, ...) become (B, T); one value per example is repeated for every token.

    An example may be packed with several texts: ``position_ids`` start again where a text begins, or ``seq_lengths`` are the
    texts' lengths. A batch with a packed row has position_ids and no attention_mask, since transformers' models keep texts
    apart only without a mask; padding then has position 0.

    Args:
        examples: lists or tensors by name, one value per token.
        pad_id: of input_ids.
        inputs: names of further model inputs, one integer per token, padded with 0; other keys of an example are left out.

    Returns:
        A dict of tensors (B, T).

    Raises:
        InputError: an example lacks input_ids or labels, they differ in length, a column is not in every example, or an
            input is not one integer per token.

    Example:
        >>> collate([{"input_ids": [5, 6, 7], "labels": [-100, 6, 7]}, {"input_ids": [5], "labels": [-100]}])["labels"]
        tensor([[-100,    6,    7],
                [-100, -100, -100]])
    """
    for number, example in enumerate(examples):
        sizes = {name: len(example[name]) if name in example else None for name in ("input_ids", "labels")}
        if None in sizes.values() or len(set(sizes.values())) > 1:
            raise InputError(f"example {number} of the batch needs input_ids and labels of one length, got {sizes}")

    def padded(name: str, rows: list, fill: int, dtype: torch.dtype = torch.long) -> Tensor:
        if dtype == torch.long and (batch := _whole_numbers(rows, fill)) is not None:
            return batch
        tensors = [exactly(name, row, dtype) for row in rows]
        return pad_sequence(tensors, batch_first=True, padding_value=fill)

    examples = [_with_positions(example) for example in examples]
    ids = [example["input_ids"] for example in examples]
    masks = [example.get("attention_mask", [1] * len(row)) for example, row in zip(examples, ids, strict=True)]
    labels = [example["labels"] for example in examples]
    batch = {
        "input_ids": padded("input_ids", ids, pad_id),
        "attention_mask": padded("attention_mask", masks, 0),
        "labels": padded("labels", labels, IGNORE),
    }
    for name in dict.fromkeys(("position_ids", *inputs)):
        if name not in batch and any(name in example for example in examples):
            batch[name] = padded(name, [_input(example, name) for example in examples], 0)
    for name, dtype in COLUMNS.items():
        if any(name in example for example in examples):
            batch[name] = padded(name, [_column(example, name) for example in examples], 0, dtype)
    if any(TEACHER_PROMPT in example for example in examples):
        batch[TEACHER_PROMPT] = ragged(TEACHER_PROMPT, [example.get(TEACHER_PROMPT) for example in examples])
    if "position_ids" in batch and (positions := packed(batch["position_ids"], batch["attention_mask"])) is not None:
        batch["position_ids"] = positions
        del batch["attention_mask"]
    return batch


def ragged(name: str, rows: Sequence[Any]) -> Tensor:
    """Lists of token ids of any length, padded with -1.

    Raises:
        InputError: a row has none.
    """
    if any(row is None for row in rows):
        raise InputError(f"column {name!r} must be in every example of the batch, or in none")
    return pad_sequence([exactly(name, row, torch.long) for row in rows], batch_first=True, padding_value=-1)


def _whole_numbers(rows: Sequence[Any], fill: int) -> Tensor | None:
    """Lists of whole numbers padded to a batch, in one conversion; None where they are anything else."""
    if not all(isinstance(row, list) for row in rows):
        return None
    width = max(map(len, rows), default=0)
    try:
        batch = torch.tensor([row + [fill] * (width - len(row)) for row in rows])
    except (TypeError, ValueError, RuntimeError, OverflowError):
        return None
    return batch if batch.dtype == torch.long and batch.ndim == 2 else None


def exactly(name: str, row: Any, dtype: torch.dtype) -> Tensor:
    """An example's values as a tensor of a dtype, exactly.

    Raises:
        InputError: the dtype cannot hold them (1.5 among whole numbers, 2 in a mask), or they are not numbers.
    """
    try:
        values = torch.as_tensor(row)
        converted = values.to(dtype)
        exact = not values.is_complex() and (dtype.is_floating_point or bool((converted == values).all()))
    except (TypeError, ValueError, RuntimeError, OverflowError):
        exact, converted = False, torch.empty(0)
    if not exact:
        expected = {torch.long: "whole numbers", torch.bool: "true and false, or 1 and 0"}.get(dtype, "numbers")
        raise InputError(f"{name} must hold {expected} in every example of the batch, got {brief(row)}")
    return converted


def _with_positions(example: Mapping[str, Any]) -> Mapping[str, Any]:
    """An example with position_ids where it has ``seq_lengths``."""
    if "seq_lengths" not in example or "position_ids" in example:
        return example
    lengths, size = exactly("seq_lengths", example["seq_lengths"], torch.long).tolist(), len(example["input_ids"])
    if sum(lengths) != size or min(lengths, default=0) < 1:
        raise InputError(f"seq_lengths must be lengths of texts that add up to {size} tokens, got {lengths}")
    return {**example, "position_ids": [at for length in lengths for at in range(length)]}


def _input(example: Mapping[str, Any], name: str) -> Tensor:
    """An example's values of a model input, one integer per token."""
    size, value = len(example["input_ids"]), example.get(name)
    if value is None and name == "position_ids":  # a text alone among packed ones
        return torch.arange(size)
    try:
        row = torch.as_tensor(value)
    except (TypeError, ValueError, RuntimeError):
        row = torch.empty(0)
    if row.shape != (size,) or row.is_floating_point() or row.is_complex():
        problem = "lacks it" if value is None else f"has {type(value).__name__} {str(value)[:40]} for {size} tokens"
        raise InputError(
            f"{name!r} is an input of the model, and collate takes one integer per token for it in every example: one "
            f"{problem}; give QTrainer(data_collator=...) for other inputs, or drop the column"
        )
    return row


def _column(example: Mapping[str, Any], name: str) -> list:
    """An example's values of a column, one per token."""
    size, value = len(example["input_ids"]), example.get(name)
    row = list(value) if isinstance(value, Sequence | Tensor) else [value] * size
    if value is None or len(row) != size:
        problem = "lacks it" if value is None else f"has {len(row)} values for {size} tokens"
        raise InputError(f"column {name!r} must hold one value, or one per token, in every example: one {problem}")
    return row
