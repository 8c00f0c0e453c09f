"""Feeding: where the inputs of a method come from while it trains."""

import copy
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn
from transformers import TrainerCallback

from qlens.batching import COLUMNS, Supervised
from qlens.errors import InputError
from qlens.registry import Variant
from qlens.sources import check_same_vocabulary, freeze

GIVEN = ("teacher", "reference")
FOUND = ("sequence", "old", "second", "negatives")


class Feed:
    """The fields of Tokens that a method needs, from other models, from the student itself, from text and from data.

    Args:
        variant: the method.
        models: ``teacher`` and ``reference``, None where not given.
        old_every: optimizer steps between refreshes of the old policy.

    Raises:
        InputError: a model that the method needs is missing, has another vocabulary or is the student itself.
    """

    def __init__(self, variant: Variant, models: Mapping[str, Any], old_every: int):
        for need in variant.needs:
            if need in GIVEN and models[need] is None:
                raise InputError(f"{variant.name} needs a {need}: give QTrainer({need}=...)")
            if need not in (*GIVEN, *FOUND, *COLUMNS):
                raise InputError(f"{variant.name} needs {need!r}, which QTrainer has no source for")
        if old_every < 1:
            raise InputError(f"old_every must be at least 1, got {old_every}")
        self.variant, self.old_every = variant, old_every
        self.others: dict[str, Any] = {name: models[name] for name in variant.needs if name in GIVEN}

    def follow(self, model: Any, device: torch.device) -> "Refresh":
        """Settle beside the student: check and place the other models, copy the old policy; returns what refreshes it."""
        for name, other in self.others.items():
            if other is model:
                raise InputError(f"{name} is the model being trained, which would freeze it: give a copy")
            check_same_vocabulary(model, other, name)
            self.others[name] = freeze(other).to(device)
        self.student = model
        if "old" in self.variant.needs:
            self.others["old"] = freeze(copy.deepcopy(model)).to(device)
        return Refresh(model, self.others.get("old"), self.old_every)

    def fields(
        self,
        supervised: Supervised,
        features: Mapping[str, Any],
        inputs: Mapping[str, Any],
        vocabulary: int,
        read: Callable[[str, nn.Module], Any],
    ) -> dict[str, Any]:
        """Everything beside logits and labels, at the supervised positions of a batch; ``read`` says what a model makes of it.

        Raises:
            InputError: the data lack a column that the method needs.
        """
        fields = {name: read(name, other) for name, other in self.others.items()}
        fields["sequence"] = supervised.sequence
        if "second" in self.variant.needs:
            fields["second"] = read("second", self.student)
        if "negatives" in self.variant.needs:
            fields["negatives"] = supervised.context(features["input_ids"], vocabulary)
        for name in COLUMNS:
            if name in inputs:
                fields[name] = supervised.at_labels(inputs[name].to(supervised.labels.device))
            elif name in self.variant.needs:
                raise InputError(f"{self.variant.name} needs {name!r}: give the data a column of that name")
        return fields


class Refresh(TrainerCallback):
    """Keeps the old policy: the student as it was at the last refresh."""

    def __init__(self, model: nn.Module, old: nn.Module | None, every: int):
        self.model, self.old, self.every = model, old, every

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Start from the student, a resumed one too."""
        self.refresh()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Catch up, every so many steps."""
        if state.global_step % self.every == 0:
            self.refresh()

    def refresh(self) -> None:
        """Copy the student's weights."""
        if self.old is not None:
            self.old.load_state_dict(self.model.state_dict())
