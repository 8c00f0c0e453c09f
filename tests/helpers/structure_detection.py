"""Detection of a method's structure on trial tokens, to compare with the structure that its card declares."""

from collections.abc import Iterator

import torch
from torch import Tensor

from qlens.core.autograd import gradient
from qlens.core.errors import InputError
from qlens.core.numerics import expectation, log_softmax
from qlens.core.probes import probes
from qlens.core.tokens import MODELS, Tokens
from qlens.engine.label_only import two_entry_tokens
from qlens.registry.structure import GeometricMixture, Structure
from qlens.registry.variant import ALONE, Variant

DENSE = ("negatives",)  # fields that name entries of the vocabulary, which two entries have none of


def collapse(tokens: Tokens) -> Tokens:
    """The same tokens on the two entries {label, rest}."""
    models = {name: getattr(tokens, name) for name in ("logits", *MODELS) if getattr(tokens, name) is not None}
    log_p, log_rest = {}, {}
    for name, logits in models.items():
        own = tokens.with_logits(logits.detach())
        log_p[name], log_rest[name] = own.label_log_probs, own.rest_log_probs
    fields = {name: value for name, value in tokens.fields().items() if name not in (*models, *DENSE, "labels")}
    return two_entry_tokens(log_p, log_rest, **fields)


def detect_structure(variant: Variant) -> Structure:
    """The simplest structure that explains a method's loss and gradient on trial tokens."""
    if _is_label(variant):
        return "label"
    return _mixture(variant) or "dense"


def _trials() -> Iterator[Tokens]:
    """The probes at two vocabularies, moved a little, so that no p_y stands at a threshold itself."""
    for vocabulary in (32, 11):
        tokens = probes(vocabulary=vocabulary)
        yield tokens.replace(logits=1.003 * tokens.logits)


def _is_label(variant: Variant) -> bool:
    if any(name in variant.needs for name in DENSE):
        return False
    for tokens in _trials():
        try:
            small = collapse(tokens)
            value, push = variant.loss(tokens), variant.target(tokens).label_weight
            small_value, small_push = variant.loss(small), variant.target(small).label_weight
        except InputError:  # these parameters want more entries
            return False
        off = push[:, None] * (tokens.probs - tokens.one_hot) - gradient(variant.loss, tokens)
        size = push.abs().clamp(min=1)
        gaps = (value - small_value).abs() / value.abs().clamp(min=1), (push - small_push).abs() / size
        if not all(bool((gap <= 1e-8).all()) for gap in (*gaps, off.abs().amax(-1) / size)):
            return False
    return True


def _mixture(variant: Variant) -> GeometricMixture | None:
    models = [name for name in variant.needs if name in MODELS]
    if variant.scope not in ALONE or len(models) > 1 or any(name in variant.needs for name in DENSE):
        return None
    answers = {_mixture_on(variant, models[0] if models else None, tokens) for tokens in _trials()}
    return answers.pop() if len(answers) == 1 else None


def _mixture_on(variant: Variant, model: str | None, tokens: Tokens) -> GeometricMixture | None:
    try:
        target, value = variant.target(tokens), variant.loss(tokens)
        uniform = isinstance(target.named, str) and target.named == "uniform"
        if not uniform and (model is None or not isinstance(target.named, Tensor)):
            return None
        small = collapse(tokens)
        small = variant.target(small.replace(**({model: small.logits} if model else {})))
    except InputError:  # these parameters want more entries
        return None
    log_p = tokens.log_probs
    log_pi = log_p if model is None else tokens.log_probs_of(model)
    own, other = (0.0, 0.0) if uniform else _exponents(torch.as_tensor(target.named).log(), log_p, log_pi)
    r = log_softmax(own * log_p + other * log_pi)
    t, s = small.trust, small.scale
    pulled = s * (t * -tokens.label_log_probs - (1 - t) * expectation(r.exp(), log_p))
    entropy_term = s * (1 - t) * expectation(r.exp(), r)
    g = s[:, None] * (tokens.probs - t[:, None] * tokens.one_hot - (1 - t)[:, None] * r.exp())
    if not bool(((g - gradient(variant.loss, tokens)).abs().amax(-1) <= 1e-9 * s.abs().clamp(min=1)).all()):
        return None
    for kind, expected in (("cross_entropy", pulled), ("kl", pulled + entropy_term)):
        if bool(((value - expected).abs() <= 1e-9 * expected.abs().clamp(min=1)).all()):
            return GeometricMixture(model, own, other, kind)
    return None


def _exponents(log_r: Tensor, log_p: Tensor, log_pi: Tensor) -> tuple[float, float]:
    """own and other in log r = own log p + other log pi + c, by least squares over all entries."""
    centred = [(x - x.mean(-1, keepdim=True)).flatten() for x in (log_p, log_pi, log_r)]
    if not all(bool(x.isfinite().all()) for x in centred):
        return 0.0, 0.0
    fit = torch.linalg.lstsq(torch.stack(centred[:2], 1), centred[2][:, None])
    own, other = fit.solution.flatten().tolist()
    return round(own, 12) + 0.0, round(other, 12) + 0.0
