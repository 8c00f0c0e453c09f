"""The account of a loss: a description of how it was called, and notes on what else it does."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from qlens.core.errors import InputError
from qlens.core.tokens import Tokens
from qlens.losses.calling import call
from qlens.losses.layout.layout_search import style_of
from qlens.losses.layout.layouts import Layout, Style
from qlens.losses.layout.names import FIELD, role_of
from qlens.losses.layout.signature import Memo, inputs, name_of, student_input
from qlens.losses.layout.trial import ROWS, few, grad_of
from qlens.losses.layout.wording import described
from qlens.losses.leaves import StubParameter, leaves
from qlens.losses.notes import effects
from qlens.losses.reduction.advantages import standardised
from qlens.losses.reduction.divisors import REDUCTIONS
from qlens.losses.reduction.scalar import ROUNDING, by_length, find_division, takes_pairs
from qlens.losses.return_values import loss_of
from qlens.losses.side_effects import recorded_modules

_ACCOUNTS = Memo()
SOURCES = {
    "weight": "the tokens' weights, one where they have none", "mask": "a mask of the supervised tokens",
    "attention mask": "a mask of all that is no padding", "count": "the number of supervised tokens",
    "texts": "the number of texts",
    "vocabulary": "the size of the vocabulary", "ignore": "-100", "temperature": "1", "input ids": "made-up token ids",
    "position ids": "0, 1, 2, ...", "log probs": "log-probabilities of the student", "probs": "probabilities of the student",
    "chosen log probs": "sums over each pair's chosen sequence", "rejected log probs": "sums over the rejected one",
    "advantage": "the tokens' advantages", "teacher model": "a model whose logits are the tokens' teacher",
    "reference model": "a model whose logits are the tokens' reference",
}  # fmt: skip
"""Descriptions of the values of inputs."""

UNDESCRIBED = (
    "logits", "labels", "outputs", "model", "batch", "dict", "tokens", "return outputs", "head", "teacher head", "reference head",
)  # fmt: skip
"""Inputs that the description of the style covers."""


class Account(NamedTuple):
    """A description of how a loss was called, and notes, in sentences, on what else it does."""

    called_as: str
    notes: tuple[str, ...]


def account(fn: Callable, params: Mapping[str, Any], tokens: Tokens) -> Account:
    """The account of a loss on such tokens; an empty one if it cannot be called."""
    fields, size = tuple(sorted(tokens.fields())), tokens.logits.shape[1]
    key = (repr(sorted(params.items(), key=str)), fields, size, tokens.logits.dtype)
    return _ACCOUNTS.get(fn, key, lambda: _account(fn, params, tokens))


def _account(fn: Callable, params: Mapping[str, Any], tokens: Tokens) -> Account:
    loss_inputs = inputs(fn)
    try:
        style = style_of(fn, params, tokens)
        tokens = _some(tokens, style.group)
        with recorded_modules(fn) as module_calls:
            leaf = tokens.logits.detach().clone().requires_grad_()
            value = loss_of(call(fn, params, tokens.with_logits(leaf), style=style, layout=Layout()), name_of(fn))
        base = grad_of(fn, params, tokens, style)
    except InputError:
        return Account("", ())
    roles = loss_inputs.required | loss_inputs.optional
    filled = _sources(fn, tokens, style)
    called_as = described(style, student_input(loss_inputs), filled)
    notes = [f"The loss is {value.part}."] if value.part else []
    reduction, length_notes = _reduction(fn, params, tokens, value.value, style)
    notes += effects.modules(module_calls)
    if any(isinstance(leaf, StubParameter) for leaf in leaves(value.value, leaf)):
        notes += [
            "It has a term of the model's own weights (a penalty on model.parameters(), say), which is no function of the "
            "logits: it is trained too, unseen here."
        ]
    advantages = [name for name in filled if (roles.get(name) or role_of(name)) == "advantage"]
    if advantages and (values := standardised(fn, params, tokens)) is not None:
        notes += [f"Of {advantages[0]} it {values.description}: they are read as they are after that."]
    notes += effects.equal_inputs(roles, filled, tokens)
    notes += effects.sampling_ratio(fn, params, tokens, style, base)
    if float(base.abs().max()) < ROUNDING * torch.finfo(base.dtype).eps:
        return Account(called_as, tuple(notes))  # all else would compare rounding with rounding
    if loss_inputs.kind == "model":
        notes += effects.hidden_states(fn, params, tokens, style, base)
    if loss_inputs.kind != "tokens":
        notes += effects.unused_inputs(fn, params, tokens, style, base)
    other_labels = effects.other_labels(fn, params, tokens, style) if style.laid_out else []
    notes += other_labels or ([] if module_calls.models else length_notes)
    return Account(called_as + reduction, tuple(notes))


def _some(tokens: Tokens, group: int) -> Tokens:
    """A few of the tokens, in whole groups of texts, with more than one advantage if they have several."""
    some, advantage = few(tokens, group), tokens.advantage
    if advantage is not None and some.advantage is not None and not bool((some.advantage != some.advantage[0]).any()):
        return few(tokens[:ROWS], group)
    return some


def _sources(fn: Callable, tokens: Tokens, style: Style) -> dict[str, str]:
    """The descriptions of the values of all arguments beside logits and labels, by name."""
    loss_inputs = inputs(fn)
    sources = {}
    for roles, passed, counted in (
        (loss_inputs.required, True, True),
        (loss_inputs.optional, style.optional, style.counted),
    ):
        for name, role in roles.items():
            field = FIELD.get(role)
            available = field in (None, "weight") or getattr(tokens, field) is not None
            if role not in UNDESCRIBED and available and (counted if role == "count" else passed):
                sources[name] = SOURCES.get(role) or f"the tokens' {role}"
    for name in style.columns:
        if (role := role_of(name)) not in (None, "labels", "logits"):
            sources[name] = SOURCES.get(role, f"the tokens' {FIELD.get(role, role)}")
    if style.by_text:
        roles = loss_inputs.required | loss_inputs.optional
        by_text = [name for name in sources if (roles.get(name) or role_of(name)) in ("advantage", "weight")]
        sources |= dict.fromkeys(by_text, "one for each text, its first token's")
    return sources


def _reduction(
    fn: Callable, params: Mapping[str, Any], tokens: Tokens, value: Tensor, style: Style
) -> tuple[str, list[str]]:
    """A description of the reduction of a scalar loss, and notes on texts of other lengths."""
    if value.ndim:
        return f"; it returns shape {tuple(value.shape)}, unreduced", []
    try:
        division = find_division(fn, params, tokens, name_of(fn))
    except InputError:
        return "", []
    if division is None:
        return "; it returns one number, and no row tried taught it anything: whether that is a sum is not known", []
    many = "pairs" if takes_pairs(fn, style) else "tokens"
    words = {"sum": f"a sum over {many}", "mean over unmasked": f"a mean over supervised {many}"}
    words |= {"mean over all": "a mean over all positions, the unsupervised included"}
    words |= {name: f"a {name}" for name in REDUCTIONS if name not in words}
    description = f"; it returns {words.get(division.name, f'a {division.name}')}, which is undone"
    if division.note:
        return description, [division.note]
    if not style.laid_out or style.pairs or by_length([division.name], fn, params, tokens, style):
        return description, []
    return description, [
        "A row's gradient changes as the same rows are cut into texts of other lengths: it depends on its position or the "
        "rest of its text, or terms of the loss are divided by different counts."
    ]
