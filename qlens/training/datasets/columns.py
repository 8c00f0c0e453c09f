"""Columns of the data (weight, critical, advantage, ...) through TRL's preparation, packing and padding."""

import copy
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import pyarrow.compute as pc
import torch
from datasets import Dataset
from trl.data_utils import get_dataset_column_names, pack_dataset
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

from qlens.core.errors import InputError
from qlens.core.supervised import IGNORE
from qlens.data.collator import COLUMNS, TEACHER_PROMPT, exactly, ragged
from qlens.training.datasets.privileged import PROMPT, check_template, with_teacher_prompt

logger = logging.getLogger(__name__)


def columns_of(dataset: Any) -> list[str]:
    """The columns of a data set that hold values for a method; text of the same name, such as a hint, is none."""
    names = [name for name in get_dataset_column_names(dataset) if name in COLUMNS]
    first = next(iter(dataset), {}) if names else {}
    return [name for name in names if not isinstance(first.get(name), str)]


def whole_rows(args: Any) -> Any:
    """A copy of an SFTConfig by which TRL encodes rows, but neither cuts nor shuffles them."""
    args = copy.copy(args)
    args.max_length, args.shuffle_dataset = None, False
    return args


def cut_and_packed(dataset: Any, args: Any, packing: bool, name: str) -> Any:
    """Encoded rows of a data set, with their columns, cut to ``max_length`` and packed as an SFTConfig says.

    What is cut and left out is logged.

    Args:
        dataset: with ``input_ids``, ``labels`` and columns, one value per row or one per token.
        args: the SFTConfig.
        packing: whether rows are packed.
        name: of the data set, for messages.

    Raises:
        InputError: a column has neither one value nor one per token; pairs would be packed, or no length is given.
    """
    names, most, counted = columns_of(dataset), args.max_length, isinstance(dataset, Dataset)
    if packing and "pair" in names:
        raise InputError(
            "packing=True may part the two texts of a pair, which must be in one micro-batch: set SFTConfig(packing=False)"
        )
    if (packing or args.padding_free) and TEACHER_PROMPT in get_dataset_column_names(dataset):
        raise InputError(
            f"{PROMPT} is one per row, and packing and padding_free join rows: set SFTConfig(packing=False, padding_free=False)"
        )
    if packing and most is None:
        raise InputError("packing=True needs a length to pack to: set SFTConfig(max_length=...)")
    parallel = {"num_proc": args.dataset_num_proc} if counted else {}
    if names:
        dataset = dataset.map(partial(_per_token, names=names, name=name), with_indices=True, **parallel)
    text = [name for name in get_dataset_column_names(dataset) if name in COLUMNS and name not in names]
    dataset = dataset.remove_columns(text) if text else dataset
    per_token, whole = ["input_ids", "labels", *names], dataset
    if packing:
        dataset = dataset.select_columns(per_token)
        dataset = dataset.shuffle(seed=args.seed) if args.shuffle_dataset else dataset
        dataset = pack_dataset(dataset, most, args.packing_strategy, parallel)
    elif most is not None:
        part = slice(None, most) if args.truncation_mode == "keep_start" else slice(-most, None)
        dataset = dataset.map(partial(_cut, names=per_token, part=part), **parallel)
        dataset = dataset.filter(_is_supervised, **parallel)
    if counted and most is not None and (not packing or args.packing_strategy == "bfd"):
        _log_cut(whole, 0 if packing else len(whole) - len(dataset), most, name)
    return dataset.shuffle(seed=args.seed) if args.shuffle_dataset else dataset


def with_teacher_prompts(dataset: Any, template: str | None, processing_class: Any, chat_template: Any) -> Any:
    """Encoded rows with ``teacher_prompt_ids``, where they have a ``teacher_prompt`` or a template writes it."""
    names = get_dataset_column_names(dataset)
    if template is None and PROMPT not in names:
        return dataset
    if template is not None:
        check_template(template, names)
    options = dict(template=template, processing_class=processing_class, chat_template=chat_template)
    return dataset.map(partial(_teacher_prompt_ids, **options))


def _teacher_prompt_ids(row: Mapping[str, Any], template: str | None, **options: Any) -> dict[str, list[int]]:
    return with_teacher_prompt(row, row, template, partial(_prompt_ids, **options))


def _prompt_ids(prompt: Any, processing_class: Any, chat_template: Any) -> list[int]:
    """The tokens of a prompt, text or turns, as TRL has them before an answer."""
    if isinstance(prompt, str):
        return processing_class(text=prompt)["input_ids"]
    options = dict(tokenize=True, return_dict=True, add_generation_prompt=True, chat_template=chat_template)
    return processing_class.apply_chat_template(prompt, **options)["input_ids"]


def _per_token(row: Mapping[str, Any], number: int, names: Sequence[str], name: str) -> dict[str, list]:
    """The columns of a row with one value per token."""
    size, values = len(row["input_ids"]), {}
    for column in names:
        value = row[column]
        values[column] = value if isinstance(value, list) else [value] * size
        if value is None or len(values[column]) != size:
            problem = "is missing" if value is None else f"has {len(values[column])} values for {size} tokens"
            raise InputError(
                f"the {name} dataset, row {number + 1}: {column} {problem}: give one value, or one per token of the row"
            )
    return values


def _cut(row: Mapping[str, Any], names: Sequence[str], part: slice) -> dict[str, list]:
    return {name: row[name][part] for name in names}


def _is_supervised(row: Mapping[str, Any]) -> bool:
    return any(label != IGNORE for label in row["labels"])


def _log_cut(whole: Dataset, left_out: int, most: int, name: str) -> None:
    """Log how many rows are longer than ``most`` tokens, and how many are left out."""
    lengths = pc.list_value_length(whole.with_format("arrow")["input_ids"][:])
    longer = pc.sum(pc.greater(lengths, most)).as_py()
    if longer or left_out:
        logger.warning(
            "qlens: %d of %d rows of the %s dataset are longer than max_length=%d and cut%s",
            longer, len(whole), name, most, f"; {left_out} have no supervised token and are left out" if left_out else "",
        )  # fmt: skip


@dataclass
class ColumnCollator(DataCollatorForLanguageModeling):
    """TRL's collator of encoded rows, with the columns of the data, (B, T) each."""

    @classmethod
    def of(cls, collator: DataCollatorForLanguageModeling) -> "ColumnCollator":
        """The same collator with columns."""
        return cls(**vars(collator))

    def torch_call(self, examples: list[dict[str, Any]]) -> dict[str, Any]:
        """A batch of rows."""
        batch = super().torch_call(examples)
        for name, dtype in COLUMNS.items():
            if name not in examples[0]:
                continue
            rows = [exactly(name, example[name], dtype) for example in examples]
            rows = [torch.cat(rows)] if self.padding_free else rows
            batch[name] = torch.zeros(batch["input_ids"].shape, dtype=dtype)
            for at, row in enumerate(rows):
                batch[name][at, : len(row)] = row
        if TEACHER_PROMPT in examples[0]:
            batch[TEACHER_PROMPT] = ragged(TEACHER_PROMPT, [example.get(TEACHER_PROMPT) for example in examples])
        return batch
