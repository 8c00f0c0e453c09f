"""Collapse: what a loss of label probabilities alone needs to know of a vocabulary: the label, and all the rest as one."""

from collections.abc import Iterator
from functools import lru_cache
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from qlens import params
from qlens.errors import InputError
from qlens.lens import gradient
from qlens.tokens import MODELS, Tokens
from qlens.variant import Method, Variant

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
    return Tokens(labels=labels, **models, **fields)


def collapse(tokens: Tokens) -> Tokens:
    """Tokens with what the collapsed vocabulary keeps of them."""
    models = {name: getattr(tokens, name) for name in ("logits", *MODELS) if getattr(tokens, name) is not None}
    log_probs, rest = {}, {}
    for name, logits in models.items():
        own = tokens.with_logits(logits.detach())
        log_probs[name], rest[name] = own.label_log_probs, own.rest_log_probs
    others = {name: value for name, value in tokens.fields().items() if name not in (*models, *DENSE, "labels")}
    return collapsed(log_probs, rest, **others)


def collapses(variant: Variant) -> bool:
    """Whether value and gradient of a method depend on label probabilities alone: found on the probes, whatever its card says.

    Then its value and its push a in g = a (p - d) are those on two entries.
    """
    return _collapses(variant.method, variant.spec)


@lru_cache(maxsize=1024)
def _collapses(method: Method, spec: str) -> bool:
    """Remembered by method and spec: a training step asks anew, with a variant of its own."""
    variant = method.variant(**params.parse(spec)[1])
    if any(name in variant.needs for name in DENSE):
        return False
    for tokens in trials():
        try:
            small = collapse(tokens)
            value, push = variant.loss(tokens), push_of(variant, tokens)
            few, its = variant.loss(small), push_of(variant, small)
        except InputError:  # these parameters want more entries, or another kind of loss
            return False
        off = push[:, None] * (tokens.probs - tokens.one_hot) - gradient(variant.loss, tokens)
        size = value.abs().clamp(min=1), push.abs().clamp(min=1), push.abs().clamp(min=1)
        gaps = ((value - few).abs(), (push - its).abs(), off.abs().amax(-1))
        if not all(bool((gap <= 1e-8 * s).all()) for gap, s in zip(gaps, size, strict=True)):
            return False
    return True


def trials() -> Iterator[Tokens]:
    """The probes at two vocabularies, moved a little: on which a method has to show what it is made of."""
    from qlens.probes import probes

    for vocabulary in (32, 11):
        tokens = probes(vocabulary=vocabulary)
        yield tokens.replace(logits=1.003 * tokens.logits)  # no p_y stands at a threshold itself


def push_of(variant: Variant, tokens: Tokens) -> Float[Tensor, " N"]:
    """a in g = a (p - d): the pull on the label in unit scale, for a method that has no other."""
    return variant.target(tokens).effective_trust
