"""Losses made for noisy labels: generalised and symmetric cross-entropy, and the mean absolute error."""

from typing import Annotated

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from qlens.citations import bibtex
from qlens.params import Between, Share, Weight
from qlens.registry import register
from qlens.target import Target
from qlens.tokens import Tokens

Power = Annotated[float, Between(0, 1, open_low=True)]
LogZero = Annotated[float, Between(high=0)]


@register(
    "gce",
    title="Generalised cross-entropy",
    paper="Zhang and Sabuncu 2018, arXiv 1805.07836",
    family="robust",
    needs=lambda q, truncate: () if truncate is None else ("old",),
    structure="label",
    trusted="p_y^q",
    residual="student",
    simplex=True,
    limits="beyond_log(alpha=q); q = 1 is dft; q -> 0 is sft",
    modes={"truncated": {"truncate": 0.5}},
    differences=(
        "The released truncation keeps a weight per sample of a classification data set, refreshed now and then: here the "
        "label's probability under tokens.old decides, token by token.",
    ),
    code="AlanChou/Truncated-Loss TruncatedLoss.py",
    bibtex=bibtex(
        "zhang2018gce",
        "Generalized Cross Entropy Loss for Training Deep Neural Networks with Noisy Labels",
        2018,
        arxiv="1805.07836",
        author="Zhang, Zhilu and Sabuncu, Mert R.",
    ),
)
def gce(tokens: Tokens, *, q: Power = 0.7, truncate: Share | None = None) -> Target:
    r"""Between the cross-entropy and the mean absolute error.

    .. math:: \ell = \frac{1 - p_y^q}{q}, \qquad Q = p_y^q d + (1 - p_y^q) p

    ``truncate`` k subtracts (1 - k^q)/q and drops the labels to which ``tokens.old`` gave no more than k. Takes
    ``tokens.logits`` and ``tokens.labels``; gives (N,) losses without a unit and Q (N, V) at s = 1.

    Raises:
        InputError: ``truncate`` without ``tokens.old``.

    Source: Zhang and Sabuncu 2018 (arXiv 1805.07836).

    Example:
        >>> import torch
        >>> gce(Tokens(logits=torch.zeros(1, 2), labels=torch.tensor([0])), q=1.0).q
        tensor([[0.7500, 0.2500]])
    """
    trust = (q * tokens.label_log_probs.detach()).exp()
    if truncate is not None:
        trust = trust * (tokens.gather(torch.softmax(tokens.require("old").detach().to(trust), -1)) > truncate)
    return Target.mix(tokens, trust=trust, residual="student")


@gce.loss
def gce_loss(tokens: Tokens, *, q: Power = 0.7, truncate: Share | None = None) -> Float[Tensor, " N"]:
    """(1 - p_y^q) / q, truncated: minus (1 - k^q) / q, times 1[old p_y > k]."""
    nll = F.cross_entropy(tokens.logits, tokens.labels.long(), reduction="none")
    loss = -torch.expm1(-q * nll) / q
    if truncate is None:
        return loss
    before = F.softmax(tokens.require("old").detach().to(nll), -1).gather(1, tokens.labels.long()[:, None])[:, 0]
    return (loss - (1 - truncate**q) / q) * (before > truncate)


@register(
    "sce",
    title="Symmetric cross-entropy",
    paper="Wang et al. 2019, arXiv 1908.06112",
    family="robust",
    structure="label",
    trusted="alpha - beta log_zero p_y",
    residual="student",
    simplex=lambda alpha, beta, log_zero: alpha - beta * log_zero <= 1,
    limits="beta = 0 is alpha times sft; alpha = 0 is -beta log_zero times dft",
    differences=("No default of alpha and beta is confirmed; log 0 is read as -4.",),
    bibtex=bibtex(
        "wang2019sce",
        "Symmetric Cross Entropy for Robust Learning with Noisy Labels",
        2019,
        arxiv="1908.06112",
    ),
)
def sce(tokens: Tokens, *, alpha: Weight = 0.1, beta: Weight = 1.0, log_zero: LogZero = -4.0) -> Target:
    r"""Cross-entropy both ways, with log 0 read as a finite number A.

    .. math:: \ell = -\alpha \log p_y - \beta A (1 - p_y), \qquad Q = a d + (1 - a) p, \quad a = \alpha - \beta A p_y

    Takes ``tokens.logits`` and ``tokens.labels``; gives (N,) losses in nats and Q (N, V) at s = 1, signed where a is
    above 1.

    Source: Wang et al. 2019 (arXiv 1908.06112).

    Example:
        >>> import torch
        >>> sce(Tokens(logits=torch.zeros(1, 4), labels=torch.tensor([0])), alpha=0.0, beta=0.5).trust
        tensor([0.5000])
    """
    return Target.push(tokens, alpha - beta * log_zero * tokens.label_probs.detach())


@sce.loss
def sce_loss(
    tokens: Tokens, *, alpha: Weight = 0.1, beta: Weight = 1.0, log_zero: LogZero = -4.0
) -> Float[Tensor, " N"]:
    """alpha CE(d, p) + beta CE(p, d)."""
    nll = F.cross_entropy(tokens.logits, tokens.labels.long(), reduction="none")
    p = F.softmax(tokens.logits, -1)
    others = 1 - F.one_hot(tokens.labels.long(), p.shape[-1]).to(p)
    backward = -(p * others * log_zero).sum(-1)
    return alpha * nll + beta * backward


@register(
    "mae",
    title="Mean absolute error",
    paper="Ghosh et al. 2017, arXiv 1712.09482",
    family="robust",
    structure="label",
    trusted="2 p_y",
    residual="student",
    simplex=False,
    limits="2 times dft",
    bibtex=bibtex(
        "ghosh2017mae",
        "Robust Loss Functions under Label Noise for Deep Neural Networks",
        2017,
        arxiv="1712.09482",
        author="Ghosh, Aritra and Kumar, Himanshu and Sastry, P. S.",
    ),
)
def mae(tokens: Tokens) -> Target:
    r"""The absolute difference between the student's distribution and the label.

    .. math:: \ell = \sum_k |p_k - d_k| = 2 (1 - p_y), \qquad Q = 2 p_y d + (1 - 2 p_y) p

    Takes ``tokens.logits`` and ``tokens.labels``; gives (N,) losses without a unit and Q (N, V) at s = 1, signed
    where p_y is above 1/2.

    Source: Ghosh et al. 2017 (arXiv 1712.09482).

    Example:
        >>> import torch
        >>> mae(Tokens(logits=torch.zeros(1, 2), labels=torch.tensor([0]))).q
        tensor([[1., 0.]])
    """
    return Target.push(tokens, 2 * tokens.label_probs.detach())


@mae.loss
def mae_loss(tokens: Tokens) -> Float[Tensor, " N"]:
    """sum_k |p_k - d_k|, the label's term being 1 - p_y."""
    p = F.softmax(tokens.logits, -1)
    p_y = p.gather(1, tokens.labels.long()[:, None])[:, 0]
    return 1 - p_y + (p.sum(-1) - p_y)
