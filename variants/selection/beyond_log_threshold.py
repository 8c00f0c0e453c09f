"""Beyond log-likelihood, thresholded: log-likelihood or p-loss of labels at or beyond a probability threshold."""

from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor

from qlens.core.target import Target
from qlens.core.tokens import Tokens
from qlens.registry import register
from qlens.registry.params import Share
from qlens.variants.likelihood.beyond_log import CODE, PAPER


@register(
    "beyond_log_threshold",
    title="Beyond log-likelihood, thresholded",
    paper=PAPER,
    scope=lambda quantile, **_: "batch" if quantile else "token",
    needs=lambda of, **_: ("reference",) if of == "reference" else (),
    trusted="1 where p_y >= threshold, else 0; form = 'p': p_y where selected",
    residual="student",
    simplex=True,
    denominator="selected",
    structure="label",
    limits="threshold = 0, keep = 'top' is sft (form 'logp') or dft (form 'p')",
    modes={
        "OnlyTopP": {"form": "p"},
        "OnlyBottomP": {"form": "p", "keep": "bottom"},
        "OnlyBottomLogP": {"keep": "bottom"},
        "base-quantile": {"of": "reference", "quantile": True},
    },
    differences=(
        "The paper's ablation takes quantiles of the base model's probabilities before training (mode base-quantile); the "
        "code compares the current probability with an absolute threshold.",
        "The code's threshold replaces the loss mask, so that the mean is over selected tokens only.",
    ),
    code=CODE,
    cites=("beyondlog2025",),
)
def beyond_log_threshold(
    tokens: Tokens,
    *,
    threshold: Share = 0.2,
    form: Literal["logp", "p"] = "logp",
    keep: Literal["top", "bottom"] = "top",
    of: Literal["student", "reference"] = "student",
    quantile: bool = False,
) -> Target:
    r"""Log-likelihood, or 1 - p_y, of the labels whose probability is at or beyond a threshold.

    .. math:: \ell = f(p_y)\, 1[p_y \ge \tau], \qquad Q = \gamma d + (1 - \gamma) p, \quad
              \gamma = 1[p_y \ge \tau] \text{ or } p_y 1[p_y \ge \tau]

    Args:
        tokens: logits (N, V) and labels (N,); with ``of="reference"`` also reference (N, V).
        threshold: tau, a probability; a quantile of the batch with ``quantile``.
        form: f, "logp" (-log p_y) or "p" (1 - p_y).
        keep: "top" selects p_y >= tau, "bottom" p_y <= tau.
        of: whose probability is compared, "student" or "reference".
        quantile: read ``threshold`` as a quantile over the batch.

    Returns:
        Q (N, V) at scale 1. Losses (N,) are in nats for "logp"; a mean divides by the selected tokens.

    Raises:
        InputError: ``tokens.reference`` is missing where it is compared.

    Source: Li et al. 2025 (arXiv 2510.00526); released objectives OnlyTopLogP, OnlyTopP and their bottoms.

    Example:
        >>> import torch
        >>> beyond_log_threshold(Tokens(logits=torch.zeros(1, 2), labels=torch.tensor([0])), threshold=0.6).q
        tensor([[0.5000, 0.5000]])
    """
    p_y, selected = tokens.label_probs.detach(), _selected(tokens, threshold, keep, of, quantile)
    return Target.mix(tokens, trust=selected * (p_y if form == "p" else torch.ones_like(p_y)), residual="student")


@beyond_log_threshold.loss
def beyond_log_threshold_loss(tokens: Tokens, *, threshold, form, keep, of, quantile) -> Float[Tensor, " N"]:
    """1[p_y beyond the threshold] times -log p_y or 1 - p_y."""
    nll = F.cross_entropy(tokens.logits, tokens.labels.long(), reduction="none")
    dropped = ~_selected(tokens, threshold, keep, of, quantile)
    return (nll if form == "logp" else -torch.expm1(-nll)).masked_fill(dropped, 0.0)


def _selected(tokens: Tokens, threshold: float, keep: str, of: str, quantile: bool) -> Bool[Tensor, " N"]:
    """A mask of the labels at or beyond the threshold, from one softmax, so that target and loss agree there."""
    logits = tokens.logits.detach() if of == "student" else tokens.require("reference").detach()
    judged = tokens.gather(torch.softmax(logits.to(tokens.label_probs.dtype), -1))
    limit = judged.quantile(threshold) if quantile and len(judged) else threshold
    return judged >= limit if keep == "top" else judged <= limit
