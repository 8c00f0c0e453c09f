"""Distillation: the teacher's distribution as the target, alone or beside the label."""

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from qlens.params import Positive, Share
from qlens.registry import register
from qlens.target import Target
from qlens.tokens import Tokens, log_softmax

BIBTEX = """@misc{hinton2015distilling,
  title = {Distilling the Knowledge in a Neural Network},
  author = {Hinton, Geoffrey and Vinyals, Oriol and Dean, Jeff},
  year = {2015}, eprint = {1503.02531}, archivePrefix = {arXiv},
}"""


@register(
    "kd",
    title="Knowledge distillation",
    paper="Hinton et al. 2015, arXiv 1503.02531",
    family="distillation",
    needs=("teacher",),
    trusted="0",
    residual="teacher",
    simplex=lambda temperature, square: temperature == 1,
    limits="kd_hybrid(weight=1); the label is never looked at",
    bibtex=BIBTEX,
)
def kd(tokens: Tokens, *, temperature: Positive = 1.0, square: bool = False) -> Target:
    r"""Kullback-Leibler divergence from the teacher, both softened by the temperature T.

    .. math:: \ell = KL(\pi_T^{(T)} \| p^{(T)}), \qquad Q = \pi_T \text{ at } T = 1, \quad
              Q = p - c\,(p^{(T)} - \pi_T^{(T)}) \text{ else}

    with c = 1/T, or T where ``square`` multiplies the loss by T squared, as the paper does beside hard labels. At T != 1
    Q is no mixture and may be signed. Takes ``tokens.teacher`` (N, V); gives losses in nats (the KL, not the cross-entropy).

    Raises:
        InputError: ``tokens.teacher`` is missing.

    Example:
        >>> import torch
        >>> z = torch.zeros(1, 2)
        >>> kd(Tokens(logits=z, labels=torch.tensor([0]), teacher=torch.tensor([[0.2, 0.8]]).log())).q
        tensor([[0.2000, 0.8000]])
    """
    if temperature == 1:
        return Target.mix(tokens, trust=0.0, residual=tokens.log_probs_of("teacher").exp())
    soft_p = log_softmax(tokens.logits.detach() / temperature).exp()
    soft_teacher = log_softmax(tokens.require("teacher").detach() / temperature).exp()
    factor = temperature if square else 1 / temperature
    return Target.dense(tokens, tokens.probs - factor * (soft_p - soft_teacher))


@kd.loss
def kd_loss(tokens: Tokens, *, temperature: Positive = 1.0, square: bool = False) -> Float[Tensor, " N"]:
    """KL(teacher || student), both at the temperature."""
    log_p = F.log_softmax(tokens.logits / temperature, -1)
    kl = _kl(F.log_softmax(tokens.require("teacher") / temperature, -1).detach(), log_p)
    return temperature**2 * kl if square else kl


@register(
    "kd_hybrid",
    title="Hybrid distillation",
    paper="Hinton et al. 2015, arXiv 1503.02531",
    family="distillation",
    needs=("teacher",),
    trusted="1 - weight",
    residual="teacher",
    simplex=True,
    limits="weight = 0 is sft; weight = 1 is kd",
    bibtex=BIBTEX,
)
def kd_hybrid(tokens: Tokens, *, weight: Share = 0.5) -> Target:
    r"""The label and the teacher in fixed shares.

    .. math:: \ell = -(1 - \lambda) \log p_y + \lambda\, KL(\pi_T \| p), \qquad Q = (1 - \lambda) d + \lambda \pi_T

    Takes ``tokens.teacher`` (N, V); gives (N,) losses in nats and Q (N, V) at s = 1.

    Raises:
        InputError: ``tokens.teacher`` is missing.

    Example:
        >>> import torch
        >>> z = torch.zeros(1, 2)
        >>> kd_hybrid(Tokens(logits=z, labels=torch.tensor([0]), teacher=z)).q
        tensor([[0.7500, 0.2500]])
    """
    return Target.mix(tokens, trust=1 - weight, residual=tokens.log_probs_of("teacher").exp())


@kd_hybrid.loss
def kd_hybrid_loss(tokens: Tokens, *, weight: Share = 0.5) -> Float[Tensor, " N"]:
    """-(1 - weight) log p_y + weight KL(teacher || student)."""
    log_p = F.log_softmax(tokens.logits, -1)
    nll = F.nll_loss(log_p, tokens.labels.long(), reduction="none")
    return (1 - weight) * nll + weight * _kl(F.log_softmax(tokens.require("teacher"), -1).detach(), log_p)


def _kl(log_t: Float[Tensor, "N V"], log_p: Float[Tensor, "N V"]) -> Float[Tensor, " N"]:
    """KL of two log-distributions; where the first is zero it adds nothing, whatever the second."""
    terms = log_t.exp() * (log_t - log_p.masked_fill(log_t == -torch.inf, 0.0))
    return torch.where(log_t > -torch.inf, terms, 0.0).sum(-1)
