"""Pairs of a chosen and a rejected answer, encoded and padded by TRL as for its DPOTrainer."""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from qlens.core.errors import InputError
from qlens.core.supervised import IGNORE
from qlens.registry import Variant
from qlens.training.datasets.rows import as_dataset, check_tokenizer, keys_of

logger = logging.getLogger(__name__)
TEXTS, IDS = ("chosen", "rejected"), ("prompt_ids", "chosen_ids", "rejected_ids")


def is_pairs(rows: Any) -> bool:
    """Whether rows hold pairs: chosen and rejected answers (and a prompt), as text, as turns or as token ids."""
    keys = set(keys_of(rows))
    return keys.issuperset(TEXTS) or keys.issuperset(IDS)


def check_takes_pairs(variant: Variant, name: str) -> None:
    """Check that a method is one of pairs.

    Raises:
        InputError: it is not.
    """
    if variant.scope != "pair":
        raise InputError(
            f"{name} has rows of chosen and rejected, but {variant.spec} is no method of pairs: take one, such as "
            "variant='dpo', or give rows of prompt and completion"
        )


def encoded_pairs(
    rows: Any, tokenizer: PreTrainedTokenizerBase, name: str, max_length: int | None = None,
    truncation_mode: str = "keep_start", processes: int | None = None,
) -> Any:  # fmt: skip
    """A Dataset of prompt_ids, chosen_ids and rejected_ids, by TRL's own encoding for DPO.

    Args:
        rows: a Dataset or a list of rows of ``prompt``, ``chosen`` and ``rejected``, each text or turns; ``prompt`` may be
            left out where both answers begin with it.
        tokenizer: of the model.
        name: of the argument, for messages.
        max_length: pairs whose prompt alone has as many tokens are left out; None: no limit.
        truncation_mode, processes: as ``truncation_mode`` and ``dataset_num_proc`` of an SFTConfig.

    Raises:
        InputError: no tokenizer.
    """
    from trl.trainer.dpo_trainer import DPOTrainer

    keys = keys_of(rows)
    rows = as_dataset(rows)
    if set(IDS) <= set(keys):
        return rows
    check_tokenizer(tokenizer, name, keys)
    trainer = SimpleNamespace(_tokenizer=tokenizer)
    args = SimpleNamespace(max_length=max_length, truncation_mode=truncation_mode, dataset_num_proc=processes)
    pairs = DPOTrainer._prepare_dataset(trainer, rows, tokenizer, args, "pairs").select_columns(list(IDS))
    if left_out := getattr(rows, "num_rows", 0) - getattr(pairs, "num_rows", 0):
        logger.warning(
            "qlens: %d of %d pairs of %s are left out: their prompt fills max_length=%d",
            left_out, rows.num_rows, name, max_length,
        )  # fmt: skip
    return pairs


@dataclass
class PairCollator:
    """TRL's batch of pairs, with labels and the columns ``chosen`` and ``pair``; the chosen texts come first.

    Args:
        pad_id: of input_ids.
        max_length, truncation_mode, pad_to_multiple_of: as in an SFTConfig.
    """

    pad_id: int = 0
    max_length: int | None = None
    truncation_mode: str = "keep_start"
    pad_to_multiple_of: int | None = None

    def __call__(self, examples: Sequence[Mapping[str, Any]]) -> dict[str, torch.Tensor]:
        """A batch of pairs, (2 B, T) each."""
        from trl.trainer.dpo_trainer import DataCollatorForPreference

        options = (self.max_length, self.truncation_mode, self.pad_to_multiple_of)
        batch = DataCollatorForPreference(self.pad_id, *options).torch_call(list(examples))
        answers = batch.pop("completion_mask")
        labels = batch["input_ids"].masked_fill(answers == 0, IGNORE)
        number = torch.arange(len(examples)).repeat(2)[:, None].expand_as(labels)
        chosen = torch.arange(len(labels))[:, None].expand_as(labels) < len(examples)
        return {**batch, "labels": labels, "pair": number.contiguous(), "chosen": chosen.contiguous()}
