"""ProFiT: log-likelihood of labels selected by their current probability."""

from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor

from qlens.core.errors import InputError
from qlens.core.random_draws import uniform
from qlens.core.target import Target
from qlens.core.tokens import Tokens
from qlens.registry import register
from qlens.registry.params import Share

Keep = Literal["higher", "lower", "middle", "random"]
Ties = Literal["keep", "drop"]


@register(
    "profit",
    title="ProFiT, probability-guided token selection",
    paper="Liu et al. 2026, arXiv 2601.09195",
    scope=lambda keep, **_: "batch" if keep == "random" else "token",
    structure="label",
    trusted="1 where p_y >= threshold, else 0; other values of keep: 1 where selected",
    residual="student",
    simplex=True,
    limits="threshold = 0 is sft; beyond_log_threshold divides by the selected tokens, this one by all",
    modes={
        "paper": {"ties": "drop"},
        "lower": {"keep": "lower"},
        "middle": {"keep": "middle", "upper": 0.9},
        "random": {"keep": "random"},
    },
    differences=(
        "The code keeps a label whose probability equals the threshold; paper and authors' table ask for more (ties='drop').",
        "The paper divides by the length of the response; the code by all valid tokens of the batch, or, where it is not "
        "given their number, by the kept ones (NaN if there are none).",
        "For random, the code's threshold is the share that is dropped; its README says the share that is trained.",
        "In the code the direction's default is a string that counts as set, so that a threshold alone raises an error.",
    ),
    code="Utaotao/ProFit src/llamafactory/train/trainer_utils.py::profit_loss_func",
    cites=("profit2026",),
)
def profit(
    tokens: Tokens,
    *,
    threshold: Share = 0.1,
    keep: Keep = "higher",
    upper: Share | None = None,
    ties: Ties = "keep",
    seed: int = 0,
) -> Target:
    r"""Log-likelihood of the labels selected by their current probability.

    .. math:: \ell = -1[p_y \ge \tau] \log p_y, \qquad Q = d \text{ where kept}, \quad Q = p \text{ where not}

    The random selection is drawn from ``seed`` and the number of tokens, so that loss and target agree. QTrainer
    draws anew at every micro-batch, from its own seed and the place in the run as well, so that a resumed run repeats
    the draws of the uninterrupted one; in a loop of your own give every step another ``seed``.

    Args:
        tokens: logits (N, V) and labels (N,).
        threshold: tau, a probability; for "random" the share that is dropped.
        keep: "higher" selects p_y >= tau, "lower" p_y <= tau, "middle" tau <= p_y <= upper, "random" any token.
        upper: upper threshold of "middle".
        ties: "keep" or "drop" labels at a threshold itself.
        seed: of the random selection.

    Returns:
        Q (N, V) at scale 1. Losses (N,) are in nats.

    Raises:
        InputError: keep = "middle" without ``upper``, or with one below ``threshold``.

    Source: Liu et al. 2026 (arXiv 2601.09195), equations 4 and 5.

    Example:
        >>> import torch
        >>> profit(Tokens(logits=torch.zeros(1, 2), labels=torch.tensor([0])), threshold=0.6).q
        tensor([[0.5000, 0.5000]])
    """
    selected = _selected(tokens, threshold, keep, upper, ties == "keep", seed)
    return Target.mix(tokens, trust=selected.to(tokens.label_probs), residual="student")


@profit.loss
def profit_loss(tokens: Tokens, *, threshold, keep, upper, ties, seed) -> Float[Tensor, " N"]:
    """-log p_y where kept, labels of dropped tokens ignored as in the released code."""
    selected = _selected(tokens, threshold, keep, upper, ties == "keep", seed)
    labels = tokens.labels.long().masked_fill(~selected, -100)
    return F.cross_entropy(tokens.logits, labels, ignore_index=-100, reduction="none")


def _selected(tokens: Tokens, low: float, keep: Keep, high: float | None, ties: bool, seed: int) -> Bool[Tensor, " N"]:
    """A mask of the selected tokens, from one softmax, so that target and loss agree at the threshold."""
    p_y = tokens.gather(torch.softmax(tokens.logits.detach().to(tokens.label_probs.dtype), -1))
    if keep == "random":
        return (uniform(len(p_y), seed) >= low).to(p_y.device)
    if keep == "middle" and (high is None or high < low):
        raise InputError(f"profit(keep='middle'): upper must be at least the threshold {low}, got {high}")
    above = (p_y >= low) if ties else (p_y > low)
    if keep == "higher":
        return above
    limit = low if keep == "lower" or high is None else high
    below = (p_y <= limit) if ties else (p_y < limit)
    return below if keep == "lower" else above & below
