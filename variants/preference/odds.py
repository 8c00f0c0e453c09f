"""Odds of whole sequences: means and log-odds of both sequences of a pair, shared by ORPO and aligned SFT."""

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from qlens.core.tokens import Tokens

CEILING = -1e-6  # mean log-probabilities above it are held there in the odds, as in released code


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
