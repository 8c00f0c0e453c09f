"""Losses of whole batches, f(logits (B, T, V), labels (B, T)) and f(outputs, labels): called in training on the true layout."""

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from qlens.core.errors import InputError
from qlens.core.supervised import IGNORE, Supervised
from qlens.core.tokens import Tokens
from qlens.core.trial_tokens import trial_rows, wide_tokens
from qlens.losses.calling import kind, on_view
from qlens.losses.layout.layouts import Counts, Layout, Style, counts
from qlens.losses.layout.names import role_of
from qlens.losses.layout.signature import Memo, inputs
from qlens.losses.layout.trial import few, grad_of, inputs_masked
from qlens.losses.layout.views import batch_of, batch_view
from qlens.losses.reduction.scalar import ALIKE, find_division
from qlens.losses.reduction.unreduced import SUM, add_up, apart
from qlens.losses.return_values import loss_of
from qlens.registry import Variant

PROMPT = Layout(before=3)
_PLACES = Memo()


def is_model_loss(variant: Variant) -> bool:
    """Whether a method's loss runs the model itself, f(model, inputs)."""
    return kind(variant.loss_fn) == "model"


def style_on_batches(variant: Variant, tokens: Tokens) -> Style | None:
    """How a loss is called that sees whole batches; None for any other method."""
    if kind(variant.loss_fn) not in ("logits", "outputs"):
        return None
    style = variant.unreduced.style(variant.shown(tokens).upcast())
    if not style.laid_out:
        return None
    if tokens.weight is None or variant.weighs(tokens) or bool((tokens.weight == tokens.weight[:1]).all()):
        return style
    if reason := place_matters(variant, tokens, style):
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


def why_whole_batches(variant: Variant, vocabulary: int) -> str:
    """Why a method has to see whole batches, (B, T, V), in training; "" where its supervised rows are enough."""
    if kind(variant.loss_fn) not in ("logits", "outputs"):
        return ""
    given = wide_tokens(vocabulary).fields()
    names = ("logits", "labels", "sequence", *(name for name in variant.needs if name in given))
    tokens = Tokens.unchecked(**{name: given[name] for name in names})
    try:
        style = variant.unreduced.style(tokens)
        return place_matters(variant, tokens, style) if style.laid_out else ""
    except InputError:
        return "it cannot be called on other tokens than its own"


def place_matters(variant: Variant, tokens: Tokens, style: Style) -> str:
    """How a loss of whole batches depends on more than its supervised rows, "" where it does not: tried once.

    What a token's place in its text, or a position that is not supervised, changes cannot be known from rows alone.
    """
    fn, params = variant.loss_fn, variant.params
    key = (repr(sorted(params.items(), key=str)), style, tuple(sorted(tokens.fields())), tokens.logits.shape[1])

    def tried() -> str:
        with variant.replay(tokens.logits.device).again():
            return _place_matters(variant, tokens, replace(style, several=False))

    return _PLACES.get(fn, key, tried)


def _place_matters(variant: Variant, tokens: Tokens, style: Style) -> str:
    fn, params = variant.loss_fn, variant.params
    one = torch.zeros_like(tokens.labels)
    trial = trial_rows(Tokens.unchecked(**{"sequence": one, **tokens.fields()}))
    tokens = few(trial, style.group)  # copies are texts of their own
    divisor_of = (find_division(fn, params, tokens, variant.spec) or SUM).divisor
    grads = []
    for layout in (Layout(), PROMPT):
        divisor = divisor_of(counts(tokens, layout, style))
        grad = grad_of(fn, params, tokens, style, layout)
        grads.append(grad * (divisor.to(grad)[:, None] if isinstance(divisor, Tensor) else divisor))
    if (grads[0] - grads[1]).norm() > ALIKE * grads[0].norm():
        return "a token's gradient depends on its place in the text"
    view = batch_view(tokens, PROMPT._replace(masked=2), style)
    with torch.enable_grad():
        leaf = view.logits.detach().requires_grad_()
        value = loss_of(on_view(fn, params, replace(view, logits=leaf.clone())), variant.spec).value.sum()
        (grad,) = torch.autograd.grad(value, leaf) if value.requires_grad else (torch.zeros_like(leaf),)
    sizes = grad.flatten(0, 1).norm(dim=-1)
    beside = torch.ones_like(sizes, dtype=torch.bool).index_fill(0, view.place, False)
    if sizes[beside].amax() > ALIKE * sizes.amax():
        return "it has a gradient at positions that are not supervised"
    return ""
