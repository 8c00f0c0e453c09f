"""Calling: one call of a loss, its arguments filled by their names, on rows or batches in the layout that it wants."""

import inspect
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from qlens.core.autograd import ordinary
from qlens.core.tokens import Tokens
from qlens.losses.layout.layouts import (
    Layout,
    Style,
    View,
    arranged,
    batch_of,
    batch_view,
    label_log_probs,
    pair_sums,
    rows_view,
    sequences,
    supervised,
    tiled,
    token_ids,
)
from qlens.losses.layout.names import FIELD, role_of
from qlens.losses.layout.signature import CALLERS, inputs, lists_of, name_of, signature
from qlens.losses.stubs.holders import built, entry_of, is_trainer, with_model
from qlens.losses.user_code import blamed, file_of

WIDE = ("logits", "outputs", "probs", "teacher", "reference", "old", "sampling old", "second", "teacher outputs",
        "reference outputs", "teacher probs", "negatives")  # fmt: skip

__all__ = ["CALLERS", "Layout", "call", "extra_inputs", "kind", "name_of", "on_batch", "opened", "signature", "written"]


def opened(loss: Callable) -> Callable:
    """The function inside: a trainer's compute_loss (its class is built around a stub model), a loss class built.

    Raises:
        InputError: the class cannot be built without arguments, or the function is asynchronous or a generator.
    """
    if inspect.isclass(loss) and is_trainer(loss):
        from qlens.losses.stubs.trainers import trained_by

        return trained_by(loss)
    return with_model(entry_of(built(loss) if inspect.isclass(loss) else loss))


def kind(fn: Callable) -> str:
    """What a loss is called with: tokens, logits, outputs, hidden or model.

    Raises:
        InputError: no parameter can be given logits.
    """
    return inputs(fn).kind


def extra_inputs(fn: Callable) -> tuple[str, ...]:
    """The fields of Tokens that a loss cannot be called without, beside logits and labels."""
    fields = [FIELD[role] for role in inputs(fn).required.values() if role in FIELD and FIELD[role] != "weight"]
    if "pair" in fields:
        fields.append("chosen")
    return tuple(dict.fromkeys(fields))


def takes(fn: Callable, role: str) -> bool:
    """Whether a loss takes this input, with or without a default."""
    found = inputs(fn)
    return role in found.required.values() or role in found.optional.values()


def call(
    fn: Callable,
    params: Mapping[str, Any],
    tokens: Tokens,
    layout: Layout,
    safe: bool = False,
    style: Style | None = None,
) -> Any:
    """One call of the loss as it wants to be called, on the rows in the given layout; on copies, unless it is ``safe``."""
    if style is None:
        from qlens.losses.layout.layout_search import style_of

        style = style_of(fn, params, tokens)
    laid = tiled(tokens, layout)
    if kind(fn) == "tokens":
        return on_view(fn, params, rows_view(shown(fn, laid), layout, style, safe=True))
    view = batch_view(laid, layout, style) if style.laid_out else rows_view(laid, layout, style, safe)
    return on_view(fn, params, view)


def shown(fn: Callable, tokens: Tokens) -> Tokens:
    """What a method of tokens is shown: a user's own may write on it, and gets copies; qlens' own do not."""
    return tokens if is_built_in(fn) else tokens.copied()


def is_built_in(fn: Callable) -> bool:
    """Whether it is one of qlens' own methods, whose card and manners the tests prove."""
    return str(getattr(fn, "__module__", "")).startswith("qlens.variants.")


def on_batch(
    fn: Callable,
    logits: Tensor,
    labels: Tensor,
    tokens: Tokens,
    params: Mapping[str, Any],
    style: Style,
    attention: Tensor | None = None,
    ids: Tensor | None = None,
    **given: Any,
) -> Any:
    """One call on (B, T, V) logits and unshifted (B, T) labels, whose supervised positions are ``tokens``, in order."""
    if attention is None:
        attention = torch.ones_like(labels)
    if ids is None:
        ids = token_ids(torch.arange(labels.numel(), device=labels.device).view(labels.shape), logits.shape[-1])
    view = batch_of(logits, labels, tokens, supervised(labels), attention, ids, style)
    return on_view(fn, params, view, **given)


def on_view(fn: Callable, params: Mapping[str, Any], view: View, **given: Any) -> Any:
    """One call with every argument filled from the view; ``given`` and ``params`` by name.

    Raises:
        LossError: whatever the loss raised.
        InputError: the tokens lack a field that it needs.
    """
    filled = arguments(fn, view) | given
    filled |= {name: value for name, value in params.items() if value is not None or name not in filled}
    found = signature(fn)
    ordered = [name for name in found if name in filled and found[name].kind is inspect.Parameter.POSITIONAL_ONLY]
    args = [filled.pop(name) for name in ordered]
    with blamed(name_of(fn), file_of(fn)):
        return fn(*args, **filled)


def arguments(fn: Callable, view: View) -> dict[str, Any]:
    """The arguments of a loss by name: all that it requires, and what is there of the others."""
    wanted = inputs(fn)
    filled = {name: _value(role, view, wanted.required) for name, role in wanted.required.items()}
    for name, role in wanted.optional.items():
        field = FIELD.get(role)
        if view.style.counted if role == "count" else view.style.optional:
            if field is None or getattr(view.tokens, field) is not None:
                filled[name] = _value(role, view, wanted.required | wanted.optional)
    roles, lists = wanted.required | wanted.optional, lists_of(fn)
    for name, value in filled.items():
        wide = roles[name] in WIDE or (roles[name].endswith("log probs") and "labels" in roles.values())
        filled[name] = arranged(value, view.style, wide, name in lists if lists else wide)
        filled[name] = _contained(roles[name], filled[name], view) if view.style.container else filled[name]
    return filled


def _value(role: str, view: View, wanted: Mapping[str, str]) -> Any:
    """What an argument of this role is given."""
    tokens, whole = view.tokens, "labels" in wanted.values()
    if wanted and "head" in wanted.values():
        if role.endswith("head"):
            from qlens.losses.stubs.stub_model import identity_head

            return identity_head(view.logits.shape[-1], view.logits) / _factors(view)
        if role == "labels":
            return view.labels
        return (tokens.require(role) if role in ("teacher", "reference") else view.logits) * _factors(view)
    if role in ("logits", "outputs"):
        return boxed(view.logits) if view.style.boxed else view.logits
    if role in ("tokens", "labels"):
        return getattr(view, role)
    if role == "model":
        from qlens.losses.stubs.stub_model import StubModel

        ids = model_inputs(view)["input_ids"]
        return StubModel(view.logits, ids, lambda field: view.spread(tokens.require(field)), view.style.head)
    if role.endswith(" model"):
        from qlens.losses.stubs.trainers import Companion

        return Companion(FIELD[role], view.spread(tokens.require(FIELD[role])))
    if role == "batch":
        return model_inputs(view)
    if role == "dict":
        return Columns(model_inputs(view), logits=arranged(view.logits, view.style, True, False))
    if role.endswith("chosen log probs") or role.endswith("rejected log probs"):
        logits = tokens.require("reference") if role.startswith("reference") else _rows(view)
        return pair_sums(label_log_probs(logits, tokens.labels), tokens, "chosen" in role)
    if role.endswith("log probs"):
        if role == "log probs" and whole:
            return torch.log_softmax(view.logits, -1)
        logits = _rows(view) if role == "log probs" else _other_logits(role, tokens)
        if view.style.pairs and not view.style.laid_out:
            return _text_sums(label_log_probs(logits, tokens.labels), view)
        return view.spread(logits.log_softmax(-1) if whole else label_log_probs(logits, tokens.labels))
    if role == "probs":
        return torch.softmax(view.logits, -1)
    if role == "teacher probs":
        return view.spread(tokens.require("teacher").softmax(-1))
    if role.endswith("outputs") and role != "return outputs":
        value = view.spread(tokens.require(FIELD[role]))
        as_outputs = view.style.boxed or not {"outputs", "model"} & {*wanted.values()}
        return boxed(value) if as_outputs == view.style.alike else value
    if role == "weight":
        ones = torch.ones(len(tokens), dtype=view.logits.dtype, device=view.logits.device)
        weight = ones if tokens.weight is None else tokens.weight
        return view.per_token(weight)
    if role == "advantage":
        return view.per_token(tokens.require("advantage"))
    if role in FIELD:
        return view.spread(_other_logits(role, tokens))
    return _simple(role, view)


def _factors(view: View) -> Tensor:
    """Factors of the hidden states' entries, and divisors of the head's, that leave the logits exactly as they are, (V,)."""
    powers = torch.arange(view.logits.shape[-1], device=view.logits.device) % 3 - 1
    return torch.full_like(powers, view.style.head, dtype=view.logits.dtype) ** powers


def _simple(role: str, view: View) -> Any:
    """Masks, counts and settings."""
    if role == "mask":
        return view.mask()
    if role == "attention mask":
        return view.attention.to(torch.bool if view.style.flag is torch.bool else torch.long)
    if role == "count":
        return torch.tensor(len(view.tokens), device=view.logits.device)
    if role == "texts":
        return torch.tensor(len(view.labels) if view.style.laid_out else 1, device=view.logits.device)
    if role == "position ids":
        return torch.arange(view.labels.shape[-1], device=view.labels.device).expand(view.labels.shape)
    if role == "input ids":
        return model_inputs(view)["input_ids"]
    settings = {"vocabulary": view.logits.shape[-1], "ignore": -100, "temperature": 1.0, "return outputs": False}
    return settings[role]


def _contained(role: str, value: Any, view: View) -> Any:
    """Labels, outputs or inputs in the container that the style wants them in."""
    container = view.style.container
    if role == "labels" and container == "one-hot":
        one_hot = torch.nn.functional.one_hot(value.clamp(min=0), view.logits.shape[-1]).to(view.logits.dtype)
        return one_hot * (value >= 0)[..., None]
    if role == "labels" and container == "pair":
        return value, view.mask()
    if role == "labels" and container == "dict":
        return model_inputs(view)
    if role == "batch" and container == "pair":
        return value["input_ids"], value["labels"]
    if role == "outputs" and container == "outputs":
        return getattr(value, "logits", value), view.logits.new_zeros(())
    return value


class Columns(dict):
    """A model's inputs, read as a dict or by attribute, as what a tokenizer gives."""

    def __getattr__(self, name: str) -> Any:
        try:
            return self[name]
        except KeyError:
            raise AttributeError(name) from None


def model_inputs(view: View) -> Columns:
    """A model's inputs: ids that depend on no label (unless the loss takes its labels from there), mask, labels, columns."""
    ids = view.labels.clamp(min=0) if view.style.ids else view.ids
    found = Columns(input_ids=ids, attention_mask=view.attention, labels=view.labels)
    for name in view.style.columns:
        found.setdefault(name, _value(role_of(name) or "", view, {}))
    return Columns({name: arranged(value, view.style, role_of(name) in WIDE, False) for name, value in found.items()})


def boxed(logits: Tensor) -> Any:
    """Logits as a model's outputs."""
    from transformers.modeling_outputs import CausalLMOutput

    return CausalLMOutput(logits=logits)  # pyright: ignore[reportArgumentType]


def _rows(view: View) -> Tensor:
    """The supervised rows of the logits, (N, V)."""
    return view.logits.reshape(-1, view.logits.shape[-1])[view.place]


def _other_logits(role: str, tokens: Tokens) -> Tensor:
    """The field that a role is filled from; for a second old policy, halfway from the first to the second pass, if given."""
    value = tokens.require(FIELD[role])
    if not role.startswith("sampling") or tokens.second is None:
        return value
    return (value + tokens.second) / 2


def _text_sums(values: Tensor, view: View) -> Tensor:
    """The sum over every text of a batch of pairs, in the order of its style, (2P,)."""
    text = sequences(view.tokens, view.style, Layout())
    return values.new_zeros(int(text.max()) + 1).index_add(0, text, values)


def written(fn: Callable, params: Mapping[str, Any], tokens: Tokens, style: Style | None = None) -> tuple[str, ...]:
    """Which of logits and labels a loss changes in place; it is given copies, so that no harm is done."""
    if kind(fn) != "logits":
        return ()
    if style is None:
        from qlens.losses.layout.layout_search import style_of

        style = style_of(fn, params, tokens)
    with torch.inference_mode(False), torch.no_grad():  # what is made under inference_mode has no version
        tokens = ordinary(tokens)
        view = (batch_view if style.laid_out else rows_view)(
            tokens.with_logits(tokens.logits.detach()), Layout(), style
        )
        given = {"logits": view.logits, "labels": view.labels}
        fresh = {name: value._version for name, value in given.items()}
        on_view(fn, params, view)
    return tuple(name for name, value in given.items() if value._version != fresh[name])
