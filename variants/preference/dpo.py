"""DPO: logistic loss of the difference of log-ratios of a chosen and a rejected sequence."""

from typing import Annotated

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from qlens.core.segments import Pairs
from qlens.core.target import Target
from qlens.core.tokens import Tokens
from qlens.registry import register
from qlens.registry.params import Between, Positive

Flips = Annotated[float, Between(0, 0.5)]
PAIR = ("chosen", "pair")


@register(
    "dpo",
    title="Direct Preference Optimization",
    paper="Rafailov et al. 2023, arXiv 2305.18290",
    scope="pair",
    coupled="pair",
    needs=(*PAIR, "reference"),
    structure="label",
    trusted=(
        "beta sigma(-u) where chosen, else -beta sigma(-u), "
        "with u = beta margin(sum_t log(p_y / reference_y)); average: over length"
    ),
    residual="student",
    simplex=None,
    limits="all tokens of a sequence are pushed alike: no token is given credit",
    modes={"sigmoid-norm": {"average": True}, "conservative": {"label_smoothing": 0.1}},
    differences=("The paper sums log-ratios over a sequence; TRL's sigmoid_norm averages them (average).",),
    code="eric-mitchell/direct-preference-optimization trainers.py::preference_loss; huggingface/trl trl/trainer/dpo_trainer.py",
    cites=("rafailov2023dpo",),
)
def dpo(tokens: Tokens, *, beta: Positive = 0.1, label_smoothing: Flips = 0.0, average: bool = False) -> Target:
    r"""Logistic loss of the chosen sequence's log-ratio to the reference minus the rejected one's.

    .. math:: L = -(1 - \epsilon) \log \sigma(u) - \epsilon \log \sigma(-u), \quad u = \beta (\Delta_w - \Delta_l), \qquad
              Q = a d + (1 - a) p, \quad a = \pm \beta (\sigma(-u) - \epsilon)

    Delta is the summed (or, with ``average``, mean) log-ratio of a sequence to the reference.

    Args:
        tokens: logits (N, V), labels (N,), reference (N, V), pair (N,) and chosen (N,).
        beta: factor of the log-ratios, an inverse temperature.
        label_smoothing: epsilon, the assumed share of swapped pairs.
        average: mean log-ratios in place of sums.

    Returns:
        Q (N, V) at scale 1, signed. Losses (N,) are in nats; a pair's loss is shared equally by its tokens.

    Raises:
        InputError: a field is missing, or a pair lacks a side.

    Source: Rafailov et al. 2023 (arXiv 2305.18290).

    Example:
        >>> import torch
        >>> z, sides = torch.zeros(2, 2), torch.tensor([True, False])
        >>> dpo(Tokens(logits=z, labels=torch.tensor([0, 1]), reference=z, chosen=sides, pair=torch.tensor([0, 0]))).trust
        tensor([ 0.0500, -0.0500])
    """
    pairs, ratio = Pairs.of(tokens), log_ratio(tokens)
    chosen, rejected = pairs.means(ratio) if average else pairs.totals(ratio)
    u = beta * (chosen - rejected)
    push = beta * ((1 - label_smoothing) * torch.sigmoid(-u) - label_smoothing * torch.sigmoid(u))
    weight = pairs.signed(push, -push)
    return Target.push(tokens, weight / pairs.size if average else weight)


@dpo.loss
def dpo_loss(tokens: Tokens, *, beta, label_smoothing, average) -> Float[Tensor, " N"]:
    """-(1 - eps) log sigma(u) - eps log sigma(-u), shared by the pair's tokens."""
    sides, share = sides_of(tokens, average)
    now, before = (
        label_log_probs(tokens.logits, tokens),
        label_log_probs(tokens.require("reference"), tokens).detach(),
    )
    u = beta * (sides @ (now - before))
    loss = -(1 - label_smoothing) * F.logsigmoid(u) - label_smoothing * F.logsigmoid(-u)
    return share @ loss


def log_ratio(tokens: Tokens) -> Float[Tensor, " N"]:
    """log p_y - log reference_y, without gradient."""
    return tokens.label_log_probs.detach() - tokens.gather(tokens.log_probs_of("reference"))


def label_log_probs(logits: Float[Tensor, "N V"], tokens: Tokens) -> Float[Tensor, " N"]:
    """log p_y under these logits, differentiable."""
    return -F.cross_entropy(logits, tokens.labels.long(), reduction="none")


def sides_of(tokens: Tokens, average: bool) -> tuple[Float[Tensor, "G N"], Float[Tensor, "N G"]]:
    """Matrices from tokens to pairs, chosen minus rejected (over their lengths), and back in equal shares."""
    ids = tokens.require("pair")
    members = (ids.unique()[:, None] == ids).to(tokens.label_probs.dtype)
    chosen = tokens.require("chosen").to(members)
    up, down = members * chosen, members * (1 - chosen)
    if average:
        up, down = up / up.sum(1, keepdim=True), down / down.sum(1, keepdim=True)
    return up - down, (members / members.sum(1, keepdim=True)).T
