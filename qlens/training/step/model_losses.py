"""Losses written as compute_loss(model, inputs), called with the trained model and its inputs."""

import inspect
import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from qlens.core.errors import InputError
from qlens.core.supervised import IGNORE
from qlens.data.supervised_batch import SupervisedBatch
from qlens.engine.models.packing import is_packed
from qlens.losses.calling import Columns
from qlens.losses.layout.names import FIELD
from qlens.losses.layout.signature import inputs, name_of, signature
from qlens.losses.replay import Replay
from qlens.losses.return_values import loss_of
from qlens.losses.user_code import file_of, user_errors
from qlens.registry import Variant
from qlens.training.metrics import MetricSums, read_target

logger = logging.getLogger(__name__)
SETTINGS = {"ignore": IGNORE, "temperature": 1.0, "return outputs": False}
SAME = 1e-6  # relative difference below which two values of a loss are one: it does not read the count
BATCH = {
    "labels": "labels",
    "input ids": "input_ids",
    "attention mask": "attention_mask",
    "position ids": "position_ids",
}


class Called(NamedTuple):
    """A loss, and the outputs of every forward pass of the model in its call."""

    loss: Tensor
    passes: list[Any]

    @property
    def outputs(self) -> Any:
        """The outputs of the only forward pass; None where there were none or several."""
        return self.passes[0] if len(self.passes) == 1 else None


class ModelLoss:
    """A loss f(model, inputs, ...), called as a Trainer calls it and trained as written.

    If it reads ``num_items_in_batch``, its value is a micro-batch's part of the step's loss. If not, a micro-batch is weighted
    by its share of the step's supervised tokens, so that a mean over tokens stays one however the step is cut.

    Args:
        variant: the method.
        models: the other models by field name, for parameters such as ``teacher_model``.

    Raises:
        InputError: the loss is a Trainer's class, whose models are stand-ins.
    """

    def __init__(self, variant: Variant, models: Mapping[str, nn.Module]):
        self.fn, self.variant, self.models = variant.loss_fn, variant, models
        self.reads_count: bool | None = None  # not known before a step has several micro-batches
        if stand_ins := getattr(self.fn, "stand_ins", ()):
            raise InputError(
                f"{variant.name} is a Trainer's class, built with stand-ins for its models ({', '.join(stand_ins)}): "
                "train with that class itself, or give compute_loss of an instance of it, variant=trainer.compute_loss"
            )

    def __call__(
        self,
        model: nn.Module,
        batch: SupervisedBatch,
        features: Mapping[str, Any],
        items: float | None,
        share: float,
    ) -> Called:
        """A micro-batch's part of the step's loss.

        Args:
            model: the trained model in its wrapper.
            batch: the micro-batch.
            features: the inputs of the model in it.
            items: the number of items that the step's loss is a mean of; None in evaluation.
            share: the micro-batch's share of them.

        Raises:
            LossError: the loss raised an error.
            InputError: the batch lacks a column, or texts of a packed row would see each other.
        """
        columns = self._columns(batch, features)
        counts = "count" in (*inputs(self.fn).required.values(), *inputs(self.fn).optional.values())
        if self.reads_count is None and not counts:
            self.reads_count = False
        if self.reads_count is None and items is not None and share != 1:
            self.reads_count = self._reads_count(model, columns, items)
        passes: list[tuple[dict[str, Any], Any]] = []
        hook = model.register_forward_hook(
            lambda module, args, kwargs, outputs: passes.append((kwargs, outputs)), with_kwargs=True
        )
        try:
            loss = self._value(model, columns, items)
        finally:
            hook.remove()
        if is_packed(features) and any("position_ids" not in kwargs for kwargs, _ in passes):
            raise InputError(
                f"the data are packed (position_ids start again within a row), but {self.variant.name} runs the model without "
                "position_ids, so that its texts would see each other: write model(**inputs), or give every text a row"
            )
        if not self.reads_count and items is not None:
            loss = loss * share
        return Called(loss, [outputs for _, outputs in passes])

    def _columns(self, batch: SupervisedBatch, features: Mapping[str, Any]) -> Columns:
        """The micro-batch with positions as the model needs them; labels that nothing predicts are -100 beyond column 0."""
        inputs = batch.inputs
        labels = torch.full_like(inputs["labels"], IGNORE).flatten()
        labels[batch.index + 1] = batch.labels.to(labels)
        labels = labels.view(inputs["labels"].shape)
        labels[:, 0] = inputs["labels"][:, 0]
        dropped = [name for name in ("attention_mask", "position_ids") if name in inputs and name not in features]
        columns = {name: value for name, value in inputs.items() if name not in dropped}
        return Columns(columns | dict(features) | {"labels": labels})

    def _value(self, model: nn.Module, columns: Columns, items: float | None) -> Tensor:
        """The value of one call, a scalar."""
        kwargs = self._arguments(model, columns, items)
        parameters = signature(self.fn)
        positional = [n for n in parameters if n in kwargs and parameters[n].kind is inspect.Parameter.POSITIONAL_ONLY]
        args = [kwargs.pop(name) for name in positional]
        with user_errors(name_of(self.fn), file_of(self.fn)):
            returned = self.fn(*args, **kwargs)
        value = loss_of(returned, self.variant.name).value
        if value.ndim:
            raise InputError(
                f"{self.variant.name} returned shape {tuple(value.shape)}: a compute_loss returns one number, as a Trainer "
                "needs it; write its mean over the supervised tokens"
            )
        return value

    def _arguments(self, model: nn.Module, columns: Columns, items: float | None) -> dict[str, Any]:
        """The arguments of the loss, by the roles of its parameters."""
        roles = inputs(self.fn)
        kwargs: dict[str, Any] = {}
        for name, role in (*roles.required.items(), *roles.optional.items()):
            required = name in roles.required
            if role == "model":
                kwargs[name] = model
            elif role == "batch":
                kwargs[name] = Columns(columns)
            elif role == "count":
                kwargs[name] = None if items is None else torch.tensor(items, device=columns["labels"].device)
            elif role.endswith(" model") and FIELD[role] in self.models:
                kwargs[name] = self.models[FIELD[role]]
            elif role == "vocabulary":
                kwargs[name] = model.get_output_embeddings().weight.shape[0]
            elif role in SETTINGS:
                kwargs |= {name: SETTINGS[role]} if required else {}
            elif (column := BATCH.get(role, FIELD.get(role, ""))) in columns and not role.endswith(" model"):
                kwargs[name] = columns[column]
            elif required:
                raise InputError(
                    f"{self.variant.name} takes {name!r}, which a batch of this data does not have ({', '.join(columns)}): give "
                    "the data a column of that name, or the parameter a default"
                )
        kwargs |= {
            name: value for name, value in self.variant.params.items() if value is not None or name not in kwargs
        }
        return kwargs

    def _reads_count(self, model: nn.Module, columns: Columns, items: float) -> bool:
        """Whether the loss divides by ``num_items_in_batch``: its value changes with twice as many, at the same dropout."""
        replay = Replay(columns["labels"].device, self.fn)
        values = []
        with torch.no_grad():
            for count in (items, 2 * items):
                with replay.again():
                    values.append(float(self._value(model, columns, count)))
        reads = abs(values[0] - values[1]) > SAME * max(abs(values[0]), abs(values[1]))
        if not reads:
            logger.warning(
                "qlens weighs the micro-batches of a step by their supervised tokens for %s: it does not divide by "
                "num_items_in_batch",
                self.variant.name,
            )
        return reads


@contextmanager
def graph_from_head(model: nn.Module) -> Iterator[None]:
    """Context that records a graph in evaluation, from the input of the model's head, or from its outputs, on."""
    off = model.register_forward_pre_hook(lambda *_: torch.set_grad_enabled(False) and None)
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    hooks = [off, model.register_forward_hook(_with_leaf)]
    if isinstance(head, nn.Module):
        hooks.append(head.register_forward_pre_hook(_with_leaves))
    with torch.enable_grad():
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()


def _with_leaves(module: nn.Module, args: tuple) -> tuple:
    """Pre-hook of a head: switch autograd on, with the head's input as the leaf."""
    torch.set_grad_enabled(True)
    return tuple(x.detach().requires_grad_() if isinstance(x, Tensor) and x.is_floating_point() else x for x in args)


def _with_leaf(module: nn.Module, args: Any, outputs: Any) -> Any:
    """Hook of a model: switch autograd on; logits without a graph become its leaf."""
    torch.set_grad_enabled(True)
    if isinstance(outputs, dict) and isinstance(outputs.get("logits"), Tensor) and not outputs["logits"].requires_grad:
        outputs["logits"] = outputs["logits"].detach().requires_grad_()
    return outputs


def logits_of(outputs: Any, batch: SupervisedBatch) -> Tensor | None:
    """The logits (B, T, V) in a model's outputs; None where there are none, or of another layout than the batch."""
    logits = outputs.get("logits") if isinstance(outputs, Mapping) else getattr(outputs, "logits", None)
    fits = isinstance(logits, Tensor) and logits.ndim == 3 and logits.shape[:2] == batch.shape
    return logits if fits else None


def count_model_loss(metrics: MetricSums, total: Tensor, outputs: Any, batch: SupervisedBatch) -> None:
    """Count a summed loss in, with the target that its gradient by the model's logits implies where there is one."""
    logits = logits_of(outputs, batch)
    if logits is None or not logits.requires_grad:
        metrics.add_losses(total, len(batch))
    else:
        metrics.add_total(total, read_target(total, logits, batch))
