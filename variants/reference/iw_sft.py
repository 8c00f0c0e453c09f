"""Importance-weighted SFT: log-likelihood times the clamped ratio of policy to reference over a sequence."""

import math
from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from qlens.core.errors import InputError
from qlens.core.segments import Groups
from qlens.core.target import Target
from qlens.core.tokens import Tokens
from qlens.registry import register
from qlens.registry.params import Weight

Level = Literal["sequence_mean", "sequence_sum", "token"]
Policy = Literal["student", "old"]
Normalize = Literal["sum", "mean"] | None


@register(
    "iw_sft",
    title="Importance-weighted SFT",
    paper="Qin and Springenberg 2025, arXiv 2507.12856",
    scope=lambda level, normalize, **_: "batch" if normalize else "token" if level == "token" else "sequence",
    needs=lambda level, policy, **_: (
        "reference",
        *(("sequence",) if level != "token" else ()),
        *(("old",) if policy == "old" else ()),
    ),  # fmt: skip
    coupled=lambda level, detach, **_: "" if detach or level == "token" else "sequence",
    structure="label",
    trusted=(
        "min(max(exp(temperature mean_t log(p_y / reference_y)), 0), 16); "
        "level, policy, clamp and normalize change the ratio"
    ),
    residual="student",
    simplex=lambda clamp, normalize, detach, **_: True if clamp[1] <= 1 and detach and not normalize else None,
    limits="student = reference is sft; temperature = 0 is sft",
    modes={
        "control": {"policy": "old", "clamp": (0.0, 1000.0), "temperature": 10.0, "normalize": "sum"},
        "control-step": {
            "level": "token",
            "policy": "old",
            "clamp": (0.0, 2.0),
            "temperature": 10.0,
            "normalize": "sum",
        },
        "step": {"level": "token", "clamp": (0.2, 1.8)},
        "rpsft": {"detach": False},
    },
    differences=(
        "The authors' table gives trust in [0, 1]; the weight is 1 at the reference and grows to the clamp's 16.",
        "The table's ratio of sequence probabilities is, in the code, a geometric mean over the tokens.",
        "The official code is right for one sequence per device only: the weight's shape does not fit a larger batch.",
        "The RPSFT repository's copy does not detach the weight.",
        "With no labels to learn from, a sequence's weight is 0/0 in the released code; here such a sequence has no rows.",
    ),
    code="emmyqin/iw_sft bounding_trainers.py::IwSFTLoss.__call__; emmyqin/iw_sft_control main.py::loss",
    cites=("iwsft2025",),
)
def iw_sft(
    tokens: Tokens,
    *,
    level: Level = "sequence_mean",
    clamp: tuple[float, float] = (0.0, 16.0),
    temperature: Weight = 1.0,
    normalize: Normalize = None,
    policy: Policy = "student",
    detach: bool = True,
) -> Target:
    r"""Log-likelihood times w, the clamped ratio of the policy to the reference over the sequence.

    .. math:: \ell_t = -\mathrm{sg}(w) \log p_{y_t}, \quad
              w = \mathrm{clamp}\Big(\exp\big(T\, \mathrm{mean}_t \log \tfrac{q_{y_t}}{r_{y_t}}\big)\Big), \qquad
              Q_t = w d + (1 - w) p

    Args:
        tokens: logits (N, V), labels (N,), reference (N, V); sequence (N,) unless level = "token"; old (N, V) for
            policy = "old".
        level: mean or sum of the log-ratio over the sequence, or each token's own.
        clamp: bounds (low, high) of the ratio.
        temperature: T, a factor of the log-ratio, as in the released code.
        normalize: divide by the "sum" or "mean" of the batch's weights, one per sequence (or token).
        policy: q is the "student" or "old" (a moving average, say).
        detach: stop the gradient of w; otherwise it flows inside the clamp.

    Returns:
        Q (N, V) at scale 1, signed where w > 1. Losses (N,) are in nats.

    Raises:
        InputError: a field is missing, or detach = False with another policy or with ``normalize``.

    Source: Qin and Springenberg 2025 (arXiv 2507.12856); the form of w from released code.

    Example:
        >>> import torch
        >>> z = torch.zeros(1, 2)
        >>> iw_sft(Tokens(logits=z, labels=torch.tensor([0]), reference=z, sequence=torch.tensor([0]))).trust
        tensor([1.])
    """
    _check(policy, normalize, detach)
    own, ref = tokens.label_log_probs.detach(), tokens.gather(tokens.log_probs_of("reference"))
    ratio = (own if policy == "student" else tokens.gather(tokens.log_probs_of("old"))) - ref
    groups = None if level == "token" else Groups(tokens.require("sequence"))
    if groups is not None:
        ratio = groups.mean(ratio) if level == "sequence_mean" else groups.total(ratio)
    log_w = temperature * ratio
    low, high = (math.log(end) if end > 0 else -math.inf for end in clamp)
    weights = log_w.clamp(low, high).exp()
    if normalize and weights.numel():
        weights = weights / (weights.sum() if normalize == "sum" else weights.mean())
    push = weights if groups is None else weights[groups.index]
    if not detach:
        inside = ((log_w >= low) & (log_w <= high)).to(weights)
        if groups is None:
            push = push + inside * temperature * weights * own
        else:
            share = groups.size(own) if level == "sequence_mean" else 1.0
            push = push + (inside * temperature * weights * groups.total(own))[groups.index] / share
    return Target.push(tokens, push)


@iw_sft.loss
def iw_sft_loss(tokens: Tokens, *, level, clamp, temperature, normalize, policy, detach) -> Float[Tensor, " N"]:
    """-sg(w) log p_y."""
    _check(policy, normalize, detach)
    labels = tokens.labels.long()
    nll = F.cross_entropy(tokens.logits, labels, reduction="none")
    with torch.no_grad():
        before = F.cross_entropy(tokens.require("reference"), labels, reduction="none")
        other = F.cross_entropy(tokens.require("old"), labels, reduction="none") if policy == "old" else None
    ratio = before - (nll if other is None else other)
    if level == "token":
        of_rows, rows = ratio, slice(None)
    else:
        ids, rows = tokens.require("sequence").unique(return_inverse=True)
        same = (rows[:, None] == torch.arange(len(ids), device=rows.device)).to(ratio)  # N x sequences
        of_rows = ratio @ (same / same.sum(0) if level == "sequence_mean" else same)
    low, high = (torch.tensor(end, dtype=ratio.dtype).log() for end in clamp)
    w = torch.exp((temperature * of_rows).clamp(low.to(ratio.device), high.to(ratio.device)))
    if normalize == "sum":
        w = w / w.sum()
    if normalize == "mean":
        w = w / w.mean()
    return (w.detach() if detach else w)[rows] * nll


def _check(policy: Policy, normalize: Normalize, detach: bool) -> None:
    if not detach and (policy != "student" or normalize):
        raise InputError(
            "iw_sft: detach = False sends a gradient through the student's own weight: it goes with policy = 'student' and "
            f"normalize = None, got policy = {policy!r}, normalize = {normalize!r}"
        )
