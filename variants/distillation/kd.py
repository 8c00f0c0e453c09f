"""Knowledge distillation: KL divergence from the teacher's distribution."""

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from qlens.core.numerics import kl, log_softmax
from qlens.core.target import Target
from qlens.core.tokens import Tokens
from qlens.registry import register
from qlens.registry.params import Positive
from qlens.registry.structure import GeometricMixture


@register(
    "kd",
    title="Knowledge distillation",
    paper="Hinton et al. 2015, arXiv 1503.02531",
    needs=("teacher",),
    structure=lambda temperature, **_: GeometricMixture("teacher") if temperature == 1 else "dense",
    trusted="0",
    residual="teacher",
    simplex=lambda temperature, square: temperature == 1,
    limits="kd_hybrid(weight=1); the label is never looked at",
    modes={"hinton": {"temperature": 2.0, "square": True}, "soft": {"temperature": 2.0}},
    differences=(
        "The authors' table is the case T = 1; at other temperatures the target is no mixture and may be signed.",
        "A draft of the authors' page called this row a fixed mixture; what their plots show is not settled.",
    ),
    code="microsoft/LMOps minillm/finetune.py::get_distil_loss (T = 1, without the teacher's entropy)",
    cites=("hinton2015distilling",),
)
def kd(tokens: Tokens, *, temperature: Positive = 1.0, square: bool = False) -> Target:
    r"""KL divergence from the teacher, both softened by the temperature T.

    .. math:: \ell = KL(\pi_T^{(T)} \| p^{(T)}), \qquad Q = \pi_T \text{ at } T = 1, \quad
              Q = p - c\,(p^{(T)} - \pi_T^{(T)}) \text{ else}

    c is 1/T, or T with ``square``. At T != 1 Q is no mixture and may be signed.

    Args:
        tokens: logits (N, V), labels (N,), which do not enter, and teacher (N, V).
        temperature: T.
        square: multiply the loss by T squared, as the paper does beside hard labels.

    Returns:
        Q (N, V) at scale 1. Losses (N,) are in nats, the KL and not the cross-entropy.

    Raises:
        InputError: ``tokens.teacher`` is missing.

    Source: Hinton et al. 2015 (arXiv 1503.02531).

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
def kd_loss(tokens: Tokens, *, temperature, square) -> Float[Tensor, " N"]:
    """KL(teacher || student), both at the temperature."""
    z, teacher = tokens.logits, tokens.require("teacher").detach()
    if temperature != 1:
        z, teacher = z / temperature, teacher / temperature
    value = kl(F.log_softmax(teacher, -1), F.log_softmax(z, -1))
    return temperature**2 * value if square else value
