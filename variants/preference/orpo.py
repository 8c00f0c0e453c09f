"""ORPO: log-likelihood of the chosen sequence and logistic loss of the pair's log-odds ratio."""

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from qlens.core.segments import Pairs
from qlens.core.target import Target
from qlens.core.tokens import Tokens
from qlens.registry import register
from qlens.registry.params import Weight
from qlens.variants.preference.odds import _log_odds, _means, _odds


@register(
    "orpo",
    title="Odds Ratio Preference Optimization",
    paper="Hong et al. 2024, arXiv 2403.07691",
    scope="pair",
    coupled="pair",
    needs=("chosen", "pair"),
    structure="label",
    trusted=(
        "(1 + weight h / (1 - P)) / length where chosen, else -weight h / ((1 - P) length), "
        "with P = exp(mean_t log(p_y)), h = sigma(-margin(log(P / (1 - P))))"
    ),
    residual="student",
    simplex=None,
    limits="weight = 0 is length-normalised sft on the chosen; never above asft_absolute",
    modes={"official": {"weight": 1.0}},
    differences=(
        "The official default weight is 1, its script's .1; TRL's is .1.",
        "TRL's likelihood term covers the prompt too and is a mean over the batch; here it is the chosen sequence's own.",
    ),
    code="xfactlab/orpo src/orpo_trainer.py; huggingface/trl trl/experimental/orpo/orpo_trainer.py::odds_ratio_loss",
    cites=("hong2024orpo",),
)
def orpo(tokens: Tokens, *, weight: Weight = 0.1) -> Target:
    r"""Chosen sequence's mean log-likelihood plus a logistic loss of the log-odds ratio.

    .. math:: L = -m_w - \lambda \log \sigma(o_w - o_l), \quad o = m - \log(1 - e^m), \qquad Q = a d + (1 - a) p, \quad
              a_w = \frac{1}{|y_w|} \Big(1 + \frac{\lambda h}{1 - P_w}\Big), \quad
              a_l = -\frac{1}{|y_l|} \frac{\lambda h}{1 - P_l}

    m is the mean log-likelihood of a sequence (at most -1e-6 within the odds), P = e^m and h = sigma(o_l - o_w).

    Args:
        tokens: logits (N, V), labels (N,), pair (N,) and chosen (N,).
        weight: lambda, the weight of the log-odds ratio.

    Returns:
        Q (N, V) at scale 1, signed. Losses (N,) are in nats; a pair's loss is shared equally by its tokens.

    Raises:
        InputError: a field is missing, or a pair lacks a side.

    Source: Hong et al. 2024 (arXiv 2403.07691).

    Example:
        >>> import torch
        >>> z, sides = torch.zeros(2, 2), torch.tensor([True, False])
        >>> orpo(Tokens(logits=z, labels=torch.tensor([0, 1]), chosen=sides, pair=torch.tensor([0, 0])), weight=1.0).trust
        tensor([ 2., -1.])
    """
    pairs = Pairs.of(tokens)
    means = pairs.means(tokens.label_log_probs.detach())
    (odds_w, slope_w), (odds_l, slope_l) = map(_odds, means)
    h = torch.sigmoid(odds_l - odds_w)
    return Target.push(tokens, pairs.signed(1 + weight * h * slope_w, -weight * h * slope_l) / pairs.size)


@orpo.loss
def orpo_loss(tokens: Tokens, *, weight) -> Float[Tensor, " N"]:
    """-m_w - weight log sigma(o_w - o_l), shared by the pair's tokens."""
    members, chosen, rejected = _means(tokens)
    loss = -chosen - weight * F.logsigmoid(_log_odds(chosen) - _log_odds(rejected))
    return (members / members.sum(1, keepdim=True)).T @ loss
