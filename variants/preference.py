"""Preference losses: a chosen and a rejected sequence, and one scalar for all tokens of each."""

from typing import Annotated

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from qlens.citations import bibtex
from qlens.pairs import Pairs
from qlens.params import Between, Positive, Weight
from qlens.registry import register
from qlens.target import Target
from qlens.tokens import Tokens

Flips = Annotated[float, Between(0, 0.5)]
PAIR = ("chosen", "pair")


@register(
    "dpo",
    title="Direct Preference Optimization",
    paper="Rafailov et al. 2023, arXiv 2305.18290",
    family="preference",
    scope="pair",
    coupled="pair",
    needs=(*PAIR, "reference"),
    trusted="beta sigma(-u) on chosen tokens, minus that on rejected ones",
    residual="student",
    simplex=None,
    limits="all tokens of a sequence are pushed alike: no token is given credit",
    modes={"sigmoid-norm": {"average": True}, "conservative": {"label_smoothing": 0.1}},
    differences=("The paper sums log-ratios over a sequence; TRL's sigmoid_norm averages them (average).",),
    code="eric-mitchell/direct-preference-optimization trainers.py::preference_loss; huggingface/trl trl/trainer/dpo_trainer.py",
    bibtex=bibtex(
        "rafailov2023dpo",
        "Direct Preference Optimization: Your Language Model is Secretly a Reward Model",
        2023,
        arxiv="2305.18290",
    ),
)
def dpo(tokens: Tokens, *, beta: Positive = 0.1, label_smoothing: Flips = 0.0, average: bool = False) -> Target:
    r"""The chosen sequence's log-ratio to the reference against the rejected one's.

    .. math:: L = -(1 - \epsilon) \log \sigma(u) - \epsilon \log \sigma(-u), \quad u = \beta (\Delta_w - \Delta_l), \qquad
              Q = a d + (1 - a) p, \quad a = \pm \beta (\sigma(-u) - \epsilon)

    Delta is the summed (or, with ``average``, mean) log-ratio of a sequence. Takes ``tokens.pair``, ``tokens.chosen``
    (N,) and ``tokens.reference`` (N, V); gives (N,) losses in nats, equal shares of their pair's, and Q (N, V) at s =
    1.

    Raises:
        InputError: a field is missing, or a pair lacks a side.

    Source: Rafailov et al. 2023 (arXiv 2305.18290).

    Example:
        >>> import torch
        >>> z, sides = torch.zeros(2, 2), torch.tensor([True, False])
        >>> dpo(Tokens(logits=z, labels=torch.tensor([0, 1]), reference=z, chosen=sides, pair=torch.tensor([0, 0]))).trust
        tensor([ 0.0500, -0.0500])
    """
    pairs, ratio = Pairs.of(tokens), _log_ratio(tokens)
    chosen, rejected = pairs.means(ratio) if average else pairs.totals(ratio)
    u = beta * (chosen - rejected)
    push = beta * ((1 - label_smoothing) * torch.sigmoid(-u) - label_smoothing * torch.sigmoid(u))
    each = pairs.signed(push, -push)
    return Target.push(tokens, each / pairs.size if average else each)


@dpo.loss
def dpo_loss(
    tokens: Tokens, *, beta: Positive = 0.1, label_smoothing: Flips = 0.0, average: bool = False
) -> Float[Tensor, " N"]:
    """-(1 - eps) log sigma(u) - eps log sigma(-u), shared by the pair's tokens."""
    sides, share = _sides(tokens, average)
    now, before = (
        _label_log_probs(tokens.logits, tokens),
        _label_log_probs(tokens.require("reference"), tokens).detach(),
    )
    u = beta * (sides @ (now - before))
    loss = -(1 - label_smoothing) * F.logsigmoid(u) - label_smoothing * F.logsigmoid(-u)
    return share @ loss


@register(
    "simpo",
    title="SimPO",
    paper="Meng et al. 2024, arXiv 2405.14734",
    family="preference",
    scope="pair",
    coupled="pair",
    needs=PAIR,
    trusted="beta sigma(-u) / length on chosen tokens, minus that on rejected ones",
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
    bibtex=bibtex(
        "meng2024simpo",
        "SimPO: Simple Preference Optimization with a Reference-Free Reward",
        2024,
        arxiv="2405.14734",
    ),
)
def simpo(tokens: Tokens, *, beta: Positive = 2.0, gamma: float = 0.5, nll: Weight = 0.0) -> Target:
    r"""The chosen sequence's mean log-likelihood against the rejected one's, with a margin.

    .. math:: L = -\log \sigma(u) - n\, m_w, \quad u = \beta (m_w - m_l) - \gamma, \qquad Q = a d + (1 - a) p, \quad
              a_w = (\beta \sigma(-u) + n) / |y_w|, \quad a_l = -\beta \sigma(-u) / |y_l|

    Takes ``tokens.pair`` and ``tokens.chosen`` (N,); gives (N,) losses in nats, equal shares of their pair's, and Q
    (N, V) at s = 1.

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
def simpo_loss(tokens: Tokens, *, beta: Positive = 2.0, gamma: float = 0.5, nll: Weight = 0.0) -> Float[Tensor, " N"]:
    """-log sigma(beta (m_w - m_l) - gamma) - nll m_w, shared by the pair's tokens."""
    (sides, share), log_p = _sides(tokens, True), _label_log_probs(tokens.logits, tokens)
    return share @ (-F.logsigmoid(beta * (sides @ log_p) - gamma) - nll * (sides.clamp(min=0) @ log_p))


@register(
    "ipo",
    title="Identity Preference Optimization",
    paper="Azar et al. 2023, arXiv 2310.12036",
    family="preference",
    scope="pair",
    coupled="pair",
    needs=(*PAIR, "reference"),
    trusted="-2 e / length on chosen tokens, 2 e / length on rejected ones",
    residual="student",
    simplex=None,
    limits="no push where the margin is 1 / (2 beta); beyond it the chosen sequence is pushed down",
    differences=("This is TRL's form, with log-ratios averaged over a sequence.",),
    code="huggingface/trl trl/trainer/dpo_trainer.py::_compute_loss",
    bibtex=bibtex(
        "azar2023ipo",
        "A General Theoretical Paradigm to Understand Learning from Human Preferences",
        2023,
        arxiv="2310.12036",
    ),
)
def ipo(tokens: Tokens, *, beta: Positive = 0.1) -> Target:
    r"""The squared distance of the pair's mean log-ratio margin from its aim.

    .. math:: L = e^2, \quad e = \bar\Delta_w - \bar\Delta_l - \tfrac{1}{2 \beta}, \qquad Q = a d + (1 - a) p, \quad
              a_w = -2 e / |y_w|, \quad a_l = 2 e / |y_l|

    Takes ``tokens.pair``, ``tokens.chosen`` (N,) and ``tokens.reference`` (N, V); gives (N,) losses in squared nats,
    equal shares of their pair's, and Q (N, V) at s = 1.

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
    chosen, rejected = pairs.means(_log_ratio(tokens))
    push = -2 * (chosen - rejected - 1 / (2 * beta))
    return Target.push(tokens, pairs.signed(push, -push) / pairs.size)


@ipo.loss
def ipo_loss(tokens: Tokens, *, beta: Positive = 0.1) -> Float[Tensor, " N"]:
    """(mean margin - 1 / (2 beta))^2, shared by the pair's tokens."""
    sides, share = _sides(tokens, True)
    now, before = (
        _label_log_probs(tokens.logits, tokens),
        _label_log_probs(tokens.require("reference"), tokens).detach(),
    )
    return share @ (sides @ (now - before) - 0.5 / beta).square()


@register(
    "apo_zero",
    title="Anchored Preference Optimization, zero",
    paper="D'Oosterlinck et al. 2024, arXiv 2408.06266",
    family="preference",
    scope="pair",
    coupled="pair",
    needs=(*PAIR, "reference"),
    trusted="beta sigma (1 - sigma) on chosen tokens, minus that on rejected ones",
    residual="student",
    simplex=None,
    limits="each sequence is pushed by its own log-ratio: the two do not meet",
    code="huggingface/trl trl/trainer/dpo_trainer.py::_compute_loss",
    bibtex=bibtex(
        "doosterlinck2024apo",
        "Anchored Preference Optimization and Contrastive Revisions: Addressing Underspecification in Alignment",
        2024,
        arxiv="2408.06266",
    ),
)
def apo_zero(tokens: Tokens, *, beta: Positive = 0.1) -> Target:
    r"""The chosen sequence raised and the rejected one lowered, each against the reference alone.

    .. math:: L = 1 - \sigma(\beta \Delta_w) + \sigma(\beta \Delta_l), \qquad Q = a d + (1 - a) p, \quad
              a = \pm \beta\, \sigma(\beta \Delta) (1 - \sigma(\beta \Delta))

    Takes ``tokens.pair``, ``tokens.chosen`` (N,) and ``tokens.reference`` (N, V); gives (N,) losses without a unit,
    equal shares of their pair's, and Q (N, V) at s = 1.

    Raises:
        InputError: a field is missing, or a pair lacks a side.

    Source: arXiv 2408.06266.

    Example:
        >>> import torch
        >>> z, sides = torch.zeros(2, 2), torch.tensor([True, False])
        >>> apo_zero(Tokens(logits=z, labels=torch.tensor([0, 1]), reference=z, chosen=sides, pair=torch.tensor([0, 0]))).trust
        tensor([ 0.0250, -0.0250])
    """
    pairs = Pairs.of(tokens)
    chosen, rejected = (torch.sigmoid(beta * side) for side in pairs.totals(_log_ratio(tokens)))
    return Target.push(tokens, beta * pairs.signed(chosen * (1 - chosen), -rejected * (1 - rejected)))


@apo_zero.loss
def apo_zero_loss(tokens: Tokens, *, beta: Positive = 0.1) -> Float[Tensor, " N"]:
    """1 - sigma(beta Delta_w) + sigma(beta Delta_l), shared by the pair's tokens."""
    sides, share = _sides(tokens, False)
    now, before = (
        _label_log_probs(tokens.logits, tokens),
        _label_log_probs(tokens.require("reference"), tokens).detach(),
    )
    gain = beta * (now - before)
    return share @ (torch.sigmoid(-(sides.clamp(min=0) @ gain)) + torch.sigmoid(-sides.clamp(max=0) @ gain))


def _log_ratio(tokens: Tokens) -> Float[Tensor, " N"]:
    """log p_y - log reference_y, without gradient."""
    return tokens.label_log_probs.detach() - tokens.gather(tokens.log_probs_of("reference"))


def _label_log_probs(logits: Float[Tensor, "N V"], tokens: Tokens) -> Float[Tensor, " N"]:
    return -F.cross_entropy(logits, tokens.labels.long(), reduction="none")


def _sides(tokens: Tokens, average: bool) -> tuple[Float[Tensor, "G N"], Float[Tensor, "N G"]]:
    """Matrices from tokens to pairs, chosen minus rejected (over their lengths), and back in equal shares."""
    ids = tokens.require("pair")
    mine = (ids.unique()[:, None] == ids).to(tokens.label_probs.dtype)
    chosen = tokens.require("chosen").to(mine)
    up, down = mine * chosen, mine * (1 - chosen)
    if average:
        up, down = up / up.sum(1, keepdim=True), down / down.sum(1, keepdim=True)
    return up - down, (mine / mine.sum(1, keepdim=True)).T
