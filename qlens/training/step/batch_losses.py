"""Losses of whole batches, f(logits (B, T, V), labels (B, T)) and f(outputs, labels): called on the layout of the batch."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from qlens.core.errors import InputError
from qlens.core.supervised import IGNORE, Supervised
from qlens.core.tokens import Tokens
from qlens.engine.verification.batch_layout import layout_dependence
from qlens.losses.calling import kind, on_view
from qlens.losses.layout.layouts import Counts, Style, batch_of
from qlens.losses.layout.names import role_of
from qlens.losses.layout.signature import inputs
from qlens.losses.layout.trial import inputs_masked
from qlens.losses.reduction.unreduced import add_up, apart
from qlens.losses.return_values import loss_of
from qlens.registry import Variant


def style_on_batches(variant: Variant, tokens: Tokens) -> Style | None:
    """How a loss is called that sees whole batches; None for any other method."""
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


def summed_loss(
    variant: Variant, logits: Tensor, tokens: Tokens, where: Supervised, batch: Mapping[str, Any], style: Style
) -> Tensor:
    """The sum over supervised tokens of a loss of whole batches, on the layout that the model saw.

    Args:
        variant: the method.
        logits: of the whole batch, (B, T, V).
        tokens: its supervised rows, in order, with their fields.
        where: their places.
        batch: input_ids, and attention_mask where there is one, (B, T) each.
        style: how the loss is called.

    Raises:
        InputError: the loss would learn prompts that the data have masked; its reduction cannot be undone.
    """
    fn, params, name = variant.loss_fn, variant.params, variant.spec
    wide = tokens.logits.dtype
    labels = torch.full_like(where.segment, IGNORE)
    labels[where.index + 1] = where.labels
    labels, ids = labels.view(where.shape), batch["input_ids"].to(labels.device)
    attention = batch.get("attention_mask")
    attention = torch.ones_like(ids) if attention is None else attention.to(ids)
    if style.clean or _takes_ids(fn):
        if not inputs_masked(fn) and bool(((labels[:, 1:] == IGNORE) & (attention[:, 1:] == 1)).any()):
            raise InputError(
                f"{name} takes its labels from token ids and an attention mask, so that it would learn the tokens, such as "
                "prompts, whose labels are -100: take labels, f(logits, labels), or a mask, f(logits, labels, loss_mask)"
            )
        labels = torch.where(labels == IGNORE, ids.to(labels), labels)

    alike = 1.0 if tokens.weight is None or variant.weighs(tokens) else float(tokens.weight[0])

    def value_on(rows: slice, mine: Tensor) -> Tensor:
        """The loss of some texts alone."""
        place = where.index[mine] - rows.start * where.shape[1]
        some = tokens if rows == slice(0, len(labels)) else tokens[mine]
        view = batch_of(logits[rows].to(wide).clone(), labels[rows], some, place, attention[rows], ids[rows], style)
        return alike * loss_of(on_view(fn, params, view), name).value

    made = value_on(slice(0, len(labels)), torch.ones_like(where.index, dtype=torch.bool))
    if made.ndim:
        return made.sum()
    text = where.index // where.shape[1]
    attended, positions = int(attention[:, 1:].sum()), len(labels) * (where.shape[1] - 1)
    number = Counts(len(where), positions, labels.numel(), len(labels), 1, attended)
    divisor = variant.unreduced.reduction(variant.shown(tokens).upcast()).divisor
    if not isinstance(divisor(number._replace(own=torch.ones(1))), Tensor):
        return made * divisor(number)
    parts, alone, together = [], [], []
    for row in range(len(labels)):
        mine = text == row
        if size := int(mine.sum()):
            parts.append(value_on(slice(row, row + 1), mine))
            own = number._replace(own=torch.tensor([float(size)]))
            together.append(float(divisor(own)))
            alone.append(float(divisor(own._replace(rows=size, texts=1))))
    if not apart(parts, alone, together, made):
        raise InputError(
            f"{name} divides by the length of each text, but its texts depend on each other, so that its reduction cannot be "
            "undone: return the unreduced loss, (B, T)"
        )
    return add_up(parts, alone)


def _takes_ids(fn: Callable) -> bool:
    """Whether a loss takes its labels from token ids, f(logits, input_ids)."""
    return any(role == "labels" and role_of(name) == "input ids" for name, role in inputs(fn).required.items())
