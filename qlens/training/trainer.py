"""Training with any variant: QLossMixin puts a qlens loss into a transformers Trainer, QTrainer is the plain one."""

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Trainer, TrainingArguments

from qlens.core.errors import InputError, brief
from qlens.core.numerics import precision
from qlens.core.random_draws import draws_of
from qlens.core.supervised import LAYOUT, Supervised
from qlens.core.tokens import MODELS, Tokens
from qlens.data.collator import COLUMNS, collate
from qlens.data.compatibility import check_model
from qlens.data.models import check_token_ids
from qlens.engine.backbone import Bodies, Body, NoBody
from qlens.engine.batch_losses import is_model_loss, style_on_batches, why_whole_batches
from qlens.engine.finite_values import refuse_rows, watch_gradient
from qlens.engine.forward import model_logits
from qlens.engine.fused import fused_pass, why_whole_logits
from qlens.engine.packing import Separation, features_of, inputs_of, is_packed, uncached
from qlens.engine.verification.causality import check_causal, check_decoder
from qlens.losses.leaves import LearnedParameter
from qlens.losses.reduction.unreduced import value_alone
from qlens.registry import Variant, resolve
from qlens.training.checkpoints import RunState
from qlens.training.inputs import Feed
from qlens.training.loss_parameters import LearnedParameters
from qlens.training.measurements import SHARDED
from qlens.training.model_losses import ModelLoss
from qlens.training.whole_batches import WholeBatches, selected_share

NO_INPUTS = ("input_ids", "labels", "attention_mask", *COLUMNS)  # those that ``collate`` knows anyway


class QLossMixin(WholeBatches):
    """A qlens loss for any transformers Trainer: ``class MyTrainer(QLossMixin, Trainer)``.

    The loss of an optimizer step is the sum of the variant's per-token losses over all its supervised tokens, divided
    by their number (by the number of pairs, for a loss of pairs), plus the variant's penalty once: the same however the
    step is cut into micro-batches, padded or packed, and on however many devices (methods of scope "batch" excepted, which
    see one micro-batch at a time; both texts of a pair must be in one micro-batch, and half a pair is refused). For a
    method with ``denominator`` "selected" the sum of every micro-batch is first raised by its supervised over its selected
    tokens, those with a trust other than 0. A mixture-of-experts model's router loss is added in training, weighted as its
    configuration says, where ``config.output_router_logits`` is set: the mean over the micro-batches of a step (transformers
    adds it once for every micro-batch, so that it grows with their number).

    Packed rows (``position_ids`` start again) are trained as rows of their own; a model that does not keep their texts apart
    is refused, as found on a few tokens.

    Beside ``loss``, every log holds the comparables of ``Tally.means`` over all supervised tokens of the logged step,
    ``update_norm``, the norm of that step's change of the parameters (estimated from 16 million of them where more are
    trained, see ``qlens.training.update_norm.UpdateNorm``), and ``aux_loss``, the router loss without its weight; they
    are computed for logged steps only. Evaluation returns ``eval_loss``, the mean over all supervised tokens (pairs)
    of the set whatever the batch size (no penalty, no router loss), and the same comparables as ``eval_*``.

    Checkpoints hold the old policy and what a penalty is measured from, so that a resumed run is the uninterrupted one.

    Args:
        variant: a Variant, a spec like "kd(temperature=2.0)", or a loss function.
        teacher, reference: other causal language models, frozen here and moved to the device; run only if needed. They share
            no trained parameter with the model. A model with adapters (peft) needs no reference: it is the model without them.
        old_every: optimizer steps between refreshes of the old policy, for methods that need one: a copy of the model.
        fused: whether the engine makes the loss from hidden states and head, so that no model's logits are ever whole:
            None, wherever model, method and machine allow, and a log line says why where they do not; True, insist; False, never.
        log_every: every so many logs have the comparables; 0, none.

    What else a method needs is found here: the second pass is the model's own, without gradient; negatives are the
    tokens before a label in its own text; critical, hint, advantage, chosen, pair and weight are columns of the data,
    one value per example, or one per token in line with the labels (see ``qlens.data.collator.collate``).

    Raises:
        InputError: a model that the method needs is missing, has another vocabulary, or is the trained model itself; an
            argument of the Trainer that would compete with the variant; at the first batch, a model whose logits at a token
            depend on later ones.
    """

    model: Any  # the Trainer allows None, for model_init
    loss_is_scaled_for_ga = True  # transformers from about 5.20 asks this, older ones ask model_accepts_loss_kwargs

    def __init__(
        self,
        *args: Any,
        variant: Variant | str | Callable,
        teacher: nn.Module | None = None,
        reference: nn.Module | None = None,
        old_every: int = 8,
        fused: bool | None = None,
        log_every: int = 1,
        **kwargs: Any,
    ):
        self._variant = resolve(variant)
        self._feed = Feed(self.variant, {"teacher": teacher, "reference": reference})
        for name, value, least in (("old_every", old_every, 1), ("log_every", log_every, 0)):
            if not isinstance(value, int) or isinstance(value, bool) or value < least:
                raise InputError(f"{name} must be a whole number of at least {least}, got {brief(value)}")
        if fused not in (None, True, False) or isinstance(fused, int) and not isinstance(fused, bool):
            raise InputError(f"fused must be None, True or False, got {brief(fused)}")
        model = kwargs.get("model", args[0] if args else None)
        if model is not None or kwargs.get("model_init") is None:
            check_model(getattr(model, "module", model), "model")
        if kwargs.get("compute_loss_func") is not None:
            raise InputError("compute_loss_func and variant both define the loss: give QTrainer(variant=...) only")
        self._bodies, self._loss_only = Bodies(fused), False
        super().__init__(*args, **kwargs)
        if self.args.label_smoothing_factor:
            raise InputError("label_smoothing_factor competes with variant: use variant='label_smoothing(epsilon=...)'")
        self.model_accepts_loss_kwargs = True
        self.label_names = list(dict.fromkeys(["labels", *(self.args.label_names or ())]))  # whatever the model takes
        check_decoder(self.model, "model")
        self._feed.settle(self.model, self.args.device)
        self._run = RunState(self.variant, self._feed, old_every)
        self.add_callback(self._run)
        self._model_loss = ModelLoss(self.variant, self._feed.others) if is_model_loss(self.variant) else None
        self._said_reduction = ""
        self._whole: str | None = None  # why a loss needs the layout of its batch, known at the first one
        self._separation = Separation()
        self._learned = LearnedParameters(self.variant.spec, lambda: self.optimizer)
        self.add_callback(self._learned)
        self._measure(log_every)

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """The Trainer's training; see QLossMixin for what a resumed run restores, and ``check_evaluation_data``."""
        self._check_evaluations()
        self._run.checkpoint = None
        return super().train(*args, **kwargs)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        """The Trainer's step of resuming that knows the checkpoint's folder, which the run's state is restored from."""
        self._run.checkpoint = None if checkpoint is None else Path(checkpoint)
        super()._load_optimizer_and_scheduler(checkpoint)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """The Trainer's checkpoint, whose last file says that it is whole, and before it the state of the run."""
        if self.args.should_save and not self.args.save_only_model:
            self._run.save(self._get_output_dir(trial=trial), self.state.global_step)
        super()._save_checkpoint(model, trial)

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """The variant's loss of a micro-batch: sum over its supervised tokens / ``num_items_in_batch``.

        Without ``num_items_in_batch``, the mean over the batch's own tokens. No token supervised: zero, with a graph.
        """
        features = self._features(inputs)
        if self._model_loss is not None:
            return self._as_written(model, features, inputs, return_outputs, num_items_in_batch)
        whole = return_outputs and not self._loss_only
        body, values, outputs = self._forward(model, features, None if whole else self._body(features))
        where = Supervised.of({name: value.to(values.device) for name, value in inputs.items() if name in LAYOUT})
        rows, own_items = where.take(values), self._count(where, inputs)
        items = self._denominator(num_items_in_batch, own_items)
        if self._evaluating:
            self._count_evaluated(len(where), own_items)
        with draws_of(*self._next_place()):
            try:
                if body is None:
                    loss = self._plain(values, rows, where, features, inputs, items)
                else:
                    loss = self._fused(body, rows, where, features, inputs, items)
            except LearnedParameter:
                if self._bodies.wanted:
                    raise
                self._whole = "it has a parameter of its own that requires a gradient"
                self._bodies.refuse(f"for {self.variant.spec}: {self._whole}")
                body, values, outputs = self._forward(model, features, None)
                loss = self._plain(values, where.take(values), where, features, inputs, items)
        self._say_reduction()
        loss = self._with_router_loss(loss, outputs, self._trains(model))
        if self._trains(model):
            loss = loss + self.variant.penalty(self.model) / self._micro_batches
        return (loss, {} if body is not None else outputs) if return_outputs else loss

    def _forward(
        self, model: nn.Module, features: dict[str, Any], body: Body | None
    ) -> tuple[Body | None, Tensor, Any]:
        """The student's pass over a batch: its body and hidden states, or None and its logits; and all its outputs."""
        try:
            if body is not None:
                return body, *body.run(features, model)
        except NoBody as reason:
            self._bodies.give_up(self.model, "model", reason)
        outputs = model(**features, **uncached(self.model))
        return None, outputs["logits"], outputs

    def _fused(
        self, body: Body, hidden: Tensor, where: Supervised, features: dict, inputs: dict, items: float
    ) -> Tensor:
        """The loss by the engine, from hidden states and head."""
        head = body.head
        if not len(where):
            return (hidden @ head.weight.to(hidden.dtype).T).sum()  # zero, and backward still runs

        def read(name: str, other: nn.Module) -> Any:
            with torch.no_grad():
                states = self._bodies.states(other, features, name)
                if states is None:
                    return where.take(model_logits(other, features))
                return states[0].of(where.take(states[1]))

        fields = self._feed.fields(where, features, inputs, head.weight.shape[0], read)
        models = {name: fields.pop(name) for name in MODELS if name in fields}
        shape = {"softcap": body.softcap, "logit_scale": body.logit_scale}
        observe = self._tally.observe if self._is_measured() else None
        bias = None if head.bias is None else head.bias.to(hidden.dtype)  # another one in mixed precision
        weight, labels = head.weight.to(hidden.dtype), where.labels
        loss, made = fused_pass(
            self.variant, hidden, weight, labels, bias, models, fields, shape, items, observe=observe
        )
        return loss * (len(where) / max(made.selected, 1)) if self.variant.denominator == "selected" else loss

    def _plain(
        self, values: Tensor, rows: Tensor, where: Supervised, features: dict, inputs: dict, items: float
    ) -> Tensor:
        """The loss by autograd, from whole logits: ``values`` (B, T, V), of which ``rows`` (N, V) are supervised."""
        if not len(where):
            return rows.sum()  # zero, and backward still runs

        def read(name: str, other: nn.Module) -> Tensor:
            return where.take(model_logits(other, features)).to(rows.dtype)

        fields = self._feed.fields(where, features, inputs, rows.shape[1], read)
        tokens = Tokens(logits=rows, labels=where.labels, **fields)
        if (style := style_on_batches(self.variant, tokens)) is not None:
            return self._on_batch(values, tokens, where, inputs, style, items)
        replay = self.variant.replay(rows.device)
        with value_alone():
            losses = self.variant.loss(tokens)
        losses = losses.to(precision(losses.dtype))  # bfloat16 must not add up
        refuse_rows(self.variant.spec, losses.detach().isnan(), "loss")
        if not self.variant.built_in:
            watch_gradient(self.variant.spec, rows)
        self._note_learned(losses, rows)
        if not losses.requires_grad and not bool(losses.any()):  # it skips all of these tokens, and backward still runs
            losses = losses + rows[:, :0].sum(-1)
        measured, selects = self._is_measured(), self.variant.denominator == "selected"
        share = 1.0
        if measured or selects:
            with replay.again():  # a loss that draws numbers has drawn these, and a logged step draws no others
                share = selected_share(self.variant.target(tokens.with_logits(rows.detach()))) if selects else 1.0
                if measured:
                    self._tally.look(self.variant, tokens, losses)
        return losses.sum() * share / items

    def _body(self, features: dict[str, Any]) -> Body | None:
        """The student as hidden states and head, where model, method and machine allow."""
        if reason := why_whole_logits(self.variant):
            return self._bodies.refuse(reason)
        if self.accelerator.num_processes > 1 or self.args.n_gpu > 1 or self.args.torch_compile:
            return self._bodies.refuse("where models are compiled, or on several devices")
        body = self._bodies.of(self.model, features)
        if body is not None and self._whole is None:
            self._whole = why_whole_batches(self.variant, body.head.weight.shape[0])
        return self._bodies.refuse(f"for {self.variant.spec}: {self._whole}") if self._whole else body

    def prediction_step(self, model: Any, inputs: Any, prediction_loss_only: bool, ignore_keys: Any = None) -> Any:
        """The Trainer's step; where nobody asks for predictions, the logits are not made whole for them either."""
        self._loss_only = prediction_loss_only
        try:
            return super().prediction_step(model, inputs, prediction_loss_only, ignore_keys)
        finally:
            self._loss_only = False

    def _set_signature_columns_if_needed(self) -> None:
        """The model's inputs, and what data may say of tokens beside: none of it is to be dropped."""
        super()._set_signature_columns_if_needed()
        kept = ("labels", *COLUMNS, *(("position_ids", "seq_lengths") if self._collates else ()))
        self._signature_columns = list(dict.fromkeys([*(self._signature_columns or []), *kept]))

    @property
    def _collates(self) -> bool:
        """Whether batches are made by ``qlens.data.collator.collate``."""
        return getattr(self.data_collator, "func", self.data_collator) is collate

    def _features(self, inputs: dict[str, Any]) -> dict[str, Any]:
        """What the models see: no labels and no columns of the data.

        Raises:
            InputError: a model is no causal one, or the data are packed, and it does not keep the texts apart.
        """
        seen = {name: value for name, value in inputs.items() if name not in ("labels", *COLUMNS)}
        features = features_of(seen, self.model)
        if self.accelerator.distributed_type not in SHARDED:
            check_token_ids(self.model, features)
            for name, model in {"model": self.model, **self._feed.others}.items():
                check_causal(model, features, name)
                if is_packed(features):
                    self._separation.prove(model, features, name)
        return features

    def _get_num_items_in_batch(self, batch_samples: list, device: torch.device) -> Any:
        """The Trainer's count over micro-batches and devices: of the labels that are really predicted, or of the pairs."""
        counts = [self._count(Supervised.of(batch), batch) for batch in batch_samples if "labels" in batch]
        items = [torch.zeros(count, dtype=torch.long) for count in counts]
        return super()._get_num_items_in_batch([{"labels": each, "shift_labels": each} for each in items], device)


class QTrainer(QLossMixin, Trainer):
    """transformers.Trainer with a qlens loss; see QLossMixin for what it computes, logs and raises.

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
            self.data_collator = functools.partial(collate, inputs=set(inputs_of(self.model)) - set(NO_INPUTS))
