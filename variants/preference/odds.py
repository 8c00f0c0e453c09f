"""Odds of whole sequences: means and log-odds of both sequences of a pair, shared by ORPO and aligned SFT."""

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from qlens.core.tokens import Tokens

CEILING = -1e-6  # mean log-probabilities above it are held there in the odds, as in released code


def _odds(mean: Float[Tensor, " G"]) -> tuple[Float[Tensor, " G"], Float[Tensor, " G"]]:
    """Log-odds of e^mean, and their slope 1 / (1 - e^mean), 0 above the ceiling."""
    clamped = mean.clamp(max=CEILING)
    complement = -torch.expm1(clamped)
    return clamped - complement.log(), torch.where(mean <= CEILING, 1 / complement, 0.0)


def _means(tokens: Tokens) -> tuple[Float[Tensor, "G N"], Float[Tensor, " G"], Float[Tensor, " G"]]:
    """The membership matrix of pairs, and the mean log-likelihoods of both sequences."""
    log_p = -F.cross_entropy(tokens.logits, tokens.labels.long(), reduction="none")
    ids = tokens.require("pair")
    members = (ids.unique()[:, None] == ids).to(log_p)
    sides = tokens.require("chosen").to(log_p)
    means = [(members * side) @ log_p / (members @ side) for side in (sides, 1 - sides)]
    return members, means[0], means[1]


def _log_odds(mean: Float[Tensor, " G"]) -> Float[Tensor, " G"]:
    """m - log(1 - e^m)."""
    clamped = torch.clamp(mean, max=CEILING)
    return clamped - torch.log(-torch.expm1(clamped))
