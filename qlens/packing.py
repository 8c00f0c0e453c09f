"""Packing: several texts in one row, told apart by position ids that start again, which a model must keep apart."""

import inspect
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from qlens.batching import restarts
from qlens.errors import InputError
from qlens.sources import evaluating, model_logits

TRIED = 6  # tokens of two neighbouring texts on which their separation is tried
ROUNDING = 100  # units in the last place of the largest logit


def inputs_of(model: nn.Module) -> dict[str, inspect.Parameter]:
    """The parameters of a model's forward pass; of an adapted model, those of the model beneath."""
    base = model.get_base_model() if callable(getattr(model, "get_base_model", None)) else model
    return dict(inspect.signature(base.forward).parameters)


def uncached(model: nn.Module) -> dict[str, bool]:
    """The argument that keeps a model from filling a key-value cache, with which it would not tell packed texts apart."""
    return {"use_cache": False} if "use_cache" in inputs_of(model) else {}


class Separation:
    """Whether models keep the texts of a packed row apart: tried once for each, never believed."""

    def __init__(self):
        self.tried: set[tuple[nn.Module, bool]] = set()

    def prove(self, model: nn.Module, features: Mapping[str, Any], name: str) -> None:
        """Try a model on the end of one text and the beginning of the next: another first must not change the second.

        Args:
            model: the model itself, unwrapped.
            features: its inputs, packed.
            name: what the message calls it.

        Raises:
            InputError: the model takes no position ids, or its second text sees the first.
        """
        ids, positions = features["input_ids"], features["position_ids"]
        several = len(ids) > 1  # some kernels separate texts only in a batch of one row
        if (model, several) in self.tried:
            return
        takes = inputs_of(model)
        if "position_ids" not in takes:
            raise InputError(
                f"the data are packed (position_ids start again within a row), but the {name} takes no position_ids, so that "
                "its texts would see each other: give every text a row of its own"
            )
        found = restarts(positions)[:, 1:].nonzero()
        row, at = (int(x) for x in found[0])
        begin, end = max(0, at + 1 - TRIED // 2), min(at + 1 + TRIED // 2, ids.shape[1])
        part = {k: v[row : row + 1, begin:end] for k, v in features.items() if _per_token(v, ids)}
        part = {k: v.expand(1 + several, -1) for k, v in part.items()}
        first = at + 1 - begin
        other = part["input_ids"].clone()
        other[:, :first] = torch.where(other[:, :first] == 0, 1, 0)
        with evaluating(model):
            logits = model_logits(model, part)[:, first:]
            moved = model_logits(model, {**part, "input_ids": other})[:, first:]
        gap, size = float((logits - moved).abs().amax()), max(1.0, float(logits.abs().amax()))
        if not gap <= ROUNDING * torch.finfo(logits.dtype).eps * size:
            kernel = getattr(getattr(model, "config", None), "_attn_implementation", None)
            way = (
                "per_device_train_batch_size=1 or attn_implementation='sdpa'"
                if several
                else "attn_implementation='sdpa'"
            )
            raise InputError(
                f"the data are packed (position_ids start again within a row), but in the {name} (attention {kernel!r}) a text "
                f"sees those before it in its row: give every text a row of its own, or try {way}"
            )
        self.tried.add((model, several))


def _per_token(value: Any, ids: Tensor) -> bool:
    return isinstance(value, Tensor) and value.shape == ids.shape
