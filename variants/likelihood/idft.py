"""In-distribution fine-tuning: label weight p_y^kappa, with kappa from the label's surprise over the entropy."""

import math

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from qlens.core.errors import InputError
from qlens.core.target import Target
from qlens.core.tokens import Tokens
from qlens.registry import register
from qlens.registry.params import Positive, Share, Weight


def mix_at(progress: float, warmup: float = 0.2, transition: float = 0.1) -> float:
    """The released schedule of ``mix``: 0 up to ``warmup`` of the run, then linear to 1 over ``transition`` of it.

    Raises:
        InputError: progress is not within [0, 1].

    Example:
        >>> [mix_at(at) for at in (0.1, 0.25, 0.9)], mix_at(0.0, warmup=0.0, transition=0.0)
        ([0.0, 0.5, 1.0], 1.0)
    """
    if not 0 <= progress <= 1:
        raise InputError(f"progress is the share of the run that is done, in [0, 1], got {progress}")
    if transition == 0:
        return float(progress >= warmup)
    return round(min(1.0, max(0.0, (progress - warmup) / transition)), 12)


@register(
    "idft",
    title="In-distribution fine-tuning",
    paper="Zhang et al. 2026, arXiv 2602.12222",
    trusted="p_y^(1 + mix (e - 1)), with e = min(max(exp(-(log p_y + H) / beta), 0.1), 2)",
    residual="student",
    simplex=True,
    limits="mix = 0 is dft; far out of distribution p_y^2, well within p_y^0.1",
    modes={"warmup": {"mix": 0.0}, "exact": {"floor": 0.0}},
    differences=(
        "The released code adds 1e-10 within the entropy's logarithm and gives no gradient where p_y is below 1e-10 (floor).",
        "The README sets warm-up and transition to 0, so that mix is 1 throughout; the code's defaults are .2 and .1 (mix_at).",
        "The released loss mask is shifted once too often: it trains the last prompt token and not the end of the answer.",
    ),
    code="zhangmiaosen2000/Towards-On-Policy-SFT IDFT/verl/trainer/fsdp_polylog_trainer.py",
    cites=("idft2026",),
)
def idft(
    tokens: Tokens,
    *,
    beta: Positive = 1.0,
    clamp: tuple[float, float] = (0.1, 2.0),
    mix: Share = 1.0,
    floor: Weight = 1e-10,
) -> Target:
    r"""Log-likelihood weighted by p_y^kappa, where kappa grows with the surprise -(log p_y + H).

    .. math:: \ell = -\mathrm{sg}(p_y^\kappa) \log p_y, \quad \kappa = 1 + m (e - 1), \quad
              e = \mathrm{clamp}(\exp(-(\log p_y + H(p)) / \beta)), \qquad Q = p_y^\kappa d + (1 - p_y^\kappa) p

    Args:
        tokens: logits (N, V) and labels (N,).
        beta: temperature of the surprise, in nats.
        clamp: bounds (low, high) of e.
        mix: m; ``mix_at`` gives the released schedule.
        floor: added within the logarithm of H and lower bound of p_y, below which there is no gradient.

    Returns:
        Q (N, V) at scale 1. Losses (N,) are in nats.

    Raises:
        InputError: ``clamp`` is not 0 <= low <= high.

    Source: Zhang et al. 2026 (arXiv 2602.12222); floor and schedule from released code.

    Example:
        >>> import torch
        >>> idft(Tokens(logits=torch.zeros(1, 2), labels=torch.tensor([0]))).q
        tensor([[0.7500, 0.2500]])
    """
    low, high = _ordered(clamp)
    log_p = tokens.log_probs.detach()
    p = log_p.exp()
    logs = (p + floor).log().masked_fill(p + floor == 0, 0.0)
    log_y = tokens.gather(log_p)
    bounded = log_y.clamp(min=math.log(floor)) if floor else log_y
    surprise = (p * logs).sum(-1) - bounded  # -(log p_y + H)
    exponent = 1 + mix * ((surprise / beta).clamp(max=60.0).exp().clamp(low, high) - 1)
    return Target.mix(tokens, trust=torch.where(log_y < bounded, 0.0, (exponent * bounded).exp()), residual="student")


@idft.loss
def idft_loss(tokens: Tokens, *, beta, clamp, mix, floor) -> Float[Tensor, " N"]:
    """-sg(p_y^kappa) log p_y, p_y clamped at the floor."""
    low, high = _ordered(clamp)
    nll = F.cross_entropy(tokens.logits, tokens.labels.long(), reduction="none")
    bounded = nll.clamp(max=-math.log(floor)) if floor else nll
    with torch.no_grad():
        probs = F.softmax(tokens.logits, -1)
        entropy = -torch.special.xlogy(probs, probs + floor).sum(-1)
        phi = entropy - bounded
        e = torch.exp(torch.clamp(-phi / beta, max=60.0)).clamp(low, high)
        weight = torch.exp(-(1 + mix * (e - 1)) * bounded)
    return weight * bounded


def _ordered(clamp: tuple[float, float]) -> tuple[float, float]:
    if not 0 <= clamp[0] <= clamp[1]:
        raise InputError(f"idft: clamp must be (low, high) with 0 <= low <= high, got {clamp}")
    return clamp
