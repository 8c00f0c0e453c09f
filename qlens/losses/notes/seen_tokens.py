"""The tokens as a loss sees them: one value per text, standardised advantages, the logits of a model that it runs."""

from collections.abc import Callable, Mapping
from typing import Any

import torch

from qlens.core.errors import InputError
from qlens.core.segments import Groups
from qlens.core.tokens import Tokens
from qlens.losses.calling import call, on_view
from qlens.losses.layout.layout_search import style_of
from qlens.losses.layout.layouts import Layout
from qlens.losses.layout.signature import inputs, roles_taken
from qlens.losses.layout.trial import sample
from qlens.losses.layout.views import batch_view
from qlens.losses.reduction.advantages import standardised
from qlens.losses.side_effects import recorded_modules


def as_given(fn: Callable, params: Mapping[str, Any], tokens: Tokens) -> Tokens:
    """The tokens with the values that a loss uses.

    If it takes one advantage or weight per text, all tokens of a text have that of its first one; advantages that it
    standardises are standardised.
    """
    if names := given_by_text(fn, params, tokens):
        texts = Groups(tokens.require("sequence"))
        first = texts.first()[texts.index]
        tokens = tokens.replace(**{name: getattr(tokens, name)[first] for name in names})
    values = _standardised(fn, params, tokens)
    return tokens if values is None else tokens.replace(advantage=values)


def given_by_text(fn: Callable, params: Mapping[str, Any], tokens: Tokens) -> tuple[str, ...]:
    """The fields of which a loss takes one value per text, that of its first token."""
    if tokens.sequence is None:
        return ()
    style = style_of(fn, params, tokens)
    roles = roles_taken(fn, style.columns) if style.by_text else set()
    return tuple(name for name in ("advantage", "weight") if name in roles and getattr(tokens, name) is not None)


def standardises(fn: Callable, params: Mapping[str, Any], tokens: Tokens) -> bool:
    """Whether a loss centres or standardises its advantages over its batch or over parts of it."""
    return _standardised(fn, params, tokens) is not None


def _standardised(fn: Callable, params: Mapping[str, Any], tokens: Tokens) -> torch.Tensor | None:
    if inputs(fn).kind == "tokens" or "advantage" not in roles_taken(fn, style_of(fn, params, tokens).columns):
        return None
    result = standardised(fn, params, tokens)
    return None if result is None else result.values


def made_up_inputs(fn: Callable, params: Mapping[str, Any], tokens: Tokens) -> bool:
    """Whether a loss runs another model, on synthetic token ids that do not change with the tokens."""
    try:
        with recorded_modules(fn) as module_calls, torch.no_grad():
            style = style_of(fn, params, tokens)
            call(fn, params, sample(fn, tokens, style.group), style=style, layout=Layout())
    except InputError:
        return False
    return bool(module_calls.models)


def supplied(fn: Callable, params: Mapping[str, Any], tokens: Tokens) -> Tokens:
    """The tokens with the logits of the one other model that a loss runs as their teacher, unless it takes a teacher.

    They make a distillation loss with its teacher in a closure recognisable.
    """
    style = style_of(fn, params, tokens)
    if inputs(fn).kind != "model" or "teacher" in roles_taken(fn, style.columns):
        return tokens
    view = batch_view(tokens, Layout(), style)
    with recorded_modules(fn) as module_calls, torch.no_grad():
        on_view(fn, params, view)
    logits = [output for output in module_calls.logits if output.shape[-1] == tokens.logits.shape[1]]
    if len(module_calls.models) != 1 or not logits or logits[0].shape != view.logits.shape:
        return tokens
    rows = logits[0].reshape(-1, logits[0].shape[-1])[view.place]
    return tokens.replace(teacher=rows.to(tokens.logits.dtype))
