"""PolyLoss: log-likelihood plus a polynomial in 1 - p_y."""

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from qlens.core.target import Target
from qlens.core.tokens import Tokens
from qlens.registry import register


def _terms(epsilon: float | tuple[float, ...]) -> tuple[float, ...]:
    return epsilon if isinstance(epsilon, tuple) else (epsilon,)


def _inside(epsilon: float | tuple[float, ...]) -> bool | None:
    """Whether Q is a distribution: Q_k = -p_y slope p_k and Q_y = 1 + p_y (1 - p_y) slope, which is least at p_y = 1/2."""
    terms = _terms(epsilon)
    if all(coefficient <= 0 for coefficient in terms):
        least = sum(j * coefficient for j, coefficient in enumerate(terms, 1))
        return True if least >= -4 else False if len(terms) == 1 else None
    return False if all(coefficient >= 0 for coefficient in terms) else None


@register(
    "poly",
    title="PolyLoss",
    paper="Leng et al. 2022, arXiv 2204.12511",
    structure="label",
    trusted="1 + epsilon p_y; a tuple: 1 + p_y sum_j j epsilon_j (1 - p_y)^(j - 1)",
    residual="student",
    simplex=_inside,
    limits="epsilon = 0 is sft; epsilon = -1 takes dft's gradient from sft's",
    modes={"optax": {"epsilon": 2.0}},
    differences=("Published defaults differ: 1 in the PyTorch port, 2 in optax.",),
    code="abhuse/polyloss-pytorch polyloss.py",
    cites=("leng2022poly",),
)
def poly(tokens: Tokens, *, epsilon: float | tuple[float, ...] = 1.0) -> Target:
    r"""Log-likelihood plus sum_j epsilon_j (1 - p_y)^j.

    .. math:: \ell = -\log p_y + \sum_j \epsilon_j (1 - p_y)^j, \qquad Q = a d + (1 - a) p, \quad
              a = 1 + p_y \sum_j j \epsilon_j (1 - p_y)^{j - 1}

    Args:
        tokens: logits (N, V) and labels (N,).
        epsilon: coefficient of Poly-1, or a tuple of those of Poly-N.

    Returns:
        Q (N, V) at scale 1, signed for most coefficients. Losses (N,) are in nats.

    Source: Leng et al. 2022 (arXiv 2204.12511).

    Example:
        >>> import torch
        >>> poly(Tokens(logits=torch.zeros(1, 2), labels=torch.tensor([0])), epsilon=-1.0).trust
        tensor([0.5000])
    """
    p_y, other_mass = tokens.label_probs.detach(), tokens.rest_log_probs.detach().exp()
    slope = torch.zeros_like(p_y)
    for j, coefficient in enumerate(_terms(epsilon), 1):
        slope = slope + j * coefficient * other_mass ** (j - 1)
    return Target.push(tokens, 1 + p_y * slope)


@poly.loss
def poly_loss(tokens: Tokens, *, epsilon) -> Float[Tensor, " N"]:
    """-log p_y + sum_j epsilon_j (1 - p_y)^j."""
    nll = F.cross_entropy(tokens.logits, tokens.labels.long(), reduction="none")
    gap = -torch.expm1(-nll)
    return nll + sum((coefficient * gap**j for j, coefficient in enumerate(_terms(epsilon), 1)), torch.zeros_like(nll))
