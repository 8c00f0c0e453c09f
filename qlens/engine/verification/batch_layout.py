"""Dependence of a loss on the layout of its batch: on places in texts, on positions that are not supervised, on the model."""

from dataclasses import replace

import torch
from torch import Tensor

from qlens.core.errors import InputError
from qlens.core.probes.trial_tokens import trial_rows, wide_tokens
from qlens.core.tokens import Tokens
from qlens.losses.calling import kind, on_view
from qlens.losses.layout.layouts import Layout, Style, counts
from qlens.losses.layout.signature import Memo
from qlens.losses.layout.trial import few, grad_of
from qlens.losses.layout.views import batch_view
from qlens.losses.reduction.scalar import ALIKE, find_division
from qlens.losses.reduction.unreduced import SUM
from qlens.losses.return_values import loss_of
from qlens.registry import Variant

PROMPT = Layout(before=3)
_REASONS = Memo()


def is_model_loss(variant: Variant) -> bool:
    """Whether a method's loss runs the model itself, f(model, inputs)."""
    return kind(variant.loss_fn) == "model"


def why_whole_batches(variant: Variant, vocabulary: int) -> str:
    """Why a method has to see whole batches, (B, T, V), in training; "" where its supervised rows are enough."""
    if kind(variant.loss_fn) not in ("logits", "outputs"):
        return ""
    fields = wide_tokens(vocabulary).fields()
    names = ("logits", "labels", "sequence", *(name for name in variant.needs if name in fields))
    tokens = Tokens.unchecked(**{name: fields[name] for name in names})
    try:
        style = variant.unreduced.style(tokens)
        return layout_dependence(variant, tokens, style) if style.laid_out else ""
    except InputError:
        return "it cannot be called on other tokens than its own"


def layout_dependence(variant: Variant, tokens: Tokens, style: Style) -> str:
    """How a loss of whole batches depends on more than its supervised rows, "" where it does not.

    A dependence on a token's place in its text, or on a position that is not supervised, is invisible on rows alone.
    """
    fn, params = variant.loss_fn, variant.params
    key = (repr(sorted(params.items(), key=str)), style, tuple(sorted(tokens.fields())), tokens.logits.shape[1])

    def reason() -> str:
        with variant.replay(tokens.logits.device).again():
            return _layout_dependence(variant, tokens, replace(style, several=False))

    return _REASONS.get(fn, key, reason)


def _layout_dependence(variant: Variant, tokens: Tokens, style: Style) -> str:
    fn, params = variant.loss_fn, variant.params
    sequence = torch.zeros_like(tokens.labels)
    # Copies are texts of their own.
    trial = trial_rows(Tokens.unchecked(**{"sequence": sequence, **tokens.fields()}))
    tokens = few(trial, style.group)
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
