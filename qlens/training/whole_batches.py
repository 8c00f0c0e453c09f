"""Whole batches in training: losses that run the model themselves, f(model, inputs), or see (B, T, V), as a Trainer has them."""

import logging
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from qlens.core.errors import InputError
from qlens.core.random_draws import draws_of
from qlens.core.supervised import LAYOUT, Supervised, count_pairs
from qlens.core.target import Target
from qlens.core.tokens import Tokens
from qlens.engine.batch_losses import summed_loss
from qlens.engine.finite_values import refuse_total, watch_gradient
from qlens.engine.packing import uncached
from qlens.losses.layout.layouts import Style
from qlens.training.loss_parameters import LearnedParameters
from qlens.training.measurements import Measurements
from qlens.training.metrics import read_target
from qlens.training.model_losses import ModelLoss, graph_from_head, logits_of

if TYPE_CHECKING:
    from qlens.engine.backbone import Bodies

logger = logging.getLogger(__name__)


class WholeBatches(Measurements):
    """A Trainer that hands true batches to losses of whole batches."""

    _bodies: "Bodies"
    _model_loss: ModelLoss | None
    _learned: LearnedParameters
    _loss_only: bool
    _said_reduction: str

    def _as_written(
        self, model: nn.Module, features: dict, inputs: dict, return_outputs: bool, num_items_in_batch: Any
    ) -> Any:
        """The loss of a method that runs the model itself, f(model, inputs)."""
        assert self._model_loss is not None
        self._bodies.refuse(f"for {self.variant.name}: it runs the model itself")
        where = Supervised.of({name: value for name, value in inputs.items() if name in LAYOUT})
        own_items = self._count(where, inputs)
        items = None if num_items_in_batch is None else self._denominator(num_items_in_batch, own_items)
        if self._evaluating:
            self._count_evaluated(len(where), own_items)
        if not len(where):
            outputs = model(**features, **uncached(self.model))
            return (outputs["logits"][:0].sum(), outputs) if return_outputs else outputs["logits"][:0].sum()
        reads = self._is_measured()
        whole = items or own_items
        with draws_of(*self._next_place()), self._graph_for(reads):
            called = self._model_loss(model, inputs, features, where, items, own_items / whole)
            loss, outputs = called.loss, called.outputs
            refuse_total(self.variant.spec, loss, logits_of(outputs, where))
            if reads:
                self._tally_as_written(loss, outputs, where, whole)
        if not self._learned.looked:  # its graph is that of the whole model
            self._note_learned(loss)
        loss = self._with_missing_router_loss(loss, called.passes, self._trains(model))
        if self._trains(model):
            loss = loss + self.variant.penalty(self.model) / self._micro_batches
        if return_outputs and outputs is None and not self._loss_only:
            raise InputError(
                f"{self.variant.name} runs the model more than once, so that there are no logits to predict with: set "
                "TrainingArguments(prediction_loss_only=True)"
            )
        return (loss, outputs if outputs is not None else {}) if return_outputs else loss

    def _trains(self, model: nn.Module) -> bool:
        """Whether a loss is one to train by, whatever mode the model is in; outside of training, the model's mode says so."""
        return not self._evaluating and (self.is_in_train or model.training)

    def _count(self, where: Supervised, inputs: dict[str, Any]) -> int:
        """How many items the losses of a micro-batch are a mean of: supervised tokens, or pairs."""
        return count_pairs(self.variant.name, where, inputs) if self.variant.scope == "pair" else len(where)

    def _denominator(self, items: Any, own: int) -> float:
        """What the sum of a micro-batch's losses is divided by: the items of all micro-batches, or its own."""
        if items is None:
            return max(own, 1)
        count = max(float(torch.as_tensor(items).flatten()[0]), 1.0)
        averaged = self.args.average_tokens_across_devices  # the processes' gradients, while the count is of all
        return count / (self.accelerator.num_processes // self.get_tp_size()) if averaged else count

    def _note_learned(self, loss: Tensor, *logits: Tensor) -> None:
        """Note the parameters that a user's loss has of its own, in training."""
        if self.is_in_train and not self._evaluating and not self.variant.built_in and loss.requires_grad:
            self._learned.note(loss, *logits, model=self.model)

    def _graph_for(self, reads: bool) -> Any:
        """What lets the gradient of a loss by the logits be read where autograd is off."""
        return graph_from_head(self.model) if reads and not torch.is_grad_enabled() else nullcontext()

    def _tally_as_written(self, loss: Tensor, outputs: Any, where: Supervised, items: float) -> None:
        """Count a loss in that runs the model itself: its target is read from its gradient by the model's logits."""
        logits = logits_of(outputs, where)
        if logits is None or not logits.requires_grad:
            return self._tally.add_losses(loss * items, len(where))
        self._tally.add_total(loss * items, read_target(loss * items, logits, where))

    def _on_batch(
        self, values: Tensor, tokens: Tokens, where: Supervised, inputs: dict, style: Style, items: float
    ) -> Tensor:
        """The loss of a method that sees whole batches, (B, T, V), on the layout that the model saw."""
        measured, selects = self._is_measured(), self.variant.denominator == "selected"
        with torch.set_grad_enabled(torch.is_grad_enabled() or measured or selects):
            values = values if values.requires_grad else values.detach().requires_grad_()
            total = summed_loss(self.variant, values, tokens, where, inputs, style)
            refuse_total(self.variant.spec, total)
            if not self.variant.built_in:
                watch_gradient(self.variant.spec, values)
            self._note_learned(total, values)
            if not total.requires_grad and not bool(
                total.any()
            ):  # it skips all of these tokens, and backward still runs
                total = total + values[..., :0].sum()
            target = read_target(total, values, where) if measured or selects else None
        if measured and target is not None:
            self._tally.add_total(total, target)
        share = selected_share(target) if selects and target is not None else 1.0
        return total * share / items

    def _say_reduction(self) -> None:
        """Say once how the reduction of a loss was undone, where its mean over tokens is another loss than the one written."""
        division = self.variant.unreduced.division
        reduction = "" if division is None else division.name
        if reduction not in ("", "mean over unmasked", self._said_reduction):
            self._said_reduction = reduction
            logger.warning(
                "qlens undoes the reduction of %s (%s): trained and logged is the sum of its tokens' losses, divided by the "
                "supervised tokens of the step",
                self.variant.spec,
                reduction,
            )


def selected_share(target: Target) -> float:
    """What raises a sum over all supervised tokens to one that counts the selected only, those with a trust other than 0."""
    return len(target.labels) / max(int((target.trust != 0).sum()), 1)
