"""Losses on the odds of a whole sequence: ORPO, and aligned SFT by absolute likelihood."""

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from qlens.citations import bibtex
from qlens.pairs import Pairs
from qlens.params import Positive, Weight
from qlens.registry import register
from qlens.target import Target
from qlens.tokens import Tokens

CEILING = -1e-6  # mean log-probabilities above it are held there in the odds, as in released code


@register(
    "orpo",
    title="Odds Ratio Preference Optimization",
    paper="Hong et al. 2024, arXiv 2403.07691",
    family="preference",
    scope="pair",
    coupled="pair",
    needs=("chosen", "pair"),
    structure="label",
    trusted="(1 + weight h / (1 - P_w)) / length on chosen tokens, -weight h / ((1 - P_l) length) on rejected ones",
    residual="student",
    simplex=None,
    limits="weight = 0 is length-normalised sft on the chosen; never above asft_absolute",
    modes={"official": {"weight": 1.0}},
    differences=(
        "The official default weight is 1, its script's .1; TRL's is .1.",
        "TRL's likelihood term covers the prompt too and is a mean over the batch; here it is the chosen sequence's own.",
    ),
    code="xfactlab/orpo src/orpo_trainer.py; huggingface/trl trl/experimental/orpo/orpo_trainer.py::odds_ratio_loss",
    bibtex=bibtex(
        "hong2024orpo", "ORPO: Monolithic Preference Optimization without Reference Model", 2024, arxiv="2403.07691"
    ),
)
def orpo(tokens: Tokens, *, weight: Weight = 0.1) -> Target:
    r"""The chosen sequence's likelihood, and the log-odds of the chosen against those of the rejected.

    .. math:: L = -m_w - \lambda \log \sigma(o_w - o_l), \quad o = m - \log(1 - e^m), \qquad Q = a d + (1 - a) p, \quad
              a_w = \frac{1}{|y_w|} \Big(1 + \frac{\lambda h}{1 - P_w}\Big), \quad
              a_l = -\frac{1}{|y_l|} \frac{\lambda h}{1 - P_l}

    with m the mean log-likelihood of a sequence, P = e^m and h = sigma(o_l - o_w). Takes ``tokens.pair`` and
    ``tokens.chosen`` (N,); gives (N,) losses in nats, equal shares of their pair's, and Q (N, V) at s = 1. Within the
    odds m is at most -1e-6.

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
def orpo_loss(tokens: Tokens, *, weight: Weight = 0.1) -> Float[Tensor, " N"]:
    """-m_w - weight log sigma(o_w - o_l), shared by the pair's tokens."""
    mine, chosen, rejected = _means(tokens)
    loss = -chosen - weight * F.logsigmoid(_log_odds(chosen) - _log_odds(rejected))
    return (mine / mine.sum(1, keepdim=True)).T @ loss


@register(
    "asft_absolute",
    title="Aligned SFT through absolute likelihood",
    paper="2024, arXiv 2409.10571",
    family="preference",
    scope="pair",
    coupled="pair",
    needs=("chosen", "pair"),
    structure="label",
    trusted="(nll + weight) / length on chosen tokens, -weight P_l / ((1 - P_l) length) on rejected ones",
    residual="student",
    simplex=None,
    limits="(1 + weight) length-normalised sft on the chosen plus weight sequence unlikelihood on the rejected",
    modes={"tempered": {"nll": 0.0, "beta": 0.1}},
    differences=(
        "No official code is known: the form is that of a later paper's restatement, lengths normalised as it says.",
        "Chosen and rejected do not meet: a pair's loss is the sum of two losses.",
        "Not to be confused with anchored SFT (asft_anchored).",
    ),
    bibtex=bibtex(
        "asft2024", "ASFT: Aligned Supervised Fine-Tuning through Absolute Likelihood", 2024, arxiv="2409.10571"
    ),
)
def asft_absolute(tokens: Tokens, *, weight: Weight = 1.0, nll: Weight = 1.0, beta: Positive = 1.0) -> Target:
    r"""The chosen sequence made likely and the rejected one unlikely, each by itself.

    .. math:: L = -n \log P_w - \lambda [\log \sigma(\beta o_w) + \log \sigma(-\beta o_l)], \qquad Q = a d + (1 - a) p, \quad
              a_w = \frac{1}{|y_w|} \Big(n + \frac{\lambda \beta \sigma(-\beta o_w)}{1 - P_w}\Big), \quad
              a_l = -\frac{1}{|y_l|} \frac{\lambda \beta \sigma(\beta o_l)}{1 - P_l}

    with P the geometric mean of a sequence's probabilities and o its log-odds; at beta = 1 the loss is -(n + weight)
    log P_w - weight log(1 - P_l). ``nll`` is n. Takes ``tokens.pair`` and ``tokens.chosen`` (N,); gives (N,) losses
    in nats, equal shares of their sequence's, and Q (N, V) at s = 1. Within the odds log P is at most -1e-6.

    Raises:
        InputError: a field is missing, or a pair lacks a side.

    Source: arXiv 2409.10571; the tempered form from the paper that restates it.

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
def asft_absolute_loss(
    tokens: Tokens, *, weight: Weight = 1.0, nll: Weight = 1.0, beta: Positive = 1.0
) -> Float[Tensor, " N"]:
    """-nll log P_w - weight (log sigma(beta o_w) + log sigma(-beta o_l)), each part shared by its sequence's tokens."""
    mine, chosen, rejected = _means(tokens)
    raised = -nll * chosen - weight * F.logsigmoid(beta * _log_odds(chosen))
    lowered = -weight * F.logsigmoid(-beta * _log_odds(rejected))
    sides = tokens.require("chosen").to(mine)
    up, down = mine * sides, mine * (1 - sides)
    return (up / up.sum(1, keepdim=True)).T @ raised + (down / down.sum(1, keepdim=True)).T @ lowered


def _odds(mean: Float[Tensor, " G"]) -> tuple[Float[Tensor, " G"], Float[Tensor, " G"]]:
    """Log-odds of e^mean, and their slope 1 / (1 - e^mean), 0 above the ceiling."""
    held = mean.clamp(max=CEILING)
    rest = -torch.expm1(held)
    return held - rest.log(), torch.where(mean <= CEILING, 1 / rest, 0.0)


def _means(tokens: Tokens) -> tuple[Float[Tensor, "G N"], Float[Tensor, " G"], Float[Tensor, " G"]]:
    """Which tokens are of which pair, and the mean log-likelihoods of both sequences."""
    log_p = -F.cross_entropy(tokens.logits, tokens.labels.long(), reduction="none")
    ids = tokens.require("pair")
    mine = (ids.unique()[:, None] == ids).to(log_p)
    sides = tokens.require("chosen").to(log_p)
    means = [(mine * side) @ log_p / (mine @ side) for side in (sides, 1 - sides)]
    return mine, means[0], means[1]


def _log_odds(mean: Float[Tensor, " G"]) -> Float[Tensor, " G"]:
    """m - log(1 - e^m)."""
    held = torch.clamp(mean, max=CEILING)
    return held - torch.log(-torch.expm1(held))
