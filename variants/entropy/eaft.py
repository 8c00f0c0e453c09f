"""Entropy-adaptive fine-tuning: log-likelihood weighted by the normalised entropy of the top k tokens."""

import math
from typing import Annotated, Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from qlens.core.errors import InputError
from qlens.core.numerics import expectation, top_ids
from qlens.core.target import Target
from qlens.core.tokens import Tokens
from qlens.registry import register
from qlens.registry.params import Between, Positive, Share, Weight

Rank = Annotated[int, Between(1)]
Floor = Annotated[float, Between(0, 1e-3)]
Normalizer = Literal["ln_k"] | Positive | None
Gate = Literal["power", "sigmoid", "mask", "conflict"]


@register(
    "eaft",
    title="Entropy-Adaptive Fine-Tuning",
    paper="Diao et al. 2026, arXiv 2601.02151",
    scope=lambda gate, **_: "batch" if gate in ("mask", "conflict") else "token",
    trusted="(H_top(k) / log(k))^alpha; other gates: their value",
    residual="student; not detached: and the gate's slope",
    simplex=lambda normalizer, gate, detach, k, **_: (
        True if detach and (normalizer == "ln_k" or gate != "power" or (normalizer or 1.0) >= math.log(k)) else None
    ),
    limits="alpha = 0 is sft; normalizer None is ln k times as hard as the paper, 3.0 is 0.9986 times",
    modes={
        "llama-factory": {"normalizer": 3.0},
        "axolotl": {"normalizer": None, "floor": 1e-10},
        "squared": {"alpha": 2.0},
        "cubed": {"alpha": 3.0},
        "sigmoid": {"gate": "sigmoid", "alpha": 30.0},
        "mask": {"gate": "mask"},
        "conflict": {"gate": "conflict"},
        "attached": {"detach": False},
    },
    differences=(
        "The paper and the authors' table divide by ln k; LLaMA-Factory and the author's ms-swift divide by 3.0, axolotl "
        "by nothing.",
        "The paper does not say whether the entropy carries a gradient; all released code detaches it.",
        "The entropy is that of the top k logits renormalised, not a part of the full entropy.",
    ),
    code="hiyouga/LLaMA-Factory src/llamafactory/train/trainer_utils.py::eaft_loss_func",
    cites=("eaft2026",),
)
def eaft(
    tokens: Tokens,
    *,
    k: Rank = 20,
    normalizer: Normalizer = "ln_k",
    alpha: Weight = 1.0,
    gate: Gate = "power",
    beta: float = 0.17,
    share: Share = 0.15,
    floor: Floor = 0.0,
    detach: bool = True,
) -> Target:
    r"""Log-likelihood weighted by the normalised entropy h / c of the k most probable tokens.

    .. math:: \ell = -\mathrm{sg}(\gamma) \log p_y, \quad \gamma = (h / c)^\alpha, \quad
              h = -\sum_{j \in \text{top } k} q_j \log q_j, \qquad Q = \gamma d + (1 - \gamma) p

    q is p renormalised on the top k (on all V entries where k is larger; ln k stays that of k).

    Args:
        tokens: logits (N, V) and labels (N,).
        k: number of tokens that the entropy runs over.
        normalizer: c, "ln_k", a number or None for 1.
        alpha: exponent, or slope of the sigmoid.
        gate: "power" as above; "sigmoid" is sigma(alpha (h/c - beta)); "mask" drops the ``share`` of the batch with
            the least entropy; "conflict" the tokens within the least ``share`` by entropy and by p_y both.
        beta: centre of the sigmoid.
        share: quantile of "mask" and "conflict".
        floor: added within the logarithm.
        detach: stop the gradient of the gate; otherwise the residual is not the student.

    Returns:
        Q (N, V) at scale 1. Losses (N,) are in nats.

    Raises:
        InputError: k = 1 with "ln_k", or detach = False with a gate that has no gradient.

    Source: Diao et al. 2026 (arXiv 2601.02151), equations 2 and 3.

    Example:
        >>> import torch
        >>> eaft(Tokens(logits=torch.zeros(1, 4), labels=torch.tensor([0])), k=4).q
        tensor([[1., 0., 0., 0.]])
    """
    _check(k, normalizer, gate, detach)
    log_p = tokens.log_probs.detach()
    index = top_ids(log_p, k)
    log_q = log_p.gather(1, index).log_softmax(-1)
    q = log_q.exp()
    logs = log_q if floor == 0 else (q + floor).log()
    h, c = -expectation(q, logs), _normalizer(normalizer, k)
    trust = _gate(h / c, tokens.label_probs.detach(), gate, alpha, beta, share)
    target = Target.mix(tokens, trust=trust, residual="student")
    if detach:
        return target
    slope = -logs.masked_fill(q == 0, 0.0) - (q / (q + floor) if floor else 1.0)  # of h in q
    by_logit = q * (slope - (q * slope).sum(-1, keepdim=True))
    if gate == "power":
        outer = torch.where(h > 0, alpha * (h / c) ** (alpha - 1) / c, 0.0)
    else:
        outer = alpha * trust * (1 - trust) / c
    through = torch.zeros_like(log_p).scatter(1, index, outer[:, None] * by_logit)
    nll = -tokens.label_log_probs.detach()[:, None]
    return Target.from_grad(tokens, target.grad + nll * through)


@eaft.loss
def eaft_loss(tokens: Tokens, *, k, normalizer, alpha, gate, beta, share, floor, detach) -> Float[Tensor, " N"]:
    """-gate log p_y."""
    _check(k, normalizer, gate, detach)
    nll = F.cross_entropy(tokens.logits, tokens.labels.long(), reduction="none")
    z = tokens.logits.detach() if detach else tokens.logits
    top = z.gather(1, top_ids(z.detach(), k))
    q = torch.softmax(top, -1)
    logs = F.log_softmax(top, -1).masked_fill(q == 0, 0.0) if floor == 0 else torch.log(q + floor)
    h = -(q * logs).sum(-1)
    return _gate(h / _normalizer(normalizer, k), (-nll).exp().detach(), gate, alpha, beta, share) * nll


def _normalizer(normalizer: Normalizer, k: int) -> float:
    return math.log(k) if normalizer == "ln_k" else 1.0 if normalizer is None else float(normalizer)


def _gate(
    h: Float[Tensor, " N"], p_y: Float[Tensor, " N"], gate: Gate, alpha: float, beta: float, share: float
) -> Float[Tensor, " N"]:
    """The weight of each token, from its normalised entropy."""
    if gate == "power":
        above = h > 0  # a floor may take h below 0; at 0 itself a power below 1 has no slope
        return torch.where(above, torch.where(above, h, 1.0) ** alpha, 0.0) if alpha else torch.ones_like(h)
    if gate == "sigmoid":
        return torch.sigmoid(alpha * (h - beta))
    if not len(h):
        return h
    low = h <= h.quantile(share)
    return (~(low if gate == "mask" else low & (p_y <= p_y.quantile(share)))).to(h)


def _check(k: int, normalizer: Normalizer, gate: Gate, detach: bool) -> None:
    if normalizer == "ln_k" and k == 1:
        raise InputError("eaft: k = 1 has ln k = 0: give a larger k, or a normalizer of 1.0 or None")
    if not detach and gate not in ("power", "sigmoid"):
        raise InputError(
            f"eaft: detach = False goes with the gates power and sigmoid, got {gate!r}, which has no gradient"
        )
