"""Unlikelihood training: log-likelihood of the label, and of "not c" for every negative c."""

import math

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from qlens.core.numerics import log_softmax
from qlens.core.target import Target
from qlens.core.tokens import Tokens
from qlens.registry import register
from qlens.registry.params import Weight


@register(
    "unlikelihood",
    title="Unlikelihood training",
    paper="Welleck et al. 2019, arXiv 1908.04319",
    needs=("negatives",),
    trusted="nll + alpha p_y c / (1 - p_y), with c = sum_k(negatives_k p_k / (1 - p_k))",
    residual="Q = p + nll (d - p) + alpha (c p - negatives p / (1 - p)), with c = sum_k(negatives_k p_k / (1 - p_k))",
    simplex=lambda alpha, nll, floor: nll + (alpha if floor < 1 else 0) <= 1,
    limits="alpha = 0 is nll times sft; the label as its only negative, nll = 0: Q = p_{-y} at natural scale 1",
    modes={"sequence": {"nll": 0.0, "floor": 1e-20}},
    differences=(
        "1 - p is clamped at 1e-5 (at 1e-20 in the sequence form): above, a negative is not pushed any more (floor).",
        "The released negatives are all earlier targets of the flattened batch, other rows' among them, and the "
        "padding id.",
        "The released sum is divided by fairseq's sample size.",
    ),
    code="facebookresearch/unlikelihood_training custom/candidate_penalty_ce_loss.py, custom/sequence_penalty_loss.py",
    cites=("welleck2019unlikelihood",),
)
def unlikelihood(tokens: Tokens, *, alpha: Weight = 1.0, nll: Weight = 1.0, floor: Weight = 1e-5) -> Target:
    r"""Log-likelihood of the label plus that of "not c" for every negative token c.

    .. math:: \ell = -n \log p_y - \alpha \sum_{c \in C} \log(1 - p_c), \qquad
              Q = p + n (d - p) + \alpha \sum_{c \in C} \frac{p_c}{1 - p_c} (p - d_c)

    Args:
        tokens: logits (N, V), labels (N,) and negatives (N, V), the mask C.
        alpha: weight of the negatives.
        nll: n, the weight of the log-likelihood.
        floor: lower bound of 1 - p_c, beyond which a negative has no gradient; 0 sets none.

    Returns:
        Q (N, V) at scale 1, below zero on likely negatives. Losses (N,) are in nats.

    Raises:
        InputError: ``tokens.negatives`` is missing.

    Source: Welleck et al. 2019 (arXiv 1908.04319); floors from released code.

    Example:
        >>> import torch
        >>> unlikelihood(Tokens(logits=torch.zeros(1, 2), labels=torch.tensor([0]), negatives=torch.tensor([[False, True]]))).q
        tensor([[ 1.5000, -0.5000]])
    """
    log_p, pushed = tokens.log_probs.detach(), tokens.require("negatives").bool()
    p, first = log_p.exp(), log_p.argmax(-1, keepdim=True)
    log_others = log_p.scatter(1, first, -torch.inf)
    # p_c / (1 - p_c) is unbounded for the most probable token alone: its gradient is p without it minus p, in full
    bound = math.log(floor) if floor else -torch.inf
    top_negative = (pushed.gather(1, first) & (log_others.logsumexp(-1, keepdim=True) >= bound)).to(p)
    odds = torch.where(pushed & (1 - p >= floor), p / (1 - p), 0.0).scatter(1, first, 0.0)
    grad = odds - p * odds.sum(-1, keepdim=True) + top_negative * (p - log_softmax(log_others.clamp(min=-1e30)).exp())
    label = Target.push(tokens, torch.full_like(p[:, 0], nll))
    return Target.from_grad(tokens, label.grad + alpha * grad)


@unlikelihood.loss
def unlikelihood_loss(tokens: Tokens, *, alpha, nll, floor) -> Float[Tensor, " N"]:
    """-nll log p_y - alpha sum_c log max(1 - p_c, floor)."""
    log_p = F.log_softmax(tokens.logits, -1)
    top = log_p.detach().argmax(-1, keepdim=True)
    # log(1 - p) of the most probable token is summed over the others; finite where there are none
    log_others = log_p.scatter(1, top, -torch.inf).clamp(min=-1e30)
    unlikely = torch.log1p(-log_others.exp()).scatter(1, top, log_others.logsumexp(-1, keepdim=True))
    unlikely = unlikely.clamp(min=math.log(floor)) if floor else unlikely
    down = -torch.where(tokens.require("negatives").bool(), unlikely, 0.0).sum(-1)
    return nll * F.nll_loss(log_p, tokens.labels.long(), reduction="none") + alpha * down
