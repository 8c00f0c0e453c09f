"""Causality: whether a model predicts every token from earlier tokens alone."""

import weakref
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from qlens.core.errors import InputError
from qlens.engine.models.forward import evaluating
from qlens.engine.models.packing import uncached

TRIAL_TOKENS = 16  # of one row
ROUNDING = 8  # units in the last place of the largest logit: kernels of experts round by how many tokens they have
_CAUSAL: "weakref.WeakSet[nn.Module]" = weakref.WeakSet()  # pyright: ignore


def check_decoder(model: Any, name: str) -> None:
    """Check that a model has no encoder, by its configuration.

    Raises:
        InputError: it has one.
    """
    if getattr(getattr(model, "config", None), "is_encoder_decoder", False) is True:
        raise InputError(
            f"the {name} ({_kind(model)}) is an encoder-decoder: qlens takes causal language models, whose logits at a "
            "token predict the next one; load one by AutoModelForCausalLM"
        )


def check_causal(model: nn.Module, features: Mapping[str, Any], name: str) -> None:
    """Check, once per model, that its logits do not change with later tokens.

    Args:
        model: the model itself, unwrapped.
        features: a batch of its inputs, of which ``input_ids`` (B, T) are changed; other inputs are left as they are.
        name: of the model in the message.

    Raises:
        InputError: the model has an encoder, or its logits at a token depend on later tokens.
    """
    from qlens.losses.stubs.stub_model import StubModel

    if model in _CAUSAL or isinstance(model, StubModel):  # a table of logits is causal
        return
    check_decoder(model, name)
    ids = features.get("input_ids")
    if not isinstance(ids, Tensor) or ids.ndim != 2:
        return
    part, ids = _part(features, ids)
    length = ids.shape[1]
    if length < 2:
        return
    first = length // 2
    other = ids.clone()
    other[:, first:] = torch.where(other[:, first:] == 0, 1, 0)
    with evaluating(model):
        logits, changed = (
            model(**{**part, "input_ids": input_ids}, **uncached(model))["logits"].detach()
            for input_ids in (ids, other)
        )
    if logits.ndim != 3 or logits.shape != changed.shape or logits.shape[1] != length:
        return  # such logits are refused where the labels are laid over them
    moved_by = float((logits - changed)[:, :first].abs().nan_to_num().amax())
    if moved_by > ROUNDING * torch.finfo(logits.dtype).eps * float(logits.abs().nan_to_num().amax()):
        raise InputError(
            f"the {name} ({_kind(model)}) is no causal language model: its logits at a token change with the tokens "
            "after it, among them the label; load one by AutoModelForCausalLM (of BERT's kind, with is_decoder=True)"
        )
    _CAUSAL.add(model)


def _kind(model: Any) -> str:
    base = model.get_base_model() if callable(getattr(model, "get_base_model", None)) else model
    return type(base).__name__


def _part(features: Mapping[str, Any], ids: Tensor) -> tuple[dict[str, Any], Tensor]:
    """Inputs of a few real tokens of the fullest row, as one text; the whole batch where an input is not one value per token."""
    mask, places = features.get("attention_mask"), features.get("position_ids")
    other_inputs = [value for name, value in features.items() if name != "input_ids" and isinstance(value, Tensor)]
    if any(value.shape != ids.shape for value in other_inputs):
        return dict(features), ids
    row, start, end = 0, 0, ids.shape[1]
    if mask is not None:
        row = int(mask.sum(1).argmax())
        real = mask[row].nonzero()[:, 0]
        start, end = (int(real[0]), int(real[-1]) + 1) if len(real) else (0, 0)
    at = (slice(row, row + 1), slice(start, min(end, start + TRIAL_TOKENS)))
    part = {name: value[at] if isinstance(value, Tensor) else value for name, value in features.items()}
    if places is not None:
        part["position_ids"] = torch.arange(part["input_ids"].shape[1], device=ids.device)[None]
    return part, part["input_ids"]
