"""The two-entry vocabulary {label, rest}, on which methods of structure "label" are evaluated."""

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from qlens.core.tokens import MODELS, Tokens

DENSE = ("negatives",)  # fields that name entries of the vocabulary: there is no rest to speak of


def collapsed(
    label_log_probs: dict[str, Float[Tensor, " N"]], rest: dict[str, Float[Tensor, " N"]], **fields: Any
) -> Tokens:
    """Tokens with two entries: the label (entry 0) and everything else; of the student ("logits") and of other models.

    Args:
        label_log_probs: log p_y by model, (N,).
        rest: log(1 - p_y) by model, (N,).
        fields: per-token fields, (N,).

    Example:
        >>> half = torch.tensor([0.5]).log()
        >>> collapsed({"logits": half}, {"logits": half}).label_probs
        tensor([0.5000])
    """
    models = {name: torch.stack([log_p, rest[name]], -1) for name, log_p in label_log_probs.items()}
    labels = torch.zeros(len(models["logits"]), dtype=torch.long, device=models["logits"].device)
    return Tokens.unchecked(labels=labels, **models, **fields)


def collapse(tokens: Tokens) -> Tokens:
    """Tokens with what the collapsed vocabulary keeps of them."""
    models = {name: getattr(tokens, name) for name in ("logits", *MODELS) if getattr(tokens, name) is not None}
    log_probs, rest = {}, {}
    for name, logits in models.items():
        own = tokens.with_logits(logits.detach())
        log_probs[name], rest[name] = own.label_log_probs, own.rest_log_probs
    others = {name: value for name, value in tokens.fields().items() if name not in (*models, *DENSE, "labels")}
    return collapsed(log_probs, rest, **others)
