"""QTrainer: transformers' Trainer with a qlens loss."""

import functools
from typing import Any

from transformers import Trainer, TrainingArguments

from qlens.data.collator import COLUMNS, collate
from qlens.engine.models.packing import forward_parameters
from qlens.training.loss_mixin import QLossMixin

COLLATED = ("input_ids", "labels", "attention_mask", *COLUMNS)  # that ``collate`` always knows


class QTrainer(QLossMixin, Trainer):
    """transformers.Trainer with a qlens loss; see ``QLossMixin`` for the loss, the logs and the other arguments.

    Batches are made by ``qlens.data.collator.collate`` unless ``data_collator`` says otherwise.

    Example:
        >>> trainer = QTrainer(model=model, args=args, variant="target_sft", teacher=teacher,
        ...                    train_dataset=examples)                                     # doctest: +SKIP
        >>> trainer.train()                                                                # doctest: +SKIP
    """

    def __init__(
        self, model: Any = None, args: TrainingArguments | None = None, data_collator: Any = None, **kwargs: Any
    ):
        super().__init__(model=model, args=args, data_collator=data_collator or collate, **kwargs)
        if data_collator is None:
            self.data_collator = functools.partial(collate, inputs=set(forward_parameters(self.model)) - set(COLLATED))
