"""GEM: cross-entropy at temperature beta in the logit gradient q - d, with q = softmax(z / beta)."""

from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from qlens.core.numerics import log_softmax
from qlens.core.target import Target
from qlens.core.tokens import Tokens
from qlens.registry import register
from qlens.registry.params import Positive

SLOPE = 0.01  # fixed in the released code


@register(
    "gem",
    title="GEM, preserving diversity",
    paper="Li et al. 2024, arXiv 2408.16673",
    trusted="(1 - q_y) / (1 - p_y), with q = softmax(z / beta)",
    residual="Q = d + p - q, with q = softmax(z / beta)",
    simplex=lambda beta, h: None if beta == 1 or h != "linear" else False,
    limits="beta = 1 is sft; linear is beta times the cross-entropy at temperature beta",
    modes={"scripts": {"h": "logsigmoid"}},
    differences=(
        "The authors' table is the linear form; the shipped scripts use the log-sigmoid, whose weights are near 1/2, so that it "
        "moves about half as far at the same rate.",
        "The command line's default became linear in March 2025; before, it was the log-sigmoid, as the method's own still is.",
        "The released kernel's z-loss uses q where p is meant, and normalises q per shard under tensor parallelism.",
    ),
    code="liziniu/GEM sft_trainer.py::SFTTrainer.gem_loss",
    cites=("gem2024",),
)
def gem(tokens: Tokens, *, beta: Positive = 0.7, h: Literal["linear", "logsigmoid"] = "linear") -> Target:
    r"""Expected gap log p_y - log p_k under the sharpened, detached student q = softmax(z / beta).

    .. math:: \ell = -\sum_k q_k w_k (\log p_y - \log p_k), \quad q = \mathrm{sg}\,\mathrm{softmax}(z / \beta), \qquad
              Q = d + p - q \text{ for } w = 1

    Args:
        tokens: logits (N, V) and labels (N,).
        beta: temperature of q.
        h: "linear" has w = 1; "logsigmoid" has detached w_k = sigma(0.01 (z_k - z_y)) and Q = p - q w + (sum_k q_k
            w_k) d.

    Returns:
        Signed Q (N, V) at scale 1, below zero where q exceeds p. Losses (N,) are in nats.

    Source: Li et al. 2024 (arXiv 2408.16673); weights from released code.

    Example:
        >>> import torch
        >>> gem(Tokens(logits=torch.zeros(1, 2), labels=torch.tensor([0]))).q
        tensor([[1., 0.]])
    """
    z = tokens.logits.detach().to(tokens.label_probs.dtype)
    omega = log_softmax(z / beta).exp()
    if h == "logsigmoid":
        omega = omega * torch.sigmoid(SLOPE * (z - tokens.gather(z)[:, None]))
    return Target.from_grad(tokens, omega - omega.sum(-1, keepdim=True) * tokens.one_hot)


@gem.loss
def gem_loss(tokens: Tokens, *, beta, h) -> Float[Tensor, " N"]:
    """-sum_k q_k w_k (log p_y - log p_k)."""
    log_p = F.log_softmax(tokens.logits, -1)
    label = tokens.labels.long()[:, None]
    with torch.no_grad():
        q = F.softmax(tokens.logits / beta, -1)
        if h == "logsigmoid":
            q = q * F.logsigmoid(SLOPE * (tokens.logits - tokens.logits.gather(-1, label))).exp()
    gap = log_p.gather(-1, label) - log_p
    return -(q * gap.masked_fill(q == 0, 0.0)).sum(-1)
