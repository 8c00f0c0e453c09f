"""Checks of the arguments of ``fused_loss``, and their supervised rows."""

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from qlens.core.errors import InputError, brief
from qlens.core.numerics import precision
from qlens.core.supervised import IGNORE, signed
from qlens.core.tokens import PER_TOKEN, Tokens
from qlens.core.tokens.fields import (
    check_floats,
    check_id_range,
    check_ids,
    check_vocabulary,
    checked_field,
    number,
)
from qlens.engine.heads import Head, TopK
from qlens.engine.row_inputs import RowInputs
from qlens.registry import Variant

Model = Tensor | tuple[Tensor, Tensor] | Head | TopK
CHUNK = "a whole number of rows, at least 1, or None"
DENOMINATOR = "a finite number above 0 (1e-37 at least), or None"
MODEL = "logits (N, V), a tuple (hidden, head), a Head or a TopK"


def check_arguments(hidden: Any, head: Any, bias: Any, labels: Any, denominator: Any, chunk: Any) -> None:
    """Check types, shapes and devices of the arguments of ``fused_loss``.

    Raises:
        InputError: an argument does not fit; it is named.
    """
    if torch._C._functorch.peek_interpreter_stack() is not None:
        raise InputError(
            "fused_loss does not run inside torch.func's transforms (grad, vmap, jvp ...): take torch.autograd.grad or backward"
        )
    check_floats("hidden", hidden, "(N, H)")
    check_floats("head", head, "(V, H)", hidden.device)
    check_vocabulary("head", len(head))
    if bias is not None and not isinstance(bias, Tensor):
        raise InputError(f"bias must be a tensor (V,) or None, got {brief(bias)}")
    if bias is not None:
        check_floats("bias", bias, "(V,)", hidden.device)
    integers = isinstance(labels, Tensor) and not labels.is_floating_point() and not labels.is_complex()
    if not integers or labels.ndim != 1 or labels.dtype == torch.bool or labels.layout != torch.strided:
        description = f"{tuple(labels.shape)} of {labels.dtype}" if isinstance(labels, Tensor) else brief(labels)
        raise InputError(f"labels must be a dense integer tensor (N,), got {description}")
    signed(labels)
    if labels.device != hidden.device:
        raise InputError(f"labels are on {labels.device}, but hidden on {hidden.device}: they must be on one device")
    if len(hidden) != len(labels):
        raise InputError(f"hidden has {len(hidden)} rows, but labels have {len(labels)}")
    if chunk is not None and not (number("chunk", chunk, CHUNK) >= 1 and number("chunk", chunk, CHUNK) % 1 == 0):
        raise InputError(f"chunk must be {CHUNK}, got {brief(chunk)}")
    least = torch.finfo(torch.float32).tiny
    if denominator is not None and not number("denominator", denominator, DENOMINATOR) >= least:
        raise InputError(f"denominator must be {DENOMINATOR}, got {brief(denominator)}")


def supervised_rows(labels: Tensor, vocabulary: int) -> Tensor:
    """Numbers of the rows whose label is not -100, in order; with one wait for a device other than the CPU.

    Raises:
        InputError: a label that is no id of the vocabulary.
    """
    if labels.device.type == "cpu":
        index = (labels != IGNORE).nonzero()[:, 0]
        check_ids(labels[index], vocabulary)
        return index
    ids = labels.long()
    supervised = ids != IGNORE
    first = torch.where(supervised, ids, 0)
    low, high, count = torch.stack([*first.aminmax(), supervised.sum()]).tolist() if len(labels) else (0, 0, 0)
    check_id_range(low, high, vocabulary)
    return torch.nonzero_static(supervised, size=count)[:, 0]


def check_needs(variant: Variant, inputs: dict[str, Any]) -> None:
    """Check that every model and field that a method needs is there.

    Raises:
        InputError: one is missing.
    """
    needs = (*variant.needs, "pair") if variant.scope == "pair" else variant.needs  # the mean is over the pairs
    missing = [name for name in needs if name not in inputs]
    if missing:
        raise InputError(f"{variant.name} needs a {missing[0]}: give fused_loss({missing[0]}=...)")


def supervised_model(name: str, model: Model, index: Tensor, rows: int, shape: dict) -> Tensor | Head | TopK:
    """Another model's predictions at the supervised rows.

    Args:
        name: of the argument.
        model: its value.
        index: numbers of the supervised rows.
        rows: number of all rows.
        shape: softcap and logit_scale of a head given as a tuple.

    Raises:
        InputError: another type, or another number of rows.
    """
    if isinstance(model, TopK):
        size, selected = len(model.ids), lambda: TopK(model.ids[index], model.log_probs[index], model.tail)
    elif isinstance(model, Head):
        size, selected = len(model.hidden), lambda: replace(model, hidden=rows_at(model.hidden.detach(), index))
    elif isinstance(model, tuple):
        if len(model) != 2 or not all(isinstance(each, Tensor) and each.ndim == 2 for each in model):
            raise InputError(f"{name} must be {MODEL}, got {brief(model)}")
        hidden, head = model
        check_floats(f"the hidden states of {name}", hidden, "(N, H)", index.device)
        check_floats(f"the head of {name}", head, "(V, H)", index.device)
        size, selected = len(hidden), lambda: Head(rows_at(hidden.detach(), index), head.detach(), **shape)
    elif not isinstance(model, Tensor):
        raise InputError(f"{name} must be {MODEL}, got {brief(model)}")
    else:
        check_floats(name, model, "(N, V)", index.device)
        size, selected = len(model), lambda: model.detach()[index]
    if size != rows:
        raise InputError(f"{name} has {size} rows, but labels have {rows}")
    return selected()


def rows_at(values: Tensor, index: Tensor) -> Tensor:
    """Some rows, in order; the values themselves where these are all of them."""
    return values if len(index) == len(values) else values[index]


def check_width(name: str, model: Tensor | Head | TopK, vocabulary: int) -> None:
    """Check that another model predicts over the head's vocabulary.

    Raises:
        InputError: it does not.
    """
    if isinstance(model, TopK):
        if len(model.ids) and not 0 <= int(model.ids.min()) <= int(model.ids.max()) < vocabulary:
            raise InputError(f"{name} names ids outside the vocabulary 0..{vocabulary - 1}")
        model.check_values(name)
        return
    width = model.width if isinstance(model, Head) else model.shape[1] if model.ndim == 2 else None
    if width != vocabulary:
        size = f"a vocabulary of {width}" if width else f"shape {tuple(model.shape)}"
        raise InputError(
            f"{name} has {size}, but the head's vocabulary is {vocabulary}: they must be one; where only "
            f"the padding of one tokenizer's differs, give {name}=Head(hidden, weight).fitted({vocabulary})"
        )


def supervised_field(name: str, value: Tensor, index: Tensor, rows: int, vocabulary: int) -> Tensor:
    """A per-token field at the supervised rows, checked.

    Raises:
        InputError: an unknown name, another number of rows, or a field that requires a gradient.
    """
    if name not in (*PER_TOKEN, "negatives"):
        raise InputError(
            f"fused_loss: unknown field {name!r}; per token there are {', '.join(PER_TOKEN)} and negatives"
        )
    if not isinstance(value, Tensor) or value.ndim < 1 or len(value) != rows:
        description = f"shape {tuple(value.shape)}" if isinstance(value, Tensor) else brief(value)
        raise InputError(f"{name} must be a tensor of {rows} rows, as labels have, got {description}")
    if value.requires_grad:
        raise InputError(
            f"{name} requires a gradient, and fused_loss makes none for it: give {name}.detach(), or take the plain "
            "path, Variant.loss(tokens), whose gradient reaches it"
        )
    shape = (len(index),) if name in PER_TOKEN else (len(index), vocabulary)
    return checked_field(name, value[index], shape)


def sample_tokens(inputs: RowInputs, head: Head, index: Tensor) -> Tokens:
    """Tokens at some of the supervised rows, with whole logits.

    Args:
        inputs: the batch.
        head: the student's hidden states at its rows, and its head.
        index: numbers of rows.
    """
    index = index.to(inputs.labels.device)
    logits = replace(head, hidden=head.hidden[index]).logits(slice(None))
    models = {}
    for name, model in inputs.models.items():
        if isinstance(model, TopK):
            models[name] = TopK(model.ids[index], model.log_probs[index], model.tail).logits(slice(None), logits)
        elif isinstance(model, Head):
            models[name] = replace(model, hidden=model.hidden[index]).logits(slice(None)).to(logits.dtype)
        else:
            models[name] = model[index].to(precision(logits.dtype))
    fields = {name: value[index] for name, value in inputs.fields.items()}
    return Tokens(logits=logits, labels=inputs.labels[index], **models, **fields)
