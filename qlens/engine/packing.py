"""Packing: several texts in one row, told apart by position ids that start again, which a model must keep apart."""

import inspect
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from qlens.core.errors import InputError
from qlens.core.supervised import packed, positions, restarts
from qlens.engine.forward import evaluating, model_logits

BOUNDARIES = (
    "cu_seq_lens_q",
    "seq_idx",
)  # what tells packed texts apart for some models, but not which labels are theirs
TRIED = 6  # tokens of two neighbouring texts on which their separation is tried
SHARE = 0.05  # of what another first text moves where it is the same text: less is rounding


def inputs_of(model: nn.Module) -> dict[str, inspect.Parameter]:
    """The parameters of a model's forward pass; of an adapted model, those of the model beneath."""
    base = model.get_base_model() if callable(getattr(model, "get_base_model", None)) else model
    return dict(inspect.signature(base.forward).parameters)


def uncached(model: nn.Module) -> dict[str, bool]:
    """The argument that keeps a model from filling a key-value cache, with which it would not tell packed texts apart."""
    return {"use_cache": False} if "use_cache" in inputs_of(model) else {}


def features_of(inputs: Mapping[str, Any], model: nn.Module) -> dict[str, Any]:
    """A batch's inputs with positions that ignore padding on the left, and without what would hide that rows are packed.

    transformers' models look for position ids that start again only where there is no attention mask; padding then has
    position 0, as a text of its own. Positions that a model takes none of are left out where every row is one text.

    Raises:
        InputError: rows are packed by something else than position ids.
    """
    features = dict(inputs)
    mask, places = features.get("attention_mask"), features.get("position_ids")
    if places is None and (named := [name for name in BOUNDARIES if name in features]):
        raise InputError(
            f"the data are packed by {named[0]} alone: position_ids that start again where a text begins are needed too "
            "(DataCollatorWithFlattening(return_position_ids=True) makes both)"
        )
    takes = "position_ids" in inputs_of(model)
    if places is not None and places.ndim == 2 and (kept := packed(places, mask)) is not None:
        features.pop("attention_mask", None)
        return {**features, "position_ids": kept}
    if places is not None and not takes:
        del features["position_ids"]
    if places is None and takes and mask is not None and not mask[:, 0].all():
        features["position_ids"] = positions(mask)
    return features


def is_packed(features: Mapping[str, Any]) -> bool:
    """Whether rows of ``features_of`` hold several texts: they have positions and no mask, with a start inside a row."""
    places = features.get("position_ids")
    if places is None or places.ndim != 2 or "attention_mask" in features:
        return False
    return bool(restarts(places)[:, 1:].any())


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
        joined = torch.arange(end - begin, device=ids.device).expand_as(part["position_ids"])
        with evaluating(model):
            gap, size = _moved(model, part, other, first)
            reach, _ = _moved(model, {**part, "position_ids": joined}, other, first)  # as one text, where it must move
        if not gap <= max(SHARE * reach, 2 * torch.finfo(size.dtype).eps * float(size)):
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


def _moved(model: nn.Module, part: Mapping[str, Tensor], other: Tensor, first: int) -> tuple[float, Tensor]:
    """How far the second text's logits move with other tokens before it, and the largest of them."""
    logits = model_logits(model, part)[:, first:]
    moved = model_logits(model, {**part, "input_ids": other})[:, first:]
    return float((logits - moved).abs().amax()), logits.abs().amax()
