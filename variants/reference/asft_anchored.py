"""Anchored SFT: the p-loss plus a KL anchor to the frozen reference."""

from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from qlens.core.numerics import expectation, kl
from qlens.core.target import Target
from qlens.core.tokens import Tokens
from qlens.registry import register
from qlens.registry.params import Weight
from qlens.registry.structure import GeometricMixture

Direction = Literal["forward", "reverse"]


@register(
    "asft_anchored",
    title="Anchored SFT",
    paper="Zhu et al. 2025, arXiv 2509.23753",
    needs=("reference",),
    structure=lambda direction, **_: GeometricMixture("reference") if direction == "forward" else "dense",
    trusted="p_y / (p_y + weight)",
    residual="reference",
    scale="p_y + weight",
    simplex=lambda weight, direction: direction == "forward",
    limits="weight = 0 is dft; in unit scale Q = p_y d + weight r + (1 - p_y - weight) p",
    modes={"code": {"weight": 0.1}, "bf16": {"weight": 0.03}, "v1": {"direction": "reverse"}},
    differences=(
        "The paper's first version prints KL(p || r); its third, the code and the authors' table have KL(r || p).",
        "The authors' table leaves out the scale p_y + weight.",
        "Defaults: .05 in the paper and the README's command, .1 in the code, .03 advised for bfloat16.",
        "The released arguments clip_min, clip_max and alpha are stored and never used.",
        "The official trainer and LLaMA-Factory ignore num_items_in_batch: under accumulation the gradient is the sum of "
        "the micro-batches' means.",
        "Ports that see label log-probabilities only have no reference residual at all: label_kl(base='dft').",
    ),
    code="zhuchichi56/ASFT train_v2.py::EnhancedTrainer.compute_loss",
    cites=("zhu2025asft",),
)
def asft_anchored(tokens: Tokens, *, weight: Weight = 0.05, direction: Direction = "forward") -> Target:
    r"""The p-loss plus ``weight`` times KL(r || p) to the frozen reference r.

    .. math:: \ell = -\mathrm{sg}(p_y) \log p_y + \lambda\, KL(r \| p), \qquad
              Q = \frac{p_y d + \lambda r}{p_y + \lambda}, \quad s = p_y + \lambda

    Args:
        tokens: logits (N, V), labels (N,) and reference (N, V).
        weight: lambda, the weight of the anchor.
        direction: "forward" is KL(r || p); "reverse" (the paper's first version) KL(p || r), with Q = p_y d + (1 -
            p_y) p - weight p (log(p/r) - KL(p || r)) at scale 1.

    Returns:
        Q (N, V) at scale p_y + weight. Losses (N,) are in nats.

    Raises:
        InputError: ``tokens.reference`` is missing.

    Source: Zhu et al. 2025 (arXiv 2509.23753).

    Example:
        >>> import torch
        >>> z = torch.zeros(1, 2)
        >>> asft_anchored(Tokens(logits=z, labels=torch.tensor([0]), reference=z), weight=0.5).q
        tensor([[0.7500, 0.2500]])
    """
    p_y, log_r = tokens.label_probs.detach(), tokens.log_probs_of("reference")
    if direction == "forward":
        scale = p_y + weight
        trust = torch.where(scale > 0, p_y / scale, 1.0)  # p_y may underflow with weight = 0
        return Target.mix(tokens, trust=trust, residual=log_r.exp(), scale=scale)
    log_p = tokens.log_probs.detach()
    p, log_ratio = log_p.exp(), torch.where(log_p > -torch.inf, log_p - log_r, 0.0)
    pull = log_ratio - expectation(p, log_ratio)[:, None]
    return Target.dense(tokens, p + p_y[:, None] * (tokens.one_hot - p) - weight * p * pull)


@asft_anchored.loss
def asft_anchored_loss(tokens: Tokens, *, weight, direction) -> Float[Tensor, " N"]:
    """-sg(p_y) log p_y + weight KL."""
    log_p = F.log_softmax(tokens.logits, -1)
    log_r = F.log_softmax(tokens.require("reference"), -1).detach()
    nll = F.nll_loss(log_p, tokens.labels.long(), reduction="none")
    anchor = kl(log_r, log_p) if direction == "forward" else kl(log_p, log_r)
    return (-nll).exp().detach() * nll + weight * anchor
