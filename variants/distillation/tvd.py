"""Total variation distance between student and teacher."""

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from qlens.core.target import Target
from qlens.core.tokens import Tokens
from qlens.registry import register

TIES = 1e3  # differences within this many roundings of the dtype are none


@register(
    "tvd",
    title="Total variation distance to a teacher",
    paper="Wen et al. 2023, arXiv 2307.15190 (f-divergence distillation)",
    needs=("teacher",),
    trusted="p_y (E_p[s] - s_y) / (1 - p_y), with s = sign(p - teacher) / 2",
    residual="Q = p (1 - s + E_p[s]), with s = sign(p - teacher) / 2",
    simplex=True,
    limits="no gradient where student and teacher agree",
    differences=("Where student and teacher agree to rounding, a token counts as neither above nor below.",),
    code="jongwooko/distillm distillm/losses.py::tv_distance",
    cites=("wen2023fdistill",),
)
def tvd(tokens: Tokens) -> Target:
    r"""Total variation distance, half the absolute difference between student and teacher.

    .. math:: \ell = \tfrac12 \sum_k |p_k - \pi_{T,k}|, \qquad Q = p \odot (1 - s + \mathbb{E}_p s), \quad
              s_k = \tfrac12 \mathrm{sign}(p_k - \pi_{T,k})

    Args:
        tokens: logits (N, V), labels (N,), which do not enter, and teacher (N, V).

    Returns:
        Q (N, V) at scale 1, always a distribution; entries equal to rounding have s_k = 0. Losses (N,) have no unit.

    Raises:
        InputError: ``tokens.teacher`` is missing.

    Source: Wen et al. 2023 (arXiv 2307.15190), as released with arXiv 2402.03898.

    Example:
        >>> import torch
        >>> z = torch.zeros(1, 2)
        >>> tvd(Tokens(logits=z, labels=torch.tensor([0]), teacher=torch.tensor([[0.2, 0.8]]).log())).q
        tensor([[0.2500, 0.7500]])
    """
    return Target.slope(tokens, _difference(tokens.probs.detach(), tokens.log_probs_of("teacher").exp()).sign() / 2)


@tvd.loss
def tvd_loss(tokens: Tokens) -> Float[Tensor, " N"]:
    """sum_k |p_k - teacher_k| / 2."""
    teacher = F.softmax(tokens.require("teacher"), -1).detach()
    return _difference(F.softmax(tokens.logits, -1), teacher).abs().sum(-1) / 2


def _difference(p: Float[Tensor, "N V"], q: Float[Tensor, "N V"]) -> Float[Tensor, "N V"]:
    """p - q, with 0 where they differ by rounding, so that target and loss agree on the sign."""
    gap = p - q
    rounding = TIES * torch.finfo(p.dtype).eps * torch.maximum(p, q).detach()
    return torch.where(gap.detach().abs() <= rounding, 0.0, gap)
