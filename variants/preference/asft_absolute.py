"""Aligned SFT by absolute likelihood: log-odds of the chosen and of the rejected sequence, each by itself."""

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from qlens.core.segments import Pairs
from qlens.core.target import Target
from qlens.core.tokens import Tokens
from qlens.registry import register
from qlens.registry.params import Positive, Weight
from qlens.variants.preference.odds import _log_odds, _means, _odds


@register(
    "asft_absolute",
    title="Aligned SFT through absolute likelihood",
    paper="Wang et al. 2024, arXiv 2409.10571",
    scope="pair",
    coupled="pair",
    needs=("chosen", "pair"),
    structure="label",
    trusted=(
        "(nll + weight) / length where chosen, else -weight P / ((1 - P) length), "
        "with P = exp(mean_t log(p_y)); beta: see the method"
    ),
    residual="student",
    simplex=None,
    limits="(1 + weight) length-normalised sft on the chosen plus weight sequence unlikelihood on the rejected",
    modes={"tempered": {"nll": 0.0, "beta": 0.1}},
    differences=(
        "No official code is known: the form is that of a later paper's restatement, lengths normalised as it says.",
        "Chosen and rejected do not meet: a pair's loss is the sum of two losses.",
        "Not to be confused with anchored SFT (asft_anchored).",
    ),
    cites=("asft2024",),
)
def asft_absolute(tokens: Tokens, *, weight: Weight = 1.0, nll: Weight = 1.0, beta: Positive = 1.0) -> Target:
    r"""Likelihood and log-odds of each sequence by itself: chosen up, rejected down.

    .. math:: L = -n \log P_w - \lambda [\log \sigma(\beta o_w) + \log \sigma(-\beta o_l)], \qquad Q = a d + (1 - a) p, \quad
              a_w = \frac{1}{|y_w|} \Big(n + \frac{\lambda \beta \sigma(-\beta o_w)}{1 - P_w}\Big), \quad
              a_l = -\frac{1}{|y_l|} \frac{\lambda \beta \sigma(\beta o_l)}{1 - P_l}

    P is the geometric mean of a sequence's probabilities and o its log-odds; at beta = 1 the loss is -(n + weight)
    log P_w - weight log(1 - P_l). Within the odds log P is at most -1e-6.

    Args:
        tokens: logits (N, V), labels (N,), pair (N,) and chosen (N,).
        weight: lambda, the weight of the log-odds.
        nll: n, the weight of the chosen sequence's log-likelihood.
        beta: factor of the log-odds.

    Returns:
        Q (N, V) at scale 1, signed. Losses (N,) are in nats; each sequence's loss is shared equally by its tokens.

    Raises:
        InputError: a field is missing, or a pair lacks a side.

    Source: Wang et al. 2024 (arXiv 2409.10571); the tempered form from the paper that restates it.

    Example:
        >>> import torch
        >>> z, sides = torch.zeros(2, 2), torch.tensor([True, False])
        >>> asft_absolute(Tokens(logits=z, labels=torch.tensor([0, 1]), chosen=sides, pair=torch.tensor([0, 0]))).trust
        tensor([ 2., -1.])
    """
    pairs = Pairs.of(tokens)
    (odds_w, slope_w), (odds_l, slope_l) = map(_odds, pairs.means(tokens.label_log_probs.detach()))
    up = nll + weight * beta * torch.sigmoid(-beta * odds_w) * slope_w
    down = weight * beta * torch.sigmoid(beta * odds_l) * slope_l
    return Target.push(tokens, pairs.signed(up, -down) / pairs.size)


@asft_absolute.loss
def asft_absolute_loss(tokens: Tokens, *, weight, nll, beta) -> Float[Tensor, " N"]:
    """-nll log P_w - weight (log sigma(beta o_w) + log sigma(-beta o_l)), each part shared by its sequence's tokens."""
    members, chosen, rejected = _means(tokens)
    raised = -nll * chosen - weight * F.logsigmoid(beta * _log_odds(chosen))
    lowered = -weight * F.logsigmoid(-beta * _log_odds(rejected))
    sides = tokens.require("chosen").to(members)
    up, down = members * sides, members * (1 - sides)
    return (up / up.sum(1, keepdim=True)).T @ raised + (down / down.sum(1, keepdim=True)).T @ lowered
