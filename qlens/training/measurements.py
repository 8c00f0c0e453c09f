"""Measurements: what a Trainer logs beside its loss, in training and in evaluation."""

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
from qlens.training.metrics import Tally
from qlens.training.router_loss import asks_for_router_loss, router_loss
from qlens.training.update_norm import UpdateNorm

logger = logging.getLogger(__name__)
SHARDED = (DistributedType.FSDP, DistributedType.DEEPSPEED, DistributedType.MEGATRON_LM)
EVALUATION = -1  # instead of a step


class Measurements(Trainer):
    """A Trainer whose logs hold comparables, the update norm and the router loss of the steps that are logged."""

    _variant: Variant

    @property
    def variant(self) -> Variant:
        """The method, for as long as this Trainer lives: its inputs, state and path are chosen when the Trainer is made."""
        return self._variant

    @variant.setter
    def variant(self, value: Any) -> None:
        raise InputError(
            f"variant is {self._variant.spec} for as long as this Trainer lives: make another, QTrainer(model=trainer.model, "
            f"variant={value.spec if isinstance(value, Variant) else brief(value)}, ...)"
        )

    _micro_batches = property(lambda self: getattr(self, "current_gradient_accumulation_steps", 1))  # of this step

    def _measure(self, log_every: int) -> None:
        """Begin to measure; every so many logs hold the measurements, 0: none."""
        self.log_every = log_every
        self._tally, self._evaluating = Tally(), False
        self._evaluated = (0, 0, 0)  # batches, tokens, and items that the evaluation's loss is a mean of
        self._router: list[Tensor] = []
        self._router_said: set[str] = set()
        self._place = (EVALUATION, -1)  # step and micro-batch
        self._update = UpdateNorm(lambda: self.model, self._is_measured)
        if self.accelerator.distributed_type in SHARDED:
            logger.warning("qlens logs no update_norm where parameters are sharded over processes")
        else:
            self.add_callback(self._update)

    def _next_place(self) -> tuple[int, ...]:
        """Where in the run the next micro-batch is: none outside of training and evaluation."""
        if not (self.is_in_train or self._evaluating):
            return ()
        step = EVALUATION if self._evaluating else self.state.global_step
        self._place = (step, self._place[1] + 1 if self._place[0] == step else 0)
        return (self.args.seed, *self._place, self.accelerator.process_index)

    def _count_evaluated(self, tokens: int, items: int) -> None:
        """Count a micro-batch of an evaluation in."""
        batches, *counted = self._evaluated
        self._evaluated = (batches + 1, counted[0] + tokens, counted[1] + items)

    def _is_measured(self) -> bool:
        """Whether this batch is measured."""
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
        """The Trainer's log, with the comparables of the step beside its loss."""
        if "loss" in logs:
            means, self._tally = self._tally.means(self.accelerator), Tally()
            logs |= {name: value for name, value in means.items() if name != "loss"} | self._update.take()
            logs |= self._router_mean()
        super().log(logs, *args, **kwargs)

    def _router_mean(self) -> dict[str, float]:
        """The mean of the router losses that were remembered, on all processes."""
        values, self._router = self._router, []
        if not values:
            return {}
        return {"aux_loss": self.accelerator.gather(torch.stack(values).mean()[None]).mean().item()}

    def _check_evaluations(self) -> None:
        """Whether the evaluations that training will make have a loss; draws are left alone.

        Raises:
            InputError: one has not.
        """
        args, sets = self.args, self.eval_dataset
        if sets is None or (args.eval_strategy == "no" and not args.eval_on_start):
            return
        known = hasattr(getattr(self.model, "config", None), "get_text_config")
        vocabulary = vocabulary_size(self.model) if known else None
        named = [(f"eval_{key}", key) for key in sets] if isinstance(sets, dict) else [("eval", None)]
        for name, key in named:
            with Replay(args.device, self.data_collator).again():
                check_evaluation_data(name, self.get_eval_dataloader(key), self.variant, vocabulary)

    def evaluation_loop(
        self, dataloader: Any, description: str, *args: Any, metric_key_prefix: str = "eval", **kwargs: Any
    ) -> Any:
        """The Trainer's loop, with loss and comparables as means over all supervised tokens of the set.

        Raises:
            InputError: there are losses, but none of a supervised token: their mean would be taken for a perfect 0; or an
                evaluation (a prediction may) has no loss at all.
        """
        training = self._tally, self._router, self._place
        self._tally, self._evaluating, self._router, self._evaluated = Tally(), True, [], (0, 0, 0)
        self._place = (EVALUATION, -1)  # every evaluation of a set draws the same
        try:
            output = super().evaluation_loop(
                dataloader, description, *args, metric_key_prefix=metric_key_prefix, **kwargs
            )
            means = self._tally.means(self.accelerator)
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
            (self._tally, self._router, self._place), self._evaluating = training, False
        named = {f"{metric_key_prefix}_{name}": value for name, value in means.items()}
        return output._replace(metrics={**(output.metrics or {}), **named})

    def _with_router_loss(self, loss: Tensor, outputs: Any, training: bool) -> Tensor:
        """The loss with the model's router loss, if it has one, a micro-batch's share of it; in training only."""
        if (found := router_loss(self.model, outputs)) is None:
            return loss
        value, weight = found
        if self._is_measured():
            self._router.append(value.detach())
        return loss + weight * value.to(loss.device) / self._micro_batches if training and weight else loss

    def _with_missing_router_loss(self, loss: Tensor, passes: list[Any], training: bool) -> Tensor:
        """The loss with the mean of the model's router losses in these forward passes, where it was computed from none of them.

        A loss that returns the model's own, model(**inputs).loss, has the router loss in it.
        """
        found = [value for outputs in passes if (value := router_loss(self.model, outputs)) is not None]
        found = [(value, weight) for value, weight in found if value.requires_grad or not training]
        if not found:
            if training and asks_for_router_loss(self.model):
                self._say_router(
                    "no router loss is trained, although config.output_router_logits is set: the loss does not "
                    "call the model itself, model(**inputs), whose outputs hold aux_loss"
                )
            return loss
        mean, weight = torch.stack([value.to(loss.device) for value, _ in found]).mean(), found[0][1]
        if self._is_measured():
            self._router.append(mean.detach())
        if not training or not weight:
            return loss
        if any(reaches(loss, value) for value, _ in found):
            return loss
        self._say_router(
            f"{weight:g} times the model's router loss (aux_loss) is added to the loss, which leaves it out; set "
            "model.config.output_router_logits = False to train without it"
        )
        return loss + weight * mean / self._micro_batches

    def _say_router(self, sentence: str) -> None:
        """Log what happens to the router loss, once."""
        if sentence not in self._router_said:
            self._router_said.add(sentence)
            logger.warning("qlens: %s", sentence)
