"""Beyond log-likelihood: losses that are a function of the label's probability, and what each trusts."""

from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor

from qlens.citations import bibtex
from qlens.params import Share
from qlens.registry import register
from qlens.target import Target
from qlens.tokens import Tokens

PAPER = "2025, arXiv 2510.00526"
CODE = "GaotangLi/Beyond-Log-Likelihood main_verl/trainer/fsdp_sft_trainer.py, trainer.objective_trans"
BIBTEX = bibtex(
    "beyondlog2025",
    "Beyond Log Likelihood: Probability-Based Objectives for Supervised Fine-Tuning across the Model Capability Continuum",
    2025,
    arxiv="2510.00526",
)


@register(
    "beyond_log",
    title="Beyond log-likelihood, the alpha family",
    paper=PAPER,
    family="label trust",
    structure="label",
    trusted="p_y^alpha",
    residual="student",
    simplex=lambda alpha: alpha >= 0,
    limits="alpha = 0 is sft; alpha = 1 is dft; alpha = q is gce; negative alpha trusts by more than 1",
    modes={"GeneralFamily-10": {"alpha": 10.0}, "logp": {"alpha": 0.0}},
    differences=(
        "The released code's default objective is plain cross-entropy; its script for mathematics uses alpha = 10.",
        "The authors' table is right for this family; for a general f the trust is -p f'(p).",
        "The paper sums over a sequence; the code takes the token mean of every micro-batch.",
        "In the released code alpha = 0 divides by zero and a negative alpha breaks the parsing of its name.",
    ),
    code=CODE,
    bibtex=BIBTEX,
)
def beyond_log(tokens: Tokens, *, alpha: float = 1.0) -> Target:
    r"""A power of the label's probability in place of its logarithm, differentiated as it stands.

    .. math:: \ell = \frac{1 - p_y^\alpha}{\alpha}, \qquad Q = p_y^\alpha d + (1 - p_y^\alpha) p

    ``alpha`` = 0 is the logarithmic limit. Takes ``tokens.logits`` and ``tokens.labels``; gives (N,) losses, in nats
    at alpha = 0 and without a unit elsewhere, and Q (N, V) at s = 1.

    Source: arXiv 2510.00526, the family f^alpha.

    Example:
        >>> import torch
        >>> beyond_log(Tokens(logits=torch.zeros(1, 2), labels=torch.tensor([0])), alpha=2.0).q
        tensor([[0.6250, 0.3750]])
    """
    return Target.push(tokens, (alpha * tokens.label_log_probs.detach()).exp())


@beyond_log.loss
def beyond_log_loss(tokens: Tokens, *, alpha: float = 1.0) -> Float[Tensor, " N"]:
    """(1 - p_y^alpha) / alpha; -log p_y at alpha = 0."""
    nll = F.cross_entropy(tokens.logits, tokens.labels.long(), reduction="none")
    return -torch.expm1(-alpha * nll) / alpha if abs(alpha) > 1e-12 else nll  # the limit, to rounding


@register(
    "beyond_log_log1mp",
    title="Beyond log-likelihood, log(1 - p)",
    paper=PAPER,
    family="label trust",
    structure="label",
    trusted="p_y / (1 - p_y)",
    residual="student",
    simplex=False,
    limits="trusts by more than 1 where p_y > 1/2; g_y = -p_y",
    differences=(
        "The authors' table gives trust in [0, 1] for the whole row; here it is above 1 wherever p_y is above 1/2.",
    ),
    code=CODE,
    bibtex=BIBTEX,
)
def beyond_log_log1mp(tokens: Tokens) -> Target:
    r"""The logarithm of the probability of everything else, which learns most from what is known already.

    .. math:: \ell = \log(1 - p_y), \qquad Q = \frac{p_y}{1 - p_y} d + \left(1 - \frac{p_y}{1 - p_y}\right) p

    Equivalently g = p_y (p_{-y} - d), with p_{-y} the other tokens' own distribution. Takes ``tokens.logits`` and
    ``tokens.labels``; gives (N,) losses in nats, below 0 and without bound as p_y -> 1, and a signed Q (N, V) at s =
    1.

    Source: arXiv 2510.00526.

    Example:
        >>> import torch
        >>> beyond_log_log1mp(Tokens(logits=torch.zeros(1, 4), labels=torch.tensor([0]))).q
        tensor([[0.5000, 0.1667, 0.1667, 0.1667]])
    """
    p_y = tokens.label_probs.detach()[:, None]
    return Target.from_grad(tokens, p_y * (tokens.others - tokens.one_hot))


@beyond_log_log1mp.loss
def beyond_log_log1mp_loss(tokens: Tokens) -> Float[Tensor, " N"]:
    """log(1 - p_y)."""
    label = F.one_hot(tokens.labels.long(), tokens.logits.shape[-1]).bool()
    return tokens.logits.masked_fill(label, -torch.inf).logsumexp(-1) - tokens.logits.logsumexp(-1)


@register(
    "beyond_log_threshold",
    title="Beyond log-likelihood, thresholded",
    paper=PAPER,
    family="token selection",
    scope=lambda quantile, **_: "batch" if quantile else "token",
    needs=lambda of, **_: ("reference",) if of == "reference" else (),
    trusted="1 or p_y where p_y is beyond the threshold, else 0",
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
    bibtex=BIBTEX,
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
    r"""The log-likelihood, or 1 - p, of those labels only whose probability is at or beyond a threshold.

    .. math:: \ell = f(p_y)\, 1[p_y \ge \tau], \qquad Q = \gamma d + (1 - \gamma) p, \quad
              \gamma = 1[p_y \ge \tau] \text{ or } p_y 1[p_y \ge \tau]

    ``keep="bottom"`` keeps p_y at or below the threshold; ``of="reference"`` compares the reference's probability
    (needs ``tokens.reference``); ``quantile=True`` reads the threshold as a quantile over the batch. Gives (N,)
    losses and Q (N, V) at s = 1; a mean divides by the selected tokens.

    Raises:
        InputError: ``tokens.reference`` is missing where it is asked for.

    Source: arXiv 2510.00526; released objectives OnlyTopLogP, OnlyTopP and their bottoms.

    Example:
        >>> import torch
        >>> beyond_log_threshold(Tokens(logits=torch.zeros(1, 2), labels=torch.tensor([0])), threshold=0.6).q
        tensor([[0.5000, 0.5000]])
    """
    p_y, kept = tokens.label_probs.detach(), _kept(tokens, threshold, keep, of, quantile)
    return Target.mix(tokens, trust=kept * (p_y if form == "p" else torch.ones_like(p_y)), residual="student")


@beyond_log_threshold.loss
def beyond_log_threshold_loss(
    tokens: Tokens,
    *,
    threshold: Share = 0.2,
    form: Literal["logp", "p"] = "logp",
    keep: Literal["top", "bottom"] = "top",
    of: Literal["student", "reference"] = "student",
    quantile: bool = False,
) -> Float[Tensor, " N"]:
    """1[p_y beyond the threshold] times -log p_y or 1 - p_y."""
    nll = F.cross_entropy(tokens.logits, tokens.labels.long(), reduction="none")
    dropped = ~_kept(tokens, threshold, keep, of, quantile)
    return (nll if form == "logp" else -torch.expm1(-nll)).masked_fill(dropped, 0.0)


def _kept(tokens: Tokens, threshold: float, keep: str, of: str, quantile: bool) -> Bool[Tensor, " N"]:
    """Which labels are at or beyond the threshold; target and loss must not differ by rounding there."""
    logits = tokens.logits.detach() if of == "student" else tokens.require("reference").detach()
    judged = tokens.gather(torch.softmax(logits.to(tokens.label_probs.dtype), -1))
    limit = judged.quantile(threshold) if quantile and len(judged) else threshold
    return judged >= limit if keep == "top" else judged <= limit
