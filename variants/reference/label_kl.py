"""SFT with a single-token KL estimator: likelihood plus k1, k2 or k3 of the label alone."""

from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from qlens.core.target import Target
from qlens.core.tokens import Tokens
from qlens.registry import register
from qlens.registry.params import Positive, Weight

Estimator = Literal["k1", "k2", "k3", "k3+"]
Base = Literal["sft", "dft"]


@register(
    "label_kl",
    title="SFT with a single-token KL estimator",
    paper="Schulman 2020 (estimators k1, k2, k3); as used by arXiv 2509.23753's ports",
    needs=("reference",),
    structure="label",
    trusted=(
        "1 - weight (1 - reference_y / p_y); k1: 1 - weight; k2: 1 - weight log(p_y / reference_y); "
        "base = 'dft': p_y for 1"
    ),
    residual="student",
    simplex=lambda weight, **_: True if weight == 0 else None,
    limits="weight = 0 is sft or dft; the label's trust is all that changes, nothing goes to the reference",
    modes={
        "verl": {"value_clamp": 10.0},
        "verl-k3+": {"estimator": "k3+", "value_clamp": 10.0},
        "skyrl": {"base": "dft", "weight": 0.03, "ratio_clamp": 10.0},
    },
    differences=(
        "Ports of anchored SFT that see label log-probabilities only use these: their residual is the student.",
        "verl clamps the log-ratio to 20 and the value to 10, SkyRL the log-ratio to 10; beyond, the penalty has no gradient.",
        "verl's k3+ has the value of k3 and the gradient of k2.",
        "A weight does not carry over from the divergence over the whole vocabulary.",
    ),
    code="verl-project/verl verl/trainer/ppo/core_algos.py::kl_penalty; NovaSky-AI/SkyRL sft_loss_utils.py::_anchored_loss",
    cites=("schulman2020kl",),
)
def label_kl(
    tokens: Tokens,
    *,
    estimator: Estimator = "k3",
    weight: Weight = 0.1,
    base: Base = "sft",
    ratio_clamp: Positive | None = 20.0,
    value_clamp: Positive | None = None,
) -> Target:
    r"""Likelihood plus an estimate of KL(p || r) from the label alone, with :math:`\rho = r_y / p_y`.

    .. math:: \ell = \ell_0 + \lambda k, \quad k_1 = -\log \rho, \quad k_2 = \tfrac12 (\log \rho)^2, \quad
              k_3 = \rho - \log \rho - 1, \qquad Q = (a_0 - \lambda c) d + (1 - a_0 + \lambda c) p

    a_0 is 1 for base "sft" and p_y for "dft"; c is 1, -log rho and 1 - rho for k1, k2 and k3.

    Args:
        tokens: logits (N, V), labels (N,) and reference (N, V).
        estimator: "k1", "k2", "k3", or "k3+" with the value of k3 and the gradient of k2.
        weight: lambda, the weight of the estimate.
        base: l_0, "sft" (-log p_y) or "dft" (-sg(p_y) log p_y).
        ratio_clamp: bound of the log-ratio in k3, in nats, beyond which it has no gradient.
        value_clamp: bound of the value of k3, in nats, likewise.

    Returns:
        Q (N, V) at scale 1, signed where the penalty outweighs the label. Losses (N,) are in nats.

    Raises:
        InputError: ``tokens.reference`` is missing.

    Source: the estimators of Schulman 2020, as frameworks use them.

    Example:
        >>> import torch
        >>> z = torch.zeros(1, 2)
        >>> label_kl(Tokens(logits=z, labels=torch.tensor([0]), reference=z), estimator="k1", weight=0.5).trust
        tensor([0.5000])
    """
    log_p = tokens.label_log_probs.detach()
    log_ratio = tokens.gather(tokens.log_probs_of("reference")) - log_p
    if estimator == "k1":
        c = torch.ones_like(log_ratio)
    elif estimator == "k2":
        c = -log_ratio
    else:
        inside = log_ratio.abs() <= (ratio_clamp or torch.inf)
        clamped = log_ratio if ratio_clamp is None else log_ratio.clamp(-ratio_clamp, ratio_clamp)
        if value_clamp is not None:
            inside &= torch.expm1(clamped) - clamped <= value_clamp
        c = -log_ratio if estimator == "k3+" else torch.where(inside, -torch.expm1(clamped), 0.0)
    return Target.push(tokens, (log_p.exp() if base == "dft" else 1.0) - weight * c)


@label_kl.loss
def label_kl_loss(tokens: Tokens, *, estimator, weight, base, ratio_clamp, value_clamp) -> Float[Tensor, " N"]:
    """-log p_y, or -sg(p_y) log p_y, plus weight times the estimator."""
    labels = tokens.labels.long()
    nll = F.cross_entropy(tokens.logits, labels, reduction="none")
    before = F.cross_entropy(tokens.require("reference"), labels, reduction="none").detach()
    first = nll if base == "sft" else (-nll).exp().detach() * nll
    gap = nll - before  # log r_y - log p_y
    if estimator == "k1":
        return first - weight * gap
    if estimator == "k2":
        return first + weight * gap.square() / 2
    bounded = gap if ratio_clamp is None else gap.clamp(-ratio_clamp, ratio_clamp)
    k3 = bounded.exp() - bounded - 1
    if value_clamp is not None:
        k3 = k3.clamp(-value_clamp, value_clamp)
    if estimator == "k3+":
        k2 = gap.square() / 2
        k3 = k3.detach() + k2 - k2.detach()
    return first + weight * k3
