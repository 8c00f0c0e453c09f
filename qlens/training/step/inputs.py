"""The inputs of a method beside logits and labels, while it trains."""

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from qlens.core.errors import InputError
from qlens.core.numerics import precision
from qlens.core.probes import widened
from qlens.data.base_models import WithoutAdapters, has_adapters
from qlens.data.collator import COLUMNS
from qlens.data.compatibility import check_same_vocabulary, vocabulary_size
from qlens.data.models import freeze, loaded
from qlens.data.supervised_batch import SupervisedBatch
from qlens.engine.heads import Head
from qlens.engine.models.backbones import Backbones
from qlens.engine.models.forward import model_logits
from qlens.registry import Variant

ARGUMENTS = ("teacher", "reference")  # models that the user gives
DERIVED = ("sequence", "old", "second", "negatives")  # inputs that come from the student and the text
COPY = "{name}=copy.deepcopy(...) of it before training, or load it anew"


class MethodInputs:
    """The fields of Tokens that a method needs: from other models, the student itself, the text and columns of the data.

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
            if need not in (*ARGUMENTS, *DERIVED, *COLUMNS):
                raise InputError(f"{variant.name} needs {need!r}, which QTrainer has no source for")
        self.variant = variant
        self.other_models: dict[str, Any] = {name: models[name] for name in variant.needs if name in ARGUMENTS}

    def set_up(self, model: Any, device: torch.device) -> None:
        """Check, freeze and move the other models, and copy the student as the first old policy.

        Without a reference, that of a model with adapters is the model without them.

        Raises:
            InputError: another model is missing, has another vocabulary, or shares parameters that are trained.
        """
        for name, other in self.other_models.items():
            if other is None and has_adapters(model):
                self.other_models[name] = WithoutAdapters(model)
                continue
            if other is None:
                raise InputError(f"{self.variant.name} needs a {name}: give QTrainer({name}=...)")
            other = loaded(other, name)
            check_same_vocabulary(model, other, name)
            _check_apart(model, other, name)
            self.other_models[name] = freeze(other).to(device)
        self.student = model
        if self.variant.may_return_target:
            dtype = next((value.dtype for value in model.parameters() if value.is_floating_point()), torch.float32)
            self.variant.is_loss_alone(widened(vocabulary_size(model), precision(dtype), device))
        if "old" in self.variant.needs:
            self.other_models["old"] = freeze(copy.deepcopy(model)).to(device)

    def begin(self, model: Any) -> None:
        """Begin a run with ``model`` as the student, and its weights in the old policy."""
        self.student = model
        for name, other in self.other_models.items():
            if isinstance(other, WithoutAdapters):
                self.other_models[name] = WithoutAdapters(model)
        self.sync()

    def sync(self) -> None:
        """Copy the student's weights into the old policy."""
        if "old" in self.other_models:
            self.other_models["old"].load_state_dict(self.student.state_dict())

    def state(self) -> dict[str, Tensor]:
        """The old policy's weights that training changes, by name; a weight shared by several layers once."""
        if "old" not in self.other_models:
            return {}
        trained = {id(p) for p in self.student.parameters() if p.requires_grad}
        buffers = {id(b) for b in self.student.buffers()}
        names = {id(value): name for name, value in self.student.state_dict(keep_vars=True).items()}
        old = self.other_models["old"].state_dict()
        return {name: old[name].contiguous() for at, name in names.items() if at in trained or at in buffers}

    def restore(self, saved: Mapping[str, Tensor]) -> None:
        """Load into the old policy the weights that ``state`` returned.

        Raises:
            InputError: they are of another model.
        """
        if "old" not in self.other_models:
            return
        own = {name: tuple(value.shape) for name, value in self.state().items()}
        stored = {name: tuple(value.shape) for name, value in saved.items()}
        if own != stored:
            name = sorted(own.items() ^ stored.items())[0][0]
            raise InputError(
                f"the checkpoint's old policy does not fit the model: {name} has shape {stored.get(name)} there and "
                f"{own.get(name)} here; resume with the model that it was saved with"
            )
        self.other_models["old"].load_state_dict(dict(saved), strict=False)

    def gather(
        self, batch: SupervisedBatch, features: Mapping[str, Any], vocabulary: int, backbones: Backbones | None
    ) -> dict[str, Any]:
        """Everything beside logits and labels, at the supervised rows of a batch.

        Args:
            batch: the batch.
            features: the models' inputs.
            vocabulary: V.
            backbones: for other models as a ``Head`` where they have one; None for their logits, (N, V).

        Raises:
            InputError: the data lack a column that the method needs.
        """
        fields = {
            name: _predictions(name, model, batch, features, backbones) for name, model in self.other_models.items()
        }
        fields["sequence"] = batch.sequence
        if "second" in self.variant.needs:
            fields["second"] = _predictions("second", self.student, batch, features, backbones)
        if "negatives" in self.variant.needs:
            fields["negatives"] = batch.context(features["input_ids"], vocabulary)
        for name in COLUMNS:
            if name in batch.columns:
                fields[name] = batch.columns[name]
            elif name in self.variant.needs:
                raise InputError(f"{self.variant.name} needs {name!r}: give the data a column of that name")
        return fields


def _predictions(
    name: str, model: nn.Module, batch: SupervisedBatch, features: Mapping[str, Any], backbones: Backbones | None
) -> Tensor | Head:
    """Another model's predictions at the supervised rows, as a ``Head`` where backbones are in use and it has one."""
    with torch.no_grad():
        states = None if backbones is None else backbones.states(model, features, name)
        if states is None:
            return batch.take(model_logits(model, features))
        backbone, hidden = states
        return backbone.at(batch.take(hidden))


def _check_apart(model: nn.Module, other: nn.Module, name: str) -> None:
    """Check that another model, which is frozen, shares no parameter that is trained.

    Raises:
        InputError: it does; the first shared parameter is named.
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
        f"{name} shares {len(shared)} parameters with the model being trained, {shared[0]} among them: {name} is frozen, "
        f"and a shared parameter would be frozen or move with the model: {way}"
    )


def _memory(value: Tensor) -> int:
    """An identifier of the memory in which a parameter lies."""
    return value.untyped_storage().data_ptr() or id(value)
