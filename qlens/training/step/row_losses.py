"""The loss of a micro-batch's supervised rows: by the engine from hidden states, or by autograd from whole logits."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from qlens.core.numerics import precision
from qlens.core.target import Target
from qlens.core.tokens import MODELS, Tokens
from qlens.data.supervised_batch import SupervisedBatch
from qlens.engine.finite_values import refuse_rows, refuse_total, watch_gradient
from qlens.engine.fused import fused_pass
from qlens.engine.models.backbone import Backbone
from qlens.losses.layout.layouts import Style
from qlens.losses.reduction.unreduced import value_alone
from qlens.registry import Variant
from qlens.training.metrics import MetricSums, read_target
from qlens.training.step.batch_losses import style_on_batches, summed_loss
from qlens.training.step.loss_parameters import LearnedParameters


@dataclass(frozen=True, eq=False)
class LossContext:
    """What the losses of a micro-batch are divided by and recorded in.

    Args:
        variant: the method.
        items: what the sum of the losses is divided by.
        metrics: where the metrics of this batch are counted; None where they are not wanted.
        learned: where learnable parameters of a user's loss are noted; None where they are not looked for.
        model: the trained model.
    """

    variant: Variant
    items: float
    metrics: MetricSums | None
    learned: LearnedParameters | None
    model: nn.Module

    @property
    def selects(self) -> bool:
        """Whether the loss is a mean over the rows with a trust other than 0."""
        return self.variant.denominator == "selected"

    def note_parameters(self, loss: Tensor, *logits: Tensor) -> None:
        """Note the learnable parameters that a user's loss has of its own."""
        if self.learned is not None and loss.requires_grad:
            self.learned.note(loss, *logits, model=self.model)


def fused_row_loss(
    context: LossContext, backbone: Backbone, hidden: Tensor, batch: SupervisedBatch, inputs: dict[str, Any]
) -> Tensor:
    """The loss by the engine, from hidden states and head.

    Args:
        context: denominator and metrics.
        backbone: of the trained model.
        hidden: its head's input at the supervised rows, (N, H).
        batch: labels and positions.
        inputs: the method's other inputs at these rows.
    """
    head = backbone.head
    return fused_pass(
        context.variant,
        hidden,
        head.weight.to(hidden.dtype),
        batch.labels,
        bias=None if head.bias is None else head.bias.to(hidden.dtype),  # another dtype in mixed precision
        models={name: value for name, value in inputs.items() if name in MODELS},
        fields={name: value for name, value in inputs.items() if name not in MODELS},
        shape={"softcap": backbone.softcap, "logit_scale": backbone.logit_scale},
        denominator=context.items,
        observe=None if context.metrics is None else context.metrics.observe,
        mean_over_selected=True,
    )


def plain_row_loss(
    context: LossContext, logits: Tensor, rows: Tensor, batch: SupervisedBatch, inputs: dict[str, Any]
) -> Tensor:
    """The loss by autograd, from whole logits.

    Args:
        context: denominator and metrics.
        logits: of the batch, (B, T, V).
        rows: of its supervised rows, (N, V).
        batch: labels and positions.
        inputs: the method's other inputs at these rows.
    """
    variant = context.variant
    fields = {name: value.to(rows.dtype) if name in MODELS else value for name, value in inputs.items()}
    tokens = Tokens(logits=rows, labels=batch.labels, **fields)
    if (style := style_on_batches(variant, tokens)) is not None:
        return _whole_batch_loss(context, logits, tokens, batch, style)
    replay = variant.replay(rows.device)
    with value_alone():
        losses = variant.loss(tokens)
    losses = losses.to(precision(losses.dtype))  # a sum in bfloat16 loses digits
    refuse_rows(variant.spec, losses.detach().isnan(), "loss")
    if not variant.built_in:
        watch_gradient(variant.spec, rows)
    context.note_parameters(losses, rows)
    losses = _with_graph(losses, rows)
    share = 1.0
    if context.metrics is not None or context.selects:
        with replay.again():  # a loss that draws numbers has drawn these, and a logged step draws no others
            if context.selects:
                share = selected_share(variant.target(tokens.with_logits(rows.detach())))
            if context.metrics is not None:
                context.metrics.add_tokens(variant, tokens, losses)
    return losses.sum() * share / context.items


def _whole_batch_loss(
    context: LossContext, logits: Tensor, tokens: Tokens, batch: SupervisedBatch, style: Style
) -> Tensor:
    """The loss of a method that sees whole batches, (B, T, V), on the layout of the batch."""
    variant, reads_target = context.variant, context.metrics is not None or context.selects
    with torch.set_grad_enabled(torch.is_grad_enabled() or reads_target):
        logits = logits if logits.requires_grad else logits.detach().requires_grad_()
        total = summed_loss(variant, logits, tokens, batch, style)
        refuse_total(variant.spec, total)
        if not variant.built_in:
            watch_gradient(variant.spec, logits)
        context.note_parameters(total, logits)
        total = _with_graph(total, logits)
        target = read_target(total, logits, batch) if reads_target else None
    if context.metrics is not None and target is not None:
        context.metrics.add_total(total, target)
    share = selected_share(target) if context.selects and target is not None else 1.0
    return total * share / context.items


def _with_graph(losses: Tensor, logits: Tensor) -> Tensor:
    """The losses, zeros without a graph with one: where all tokens are skipped, backward still runs."""
    if losses.requires_grad or bool(losses.any()):
        return losses
    return losses + logits[..., :0].sum()


def selected_share(target: Target) -> float:
    """Supervised over selected rows, those with a trust other than 0."""
    return len(target.labels) / max(int(target.selected), 1)


def undone_reduction(variant: Variant) -> str:
    """A log message about how a loss's reduction was undone, where the mean over tokens is another loss; "" elsewhere."""
    division = variant.unreduced.division
    if division is None or division.name in ("", "mean over unmasked"):
        return ""
    return (
        f"qlens undoes the reduction of {variant.spec} ({division.name}): trained and logged is the sum of its tokens' losses, "
        "divided by the supervised tokens of the step"
    )
