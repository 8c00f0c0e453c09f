"""The inputs of a method beside logits and labels, while it trains."""

from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from qlens.core.errors import InputError
from qlens.core.numerics import precision
from qlens.core.probes import widened
from qlens.data.base_models import SameModel, has_adapters
from qlens.data.collator import COLUMNS
from qlens.data.compatibility import check_model, vocabulary_size
from qlens.data.models import check_token_ids, freeze, loaded, moved, placed
from qlens.data.supervised_batch import SupervisedBatch
from qlens.data.vocabularies import Vocabularies
from qlens.engine.heads import Head
from qlens.engine.models.backbones import Backbones
from qlens.engine.models.forward import model_logits
from qlens.registry import Variant
from qlens.training.datasets.privileged import privileged
from qlens.training.sources import EMA, AdaptersOff, KeptWeights, Source, of_student

ARGUMENTS = ("teacher", "reference")  # models that the user gives
DERIVED = ("sequence", "old", "second", "negatives")  # inputs that come from the student and the text
COPY = "{name}=copy.deepcopy(...) of it before training, or load it anew"
KEPT = {"old": "old policy", "teacher": "teacher, an average,", "reference": "reference, an average,"}


class MethodInputs:
    """The fields of Tokens that a method needs: from other models, the student itself, the text and columns of the data.

    Args:
        variant: the method.
        models: ``teacher`` and ``reference``, models, their paths or ``qlens.training.sources``; None where not given.

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
        self.sources: dict[str, Any] = {name: models[name] for name in variant.needs if name in ARGUMENTS}
        self.other_models: dict[str, Any] = {}
        self.vocabularies = Vocabularies()

    def set_up(self, model: Any, device: torch.device, tokenizer: Any = None) -> None:
        """Open, check, freeze and move the other models, and keep the student's weights as the first old policy.

        Without a reference, that of a model with adapters is the model without them.

        Args:
            model: the trained model.
            device: where other models go, unless they are quantised or dispatched to devices.
            tokenizer: of the trained model; None where there is none at hand.

        Raises:
            InputError: another model is missing, has another tokenizer, or shares parameters that are trained.
        """
        opened: dict[Any, Any] = {}
        for name, source in self.sources.items():
            if source is None and has_adapters(model):
                source = AdaptersOff()
            if source is None:
                raise InputError(f"{self.variant.name} needs a {name}: give QTrainer({name}=...)")
            key = str(source) if isinstance(source, str | Path) else id(source)
            if key not in opened:
                opened[key] = self._opened(name, source, model, device, tokenizer)
            self.other_models[name] = opened[key]
        self.student = model
        if self.variant.may_return_target:
            dtype = next((value.dtype for value in model.parameters() if value.is_floating_point()), torch.float32)
            self.variant.is_loss_alone(widened(vocabulary_size(model), precision(dtype), device))
        if "old" in self.variant.needs:
            self.other_models["old"] = KeptWeights(model)

    def _opened(self, name: str, source: Any, model: Any, device: torch.device, tokenizer: Any) -> Any:
        """The model of a source, ready to run."""
        if isinstance(source, Source):
            return of_student(source, model, name)
        other = loaded(source, name)
        check_model(other, name)
        self.vocabularies.check(model, other, name, tokenizer)
        _check_apart(model, other, name)
        return placed(freeze(other), device)

    def begin(self, model: Any) -> None:
        """Begin a run with ``model`` as the student, and its weights in the old policy and in averages."""
        self.student = model
        for other in self.other_models.values():
            if isinstance(other, SameModel):
                other.bind(model)

    def sync(self) -> None:
        """Copy the student's weights into the old policy."""
        if "old" in self.other_models:
            self.other_models["old"].sync()

    def average(self) -> None:
        """Move averages of the student's weights on by one step."""
        for other, source in {self.other_models[n]: s for n, s in self.sources.items() if isinstance(s, EMA)}.items():
            other.average(source.decay)

    @property
    def kept(self) -> dict[str, KeptWeights]:
        """The other models whose weights were the student's, by name."""
        return {name: model for name, model in self.other_models.items() if isinstance(model, KeptWeights)}

    def state(self) -> dict[str, Tensor]:
        """The weights of the old policy and of averages, by names that begin with "old.", "teacher." or "reference."."""
        return {f"{name}.{key}": value for name, model in self.kept.items() for key, value in model.state().items()}

    def restore(self, saved: Mapping[str, Tensor]) -> None:
        """Load the weights that ``state`` returned.

        Raises:
            InputError: they are of another model.
        """
        for name, model in self.kept.items():
            own = {key.removeprefix(f"{name}."): value for key, value in saved.items() if key.startswith(f"{name}.")}
            model.restore(own, KEPT[name])

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
        fields: dict[str, Any] = {}
        longer = privileged(batch, features) if "teacher" in self.other_models else None
        passes: dict[tuple, Any] = {}
        for name, model in self.other_models.items():
            own = longer if name == "teacher" and longer is not None else (batch, features)
            key = id(model), id(own[0])
            if key not in passes:
                passes[key] = self._predictions(name, model, *own, vocabulary, backbones)
            fields[name] = passes[key]
        fields["sequence"] = batch.sequence
        if "second" in self.variant.needs:
            fields["second"] = self._predictions("second", self.student, batch, features, vocabulary, backbones)
        if "negatives" in self.variant.needs:
            fields["negatives"] = batch.context(features["input_ids"], vocabulary)
        for name in COLUMNS:
            if name in batch.columns:
                fields[name] = batch.columns[name]
            elif name in self.variant.needs:
                raise InputError(f"{self.variant.name} needs {name!r}: give the data a column of that name")
        return fields

    def _predictions(
        self,
        name: str,
        model: Any,
        batch: SupervisedBatch,
        features: Mapping[str, Any],
        vocabulary: int,
        backbones: Backbones | None,
    ) -> Tensor | Head:
        """Another model's predictions at the supervised rows, as a ``Head`` where backbones are in use and it has one."""
        features = moved(features, model)
        if vocabulary_size(model) < vocabulary:
            check_token_ids(model, features, name)
        with torch.no_grad(), model.active() if isinstance(model, SameModel) else nullcontext():
            states = None if backbones is None else backbones.states(model, features, name)
            if states is None:
                rows = batch.take(model_logits(model, features).to(batch.labels.device))
                return self.vocabularies.fitted(rows, vocabulary, name)
            backbone, hidden = states
            head = backbone.at(hidden[:0].flatten(0, -2)).to(batch.labels.device)
            head = replace(head, hidden=batch.take(hidden.to(batch.labels.device)))
            return self.vocabularies.fitted(head, vocabulary, name)


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
