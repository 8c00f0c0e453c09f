"""Feeding: where the inputs of a method come from while it trains."""

import copy
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from qlens.core.errors import InputError
from qlens.core.numerics import precision
from qlens.core.probes import widened
from qlens.core.supervised import Supervised
from qlens.data.base_models import WithoutAdapters, has_adapters
from qlens.data.collator import COLUMNS
from qlens.data.compatibility import check_same_vocabulary, vocabulary_size
from qlens.data.models import freeze
from qlens.registry import Variant

GIVEN = ("teacher", "reference")
COPY = "{name}=copy.deepcopy(...) of it before training, or load it anew"
FOUND = ("sequence", "old", "second", "negatives")


class Feed:
    """The fields of Tokens that a method needs, from other models, from the student itself, from text and from data.

    Args:
        variant: the method.
        models: ``teacher`` and ``reference``, None where not given.

    Raises:
        InputError: a teacher that the method needs is missing, or it needs what there is no source for.
    """

    def __init__(self, variant: Variant, models: Mapping[str, Any]):
        for need in variant.needs:
            if need == "teacher" and models[need] is None:
                raise InputError(f"{variant.name} needs a teacher: give QTrainer(teacher=...)")
            if need not in (*GIVEN, *FOUND, *COLUMNS):
                raise InputError(f"{variant.name} needs {need!r}, which QTrainer has no source for")
        self.variant = variant
        self.others: dict[str, Any] = {name: models[name] for name in variant.needs if name in GIVEN}

    def settle(self, model: Any, device: torch.device) -> None:
        """Check the other models against the student, place them, and copy the student as the first old policy.

        The reference of a model with adapters, where none is given, is the model without them.

        Raises:
            InputError: another model is missing, has another vocabulary, or shares parameters that are trained.
        """
        for name, other in self.others.items():
            if other is None and has_adapters(model):
                self.others[name] = WithoutAdapters(model)
                continue
            if other is None:
                raise InputError(f"{self.variant.name} needs a {name}: give QTrainer({name}=...)")
            check_same_vocabulary(model, other, name)
            _check_apart(model, other, name)
            self.others[name] = freeze(other).to(device)
        self.student = model
        if self.variant.may_return_target:
            dtype = next((value.dtype for value in model.parameters() if value.is_floating_point()), torch.float32)
            self.variant.is_loss_alone(widened(vocabulary_size(model), precision(dtype), device))
        if "old" in self.variant.needs:
            self.others["old"] = freeze(copy.deepcopy(model)).to(device)

    def begin(self, model: Any) -> None:
        """Begin a run: the student is ``model``, and the old policy a copy of it."""
        self.student = model
        for name, other in self.others.items():
            if isinstance(other, WithoutAdapters):
                self.others[name] = WithoutAdapters(model)
        self.refresh()

    def refresh(self) -> None:
        """Copy the student's weights into the old policy."""
        if "old" in self.others:
            self.others["old"].load_state_dict(self.student.state_dict())

    def state(self) -> dict[str, Tensor]:
        """The old policy's weights that training changes, by name; a weight that several layers share, once."""
        if "old" not in self.others:
            return {}
        trained = {id(p) for p in self.student.parameters() if p.requires_grad}
        buffers = {id(b) for b in self.student.buffers()}
        names = {id(value): name for name, value in self.student.state_dict(keep_vars=True).items()}
        old = self.others["old"].state_dict()
        return {name: old[name].contiguous() for at, name in names.items() if at in trained or at in buffers}

    def restore(self, saved: Mapping[str, Tensor]) -> None:
        """Give the old policy the weights that ``state`` returned.

        Raises:
            InputError: they are of another model.
        """
        if "old" not in self.others:
            return
        own = {name: tuple(value.shape) for name, value in self.state().items()}
        given = {name: tuple(value.shape) for name, value in saved.items()}
        if own != given:
            name = sorted(own.items() ^ given.items())[0][0]
            raise InputError(
                f"the checkpoint's old policy does not fit the model: {name} has shape {given.get(name)} there and "
                f"{own.get(name)} here; resume with the model that it was saved with"
            )
        self.others["old"].load_state_dict(dict(saved), strict=False)

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


def _check_apart(model: nn.Module, other: nn.Module, name: str) -> None:
    """Whether another model, which is frozen, has none of the parameters that are trained.

    Raises:
        InputError: it has; the first of them is named.
    """
    if other is model:
        raise InputError(
            f"{name} is the model being trained, which would freeze it: give a copy, {COPY.format(name=name)}"
        )
    frozen = {_memory(value) for value in other.parameters()}
    trained = ((key, value) for key, value in model.named_parameters() if value.requires_grad)
    shared = [key for key, value in trained if _memory(value) in frozen]
    if not shared:
        return
    way = COPY.format(name=name)
    if has_adapters(model):
        way = "leave reference out (it is then the model without its adapters)" if name == "reference" else way
        way += "; the base model beneath adapters holds them too"
    raise InputError(
        f"{name} shares {len(shared)} parameters with the model being trained, {shared[0]} among them: {name} is frozen, and a "
        f"shared parameter would be frozen or move with the model: {way}"
    )


def _memory(value: Tensor) -> int:
    """What tells whether two parameters lie in the same memory."""
    return value.untyped_storage().data_ptr() or id(value)
