"""Losses of whole batches, f(logits (B, T, V), labels (B, T)) and f(outputs, labels): called on the layout of the batch."""

from collections.abc import Callable

import torch
from torch import Tensor

from qlens.core.errors import InputError
from qlens.core.supervised import IGNORE
from qlens.core.tokens import Tokens
from qlens.data.supervised_batch import SupervisedBatch
from qlens.engine.verification.batch_layout import layout_dependence
from qlens.losses.calling import kind, on_view
from qlens.losses.layout.layouts import Counts, Style
from qlens.losses.layout.names import role_of
from qlens.losses.layout.signature import inputs
from qlens.losses.layout.trial import inputs_masked
from qlens.losses.layout.views import batch_of
from qlens.losses.reduction.unreduced import add_up, independent
from qlens.losses.return_values import loss_of
from qlens.registry import Variant


def style_on_batches(variant: Variant, tokens: Tokens) -> Style | None:
    """How a loss of whole batches is called; None for a loss of rows."""
    if kind(variant.loss_fn) not in ("logits", "outputs"):
        return None
    style = variant.unreduced.style(variant.shown(tokens).upcast())
    if not style.laid_out:
        return None
    if tokens.weight is None or variant.weighs(tokens) or bool((tokens.weight == tokens.weight[:1]).all()):
        return style
    if reason := layout_dependence(variant, tokens, style):
        raise InputError(
            f"{variant.spec}: {reason}, and its tokens weigh differently, so that qlens cannot weigh them: take weight as an "
            "argument, f(logits, labels, weight)"
        )
    return None  # on rows, which can be weighed


def summed_loss(variant: Variant, logits: Tensor, tokens: Tokens, batch: SupervisedBatch, style: Style) -> Tensor:
    """The sum over supervised tokens of a loss of whole batches, on the layout of the batch.

    Args:
        variant: the method.
        logits: of the batch, (B, T, V).
        tokens: its supervised rows, in order, with their fields.
        batch: the batch, with input_ids.
        style: how the loss is called.

    Raises:
        InputError: the loss would learn prompts whose labels are -100; its reduction cannot be undone.
    """
    fn, params, name = variant.loss_fn, variant.params, variant.spec
    labels, ids, attention = _layout(batch)
    if style.clean or _takes_ids(fn):
        if not inputs_masked(fn) and bool(((labels[:, 1:] == IGNORE) & (attention[:, 1:] == 1)).any()):
            raise InputError(
                f"{name} takes its labels from token ids and an attention mask, so that it would learn the tokens, such as "
                "prompts, whose labels are -100: take labels, f(logits, labels), or a mask, f(logits, labels, loss_mask)"
            )
        labels = torch.where(labels == IGNORE, ids.to(labels), labels)
    dtype, texts = tokens.logits.dtype, len(labels)
    weight = 1.0 if tokens.weight is None or variant.weighs(tokens) else float(tokens.weight[0])

    def value_on(rows: slice, mask: Tensor) -> Tensor:
        """The loss of some texts, whose supervised tokens the mask marks."""
        place = batch.index[mask] - rows.start * batch.shape[1]
        own_tokens = tokens if rows == slice(0, texts) else tokens[mask]
        own_logits = logits[rows].to(dtype).clone()
        view = batch_of(own_logits, labels[rows], own_tokens, place, attention[rows], ids[rows], style)
        return weight * loss_of(on_view(fn, params, view), name).value

    value = value_on(slice(0, texts), torch.ones_like(batch.index, dtype=torch.bool))
    if value.ndim:
        return value.sum()
    attended, positions = int(attention[:, 1:].sum()), texts * (batch.shape[1] - 1)
    size = Counts(len(batch), positions, labels.numel(), texts, 1, attended)
    divisor = variant.unreduced.reduction(variant.shown(tokens).upcast()).divisor
    if not isinstance(divisor(size._replace(own=torch.ones(1))), Tensor):
        return value * divisor(size)
    # Every text has a divisor of its own: the texts are called one by one.
    text = batch.index // batch.shape[1]
    values, divisors_alone, divisors_together = [], [], []
    for row in range(texts):
        mask = text == row
        if number := int(mask.sum()):
            values.append(value_on(slice(row, row + 1), mask))
            own_size = size._replace(own=torch.tensor([float(number)]))
            divisors_together.append(float(divisor(own_size)))
            divisors_alone.append(float(divisor(own_size._replace(rows=number, texts=1))))
    if not independent(values, divisors_alone, divisors_together, value):
        raise InputError(
            f"{name} divides by the length of each text, but its texts depend on each other, so that its reduction cannot be "
            "undone: return the unreduced loss, (B, T)"
        )
    return add_up(values, divisors_alone)


def _layout(batch: SupervisedBatch) -> tuple[Tensor, Tensor, Tensor]:
    """Labels, with -100 where nothing is predicted, token ids and attention mask of a batch, (B, T) each."""
    labels = torch.full_like(batch.segment, IGNORE)
    labels[batch.index + 1] = batch.labels
    labels, ids = labels.view(batch.shape), batch.inputs["input_ids"].to(labels.device)
    attention = batch.inputs.get("attention_mask")
    return labels, ids, torch.ones_like(ids) if attention is None else attention.to(ids)


def _takes_ids(fn: Callable) -> bool:
    """Whether a loss takes its labels from token ids, f(logits, input_ids)."""
    return any(role == "labels" and role_of(name) == "input ids" for name, role in inputs(fn).required.items())
