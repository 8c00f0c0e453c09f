"""Packed rows: several texts in one row, whose position ids start again, which a model must keep apart."""

import inspect
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from qlens.core.errors import InputError
from qlens.core.supervised import packed, positions, restarts
from qlens.engine.models.forward import evaluating, model_logits

BOUNDARIES = ("cu_seq_lens_q", "seq_idx")  # inputs that separate packed texts in some models, but not their labels
TRIAL_TOKENS = 6  # of two neighbouring texts
ROUNDING = 0.05  # an effect on the second text below this share of the effect within one text is rounding


def forward_parameters(model: nn.Module) -> dict[str, inspect.Parameter]:
    """The parameters of a model's forward pass; of an adapted model, those of the model beneath."""
    base = model.get_base_model() if callable(getattr(model, "get_base_model", None)) else model
    return dict(inspect.signature(base.forward).parameters)


def uncached(model: nn.Module) -> dict[str, bool]:
    """The argument that switches a model's key-value cache off; with a cache, packed texts are not kept apart."""
    return {"use_cache": False} if "use_cache" in forward_parameters(model) else {}


def features_of(inputs: Mapping[str, Any], model: nn.Module) -> dict[str, Any]:
    """A batch's inputs as a model needs them: positions that ignore padding on the left, and no mask where rows are packed.

    transformers' models look for position ids that start again only where there is no attention mask; padding then has
    position 0, as a text of its own. ``position_ids`` are left out for a model that takes none, where every row is one text.

    Raises:
        InputError: rows are packed without position ids.
    """
    features = dict(inputs)
    mask, places = features.get("attention_mask"), features.get("position_ids")
    if places is None and (boundaries := [name for name in BOUNDARIES if name in features]):
        raise InputError(
            f"the data are packed by {boundaries[0]} alone: position_ids that start again where a text begins are "
            "needed too (DataCollatorWithFlattening(return_position_ids=True) makes both)"
        )
    takes = "position_ids" in forward_parameters(model)
    if places is not None and places.ndim == 2 and (positions_of := packed(places, mask)) is not None:
        features.pop("attention_mask", None)
        return {**features, "position_ids": positions_of}
    if places is not None and not takes:
        del features["position_ids"]
    if places is None and takes and mask is not None and not mask[:, 0].all():
        features["position_ids"] = positions(mask)
    return features


def is_packed(features: Mapping[str, Any]) -> bool:
    """Whether rows of ``features_of`` hold several texts: positions start again inside a row, and there is no mask."""
    places = features.get("position_ids")
    if places is None or places.ndim != 2 or "attention_mask" in features:
        return False
    return bool(restarts(places)[:, 1:].any())


class TextSeparation:
    """Verifies, once per model, that it keeps the texts of a packed row apart."""

    def __init__(self):
        self.verified: set[tuple[nn.Module, bool]] = set()

    def verify(self, model: nn.Module, features: Mapping[str, Any], name: str) -> None:
        """Run a model on the end of one text and the beginning of the next: changing the first must not change the second.

        Args:
            model: the model itself, unwrapped.
            features: its inputs, packed.
            name: of the model in the message.

        Raises:
            InputError: the model takes no position ids, or its second text sees the first.
        """
        ids, positions = features["input_ids"], features["position_ids"]
        several = len(ids) > 1  # some kernels separate texts only in a batch of one row
        if (model, several) in self.verified:
            return
        if "position_ids" not in forward_parameters(model):
            raise InputError(
                f"the data are packed (position_ids start again within a row), but the {name} takes no position_ids, "
                "so that its texts would see each other: give every text a row of its own"
            )
        row, at = (int(x) for x in restarts(positions)[:, 1:].nonzero()[0])
        begin, end = max(0, at + 1 - TRIAL_TOKENS // 2), min(at + 1 + TRIAL_TOKENS // 2, ids.shape[1])
        part = {k: v[row : row + 1, begin:end] for k, v in features.items() if _per_token(v, ids)}
        part = {k: v.expand(1 + several, -1) for k, v in part.items()}
        first = at + 1 - begin
        other = part["input_ids"].clone()
        other[:, :first] = torch.where(other[:, :first] == 0, 1, 0)
        joined = torch.arange(end - begin, device=ids.device).expand_as(part["position_ids"])
        with evaluating(model):
            gap, size = _moved(model, part, other, first)
            reach, _ = _moved(model, {**part, "position_ids": joined}, other, first)  # as one text, where it must move
        if not gap <= max(ROUNDING * reach, 2 * torch.finfo(size.dtype).eps * float(size)):
            kernel = getattr(getattr(model, "config", None), "_attn_implementation", None)
            advice = (
                "per_device_train_batch_size=1 or attn_implementation='sdpa'"
                if several
                else "attn_implementation='sdpa'"
            )
            raise InputError(
                f"the data are packed (position_ids start again within a row), but in the {name} (attention {kernel!r}) "
                f"a text sees those before it in its row: give every text a row of its own, or try {advice}"
            )
        self.verified.add((model, several))


def _per_token(value: Any, ids: Tensor) -> bool:
    return isinstance(value, Tensor) and value.shape == ids.shape


def _moved(model: nn.Module, part: Mapping[str, Tensor], other: Tensor, first: int) -> tuple[float, Tensor]:
    """The largest change of the second text's logits with other tokens before it, and the largest logit."""
    logits = model_logits(model, part)[:, first:]
    changed = model_logits(model, {**part, "input_ids": other})[:, first:]
    return float((logits - changed).abs().amax()), logits.abs().amax()
