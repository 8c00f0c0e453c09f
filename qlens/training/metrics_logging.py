"""Logging of metrics beside the loss, in training and in evaluation."""

import logging
import math
from typing import Any

import torch
from accelerate.utils import DistributedType
from torch import Tensor
from transformers import Trainer
from transformers.trainer_utils import has_length

from qlens.core.errors import InputError, brief
from qlens.data.compatibility import vocabulary_size
from qlens.losses.leaves import reaches
from qlens.losses.replay import Replay
from qlens.registry import Variant
from qlens.training.evaluation_data import check_evaluation_data, no_supervised_token
from qlens.training.metrics import MetricSums
from qlens.training.step.router_loss import asks_for_router_loss, router_loss
from qlens.training.update_norm import UpdateNorm

logger = logging.getLogger(__name__)
SHARDED = (DistributedType.FSDP, DistributedType.DEEPSPEED, DistributedType.MEGATRON_LM)
EVALUATION = -1  # instead of a step


class MetricsLogging(Trainer):
    """A Trainer that logs the metrics of ``MetricSums``, the update norm and the router loss beside the loss."""

    _variant: Variant

    @property
    def variant(self) -> Variant:
        """The method; fixed, since its inputs and state are set up with the Trainer."""
        return self._variant

    @variant.setter
    def variant(self, value: Any) -> None:
        raise InputError(
            f"variant is {self._variant.spec} for as long as this Trainer lives: make another, QTrainer(model=trainer.model, "
            f"variant={value.spec if isinstance(value, Variant) else brief(value)}, ...)"
        )

    _micro_batches = property(lambda self: getattr(self, "current_gradient_accumulation_steps", 1))  # of this step

    def _start_metrics(self, log_every: int) -> None:
        """Set up the metrics; every ``log_every``-th log holds them, none for 0."""
        self.log_every = log_every
        self._sums, self._evaluating = MetricSums(), False
        self._evaluated = (0, 0, 0)  # batches, tokens, and items that the evaluation's loss is a mean of
        self._router: list[Tensor] = []
        self._warned: set[str] = {""}
        self._place = (EVALUATION, -1)  # step and micro-batch
        self._update = UpdateNorm(lambda: self.model, self._logs_metrics)
        if self.accelerator.distributed_type in SHARDED:
            logger.warning("qlens logs no update_norm where parameters are sharded over processes")
        else:
            self.add_callback(self._update)

    def _next_place(self) -> tuple[int, ...]:
        """Seed, step, number and process of the next micro-batch, for its draws; () outside of training and evaluation."""
        if not (self.is_in_train or self._evaluating):
            return ()
        step = EVALUATION if self._evaluating else self.state.global_step
        self._place = (step, self._place[1] + 1 if self._place[0] == step else 0)
        return (self.args.seed, *self._place, self.accelerator.process_index)

    def _count_evaluated(self, tokens: int, items: int) -> None:
        """Add a micro-batch to the counts of an evaluation."""
        batches, *counted = self._evaluated
        self._evaluated = (batches + 1, counted[0] + tokens, counted[1] + items)

    def _wanted_metrics(self) -> MetricSums | None:
        """The sums that this batch is counted in; None where its metrics are not logged."""
        return self._sums if self._logs_metrics() else None

    def _logs_metrics(self) -> bool:
        """Whether the metrics of this batch are logged."""
        if self._evaluating:
            return True
        if not (self.is_in_train and self.log_every and self.logs_this_step()):
            return False
        return sum("loss" in entry for entry in self.state.log_history) % self.log_every == 0

    def logs_this_step(self) -> bool:
        """Whether the optimizer step under way will be logged."""
        step, args = self.state.global_step + 1, self.args
        if step == 1 and args.logging_first_step:
            return True
        if args.logging_strategy == "steps":
            return step % self.state.logging_steps == 0
        if args.logging_strategy == "epoch":
            batches = self.callback_handler.train_dataloader
            ends = has_length(batches) and step % math.ceil(len(batches) / args.gradient_accumulation_steps) == 0
            return ends or step == self.state.max_steps
        return False

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """The Trainer's log, with the metrics of the step beside its loss."""
        if "loss" in logs:
            means, self._sums = self._sums.means(self.accelerator), MetricSums()
            logs |= {name: value for name, value in means.items() if name != "loss"} | self._update.take()
            logs |= self._router_mean()
        super().log(logs, *args, **kwargs)

    def _router_mean(self) -> dict[str, float]:
        """The mean of the router losses since the last log, on all processes."""
        values, self._router = self._router, []
        if not values:
            return {}
        return {"aux_loss": self.accelerator.gather(torch.stack(values).mean()[None]).mean().item()}

    def _check_evaluations(self) -> None:
        """Check that the evaluations in training will have a loss, without moving random states.

        Raises:
            InputError: one will not.
        """
        args, sets = self.args, self.eval_dataset
        if sets is None or (args.eval_strategy == "no" and not args.eval_on_start):
            return
        has_config = hasattr(getattr(self.model, "config", None), "get_text_config")
        vocabulary = vocabulary_size(self.model) if has_config else None
        named = [(f"eval_{key}", key) for key in sets] if isinstance(sets, dict) else [("eval", None)]
        for name, key in named:
            with Replay(args.device, self.data_collator).again():
                check_evaluation_data(name, self.get_eval_dataloader(key), self.variant, vocabulary)

    def evaluation_loop(
        self, dataloader: Any, description: str, *args: Any, metric_key_prefix: str = "eval", **kwargs: Any
    ) -> Any:
        """The Trainer's loop, with loss and metrics as means over all supervised tokens of the set.

        Raises:
            InputError: no token is supervised, so that a mean of 0 would look perfect; or an evaluation (not a prediction)
                has no loss at all.
        """
        training = self._sums, self._router, self._place
        self._sums, self._evaluating, self._router, self._evaluated = MetricSums(), True, [], (0, 0, 0)
        self._place = (EVALUATION, -1)  # every evaluation of a set draws the same
        try:
            output = super().evaluation_loop(
                dataloader, description, *args, metric_key_prefix=metric_key_prefix, **kwargs
            )
            means = self._sums.means(self.accelerator)
            counts = torch.tensor(self._evaluated, dtype=torch.float64, device=self.args.device)
            batches, tokens, items = self.accelerator.gather(counts[None]).sum(0).tolist()
            if batches and not tokens:
                raise no_supervised_token(metric_key_prefix)
            if description == "Evaluation" and output.num_samples and not batches:
                raise InputError(
                    f"the evaluation set ({metric_key_prefix}) has no loss: its batches lack one of "
                    f"{self.label_names} (TrainingArguments(label_names=...)); trainer.predict takes data without labels"
                )
            if means:
                means["loss"] *= tokens / items
            means |= self._router_mean()
        finally:
            (self._sums, self._router, self._place), self._evaluating = training, False
        named = {f"{metric_key_prefix}_{name}": value for name, value in means.items()}
        return output._replace(metrics={**(output.metrics or {}), **named})

    def _with_router_loss(self, loss: Tensor, outputs: Any, training: bool) -> Tensor:
        """The loss with a micro-batch's share of the model's router loss, where it has one; in training only."""
        if (term := router_loss(self.model, outputs)) is None:
            return loss
        value, weight = term
        if self._logs_metrics():
            self._router.append(value.detach())
        return loss + weight * value.to(loss.device) / self._micro_batches if training and weight else loss

    def _with_missing_router_loss(self, loss: Tensor, passes: list[Any], training: bool) -> Tensor:
        """The loss with the mean router loss of these forward passes, where it does not depend on one already.

        A loss that returns the model's own, model(**inputs).loss, includes it.
        """
        terms = [term for outputs in passes if (term := router_loss(self.model, outputs)) is not None]
        terms = [(value, weight) for value, weight in terms if value.requires_grad or not training]
        if not terms:
            if training and asks_for_router_loss(self.model):
                self._warn_once(
                    "qlens: no router loss is trained, although config.output_router_logits is set: the loss does not "
                    "call the model itself, model(**inputs), whose outputs hold aux_loss"
                )
            return loss
        mean, weight = torch.stack([value.to(loss.device) for value, _ in terms]).mean(), terms[0][1]
        if self._logs_metrics():
            self._router.append(mean.detach())
        if not training or not weight:
            return loss
        if any(reaches(loss, value) for value, _ in terms):
            return loss
        self._warn_once(
            f"qlens: {weight:g} times the model's router loss (aux_loss) is added to the loss, which leaves it out; set "
            "model.config.output_router_logits = False to train without it"
        )
        return loss + weight * mean / self._micro_batches

    def _warn_once(self, message: str) -> None:
        """Log a warning, unless it has been logged before or is empty."""
        if message not in self._warned:
            self._warned.add(message)
            logger.warning(message)
