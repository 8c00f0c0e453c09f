"""Beyond log-likelihood: loss (1 - p_y^alpha) / alpha, label weight p_y^alpha."""

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from qlens.core.target import Target
from qlens.core.tokens import Tokens
from qlens.registry import register

PAPER = "Li et al. 2025, arXiv 2510.00526"
CODE = "GaotangLi/Beyond-Log-Likelihood main_verl/trainer/fsdp_sft_trainer.py, trainer.objective_trans"


@register(
    "beyond_log",
    title="Beyond log-likelihood, the alpha family",
    paper=PAPER,
    structure="label",
    trusted="p_y^alpha",
    residual="student",
    simplex=lambda alpha: alpha >= 0,
    limits="alpha = 0 is sft; alpha = 1 is dft; alpha = q is gce; negative alpha has a label weight above 1",
    modes={"GeneralFamily-10": {"alpha": 10.0}, "logp": {"alpha": 0.0}},
    differences=(
        "The released code's default objective is plain cross-entropy; its script for mathematics uses alpha = 10.",
        "The authors' table is right for this family; for a general f the trust is -p f'(p).",
        "The paper sums over a sequence; the code takes the token mean of every micro-batch.",
        "In the released code alpha = 0 divides by zero and a negative alpha breaks the parsing of its name.",
    ),
    code=CODE,
    cites=("beyondlog2025",),
)
def beyond_log(tokens: Tokens, *, alpha: float = 1.0) -> Target:
    r"""Power of the label probability in place of its logarithm, label weight p_y^alpha.

    .. math:: \ell = \frac{1 - p_y^\alpha}{\alpha}, \qquad Q = p_y^\alpha d + (1 - p_y^\alpha) p

    Args:
        tokens: logits (N, V) and labels (N,).
        alpha: exponent; 0 is the limit -log p_y.

    Returns:
        Q (N, V) at scale 1; signed where alpha is negative. Losses (N,) are in nats at alpha = 0, without a unit
        elsewhere.

    Source: Li et al. 2025 (arXiv 2510.00526), the family f^alpha.

    Example:
        >>> import torch
        >>> beyond_log(Tokens(logits=torch.zeros(1, 2), labels=torch.tensor([0])), alpha=2.0).q
        tensor([[0.6250, 0.3750]])
    """
    return Target.push(tokens, (alpha * tokens.label_log_probs.detach()).exp())


@beyond_log.loss
def beyond_log_loss(tokens: Tokens, *, alpha) -> Float[Tensor, " N"]:
    """(1 - p_y^alpha) / alpha; -log p_y at alpha = 0."""
    nll = F.cross_entropy(tokens.logits, tokens.labels.long(), reduction="none")
    return -torch.expm1(-alpha * nll) / alpha if abs(alpha) > 1e-12 else nll  # the limit, to rounding
