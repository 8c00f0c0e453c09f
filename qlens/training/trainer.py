"""QTrainer: transformers' Trainer with a qlens loss."""

import functools
from pathlib import Path
from typing import Any

from transformers import Trainer, TrainingArguments

from qlens.data.collator import COLUMNS, collate
from qlens.data.model_folders import has_tokenizer
from qlens.data.models import load_tokenizer
from qlens.engine.models.packing import forward_parameters
from qlens.training.datasets.pairs import PairCollator, check_takes_pairs, encoded_pairs, is_pairs
from qlens.training.datasets.rows import encoded_rows, read_file
from qlens.training.loss_mixin import QLossMixin

COLLATED = ("input_ids", "labels", "attention_mask", *COLUMNS)  # that ``collate`` always knows


class QTrainer(QLossMixin, Trainer):
    """transformers.Trainer with a qlens loss; see ``QLossMixin`` for the loss, the logs and the other arguments.

    A data set is a ``datasets.Dataset``, a list, or the path of a file. Its rows are examples of ``input_ids`` and
    ``labels`` as ``qlens.data.encode`` returns them; or text (messages, prompt and completion, ...), which is encoded with
    ``processing_class``, the tokenizer (by default the one beside a model given by its path); or, for a method of pairs,
    prompt, chosen and rejected, encoded and padded as by trl.DPOTrainer: batch sizes then count pairs.

    Batches are made by ``qlens.data.collator.collate`` unless ``data_collator`` says otherwise.

    Example:
        >>> trainer = QTrainer(model=model, args=args, variant="target_sft", teacher=teacher,
        ...                    train_dataset=examples)                                     # doctest: +SKIP
        >>> trainer.train()                                                                # doctest: +SKIP
    """

    def __init__(
        self,
        model: Any = None,
        args: TrainingArguments | None = None,
        data_collator: Any = None,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        processing_class: Any = None,
        **options: Any,
    ):
        if data_collator is None:  # a user's takes the rows as they are
            train_dataset = read_file(train_dataset, "train_dataset")
            if isinstance(eval_dataset, dict):
                eval_dataset = {key: read_file(rows, "eval_dataset") for key, rows in eval_dataset.items()}
            else:
                eval_dataset = read_file(eval_dataset, "eval_dataset")
        super().__init__(
            model=model, args=args, data_collator=data_collator or collate, train_dataset=train_dataset,
            eval_dataset=eval_dataset, processing_class=processing_class, **options,
        )  # fmt: skip
        if data_collator is not None:
            return
        self._tokenizer_place = model if isinstance(model, str | Path) else None
        named = eval_dataset if isinstance(eval_dataset, dict) else {"": eval_dataset}
        pairs = any(is_pairs(rows) for rows in (train_dataset, *named.values()))
        self.data_collator = functools.partial(collate, inputs=set(forward_parameters(self.model)) - set(COLLATED))
        if pairs:
            self.data_collator = PairCollator(getattr(self._tokenizer, "pad_token_id", None) or 0)
        self.train_dataset = self._encoded(train_dataset, "train_dataset")
        encoded = {key: self._encoded(rows, "eval_dataset") for key, rows in named.items()}
        self.eval_dataset = encoded if isinstance(eval_dataset, dict) else encoded[""]

    @property
    def _tokenizer(self) -> Any:
        """The tokenizer that was given, or that lies beside a model given by its path; None where there is none."""
        place = getattr(self, "_tokenizer_place", None)
        if self.processing_class is None and place is not None and has_tokenizer(place):
            self.processing_class = load_tokenizer(place)
        return self.processing_class

    def _encoded(self, rows: Any, name: str) -> Any:
        """A data set of text, encoded; encoded ones, None, and what a user's collator takes, as they are."""
        if not (self._collates or isinstance(self.data_collator, PairCollator)):
            return rows
        if not is_pairs(rows):
            return encoded_rows(rows, lambda: self._tokenizer, name, self._teacher_template)
        check_takes_pairs(self.variant, name)
        return encoded_pairs(rows, self._tokenizer, name)

    def get_eval_dataloader(self, eval_dataset: Any = None) -> Any:
        """The Trainer's; rows of text are encoded."""
        rows = eval_dataset if isinstance(eval_dataset, str) else self._encoded(eval_dataset, "eval_dataset")
        return super().get_eval_dataloader(rows)

    def get_test_dataloader(self, test_dataset: Any) -> Any:
        """The Trainer's; rows of text are encoded."""
        return super().get_test_dataloader(self._encoded(test_dataset, "test_dataset"))
