"""The collator: examples of token ids and labels, padded to a batch with every further column."""

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
"""Fields of Tokens that data may carry beside input_ids and labels: a list as long as these, or one value per example."""
INPUTS = ("position_ids", "token_type_ids")
"""Inputs of models that have one integer per token."""


def collate(
    examples: Sequence[Mapping[str, Any]], pad_id: int = 0, inputs: Collection[str] = INPUTS
) -> dict[str, Tensor]:
    """A right-padded batch of ``{"input_ids", "labels"}``: input_ids, attention_mask and labels, each (B, T).

    Padding is neither attended to nor supervised, so any ``pad_id`` will do for a tokenizer that has none. Columns named
    as in ``COLUMNS`` (critical, advantage, weight, ...) come along as (B, T), a value per example being every token's.

    An example may hold several texts, one after the other (packed): ``position_ids`` start again where a text begins, or
    ``seq_lengths`` are the texts' lengths. Where a row is packed, the batch has position_ids and no attention_mask, as
    transformers' models look for texts to keep apart only without a mask; every column of padding then has position 0.

    Args:
        examples: lists or tensors by name, one value per token.
        pad_id: what input_ids are filled up with.
        inputs: names of further inputs of the model, one integer per token, that come along as (B, T), filled up with 0;
            other keys of an example are no inputs and left out.

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
        tensors = [_exactly(name, row, dtype) for row in rows]
        return pad_sequence(tensors, batch_first=True, padding_value=fill)

    examples = [_with_positions(example) for example in examples]
    ids = [example["input_ids"] for example in examples]
    seen = [example.get("attention_mask", [1] * len(row)) for example, row in zip(examples, ids, strict=True)]
    labels = [example["labels"] for example in examples]
    batch = {
        "input_ids": padded("input_ids", ids, pad_id),
        "attention_mask": padded("attention_mask", seen, 0),
        "labels": padded("labels", labels, IGNORE),
    }
    for name in dict.fromkeys(("position_ids", *inputs)):
        if name not in batch and any(name in example for example in examples):
            batch[name] = padded(name, [_input(example, name) for example in examples], 0)
    for name, dtype in COLUMNS.items():
        if any(name in example for example in examples):
            batch[name] = padded(name, [_column(example, name) for example in examples], 0, dtype)
    if "position_ids" in batch and (positions := packed(batch["position_ids"], batch["attention_mask"])) is not None:
        batch["position_ids"] = positions
        del batch["attention_mask"]
    return batch


def _exactly(name: str, row: Any, dtype: torch.dtype) -> Tensor:
    """An example's values as a tensor of a type that holds them.

    Raises:
        InputError: it does not, as of 1.5 among whole numbers or 2 in a mask; or they are no numbers.
    """
    try:
        given = torch.as_tensor(row)
        made = given.to(dtype)
        exact = not given.is_complex() and (dtype.is_floating_point or bool((made == given).all()))
    except (TypeError, ValueError, RuntimeError, OverflowError):
        exact, made = False, torch.empty(0)
    if not exact:
        wanted = {torch.long: "whole numbers", torch.bool: "true and false, or 1 and 0"}.get(dtype, "numbers")
        raise InputError(f"{name} must hold {wanted} in every example of the batch, got {brief(row)}")
    return made


def _with_positions(example: Mapping[str, Any]) -> Mapping[str, Any]:
    """An example with position_ids where it has ``seq_lengths``."""
    if "seq_lengths" not in example or "position_ids" in example:
        return example
    lengths, size = _exactly("seq_lengths", example["seq_lengths"], torch.long).tolist(), len(example["input_ids"])
    if sum(lengths) != size or min(lengths, default=0) < 1:
        raise InputError(f"seq_lengths must be lengths of texts that add up to {size} tokens, got {lengths}")
    return {**example, "position_ids": [at for length in lengths for at in range(length)]}


def _input(example: Mapping[str, Any], name: str) -> Tensor:
    """An example's values of an input of the model, one integer per token."""
    size, value = len(example["input_ids"]), example.get(name)
    if value is None and name == "position_ids":  # a text alone among packed ones
        return torch.arange(size)
    try:
        row = torch.as_tensor(value)
    except (TypeError, ValueError, RuntimeError):
        row = torch.empty(0)
    if row.shape != (size,) or row.is_floating_point() or row.is_complex():
        found = "lacks it" if value is None else f"has {type(value).__name__} {str(value)[:40]} for {size} tokens"
        raise InputError(
            f"{name!r} is an input of the model, and collate takes one integer per token for it in every example: one "
            f"{found}; give QTrainer(data_collator=...) for other inputs, or drop the column"
        )
    return row


def _column(example: Mapping[str, Any], name: str) -> list:
    """An example's values of a column, one per token."""
    size, value = len(example["input_ids"]), example.get(name)
    row = list(value) if isinstance(value, Sequence | Tensor) else [value] * size
    if value is None or len(row) != size:
        found = "lacks it" if value is None else f"has {len(row)} values for {size} tokens"
        raise InputError(f"column {name!r} must hold one value, or one per token, in every example: one {found}")
    return row
