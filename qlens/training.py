"""Training with any variant: QLossMixin puts a qlens loss into a transformers Trainer, QTrainer is the plain one."""

import inspect
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_utils import has_length

from qlens.batching import COLUMNS, Supervised, collate, positions
from qlens.errors import InputError
from qlens.feeding import Feed
from qlens.registry import Variant, resolve
from qlens.tokens import Tokens, precision

LAYOUT = ("labels", "attention_mask", "position_ids")
COMPARABLES = (
    "loss",
    "nll",
    "negative_mass",
    "pull",
    "room",
    "weight",
    "weight_squared",
    "target_entropy",
    "kl_target",
)


class QLossMixin(Trainer):
    """A qlens loss for any transformers Trainer: ``class MyTrainer(QLossMixin, Trainer)``.

    The loss of an optimizer step is the sum of the variant's per-token losses over all its supervised tokens, divided
    by their number, plus the variant's penalty once: the same however the step is cut into micro-batches, padded or
    packed, and on however many devices (methods of scope "batch" or "pair" excepted, which see one micro-batch at a
    time). The number is that of all supervised tokens; for a method with ``denominator`` "selected" the sum of every
    micro-batch is first raised by its supervised over its selected tokens, those with a trust other than 0.

    Beside ``loss``, every log holds the comparables of ``Tally.means`` over all supervised tokens of the logged step,
    and ``update_norm``, the norm of that step's change of the parameters; they are computed for logged steps only.
    Evaluation returns ``eval_loss``, the mean over all supervised tokens of the set whatever the batch size (no
    penalty), and the same comparables as ``eval_*``.

    Args:
        variant: a Variant, a spec like "kd(temperature=2.0)", or a loss function.
        teacher, reference: other causal language models, frozen here and moved to the device; run only if needed.
        old_every: optimizer steps between refreshes of the old policy, for methods that need one: a copy of the model.

    What else a method needs is found here: the second pass is the model's own, without gradient; negatives are the
    tokens before a label in its own text; critical, hint, advantage, chosen, pair and weight are columns of the data,
    one value per example, or one per token in line with the labels (see ``qlens.batching.collate``).

    Raises:
        InputError: a model that the method needs is missing, has another vocabulary, or is the trained model itself; or
            an argument of the Trainer that would compete with the variant.
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
        **kwargs: Any,
    ):
        self.variant = resolve(variant)
        self._feed = Feed(self.variant, {"teacher": teacher, "reference": reference}, old_every)
        if kwargs.get("compute_loss_func") is not None:
            raise InputError("compute_loss_func and variant both define the loss: give QTrainer(variant=...) only")
        super().__init__(*args, **kwargs)
        if self.args.label_smoothing_factor:
            raise InputError("label_smoothing_factor competes with variant: use variant='label_smoothing(epsilon=...)'")
        self.model_accepts_loss_kwargs = True
        self.add_callback(self._feed.follow(self.model, self.args.device))
        self.variant.penalty(self.model)  # a penalty measures from here, whatever checkpoint is resumed later
        self._tally, self._evaluating = Tally(), False
        self._update = UpdateNorm(self)
        self.add_callback(self._update)

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """The variant's loss of a micro-batch: sum over its supervised tokens / ``num_items_in_batch``.

        Without ``num_items_in_batch``, the mean over the batch's own tokens. No token supervised: zero, with a graph.
        """
        features = self._features(inputs)
        outputs = model(**features)
        logits = outputs["logits"]
        supervised = Supervised.of({k: v.to(logits.device) for k, v in inputs.items() if k in LAYOUT})
        rows = supervised.take(logits)
        if len(supervised):
            fields = self._feed.fields(supervised, rows, features, inputs)
            tokens = Tokens(logits=rows, labels=supervised.labels, **fields)
            losses = self.variant.loss(tokens)
            losses = losses.to(precision(losses.dtype))  # bfloat16 must not add up
            if self._evaluating or (self.is_in_train and self.logs_this_step()):
                self._tally.add(self.variant, tokens, losses)
            total = losses.sum() * self._selected(tokens)
        else:
            total = rows.sum()  # zero, and backward still runs
        if num_items_in_batch is None:
            loss = total / max(len(supervised), 1)
        else:
            loss = total / torch.as_tensor(num_items_in_batch, device=total.device).flatten()[0].clamp(min=1)
            if self.args.average_tokens_across_devices:  # the processes' gradients are averaged, the count is of all
                loss = loss * (self.accelerator.num_processes // self.get_tp_size())
        if model.training:
            loss = loss + self.variant.penalty(self.model) / getattr(self, "current_gradient_accumulation_steps", 1)
        return (loss, outputs) if return_outputs else loss

    def _selected(self, tokens: Tokens) -> float:
        """What raises a sum over all supervised tokens to one that counts the selected only."""
        if self.variant.denominator != "selected":
            return 1.0
        kept = self.variant.target(tokens.replace(logits=tokens.logits.detach())).trust != 0
        return len(tokens) / max(int(kept.sum()), 1)

    def _set_signature_columns_if_needed(self) -> None:
        """The model's inputs, and what data may say of tokens beside: none of it is to be dropped."""
        super()._set_signature_columns_if_needed()
        self._signature_columns = list(dict.fromkeys([*(self._signature_columns or []), *COLUMNS]))

    def _features(self, inputs: dict[str, Any]) -> dict[str, Any]:
        """What the models see: no labels, and positions that ignore padding on the left."""
        features = {name: value for name, value in inputs.items() if name not in ("labels", *COLUMNS)}
        mask = features.get("attention_mask")
        if mask is not None and "position_ids" not in features and not mask[:, 0].all():
            if "position_ids" in inspect.signature(self.model.forward).parameters:
                features["position_ids"] = positions(mask)
        return features

    def _get_num_items_in_batch(self, batch_samples: list, device: torch.device) -> Any:
        """The Trainer's count over micro-batches and devices, of the labels that are really predicted."""
        labels = [Supervised.of(batch).labels for batch in batch_samples if "labels" in batch]
        return super()._get_num_items_in_batch([{"labels": kept, "shift_labels": kept} for kept in labels], device)

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
        super().log(logs, *args, **kwargs)

    def evaluation_loop(self, *args: Any, metric_key_prefix: str = "eval", **kwargs: Any) -> Any:
        """The Trainer's loop, with loss and comparables as means over all supervised tokens of the set."""
        training, self._tally, self._evaluating = self._tally, Tally(), True
        try:
            output = super().evaluation_loop(*args, metric_key_prefix=metric_key_prefix, **kwargs)
            means = self._tally.means(self.accelerator)
        finally:
            self._tally, self._evaluating = training, False
        named = {f"{metric_key_prefix}_{name}": value for name, value in means.items()}
        return output._replace(metrics={**(output.metrics or {}), **named})


class QTrainer(QLossMixin, Trainer):
    """transformers.Trainer with a qlens loss; see QLossMixin for what it computes, logs and raises.

    Batches are made by ``qlens.batching.collate`` unless ``data_collator`` says otherwise.

    Example:
        >>> trainer = QTrainer(model=model, args=args, variant="target_sft", teacher=teacher,
        ...                    train_dataset=examples)                                     # doctest: +SKIP
        >>> trainer.train()                                                                # doctest: +SKIP
    """

    def __init__(
        self, model: Any = None, args: TrainingArguments | None = None, data_collator: Any = None, **kwargs: Any
    ):
        super().__init__(model=model, args=args, data_collator=data_collator or collate, **kwargs)


class Tally:
    """Running sums of the comparables over the tokens of several micro-batches."""

    def __init__(self):
        self.sums = torch.zeros(len(COMPARABLES), 2, dtype=torch.float64)

    def add(self, variant: Variant, tokens: Tokens, losses: Tensor) -> None:
        """Count these tokens in."""
        tokens = tokens.replace(logits=tokens.logits.detach())
        target = variant.target(tokens).at("unit")
        weight, entropy, kl = (v[v.isfinite()] for v in (target.trust, target.entropy, target.kl))
        values = (losses, -tokens.label_log_probs, target.negative_mass, target.pull, target.room)
        values += (weight, weight.square(), entropy, kl)
        self.sums += torch.tensor([[value.sum().item(), len(value)] for value in values], dtype=torch.float64)

    def means(self, accelerator: Any) -> dict[str, float]:
        """Means over all tokens so far, on all processes; empty if there were none. Nats, Q in unit scale.

        ``loss``: the variant's own. ``nll``: -log p_y. ``negative_mass``: sum_k max(0, -Q_k). ``trust``: the pull on the
        labels as a share of SFT's, sum(-g_y) / sum(1 - p_y). ``ess``: the effective sample size of the tokens' trusts t,
        (sum t)^2 / sum t^2 as a share of their number; 1 when all count alike, absent when none is trusted.
        ``target_entropy``: H(Q) and ``kl_target``: KL(Q || p), over the tokens whose Q is a distribution; NaN if none is.
        """
        sums = self.sums
        if accelerator.num_processes > 1:
            sums = accelerator.gather(sums.to(accelerator.device)[None]).sum(0).cpu()
        total = dict(zip(COMPARABLES, sums.unbind(), strict=True))
        if not total["loss"][1]:
            return {}
        means = {name: (value[0] / value[1]).item() for name, value in total.items()}
        pull, room, weight, squared = (means.pop(name) for name in ("pull", "room", "weight", "weight_squared"))
        means["trust"] = pull / room if room else math.nan
        return means | ({"ess": weight**2 / squared} if squared else {})


class UpdateNorm(TrainerCallback):
    """The norm of an optimizer step's change of the trained parameters, on the steps that are logged."""

    def __init__(self, trainer: QLossMixin):
        self.trainer, self.before, self.norm = trainer, [], {}

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Remember the parameters."""
        if self.trainer.logs_this_step():
            self.before = [(p, p.detach().clone()) for p in self.trainer.model.parameters() if p.requires_grad]

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Measure how far they went."""
        if self.before:
            norms = [(p.detach() - old).float().norm() for p, old in self.before]
            self.before, self.norm = [], {"update_norm": torch.stack(norms).norm().item()}

    def take(self) -> dict[str, float]:
        """The last norm measured, once."""
        norm, self.norm = self.norm, {}
        return norm
