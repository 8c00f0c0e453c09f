"""Notes: how a loss was called, and what it does beyond its gradient's own rows, in sentences."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from qlens.core.errors import InputError
from qlens.core.segments import Groups
from qlens.core.tokens import MODELS, Tokens
from qlens.losses.calling import call, on_view
from qlens.losses.layout.layout_search import style_of
from qlens.losses.layout.layouts import Layout, Style, batch_view, label_log_probs
from qlens.losses.layout.names import FIELD, role_of
from qlens.losses.layout.signature import Inputs, Memo, inputs, name_of, seen_as
from qlens.losses.layout.trial import ROWS, TURNED, across, changed, few, grad_of
from qlens.losses.layout.wording import described
from qlens.losses.leaves import StubParameter, leaves
from qlens.losses.reduction.advantages import standardised
from qlens.losses.reduction.divisors import REDUCTIONS
from qlens.losses.reduction.scalar import ROUNDING, by_length, find_division, takes_pairs
from qlens.losses.return_values import loss_of
from qlens.losses.side_effects import Seen, watched

ORDER = 12  # rows of the one text on which the labels that a row reacts to are found
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

PLAIN = (
    "logits", "labels", "outputs", "model", "batch", "dict", "tokens", "return outputs", "head", "teacher head", "reference head",
)  # fmt: skip


class Account(NamedTuple):
    """How a loss was called, and sentences about what else it does."""

    called_as: str
    notes: tuple[str, ...]


def account(fn: Callable, params: Mapping[str, Any], tokens: Tokens) -> Account:
    """How a loss is called on such tokens, and what else it does; nothing where it cannot be called at all."""
    key = (
        repr(sorted(params.items(), key=str)),
        tuple(sorted(tokens.fields())),
        tokens.logits.shape[1],
        tokens.logits.dtype,
    )
    return _ACCOUNTS.get(fn, key, lambda: _account(fn, params, _some(fn, params, tokens)))


def _some(fn: Callable, params: Mapping[str, Any], tokens: Tokens) -> Tokens:
    """A few of the tokens, with more than one advantage if they have several, in as many texts as the loss asks for."""
    try:
        group = style_of(fn, params, tokens).group
    except InputError:
        group = 1
    some, advantage = few(tokens, group), tokens.advantage
    if advantage is not None and some.advantage is not None and not bool((some.advantage != some.advantage[0]).any()):
        some = few(tokens[:ROWS], group)
    return some


def _account(fn: Callable, params: Mapping[str, Any], tokens: Tokens) -> Account:
    wanted = inputs(fn)
    try:
        style = style_of(fn, params, tokens)
        with watched(fn) as seen:
            leaf = _leaf(tokens)
            value = loss_of(call(fn, params, tokens.with_logits(leaf), style=style, layout=Layout()), name_of(fn))
        base = grad_of(fn, params, tokens, style)
    except InputError:
        return Account("", ())
    given = _given(wanted.required, tokens, optional=True)
    given |= _given(wanted.optional, tokens, style.optional, style.counted)
    given |= {
        name: SOURCES.get(role, f"the tokens' {FIELD.get(role, role)}")
        for name in style.columns
        if (role := role_of(name)) not in (None, "labels", "logits")
    }
    if style.by_text:
        roles = wanted.required | wanted.optional
        given |= {n: "one for each text, its first token's" for n in given if roles.get(n) in ("advantage", "weight")}
    notes = [f"The loss is {value.part}."] if value.part else []
    divides, by_length = _reduction(fn, params, tokens, value.value, style)
    notes += _others(seen)
    if any(isinstance(each, StubParameter) for each in leaves(value.value, leaf)):
        notes += [
            "It has a term of the model's own weights (a penalty on model.parameters(), say), which is no function of the "
            "logits: it is trained too, unseen here."
        ]
    roles = wanted.required | wanted.optional
    if named := [name for name in given if (roles.get(name) or role_of(name)) == "advantage"]:
        found = standardised(fn, params, tokens)
        if found is not None:
            notes += [f"Of {named[0]} it {found.description}: they are read as they are after that."]
    notes += _alike(wanted.required | wanted.optional, given, tokens)
    notes += _sampling_ratio(fn, params, tokens, style, base) if _samples(wanted) else []
    if float(base.abs().max()) < ROUNDING * torch.finfo(base.dtype).eps:
        return Account(described(style, seen_as(wanted), given), tuple(notes))  # rounding beside rounding says nothing
    if wanted.kind == "model":
        notes += _hidden(fn, params, tokens, style, base)
    if wanted.kind != "tokens":
        notes += _without_effect(fn, params, tokens, style, base)
    further = _offsets(fn, params, tokens, style) if style.laid_out else []
    notes += further or ([] if seen.models else by_length)
    return Account(described(style, seen_as(wanted), given) + divides, tuple(notes))


def _alike(roles: Mapping[str, str], filled: Mapping[str, str], tokens: Tokens) -> list[str]:
    """Which arguments were given the values of one other model, so that what their difference does is not seen."""
    notes = []
    for name in filled:
        if roles.get(name, "").startswith("sampling"):
            first = next(n for n in filled if n != name and roles.get(n) == roles[name].removeprefix("sampling "))
            said = (
                f"{first} is the old policy that ratios are taken to; {name} another one, that texts were sampled from"
            )
            same = "with the same values, so that a ratio of the two is 1 here: give tokens with second=..., near old"
            apart = "halfway between the tokens' old and second, so that a ratio of the two is a factor of its own"
            notes.append(f"{said}, {same if tokens.second is None else apart}.")
    for field in MODELS:
        names = [
            name
            for name in filled
            if name in roles and FIELD.get(roles[name]) == field and roles[name] != field + " model"
        ]
        if len({roles[name] for name in names}) < len(names):
            notes.append(
                f"{' and '.join(names)} are given the same values, the tokens' {field}: a ratio of the two is 1 here, and what "
                "their difference does to the gradient is not seen."
            )
    return notes


def _samples(wanted: Inputs) -> bool:
    return any(role.startswith("sampling") for role in (wanted.required | wanted.optional).values())


def _sampling_ratio(fn: Callable, params: Mapping[str, Any], tokens: Tokens, style: Style, base: Tensor) -> list[str]:
    """Whether the ratio of the label's probabilities under two old policies is a factor of the gradient, and its cap."""
    if tokens.second is None:
        return []
    alike = grad_of(fn, params, tokens.replace(second=None), style)
    there = alike.norm(dim=-1) > TURNED * float(alike.norm(dim=-1).max())
    factor = ((base * alike).sum(-1) / alike.square().sum(-1))[there]
    old, sampling = tokens.require("old"), (tokens.require("old") + tokens.second) / 2
    ratio = (label_log_probs(old, tokens.labels) - label_log_probs(sampling, tokens.labels)).exp()[there]
    cap = float(factor.max())
    off = min(float((factor - wanted).abs().max() / cap) for wanted in (ratio, ratio.clamp(max=cap)))
    if not bool(there.any()) or not off <= TURNED:
        return []
    capped = f", at most {cap:.4g}" if float(ratio.max()) > cap * (1 + TURNED) else ""
    return [f"That ratio, p under the first over p under the second of the label, is a factor of its gradient{capped}."]


def _leaf(tokens: Tokens) -> Tensor:
    return tokens.logits.detach().clone().requires_grad_()


def _given(roles: Mapping[str, str], tokens: Tokens, optional: bool, counted: bool = True) -> dict[str, str]:
    """What the arguments beside logits and labels were filled with, by name."""
    said = {}
    for name, role in roles.items():
        if role in PLAIN:
            continue
        there = counted if role == "count" else optional
        field = FIELD.get(role)
        if there and (field in (None, "weight") or getattr(tokens, field) is not None):
            said[name] = SOURCES.get(role) or f"the tokens' {role}"
    return said


def _reduction(
    fn: Callable, params: Mapping[str, Any], tokens: Tokens, value: Tensor, style: Style
) -> tuple[str, list[str]]:
    """How it divides, where it returns one number; and whether that is the same for texts of other lengths."""
    if value.ndim:
        return f"; it returns shape {tuple(value.shape)}, unreduced", []
    try:
        found = find_division(fn, params, tokens, name_of(fn))
    except InputError:
        return "", []
    if found is None:
        return "; it returns one number, and no row tried taught it anything: whether that is a sum is not known", []
    many = "pairs" if takes_pairs(fn, style) else "tokens"
    what = {"sum": f"a sum over {many}", "mean over unmasked": f"a mean over supervised {many}"}
    what |= {"mean over all": "a mean over all positions, the unsupervised included"}
    what |= {name: f"a {name}" for name in REDUCTIONS if name not in what}
    said = f"; it returns {what.get(found.name, f'a {found.name}')}, which is undone"
    if found.note:
        return said, [found.note]
    if not style.laid_out or style.pairs or by_length([found.name], fn, params, tokens, style):
        return said, []
    return said, [
        "A row's gradient changes as the same rows are cut into texts of other lengths: it depends on its position or the "
        "rest of its text, or terms of the loss are divided by different counts."
    ]


def _others(seen: Seen) -> list[str]:
    """Other models, layers and passes that ran."""
    said = []
    if seen.models:
        named = " and ".join(seen.models)
        said.append(f"It runs another model ({named}), whose inputs here are made-up token ids that no label changes.")
    if seen.layers:
        named = " and ".join(seen.layers)
        said.append(
            f"It runs layers of its own ({named}) on what the model gives; their weights are trained too, unseen here."
        )
    if seen.passes > 1:
        said.append(
            f"It runs the model {seen.passes} times. In training, dropout makes the passes differ; here they are equal, so "
            "that terms which compare them vanish."
        )
    if seen.hidden:
        said.append("It asks for hidden states; here they are the logits themselves.")
    return said


def _hidden(fn: Callable, params: Mapping[str, Any], tokens: Tokens, style: Style, base: Tensor) -> list[str]:
    """Whether part of the gradient reaches the hidden states past the head: with another head it is another one."""
    try:
        other = grad_of(fn, params, tokens, dataclasses.replace(style, head=2.0))
    except InputError:
        return []
    share = float((other - base).norm() / base.norm())
    if share < 10 * TURNED:
        return []
    return [
        "Part of its gradient reaches the hidden states past the head, so that it is no function of the logits: what is "
        "read here holds that part for logits too."
    ]


def _without_effect(fn: Callable, params: Mapping[str, Any], tokens: Tokens, style: Style, base: Tensor) -> list[str]:
    """Inputs that it takes and that change nothing."""
    wanted = inputs(fn)
    said = []
    fields: dict[str, list[str]] = {}
    asked = {
        **wanted.required,
        **(wanted.optional if style.optional else {}),
        **{n: role_of(n) or "" for n in style.columns},
    }
    for name, role in asked.items():
        if role in FIELD and role not in ("sequence", "pair", "chosen") and not role.endswith("rejected log probs"):
            fields.setdefault(FIELD[role], []).append(name)
    for field, names in fields.items():
        if field == "pair":
            continue
        turned = [other for scale in (0.5, 20.0, -20.0) if (other := _turned(tokens, field, scale)) is not None]
        try:  # a hinge reacts to large changes alone
            moved = [(grad_of(fn, params, other, style) - base).norm() > 1e-6 * base.norm() for other in turned]
        except InputError:
            continue
        if moved and not any(map(bool, moved)):
            said.append(f"{' and '.join(names)} has no effect on its gradient.")
    return said


def _turned(tokens: Tokens, field: str, scale: float) -> Tokens | None:
    """The tokens with other values in a field; other models' logits moved to the next entry, times ``scale``."""
    value = getattr(tokens, field)
    if field == "weight":
        value = (
            torch.ones(len(tokens), dtype=tokens.logits.dtype, device=tokens.logits.device) if value is None else value
        )
        return tokens.replace(weight=value * (2 + torch.arange(len(tokens), device=value.device) % 3))
    if value is None:
        return None
    if value.dtype is torch.bool:
        return tokens.replace(**{field: ~value})
    if field in MODELS:
        return tokens.replace(**{field: scale * value.roll(1, -1)})
    if value.is_floating_point():
        return tokens.replace(**{field: 2 * value.roll(1, 0) + 1})
    return None


def _offsets(fn: Callable, params: Mapping[str, Any], tokens: Tokens, style: Style) -> list[str]:
    """Labels further on, or back, that a row reacts to beside its own."""
    if style.several or style.pairs:
        return []
    index = torch.arange(ORDER, device=tokens.logits.device) % len(tokens)
    text = tokens[index]
    if text.sequence is not None:
        text = text.replace(sequence=torch.zeros_like(index))
    label = ORDER // 2
    try:
        base = grad_of(fn, params, text, style)
        one = torch.zeros(ORDER, dtype=torch.bool)
        one[label] = True
        grad = grad_of(fn, params, changed(text, one), style)
        turned, moved = across(grad, base), (grad - base).norm(dim=-1)
    except InputError:
        return []
    rows = (turned > TURNED * float(base.norm(dim=-1).max())).nonzero()[:, 0].tolist()
    others = {label - row: float(moved[row] / moved[label]) for row in rows if row != label}
    if label not in rows or not others or len(others) > 4:
        return []
    if min(others) > 0:
        learns = " and ".join(f"the one {k} further on ({share:.2g} times as strongly)" for k, share in others.items())
        return [
            f"A row learns its own label and {learns}: another term, no function of its own label (multi-token prediction, "
            "say). The rest of what is said here is about the sum of both."
        ]
    named = ", ".join(f"{abs(k)} {'after' if k > 0 else 'before'}" for k in sorted(others))
    return [f"A row's gradient also turns with labels of other tokens of its text ({named} it)."]


def given_by_text(fn: Callable, params: Mapping[str, Any], tokens: Tokens) -> tuple[str, ...]:
    """The fields of which the loss is given one value for each text, that of its first token."""
    if tokens.sequence is None or not style_of(fn, params, tokens).by_text:
        return ()
    asked = _asked(fn, params, tokens)
    return tuple(name for name in ("advantage", "weight") if name in asked and getattr(tokens, name) is not None)


def standardises(fn: Callable, params: Mapping[str, Any], tokens: Tokens) -> bool:
    """Whether a loss centres or standardises its advantages over its batch or over parts of it."""
    if inputs(fn).kind == "tokens" or "advantage" not in _asked(fn, params, tokens):
        return False
    return standardised(fn, params, tokens) is not None


def _asked(fn: Callable, params: Mapping[str, Any], tokens: Tokens) -> set[str | None]:
    """The inputs that a loss takes, as parameters or as columns of its batch."""
    style, wanted = style_of(fn, params, tokens), inputs(fn)
    return {*wanted.required.values(), *wanted.optional.values(), *(role_of(name) for name in style.columns)}


def as_given(fn: Callable, params: Mapping[str, Any], tokens: Tokens) -> Tokens:
    """The tokens with the values that the loss is given: its first token's for a whole text, where it takes one a text.

    Advantages that it standardises over its batch are standardised.
    """
    if names := given_by_text(fn, params, tokens):
        texts = Groups(tokens.require("sequence"))
        first = texts.first()[texts.index]
        tokens = tokens.replace(**{name: getattr(tokens, name)[first] for name in names})
    if inputs(fn).kind != "tokens" and "advantage" in _asked(fn, params, tokens):
        found = standardised(fn, params, tokens)
        return tokens if found is None else tokens.replace(advantage=found.values)
    return tokens


def made_up_inputs(fn: Callable, params: Mapping[str, Any], tokens: Tokens) -> bool:
    """Whether the loss runs another model, on made-up token ids that stay in their places whatever the tokens are."""
    try:
        with watched(fn) as seen, torch.no_grad():
            style = style_of(fn, params, tokens)
            call(fn, params, few(tokens, style.group), style=style, layout=Layout())
    except InputError:
        return False
    return bool(seen.models)


def supplied(fn: Callable, params: Mapping[str, Any], tokens: Tokens) -> Tokens:
    """The tokens with the logits of the one other model that the loss runs as their teacher, where it takes no teacher.

    So that a distillation loss with its teacher in a closure can be told from others by that teacher.
    """
    wanted = inputs(fn)
    style = style_of(fn, params, tokens)
    if wanted.kind != "model" or "teacher" in _asked(fn, params, tokens):
        return tokens
    view = batch_view(tokens, Layout(), style)
    with watched(fn) as seen, torch.no_grad():
        on_view(fn, params, view)
    found = [made for made in seen.logits if made.shape[-1] == tokens.logits.shape[1]]
    if len(seen.models) != 1 or not found or found[0].shape != view.logits.shape:
        return tokens
    rows = found[0].reshape(-1, found[0].shape[-1])[view.place]
    return tokens.replace(teacher=rows.to(tokens.logits.dtype))
