"""Target-SFT: cross-entropy toward Q = p_y d + (1 - p_y) times a geometric student-teacher mixture."""

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from qlens.core.numerics import expectation, log_softmax
from qlens.core.target import Target
from qlens.core.tokens import Tokens
from qlens.registry import register
from qlens.registry.params import Share
from qlens.registry.structure import GeometricMixture


def guided(tokens: Tokens, eta: float) -> Float[Tensor, "N V"]:
    r"""The geometric student-teacher mix, detached: :math:`\tilde\pi \propto p^{1 - \eta}\, \pi_T^{\eta}`, (N, V)."""
    log_p, log_t = tokens.log_probs.detach(), tokens.log_probs_of("teacher")
    mixed = {0.0: log_p, 1.0: log_t}.get(eta)  # 0 times -inf is not 0
    return log_softmax((1 - eta) * log_p + eta * log_t if mixed is None else mixed).exp()


@register(
    "target_sft",
    title="Target-SFT",
    paper="Xie et al. 2026, arXiv 2606.11189",
    needs=("teacher",),
    structure=lambda eta: GeometricMixture("teacher", own=1 - eta, other=eta, value="cross_entropy"),
    trusted="p_y",
    residual="normalised(p^(1 - eta) teacher^eta)",
    simplex=True,
    limits="eta = 0 is dft; p_y -> 1 gives sft; p_y -> 0 gives the guided distribution",
    differences=(
        "No code is public, and the value of eta in the paper's experiments is not known.",
        "The authors' page prints no stop-gradient on this row; only with all of Q detached is p - Q the gradient.",
    ),
    cites=("xie2026targetsft",),
)
def target_sft(tokens: Tokens, *, eta: Share = 0.5) -> Target:
    r"""Cross-entropy toward a designed, detached target of label and geometric student-teacher mixture.

    .. math:: \ell = CE(\mathrm{sg}\,Q, p), \qquad Q = p_y d + (1 - p_y)\,\tilde\pi, \qquad
              \tilde\pi \propto p^{1 - \eta}\, \pi_T^{\eta}

    Args:
        tokens: logits (N, V), labels (N,) and teacher (N, V).
        eta: the teacher's exponent in the mixture. The paper's value is not known: sweep it and report it.

    Returns:
        Q (N, V) at scale 1. Losses (N,) are in nats.

    Raises:
        InputError: ``tokens.teacher`` is missing.

    Source: Xie et al. 2026 (arXiv 2606.11189), Target-SFT.

    Example:
        >>> import torch
        >>> z = torch.zeros(1, 2)
        >>> target_sft(Tokens(logits=z, labels=torch.tensor([0]), teacher=torch.tensor([[0.1, 0.9]]).log()), eta=1.0).q
        tensor([[0.5500, 0.4500]])
    """
    return Target.mix(tokens, trust=tokens.label_probs.detach(), residual=guided(tokens, eta))


@target_sft.loss
def target_sft_loss(tokens: Tokens, *, eta) -> Float[Tensor, " N"]:
    """-sum_k sg(Q_k) log p_k."""
    log_p = F.log_softmax(tokens.logits, -1)
    labels = tokens.labels.long()
    with torch.no_grad():
        log_t = F.log_softmax(tokens.require("teacher"), -1)
        # weights of exactly 0 drop their factor, so that 0 * -inf never arises
        factors = [share * log_f for share, log_f in ((1 - eta, log_p), (eta, log_t)) if share > 0]
        guided = F.softmax(sum(factors[1:], factors[0]), -1)
    label = -F.nll_loss(log_p, labels, reduction="none")
    p_y = label.detach().exp()
    return -(p_y * label + (1 - p_y) * expectation(guided, log_p))
