"""The arguments of a loss: the value of every input that it takes, from the supervised rows in its layout."""

import sys
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from qlens.core.segments import Groups
from qlens.core.tokens import Tokens
from qlens.losses.layout.layouts import Layout, sequences
from qlens.losses.layout.names import FIELD, role_of
from qlens.losses.layout.signature import inputs, lists_of
from qlens.losses.layout.views import View, arranged, label_log_probs, pair_sums

WIDE = ("logits", "outputs", "probs", "teacher", "reference", "old", "sampling old", "second", "teacher outputs",
        "reference outputs", "teacher probs", "negatives")  # fmt: skip
"""Inputs with an entry for every token of the vocabulary."""


def arguments(fn: Callable, view: View) -> dict[str, Any]:
    """The arguments of a loss by name: all that it requires, and the optional ones that the tokens hold."""
    loss_inputs = inputs(fn)
    filled = {name: _value(role, view, loss_inputs.required) for name, role in loss_inputs.required.items()}
    for name, role in loss_inputs.optional.items():
        field = FIELD.get(role)
        if view.style.counted if role == "count" else view.style.optional:
            if field is None or getattr(view.tokens, field) is not None:
                filled[name] = _value(role, view, loss_inputs.required | loss_inputs.optional)
    roles, lists = loss_inputs.required | loss_inputs.optional, lists_of(fn)
    for name, value in filled.items():
        wide = roles[name] in WIDE or (roles[name].endswith("log probs") and "labels" in roles.values())
        filled[name] = arranged(value, view.style, wide, name in lists if lists else wide)
        filled[name] = _contained(roles[name], filled[name], view) if view.style.container else filled[name]
    return filled


def _value(role: str, view: View, roles: Mapping[str, str]) -> Any:
    """The value of an input, by its role; ``roles`` holds the roles of all parameters of the loss."""
    tokens, whole = view.tokens, "labels" in roles.values()
    if roles and "head" in roles.values():
        return _kernel_value(role, view)
    if role in ("logits", "outputs"):
        return boxed(view.logits, trial=role == "logits") if view.style.boxed else view.logits
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
        logits = tokens.require("reference") if role.startswith("reference") else view.rows()
        return pair_sums(label_log_probs(logits, tokens.labels), tokens, "chosen" in role)
    if role.endswith("log probs"):
        return _log_probs(role, view, whole)
    if role == "probs":
        return torch.softmax(view.logits, -1)
    if role == "teacher probs":
        return view.spread(tokens.require("teacher").softmax(-1))
    if role.endswith("outputs") and role != "return outputs":
        value = view.spread(tokens.require(FIELD[role]))
        as_outputs = view.style.boxed or not {"outputs", "model"} & {*roles.values()}
        return boxed(value) if as_outputs == view.style.same_form else value
    if role == "weight":
        ones = torch.ones(len(tokens), dtype=view.logits.dtype, device=view.logits.device)
        return view.per_token(ones if tokens.weight is None else tokens.weight)
    if role == "advantage":
        return view.per_token(tokens.require("advantage"))
    if role in FIELD:
        return view.spread(_other_logits(role, tokens))
    return _setting(role, view)


def _kernel_value(role: str, view: View) -> Tensor:
    """An input of a loss of hidden states and a head, whose product is the logits."""
    from qlens.losses.stubs.stub_model import identity_head

    size = view.logits.shape[-1]
    powers = torch.arange(size, device=view.logits.device) % 3 - 1
    factors = (
        torch.full_like(powers, view.style.head, dtype=view.logits.dtype) ** powers
    )  # of entries; logits stay exact
    if role.endswith("head"):
        return identity_head(size, view.logits) / factors
    if role == "labels":
        return view.labels
    return (view.tokens.require(role) if role in ("teacher", "reference") else view.logits) * factors


def _log_probs(role: str, view: View, whole: bool) -> Tensor:
    """Log-probabilities of the labels, of whole texts for a loss of pairs, or of all entries if the loss takes labels too."""
    tokens = view.tokens
    if role == "log probs" and whole:
        return torch.log_softmax(view.logits, -1)
    logits = view.rows() if role == "log probs" else _other_logits(role, tokens)
    if view.style.pairs and not view.style.laid_out:
        return Groups(sequences(tokens, view.style, Layout())).total(label_log_probs(logits, tokens.labels))
    return view.spread(logits.log_softmax(-1) if whole else label_log_probs(logits, tokens.labels))


def _other_logits(role: str, tokens: Tokens) -> Tensor:
    """The field of a role; for a second old policy the mean of the first one and the second pass, if there is one."""
    value = tokens.require(FIELD[role])
    if not role.startswith("sampling") or tokens.second is None:
        return value
    return (value + tokens.second) / 2


def _setting(role: str, view: View) -> Any:
    """A mask, a count or a setting."""
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
    """Labels, outputs or inputs in the container of the style."""
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
    """A model's inputs, readable as a dict or by attribute, as a tokenizer's BatchEncoding is."""

    def __getattr__(self, name: str) -> Any:
        try:
            return self[name]
        except KeyError:
            raise AttributeError(name) from None


def model_inputs(view: View) -> Columns:
    """A model's inputs: input_ids, attention_mask, labels and the columns of the style.

    The ids do not depend on the labels, unless the style says that the loss reads its labels from them.
    """
    ids = view.labels.clamp(min=0) if view.style.ids else view.ids
    columns = Columns(input_ids=ids, attention_mask=view.attention, labels=view.labels)
    for name in view.style.columns:
        columns.setdefault(name, _value(role_of(name) or "", view, {}))
    return Columns({name: arranged(value, view.style, role_of(name) in WIDE, False) for name, value in columns.items()})


def boxed(logits: Tensor, trial: bool = False) -> Any:
    """Logits as the outputs of a model; in a trial without the second that it takes to import transformers."""
    if trial and "transformers" not in sys.modules:
        return CausalLMOutput(logits)
    from transformers import modeling_outputs

    return modeling_outputs.CausalLMOutput(logits=logits)  # pyright: ignore[reportArgumentType]


class CausalLMOutput(dict):
    """A model's outputs, read by attribute, key or place as those of transformers."""

    loss = hidden_states = attentions = None

    def __init__(self, logits: Tensor):
        super().__init__(logits=logits)
        self.logits = logits

    def __getitem__(self, key: Any) -> Any:
        return super().__getitem__(key) if isinstance(key, str) else self.to_tuple()[key]

    def to_tuple(self) -> tuple[Any, ...]:
        """The values in their order."""
        return tuple(self.values())
