"""APO-zero: sigmoids of the log-ratios of the chosen and of the rejected sequence, each by itself."""

import torch
from jaxtyping import Float
from torch import Tensor

from qlens.core.segments import Pairs
from qlens.core.target import Target
from qlens.core.tokens import Tokens
from qlens.registry import register
from qlens.registry.params import Positive
from qlens.variants.preference.dpo import PAIR, label_log_probs, log_ratio, sides_of


@register(
    "apo_zero",
    title="Anchored Preference Optimization, zero",
    paper="D'Oosterlinck et al. 2024, arXiv 2408.06266",
    scope="pair",
    coupled="pair",
    needs=(*PAIR, "reference"),
    structure="label",
    trusted=(
        "beta sigma(u) sigma(-u) where chosen, else -beta sigma(u) sigma(-u), "
        "with u = beta sum_t log(p_y / reference_y)"
    ),
    residual="student",
    simplex=None,
    limits="each sequence is pushed by its own log-ratio: the two do not meet",
    code="huggingface/trl trl/trainer/dpo_trainer.py::_compute_loss",
    cites=("doosterlinck2024apo",),
)
def apo_zero(tokens: Tokens, *, beta: Positive = 0.1) -> Target:
    r"""Sigmoid loss of each sequence's log-ratio to the reference: chosen up, rejected down.

    .. math:: L = 1 - \sigma(\beta \Delta_w) + \sigma(\beta \Delta_l), \qquad Q = a d + (1 - a) p, \quad
              a = \pm \beta\, \sigma(\beta \Delta) (1 - \sigma(\beta \Delta))

    Delta is the summed log-ratio of a sequence to the reference.

    Args:
        tokens: logits (N, V), labels (N,), reference (N, V), pair (N,) and chosen (N,).
        beta: factor of the log-ratios, an inverse temperature.

    Returns:
        Q (N, V) at scale 1, signed. Losses (N,) have no unit; a pair's loss is shared equally by its tokens.

    Raises:
        InputError: a field is missing, or a pair lacks a side.

    Source: D'Oosterlinck et al. 2024 (arXiv 2408.06266).

    Example:
        >>> import torch
        >>> z, sides = torch.zeros(2, 2), torch.tensor([True, False])
        >>> apo_zero(Tokens(logits=z, labels=torch.tensor([0, 1]), reference=z, chosen=sides, pair=torch.tensor([0, 0]))).trust
        tensor([ 0.0250, -0.0250])
    """
    pairs = Pairs.of(tokens)
    chosen, rejected = (torch.sigmoid(beta * side) for side in pairs.totals(log_ratio(tokens)))
    return Target.push(tokens, beta * pairs.signed(chosen * (1 - chosen), -rejected * (1 - rejected)))


@apo_zero.loss
def apo_zero_loss(tokens: Tokens, *, beta) -> Float[Tensor, " N"]:
    """1 - sigma(beta Delta_w) + sigma(beta Delta_l), shared by the pair's tokens."""
    sides, share = sides_of(tokens, False)
    now, before = (
        label_log_probs(tokens.logits, tokens),
        label_log_probs(tokens.require("reference"), tokens).detach(),
    )
    gain = beta * (now - before)
    return share @ (torch.sigmoid(-(sides.clamp(min=0) @ gain)) + torch.sigmoid(-sides.clamp(max=0) @ gain))
