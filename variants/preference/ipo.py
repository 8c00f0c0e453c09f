"""IPO: squared distance of the log-ratio margin from 1 / (2 beta)."""

from jaxtyping import Float
from torch import Tensor

from qlens.core.segments import Pairs
from qlens.core.target import Target
from qlens.core.tokens import Tokens
from qlens.registry import register
from qlens.registry.params import Positive
from qlens.variants.preference.dpo import PAIR, label_log_probs, log_ratio, sides_of


@register(
    "ipo",
    title="Identity Preference Optimization",
    paper="Azar et al. 2023, arXiv 2310.12036",
    scope="pair",
    coupled="pair",
    needs=(*PAIR, "reference"),
    structure="label",
    trusted=(
        "-2 e / length where chosen, else 2 e / length, with e = margin(mean_t log(p_y / reference_y)) - 1 / (2 beta)"
    ),
    residual="student",
    simplex=None,
    limits="no push where the margin is 1 / (2 beta); beyond it the chosen sequence is pushed down",
    differences=("This is TRL's form, with log-ratios averaged over a sequence.",),
    code="huggingface/trl trl/trainer/dpo_trainer.py::_compute_loss",
    cites=("azar2023ipo",),
)
def ipo(tokens: Tokens, *, beta: Positive = 0.1) -> Target:
    r"""Squared distance of the pair's mean log-ratio margin from 1 / (2 beta).

    .. math:: L = e^2, \quad e = \bar\Delta_w - \bar\Delta_l - \tfrac{1}{2 \beta}, \qquad Q = a d + (1 - a) p, \quad
              a_w = -2 e / |y_w|, \quad a_l = 2 e / |y_l|

    Args:
        tokens: logits (N, V), labels (N,), reference (N, V), pair (N,) and chosen (N,).
        beta: sets the margin 1 / (2 beta), in nats.

    Returns:
        Q (N, V) at scale 1, signed. Losses (N,) are in squared nats; a pair's loss is shared equally by its tokens.

    Raises:
        InputError: a field is missing, or a pair lacks a side.

    Source: Azar et al. 2023 (arXiv 2310.12036), as TRL averages it.

    Example:
        >>> import torch
        >>> z, sides = torch.zeros(2, 2), torch.tensor([True, False])
        >>> pair = torch.tensor([0, 0])
        >>> ipo(Tokens(logits=z, labels=1 - pair, reference=z, chosen=sides, pair=pair), beta=2.0).trust
        tensor([ 0.5000, -0.5000])
    """
    pairs = Pairs.of(tokens)
    chosen, rejected = pairs.means(log_ratio(tokens))
    push = -2 * (chosen - rejected - 1 / (2 * beta))
    return Target.push(tokens, pairs.signed(push, -push) / pairs.size)


@ipo.loss
def ipo_loss(tokens: Tokens, *, beta) -> Float[Tensor, " N"]:
    """(mean margin - 1 / (2 beta))^2, shared by the pair's tokens."""
    sides, share = sides_of(tokens, True)
    now, before = (
        label_log_probs(tokens.logits, tokens),
        label_log_probs(tokens.require("reference"), tokens).detach(),
    )
    return share @ (sides @ (now - before) - 0.5 / beta).square()
