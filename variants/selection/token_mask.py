"""Token masks: log-likelihood of the tokens with the largest excess loss, or of given ones."""

import math
from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from qlens.core.target import Target
from qlens.core.tokens import Tokens
from qlens.registry import register
from qlens.registry.params import Share

By = Literal["given", "excess", "history"]


@register(
    "token_mask",
    title="Selective-token masks (Rho-1, Token Cleaning, ssToken)",
    paper="Lin et al. 2024, arXiv 2404.07965; Pang et al. 2025, arXiv 2502.01968; Qin et al. 2025, arXiv 2510.18250",
    scope=lambda by, keep: "token" if by == "given" else "batch",
    needs=lambda by, keep: {"given": ("critical",), "excess": ("reference",), "history": ("old",)}[by],
    trusted="1 where critical, else 0; by = 'excess' or 'history': 1 where selected",
    residual="student",
    simplex=True,
    denominator="selected",
    structure="label",
    limits="keep = 1 is sft; by = 'given' is cft",
    modes={"rho-1": {"by": "excess"}, "sstoken": {"by": "history"}},
    differences=(
        "Rho-1's repository holds no training code, and its ratio of .6 to .7 is not confirmed.",
        "Token Cleaning computes its mask before training, from a base and a reference model: hand it in as critical.",
        "ssToken mixes the history score with attention from the last layer; without attention only the first half is here.",
    ),
    code="UCSC-REAL/TokenCleaning scripts/generate_token_label.py; jianke0604/ssToken scripts/finetune.py",
    cites=("rho2024", "pang2025cleaning", "qin2025sstoken"),
)
def token_mask(tokens: Tokens, *, by: By = "given", keep: Share = 0.6) -> Target:
    r"""Log-likelihood of selected tokens.

    .. math:: \ell = -m \log p_y, \qquad Q = d \text{ where } m = 1, \quad Q = p \text{ where } m = 0

    Args:
        tokens: logits (N, V), labels (N,) and, by ``by``, critical (N,), reference (N, V) or old (N, V).
        by: "given" selects ``tokens.critical``; "excess" the labels whose loss exceeds the reference's most;
            "history" those whose loss fell most since ``tokens.old``.
        keep: share of the batch that is selected; ties go to the earlier token.

    Returns:
        Q (N, V) at scale 1. Losses (N,) are in nats; a mean divides by the selected tokens.

    Raises:
        InputError: the field that ``by`` reads is missing.

    Source: Lin et al. 2024 (arXiv 2404.07965, excess loss), arXiv 2502.01968, arXiv 2510.18250 (history).

    Example:
        >>> import torch
        >>> z = torch.tensor([[0.0, 0.0], [2.0, 0.0]])
        >>> token_mask(Tokens(logits=z, labels=torch.tensor([0, 0]), reference=z * 0), by="excess", keep=0.5).trust
        tensor([1., 0.])
    """
    if by == "given":
        chosen = tokens.require("critical").to(tokens.label_probs)
    else:
        own = tokens.label_log_probs.detach()
        other = tokens.gather(tokens.log_probs_of("reference" if by == "excess" else "old"))
        score = other - own if by == "excess" else own - other
        order = score.sort(dim=-1, descending=True, stable=True).indices
        chosen = torch.zeros_like(score)
        chosen[order[: math.ceil(keep * len(score))]] = 1.0
    return Target.mix(tokens, trust=chosen, residual="student")


@token_mask.loss
def token_mask_loss(tokens: Tokens, *, by, keep) -> Float[Tensor, " N"]:
    """-mask log p_y."""
    labels = tokens.labels.long()
    nll = F.cross_entropy(tokens.logits, labels, reduction="none")
    if by == "given":
        return torch.where(tokens.require("critical").bool(), nll, 0.0)
    other = tokens.require({"excess": "reference", "history": "old"}[by])
    before = F.cross_entropy(other, labels, reduction="none")
    gain = (nll - before if by == "excess" else before - nll).detach()
    rank = gain.argsort(dim=-1, descending=True, stable=True).argsort()
    return torch.where(rank < math.ceil(keep * len(gain)), nll, 0.0)
