"""Effects of a loss that its logit gradient alone does not show: modules that run, inputs without effect, further labels."""

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from qlens.core.errors import InputError
from qlens.core.tokens import MODELS, Tokens
from qlens.losses.layout.layouts import Style
from qlens.losses.layout.names import FIELD, role_of
from qlens.losses.layout.signature import inputs
from qlens.losses.layout.trial import TURNED, across, changed, grad_of
from qlens.losses.layout.views import label_log_probs
from qlens.losses.side_effects import ModuleCalls

TEXT = 12  # rows of the one text on which the labels that a row reacts to are found
SCALES = (0.5, 20.0, -20.0)  # of other models' logits, moved to the next entry: a hinge reacts to large changes alone
CHANGED = 1e-6  # relative change of a gradient that is an effect


def modules(module_calls: ModuleCalls) -> list[str]:
    """Notes on other models, layers and forward passes that ran."""
    notes = []
    if module_calls.models:
        class_names = " and ".join(module_calls.models)
        notes.append(
            f"It runs another model ({class_names}), whose inputs here are made-up token ids that no label changes."
        )
    if module_calls.layers:
        class_names = " and ".join(module_calls.layers)
        notes.append(
            f"It runs layers of its own ({class_names}) on what the model gives; their weights are trained "
            "too, unseen here."
        )
    if module_calls.passes > 1:
        notes.append(
            f"It runs the model {module_calls.passes} times. In training, dropout makes the passes differ; here they are equal, "
            "so that terms which compare them vanish."
        )
    if module_calls.hidden:
        notes.append("It asks for hidden states; here they are the logits themselves.")
    return notes


def equal_inputs(roles: Mapping[str, str], filled: Mapping[str, str], tokens: Tokens) -> list[str]:
    """Notes on arguments that have the same values, so that the effect of their difference is not seen.

    Args:
        roles: the role of every parameter.
        filled: the arguments.
        tokens: the tokens that their values are taken from.
    """
    notes = []
    for name in filled:
        if roles.get(name, "").startswith("sampling"):
            first = next(n for n in filled if n != name and roles.get(n) == roles[name].removeprefix("sampling "))
            text = (
                f"{first} is the old policy that ratios are taken to; {name} another one, that texts were sampled from"
            )
            same = "with the same values, so that a ratio of the two is 1 here: give tokens with second=..., near old"
            different = "halfway between the tokens' old and second, so that a ratio of the two is a factor of its own"
            notes.append(f"{text}, {same if tokens.second is None else different}.")
    for field in MODELS:
        names = [name for name in filled if FIELD.get(roles.get(name, "")) == field and roles[name] != f"{field} model"]
        if len({roles[name] for name in names}) < len(names):
            notes.append(
                f"{' and '.join(names)} are given the same values, the tokens' {field}: a ratio of the two is 1 here, and what "
                "their difference does to the gradient is not seen."
            )
    return notes


def sampling_ratio(fn: Callable, params: Mapping[str, Any], tokens: Tokens, style: Style, base: Tensor) -> list[str]:
    """A note if the ratio of the label's probabilities under two old policies is a factor of the gradient, with its cap."""
    loss_inputs = inputs(fn)
    sampled = any(role.startswith("sampling") for role in (loss_inputs.required | loss_inputs.optional).values())
    if not sampled or tokens.second is None:
        return []
    without = grad_of(fn, params, tokens.replace(second=None), style)
    large = without.norm(dim=-1) > TURNED * float(without.norm(dim=-1).max())
    if not bool(large.any()):
        return []
    factor = ((base * without).sum(-1) / without.square().sum(-1))[large]
    old, sampling = tokens.require("old"), (tokens.require("old") + tokens.second) / 2
    ratio = (label_log_probs(old, tokens.labels) - label_log_probs(sampling, tokens.labels)).exp()[large]
    cap = float(factor.max())
    off = min(float((factor - expected).abs().max() / cap) for expected in (ratio, ratio.clamp(max=cap)))
    if not off <= TURNED:
        return []
    capped = f", at most {cap:.4g}" if float(ratio.max()) > cap * (1 + TURNED) else ""
    return [f"That ratio, p under the first over p under the second of the label, is a factor of its gradient{capped}."]


def hidden_states(fn: Callable, params: Mapping[str, Any], tokens: Tokens, style: Style, base: Tensor) -> list[str]:
    """A note if part of the gradient reaches the hidden states past the head, seen with another head."""
    try:
        other = grad_of(fn, params, tokens, replace(style, head=2.0))
    except InputError:
        return []
    if float((other - base).norm() / base.norm()) < 10 * TURNED:
        return []
    return [
        "Part of its gradient reaches the hidden states past the head, so that it is no function of the logits: what is "
        "read here holds that part for logits too."
    ]


def unused_inputs(fn: Callable, params: Mapping[str, Any], tokens: Tokens, style: Style, base: Tensor) -> list[str]:
    """Notes on inputs whose values do not change the gradient."""
    loss_inputs = inputs(fn)
    roles = loss_inputs.required | (loss_inputs.optional if style.optional else {})
    roles |= {name: role_of(name) or "" for name in style.columns}
    fields: dict[str, list[str]] = {}
    for name, role in roles.items():
        if role in FIELD and role not in ("sequence", "pair", "chosen") and not role.endswith("rejected log probs"):
            fields.setdefault(FIELD[role], []).append(name)
    fields.pop("pair", None)
    notes = []
    for field, names in fields.items():
        try:
            effect = _moved(fn, params, tokens, style, base, field)
        except InputError:
            continue
        if effect is False:
            notes.append(f"{' and '.join(names)} has no effect on its gradient.")
    return notes


def _moved(
    fn: Callable, params: Mapping[str, Any], tokens: Tokens, style: Style, base: Tensor, field: str
) -> bool | None:
    """Whether other values in a field change the gradient; None if the tokens have no such field."""
    effect = None
    for scale in SCALES if field in MODELS else SCALES[:1]:
        other = _with_other_values(tokens, field, scale)
        if other is None:
            return effect
        effect = bool((grad_of(fn, params, other, style) - base).norm() > CHANGED * base.norm())
        if effect:
            return True
    return effect


def _with_other_values(tokens: Tokens, field: str, scale: float) -> Tokens | None:
    """The tokens with other values in a field, None if they have none; other models' logits are moved and scaled."""
    value = getattr(tokens, field)
    if field == "weight":
        ones = torch.ones(len(tokens), dtype=tokens.logits.dtype, device=tokens.logits.device)
        turn = torch.arange(len(tokens), device=ones.device) % 3
        return tokens.replace(weight=(ones if value is None else value) * (2 + turn))
    if value is None:
        return None
    if value.dtype is torch.bool:
        return tokens.replace(**{field: ~value})
    if field in MODELS:
        return tokens.replace(**{field: scale * value.roll(1, -1)})
    if value.is_floating_point():
        return tokens.replace(**{field: 2 * value.roll(1, 0) + 1})
    return None


def other_labels(fn: Callable, params: Mapping[str, Any], tokens: Tokens, style: Style) -> list[str]:
    """A note on labels, further on or back in its text, that a row reacts to beside its own."""
    if style.several or style.pairs:
        return []
    index = torch.arange(TEXT, device=tokens.logits.device) % len(tokens)
    text = tokens[index]
    if text.sequence is not None:
        text = text.replace(sequence=torch.zeros_like(index))
    label = TEXT // 2
    try:
        base = grad_of(fn, params, text, style)
        grad = grad_of(fn, params, changed(text, torch.arange(TEXT) == label), style)
    except InputError:
        return []
    turn, change = across(grad, base), (grad - base).norm(dim=-1)
    rows = (turn > TURNED * float(base.norm(dim=-1).max())).nonzero()[:, 0].tolist()
    strengths = {label - row: float(change[row] / change[label]) for row in rows if row != label}
    if label not in rows or not strengths or len(strengths) > 4:
        return []
    if min(strengths) > 0:
        learns = " and ".join(
            f"the one {k} further on ({share:.2g} times as strongly)" for k, share in strengths.items()
        )
        return [
            f"A row learns its own label and {learns}: another term, no function of its own label (multi-token prediction, "
            "say). The rest of what is said here is about the sum of both."
        ]
    offsets = ", ".join(f"{abs(k)} {'after' if k > 0 else 'before'}" for k in sorted(strengths))
    return [f"A row's gradient also turns with labels of other tokens of its text ({offsets} it)."]
