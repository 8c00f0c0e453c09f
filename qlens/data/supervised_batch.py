"""A padded batch as supervised rows."""

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from qlens.core.errors import InputError
from qlens.core.supervised import LAYOUT, Supervised
from qlens.data.collator import COLUMNS, TEACHER_PROMPT


class SupervisedBatch(Supervised):
    """A batch of a data loader as supervised rows: labels shifted and masked, and the columns of the data at them, once.

    Args:
        inputs: input_ids, labels and further inputs of the model and columns of the data, (B, T) each.

    Attributes:
        inputs: as given.
        columns: those of ``qlens.data.collator.COLUMNS`` that the batch has, at the supervised labels, (N,) each.

    Raises:
        InputError: the batch has no labels, or shapes that do not fit.

    Example:
        >>> rows = {"input_ids": torch.tensor([[5, 6, 7]]), "labels": torch.tensor([[-100, -100, 7]])}
        >>> batch = SupervisedBatch({**rows, "weight": torch.tensor([[1.0, 2.0, 3.0]])})
        >>> batch.labels, batch.columns["weight"]
        (tensor([7]), tensor([3.]))
    """

    def __init__(self, inputs: Mapping[str, Any]):
        if "labels" not in inputs:
            raise InputError(f"the batch has no labels, only {sorted(inputs)}: nothing in it is supervised")
        super().__init__(**{name: inputs[name] for name in LAYOUT if name in inputs})
        self.inputs = inputs
        columns = {name: inputs[name] for name in COLUMNS if name in inputs}
        self.columns = {name: self.at_labels(value.to(self.labels.device)) for name, value in columns.items()}

    def model_inputs(self) -> dict[str, Any]:
        """The inputs without labels and columns."""
        return {name: value for name, value in self.inputs.items() if name not in ("labels", TEACHER_PROMPT, *COLUMNS)}

    def items(self, method: str, pairs: bool) -> int:
        """The number of items that the losses are averaged over: supervised tokens, or pairs.

        Raises:
            InputError: ``pairs``, and the batch has no column ``pair``, which ``method`` needs.
        """
        if not pairs:
            return len(self)
        if "pair" not in self.columns:
            raise InputError(f"{method} needs 'pair': give the data a column of that name")
        return self.columns["pair"].unique().numel()

    def to(self, device: torch.device) -> "SupervisedBatch":
        """The same batch with its positions, labels and columns on a device."""
        if self.labels.device == device:
            return self
        copied = copy.copy(self)
        for name, value in vars(self).items():
            if isinstance(value, Tensor):
                setattr(copied, name, value.to(device))
        copied.columns = {name: value.to(device) for name, value in self.columns.items()}
        return copied
