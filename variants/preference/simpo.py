"""SimPO: logistic loss of the margin between mean log-likelihoods, without a reference."""

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from qlens.core.segments import Pairs
from qlens.core.target import Target
from qlens.core.tokens import Tokens
from qlens.registry import register
from qlens.registry.params import Positive, Weight
from qlens.variants.preference.dpo import PAIR, label_log_probs, sides_of


@register(
    "simpo",
    title="SimPO",
    paper="Meng et al. 2024, arXiv 2405.14734",
    scope="pair",
    coupled="pair",
    needs=PAIR,
    structure="label",
    trusted=(
        "beta sigma(-u) / length where chosen, else -beta sigma(-u) / length, "
        "with u = beta margin(mean_t log(p_y)) - gamma; nll adds nll / length to chosen"
    ),
    residual="student",
    simplex=None,
    limits="no reference; gamma is the margin in the reward's own unit",
    modes={"trl": {"nll": 1.0}, "official-scripts": {"beta": 10.0, "gamma": 3.0}},
    differences=(
        "TRL's CPO trainer adds the chosen sequence's likelihood by default (cpo_alpha 1): nll = 0 is SimPO.",
        "The official code gives the margin as a share of beta (gamma_beta_ratio .25), TRL and this page as a number.",
        "TRL's likelihood is a mean over the batch's chosen tokens; here every pair has its own mean.",
    ),
    code="princeton-nlp/SimPO scripts/simpo_trainer.py::simpo_loss",
    cites=("meng2024simpo",),
)
def simpo(tokens: Tokens, *, beta: Positive = 2.0, gamma: float = 0.5, nll: Weight = 0.0) -> Target:
    r"""Logistic loss of the difference of mean log-likelihoods m, with a margin.

    .. math:: L = -\log \sigma(u) - n\, m_w, \quad u = \beta (m_w - m_l) - \gamma, \qquad Q = a d + (1 - a) p, \quad
              a_w = (\beta \sigma(-u) + n) / |y_w|, \quad a_l = -\beta \sigma(-u) / |y_l|

    Args:
        tokens: logits (N, V), labels (N,), pair (N,) and chosen (N,).
        beta: factor of the log-likelihoods, an inverse temperature.
        gamma: margin, in the unit of beta m.
        nll: n, the weight of the chosen sequence's mean log-likelihood.

    Returns:
        Q (N, V) at scale 1, signed. Losses (N,) are in nats; a pair's loss is shared equally by its tokens.

    Raises:
        InputError: a field is missing, or a pair lacks a side.

    Source: Meng et al. 2024 (arXiv 2405.14734).

    Example:
        >>> import torch
        >>> z, sides = torch.zeros(2, 2), torch.tensor([True, False])
        >>> simpo(Tokens(logits=z, labels=torch.tensor([0, 1]), chosen=sides, pair=torch.tensor([0, 0])), gamma=0.0).trust
        tensor([ 1., -1.])
    """
    pairs = Pairs.of(tokens)
    chosen, rejected = pairs.means(tokens.label_log_probs.detach())
    push = beta * torch.sigmoid(gamma - beta * (chosen - rejected))
    return Target.push(tokens, pairs.signed(push + nll, -push) / pairs.size)


@simpo.loss
def simpo_loss(tokens: Tokens, *, beta, gamma, nll) -> Float[Tensor, " N"]:
    """-log sigma(beta (m_w - m_l) - gamma) - nll m_w, shared by the pair's tokens."""
    (sides, share), log_p = sides_of(tokens, True), label_log_probs(tokens.logits, tokens)
    return share @ (-F.logsigmoid(beta * (sides @ log_p) - gamma) - nll * (sides.clamp(min=0) @ log_p))
