"""QLossMixin: a qlens loss in a transformers Trainer; one training step from the top."""

from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from qlens.core.errors import InputError, brief
from qlens.core.random_draws import draws_of
from qlens.data.collator import COLUMNS, TEACHER_PROMPT, collate
from qlens.data.compatibility import check_model
from qlens.data.models import check_token_ids, loaded
from qlens.data.supervised_batch import SupervisedBatch
from qlens.engine.finite_values import refuse_total
from qlens.engine.models.causality import check_causal, check_decoder
from qlens.engine.models.packing import TextSeparation, features_of, is_packed, uncached
from qlens.engine.verification.batch_layout import is_model_loss
from qlens.losses.leaves import LearnedParameter
from qlens.registry import Variant, resolve
from qlens.training.checkpoints import RunState
from qlens.training.datasets.pairs import IDS
from qlens.training.metrics_logging import SHARDED, MetricsLogging
from qlens.training.sources import Source
from qlens.training.step.inputs import MethodInputs
from qlens.training.step.loss_parameters import LearnedParameters
from qlens.training.step.model_losses import ModelLoss, count_model_loss, graph_from_head, logits_of
from qlens.training.step.row_losses import LossContext, fused_row_loss, plain_row_loss, undone_reduction
from qlens.training.step.student import Student, StudentPass


class QLossMixin(MetricsLogging):
    """A qlens loss for any transformers Trainer: ``class MyTrainer(QLossMixin, Trainer)``.

    The loss of an optimizer step is the sum of the variant's per-token losses over its supervised tokens, divided by their
    number (by the number of pairs, for a loss of pairs), plus the variant's penalty once. It is the same however the step is
    cut into micro-batches, padded or packed, and on however many devices, except for methods of scope "batch", which see one
    micro-batch at a time; both texts of a pair must be in one micro-batch. For a method with ``denominator`` "selected" the
    sum of every micro-batch is first multiplied by its supervised over its selected tokens, those with a trust other than 0.

    A mixture-of-experts model's router loss is added in training, weighted as its configuration says, where
    ``config.output_router_logits`` is set: the mean over the micro-batches of a step (transformers adds it once per
    micro-batch, so that it grows with their number).

    Packed rows (``position_ids`` start again) are trained as rows of their own; a model that does not keep their texts apart
    on a few tokens is refused.

    Beside ``loss``, every log holds the metrics of ``MetricSums.means`` over all supervised tokens of the logged step;
    ``update_norm``, the norm of that step's change of the parameters (estimated from 16 million of them where more are
    trained, see ``qlens.training.update_norm.UpdateNorm``); and ``aux_loss``, the router loss without its weight. They are
    computed for logged steps only. Evaluation returns ``eval_loss``, the mean over all supervised tokens (pairs) of the set
    whatever the batch size (no penalty, no router loss), and the same metrics as ``eval_*``.

    Checkpoints hold the old policy, averages and the start of a penalty, so that a resumed run equals the uninterrupted one.

    Args:
        variant: a Variant, a spec like "kd(temperature=2.0)", or a loss function.
        model: the model to train, or the path of one (``qlens.data.models.load_model``).
        teacher, reference: other causal language models or their paths, frozen here and moved to the device unless they are
            quantised; run only if needed. They share no trained parameter with the model, and one that is both is loaded and
            run once. Or a source made of the model itself (``qlens.training.sources``): ``EMA(decay)``, ``AdaptersOff()``,
            ``CurrentModel()``. A model with adapters (peft) needs no reference: it is the model without them. Where their
            vocabulary is padded to another size it is cut or filled up, see ``qlens.data.vocabularies.Vocabularies``.
        teacher_template: text with columns as fields, from which the prompt is written that the teacher sees instead of the
            student's; rows may have it as ``teacher_prompt``. See ``qlens.training.datasets.privileged``.
        old_every: optimizer steps between syncs of the old policy, a copy of the trained weights, for methods that need one.
        fused: whether the loss is computed from hidden states and head, so that no model's logits are ever whole: None,
            wherever model, method and machine allow, with a log line where they do not; True, insist; False, never.
        log_every: log the metrics at every n-th log; 0, never.

    Other inputs of a method: the second pass is the model's own, without gradient; negatives are the tokens before a label
    in its own text; critical, hint, advantage, chosen, pair and weight are columns of the data, one value per example or one
    per token (see ``qlens.data.collator.collate``).

    Raises:
        InputError: a model that the method needs is missing, has another vocabulary, or is the trained model itself; an
            argument of the Trainer that competes with the variant; at the first batch, a model whose logits at a token
            depend on later ones.

    Example:
        >>> from transformers import Trainer
        >>> class MyTrainer(QLossMixin, Trainer):
        ...     pass
        >>> trainer = MyTrainer(model=model, args=args, variant="dft", train_dataset=examples)  # doctest: +SKIP
    """

    model: Any  # the Trainer allows None, for model_init
    loss_is_scaled_for_ga = True  # transformers from about 5.20 asks this, older ones ask model_accepts_loss_kwargs

    def __init__(
        self,
        *args: Any,
        variant: Variant | str | Callable,
        teacher: nn.Module | Source | str | Path | None = None,
        reference: nn.Module | Source | str | Path | None = None,
        teacher_template: str | None = None,
        old_every: int = 8,
        fused: bool | None = None,
        log_every: int = 1,
        **kwargs: Any,
    ):
        self._variant, self._teacher_template = resolve(variant), teacher_template
        self._method_inputs = MethodInputs(self.variant, {"teacher": teacher, "reference": reference})
        for name, value, least in (("old_every", old_every, 1), ("log_every", log_every, 0)):
            if not isinstance(value, int) or isinstance(value, bool) or value < least:
                raise InputError(f"{name} must be a whole number of at least {least}, got {brief(value)}")
        if fused not in (None, True, False) or isinstance(fused, int) and not isinstance(fused, bool):
            raise InputError(f"fused must be None, True or False, got {brief(fused)}")
        model = kwargs.get("model", args[0] if args else None)
        if model is not None or kwargs.get("model_init") is None:
            model = self._opened(model)
            args, kwargs = ((model, *args[1:]), kwargs) if args else (args, {**kwargs, "model": model})
        if kwargs.get("compute_loss_func") is not None:
            raise InputError("compute_loss_func and variant both define the loss: give QTrainer(variant=...) only")
        self._student, self._loss_only = Student(self.variant, fused), False
        super().__init__(*args, **kwargs)
        if self.args.label_smoothing_factor:
            raise InputError("label_smoothing_factor competes with variant: use variant='label_smoothing(epsilon=...)'")
        self.model_accepts_loss_kwargs = True
        self.label_names = list(dict.fromkeys(["labels", *(self.args.label_names or ())]))  # whatever the model takes
        check_decoder(self.model, "model")
        self._method_inputs.set_up(self.model, self.args.device, self.processing_class)
        self._run = RunState(self.variant, self._method_inputs, old_every)
        self.add_callback(self._run)
        self._model_loss = (
            ModelLoss(self.variant, self._method_inputs.other_models) if is_model_loss(self.variant) else None
        )
        self._separation = TextSeparation()
        self._learned = LearnedParameters(self.variant.spec, lambda: self.optimizer)
        self.add_callback(self._learned)
        self._start_metrics(log_every)

    def _opened(self, model: Any) -> Any:
        """The model to train, loaded where it is a path."""
        model = loaded(model, "model")
        check_model(getattr(model, "module", model), "model")
        return model

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """The Trainer's training; see QLossMixin for what a resumed run restores, and ``check_evaluation_data``."""
        self._check_evaluations()
        self._run.checkpoint = None
        return super().train(*args, **kwargs)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        """The Trainer's step of resuming; the run's state is restored from the same folder."""
        self._run.checkpoint = None if checkpoint is None else Path(checkpoint)
        super()._load_optimizer_and_scheduler(checkpoint)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """The Trainer's checkpoint, with the state of the run written before it: its last file marks it as complete."""
        if self.args.should_save and not self.args.save_only_model:
            self._run.save(self._get_output_dir(trial=trial), self.state.global_step)
        super()._save_checkpoint(model, trial)

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """The loss of a micro-batch: sum over its supervised tokens / ``num_items_in_batch``.

        Without ``num_items_in_batch``, the mean over the batch's own tokens. No token supervised: zero, with a graph.
        """
        batch = SupervisedBatch(inputs)
        features = self._features(batch)
        if self._model_loss is not None:
            loss, outputs = self._loss_on_model(model, batch, features, return_outputs, num_items_in_batch)
            return (loss, outputs) if return_outputs else loss
        whole = return_outputs and not self._loss_only
        student = self._student.run(self.model, model, features, whole, self._machine_reason())
        batch = batch.to(student.values.device)
        own_items = self._items(batch)
        items = self._denominator(num_items_in_batch, own_items)
        if self._evaluating:
            self._count_evaluated(len(batch), own_items)
        with draws_of(*self._next_place()):
            try:
                loss = self._row_loss(student, batch, features, items)
            except LearnedParameter:
                if self._student.backbones.fused:
                    raise
                self._student.use_whole_logits("it has a parameter of its own that requires a gradient")
                student = self._student.run_whole(self.model, model, features)
                loss = self._row_loss(student, batch, features, items)
        self._warn_once(undone_reduction(self.variant))
        loss = self._with_router_loss(loss, student.outputs, self._trains(model))
        loss = self._with_penalty(loss, model)
        return (loss, {} if student.backbone is not None else student.outputs) if return_outputs else loss

    def _row_loss(self, student: StudentPass, batch: SupervisedBatch, features: dict, items: float) -> Tensor:
        """The loss of the supervised rows, from hidden states and head or from whole logits."""
        backbone, rows = student.backbone, batch.take(student.values)
        context = self._loss_context(items)
        if backbone is None:
            if not len(batch):
                return rows.sum()  # zero, and backward still runs
            fields = self._method_inputs.gather(batch, features, rows.shape[1], None)
            return plain_row_loss(context, student.values, rows, batch, fields)
        if not len(batch):
            return (rows @ backbone.head.weight.to(rows.dtype).T).sum()
        vocabulary = backbone.head.weight.shape[0]
        fields = self._method_inputs.gather(batch, features, vocabulary, self._student.backbones)
        return fused_row_loss(context, backbone, rows, batch, fields)

    def _loss_on_model(
        self, model: nn.Module, batch: SupervisedBatch, features: dict, return_outputs: bool, num_items_in_batch: Any
    ) -> tuple[Tensor, Any]:
        """The loss of a method that runs the model itself, f(model, inputs), and the outputs of its forward pass."""
        assert self._model_loss is not None
        self._student.backbones.refuse(f"for {self.variant.name}: it runs the model itself")
        own_items = self._items(batch)
        items = None if num_items_in_batch is None else self._denominator(num_items_in_batch, own_items)
        if self._evaluating:
            self._count_evaluated(len(batch), own_items)
        if not len(batch):
            outputs = model(**features, **uncached(self.model))
            return outputs["logits"][:0].sum(), outputs
        metrics, all_items = self._wanted_metrics(), items or own_items
        graph = metrics is not None and not torch.is_grad_enabled()  # the target is read from a gradient
        with draws_of(*self._next_place()), graph_from_head(self.model) if graph else nullcontext():
            called = self._model_loss(model, batch, features, items, own_items / all_items)
            loss, outputs = called.loss, called.outputs
            refuse_total(self.variant.spec, loss, logits_of(outputs, batch))
            if metrics is not None:
                count_model_loss(metrics, loss * all_items, outputs, batch)
        if not self._learned.searched:  # its graph is that of the whole model
            self._loss_context(all_items).note_parameters(loss)
        loss = self._with_missing_router_loss(loss, called.passes, self._trains(model))
        loss = self._with_penalty(loss, model)
        if return_outputs and outputs is None and not self._loss_only:
            raise InputError(
                f"{self.variant.name} runs the model more than once, so that there are no logits to predict with: set "
                "TrainingArguments(prediction_loss_only=True)"
            )
        return loss, {} if outputs is None else outputs

    def _loss_context(self, items: float) -> LossContext:
        """The denominator of a micro-batch, and where its metrics and parameters are noted."""
        notes = self.is_in_train and not self._evaluating and not self.variant.built_in
        learned = self._learned if notes else None
        return LossContext(self.variant, items, self._wanted_metrics(), learned, self.model)

    def _with_penalty(self, loss: Tensor, model: nn.Module) -> Tensor:
        """The loss with a micro-batch's share of the variant's penalty, in training."""
        return loss + self.variant.penalty(self.model) / self._micro_batches if self._trains(model) else loss

    def _trains(self, model: nn.Module) -> bool:
        """Whether the loss is one to train by: in training whatever the model's mode, elsewhere by its mode."""
        return not self._evaluating and (self.is_in_train or model.training)

    def _items(self, batch: SupervisedBatch) -> int:
        """The number of items that a micro-batch's losses are averaged over: supervised tokens, or pairs."""
        return batch.items(self.variant.name, pairs=self.variant.scope == "pair")

    def _denominator(self, items: Any, own: int) -> float:
        """What the sum of a micro-batch's losses is divided by: the items of all micro-batches, or its own."""
        if items is None:
            return max(own, 1)
        count = max(float(torch.as_tensor(items).flatten()[0]), 1.0)
        averaged = self.args.average_tokens_across_devices  # the processes' gradients, while the count is of all
        return count / (self.accelerator.num_processes // self.get_tp_size()) if averaged else count

    def _machine_reason(self) -> str:
        """Why the machine needs whole logits, "" where it does not."""
        if self.accelerator.num_processes > 1 or self.args.n_gpu > 1 or self.args.torch_compile:
            return "where models are compiled, or on several devices"
        return ""

    def prediction_step(self, model: Any, inputs: Any, prediction_loss_only: bool, ignore_keys: Any = None) -> Any:
        """The Trainer's step; without predictions to return, whole logits are not needed."""
        self._loss_only = prediction_loss_only
        try:
            return super().prediction_step(model, inputs, prediction_loss_only, ignore_keys)
        finally:
            self._loss_only = False

    def _set_signature_columns_if_needed(self) -> None:
        """Keep the columns of the data, which the Trainer would drop with all that is not an input of the model."""
        super()._set_signature_columns_if_needed()
        columns = (
            "labels",
            TEACHER_PROMPT,
            *COLUMNS,
            *IDS,
            *(("position_ids", "seq_lengths") if self._collates else ()),
        )
        self._signature_columns = list(dict.fromkeys([*(self._signature_columns or []), *columns]))

    @property
    def _collates(self) -> bool:
        """Whether batches are made by ``qlens.data.collator.collate``."""
        return getattr(self.data_collator, "func", self.data_collator) is collate

    def _features(self, batch: SupervisedBatch) -> dict[str, Any]:
        """The inputs of the models, without labels and columns.

        Raises:
            InputError: a model is not causal, or the data are packed and a model does not keep the texts apart.
        """
        features = features_of(batch.model_inputs(), self.model)
        if self.accelerator.distributed_type not in SHARDED:
            check_token_ids(self.model, features)
            for name, model in {"model": self.model, **self._method_inputs.other_models}.items():
                check_causal(model, features, name)
                if is_packed(features):
                    self._separation.verify(model, features, name)
        return features

    def _get_num_items_in_batch(self, batch_samples: list, device: torch.device) -> Any:
        """The Trainer's count over micro-batches and devices: of the labels that are really predicted, or of the pairs."""
        counts = [self._items(SupervisedBatch(batch)) for batch in batch_samples if "labels" in batch]
        items = [torch.zeros(count, dtype=torch.long) for count in counts]
        return super()._get_num_items_in_batch([{"labels": each, "shift_labels": each} for each in items], device)
