"""Metrics: scalar metrics of a target, one value per token.

What follows from the construction of a target is not computed from its V entries: see ``Target.label_only`` and
``Target.named``.
"""

from collections.abc import Iterator
from functools import cached_property
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from qlens.core.deprecation import warn
from qlens.core.numerics import BLOCK_ENTRIES, expectation, row_blocks
from qlens.core.scales import balanced, carried, coefficient_tolerance, gradient_tolerance, label_pull, tolerance


class Residual(NamedTuple):
    """A mixture's residual r, (N,) each: r_y, the sum of the others, whether all are >= 0, whether r is a distribution."""

    at_label: Float[Tensor, " N"]
    others: Float[Tensor, " N"]
    positive: Bool[Tensor, " N"]
    fits: Bool[Tensor, " N"]


class Metrics:
    """Scalar metrics of a ``Target``.

    There are three cases. For a label-only target, Q = t d + (1 - t) p, they follow from t, p_y and two sums over the
    other entries. A mixture with another residual is a distribution where its coefficients and the residual are. For
    any other target they are computed entry by entry.
    """

    @cached_property
    def total(self) -> Float[Tensor, " N"]:
        """sum_k Q_k, which is 1 if the loss depends on the logits only through softmax."""
        if self.label_only:
            return torch.ones_like(self.rest)
        if self.named is not None:
            t, r = self.trust, self._of_residual
            return torch.where(r.fits, 1.0, t + (1 - t) * (r.at_label + r.others))
        total = self._signs[0]
        return total if self.proper is None else torch.where(self.proper, 1.0, total)

    @cached_property
    def shift_invariant(self) -> Bool[Tensor, " N"]:
        """Whether sum_k g_k = 0, so that adding a constant to the logits changes nothing; false for losses of raw logits."""
        if self.label_only:
            return torch.ones_like(self.rest, dtype=torch.bool)
        if self.named is not None and bool(self._of_residual.fits.all()):
            return self._of_residual.fits
        return balanced(self.log_probs, self.grad, self._carried)

    @cached_property
    def negative_mass(self) -> Float[Tensor, " N"]:
        """sum_k max(0, -Q_k) over the entries below zero by more than the rounding of p_k - g_k / s; 0 if there are none."""
        if self.label_only:
            t = self.trust
            return self._excess(t, self.rest) + _below(self.label_probs, t * self.rest)
        if self.named is not None and bool(self._of_residual.positive.all()):
            t, r = self.trust, self._of_residual
            return self._excess(t, r.others) + _below(t, (1 - t) * r.at_label)
        negative = self._signs[1]
        return negative if self.proper is None else torch.where(self.proper, 0.0, negative)

    @cached_property
    def in_simplex(self) -> Bool[Tensor, " N"]:
        """Whether Q is a distribution: no negative entry and a sum of 1, up to rounding."""
        inside = self.negative_mass == 0
        if self.label_only:
            return inside
        fits = (self.total - 1).abs() <= tolerance(self._carried)
        return inside & (fits | (self.shift_invariant & (self.scale >= 1)))

    @property
    def label_weight(self) -> Float[Tensor, " N"]:
        """-g_y / (1 - p_y), the label gradient relative to that of SFT, for any construction; NaN where 1 - p_y = 0."""
        weight = self.scale * self.trust if self.label_only else self.pull / self.rest
        return torch.where(self.rest > 0, weight, torch.nan)

    @property
    def effective_trust(self) -> Float[Tensor, " N"]:
        """The old name of ``label_weight``."""
        warn("Target.effective_trust", "Target.label_weight")
        return self.label_weight

    @cached_property
    def pull(self) -> Float[Tensor, " N"]:
        """-g_y, the label gradient.

        For a mean label weight over tokens divide its sum by that of ``room``, the label gradient of SFT: single label
        weights grow without bound near p_y = 1.
        """
        if self.label_only:
            return self.scale * self.trust * self.rest
        if self.named is None:
            return label_pull(self.log_probs, self.labels, self.grad, self.shift_invariant)
        t, r = self.trust, self._of_residual
        near_one = r.fits & (self.label_probs > 0.5)  # r_y - p_y without its cancellation
        gap = torch.where(near_one, self.rest - r.others, r.at_label - self.label_probs)
        return self.scale * (t * self.rest + (1 - t) * gap)

    @property
    def q_y(self) -> Float[Tensor, " N"]:
        """Q_y, the target's probability of the label."""
        return self._label_mass if self.label_only else self.q.gather(1, self._index)[:, 0]

    @property
    def room(self) -> Float[Tensor, " N"]:
        """1 - p_y, the label gradient of SFT."""
        return self.rest

    @property
    def selected(self) -> Tensor:
        """The number of tokens with a trust other than 0, by which methods that select tokens divide."""
        return (self.trust != 0).sum()

    @cached_property
    def reshape(self) -> Float[Tensor, " N"]:
        """1/2 sum_{k != y} |Q_k - p_k (1 - Q_y)/(1 - p_y)| at unit scale, the change of the alternatives' proportions."""
        if self.label_only:
            return torch.zeros_like(self.rest)
        weight = torch.where(self.rest > 0, self.pull / self.rest, 0.0)  # the terms are |g_k - weight p_k|
        total = torch.zeros_like(weight)
        for rows in self._blocks():
            p = self.log_probs[rows].exp()
            terms = (self.grad[rows] - weight[rows, None] * p).abs_()
            total[rows] = terms.scatter_(1, self._index[rows], 0.0).sum(-1) / 2
        return total

    @property
    def entropy(self) -> Float[Tensor, " N"]:
        """H(Q) in nats; NaN where Q is signed."""
        if not self.label_only:
            return torch.where(self.in_simplex, self._divergences[0], torch.nan)
        others = (1 - self.trust).clamp(min=0)
        entropy = others * self._spread - self.rest * _xlogx(others) - _xlogx(self._label_mass.clamp(0, 1))
        return torch.where(self.in_simplex, entropy.clamp(min=0), torch.nan)

    @property
    def kl(self) -> Float[Tensor, " N"]:
        """KL(Q || p) in nats; NaN where Q is signed."""
        if not self.label_only:
            return torch.where(self.in_simplex, self._divergences[1], torch.nan)
        t, q_y, p_y = self.trust, self._label_mass.clamp(0, 1), self.label_probs
        gain = t * self.rest
        ratio = torch.where(gain.abs() < p_y, (gain / p_y).log1p(), q_y.log() - self.label_log_probs)
        ratio = torch.where(t == 1, -self.label_log_probs, ratio)
        kl = torch.where(q_y > 0, q_y * ratio, 0.0) + self.rest * _xlogx((1 - t).clamp(min=0))
        return torch.where(self.in_simplex, kl.clamp(min=0), torch.nan)

    @cached_property
    def label_log_probs(self) -> Float[Tensor, " N"]:
        """log p_y, near p_y = 1 computed from 1 - p_y."""
        direct = self.log_probs.gather(1, self._index)[:, 0]
        return torch.where(direct > -0.5, (-self.rest.clamp(max=0.5)).log1p(), direct)

    @property
    def student_entropy(self) -> Float[Tensor, " N"]:
        """H(p) in nats."""
        return self._spread - self.label_probs * self.label_log_probs

    @property
    def correct(self) -> Bool[Tensor, " N"]:
        """Whether no entry of p is above the label's."""
        return self.log_probs.gather(1, self._index)[:, 0] >= self.log_probs.amax(-1)

    @property
    def label_probs(self) -> Float[Tensor, " N"]:
        """p_y."""
        return self.label_log_probs.exp()

    @cached_property
    def rest(self) -> Float[Tensor, " N"]:
        """1 - p_y, summed over the other entries so that it keeps its digits."""
        rest = torch.zeros_like(self.log_probs[:, 0])
        for rows in self._blocks():
            rest[rows] = self.log_probs[rows].exp().scatter_(1, self._index[rows], 0.0).sum(-1)
        return rest

    @cached_property
    def _spread(self) -> Float[Tensor, " N"]:
        """-sum p_k log p_k over all entries but the label."""
        spread = torch.zeros_like(self.log_probs[:, 0])
        for rows in self._blocks():
            log_p = self.log_probs[rows]
            spread[rows] = -expectation(log_p.exp().scatter_(1, self._index[rows], 0.0), log_p)
        return spread

    @cached_property
    def _label_mass(self) -> Float[Tensor, " N"]:
        """Q_y of a label-only target, p_y + t (1 - p_y); exactly 1 where t = 1."""
        others = (1 - self.trust) * self.rest
        return torch.where(others < 0.5, 1 - others, self.label_probs + self.trust * self.rest)

    @cached_property
    def _of_residual(self) -> Residual:
        """The sums and signs of a mixture's residual."""
        if not isinstance(self.named, Tensor):
            at_label, yes = torch.full_like(self.trust, 1 / self.logits.shape[-1]), torch.ones_like(self.trust) > 0
            return Residual(at_label, 1 - at_label, yes, yes)
        r, index = self.named, self._index
        at_label, others = r.gather(1, index)[:, 0], torch.zeros_like(r[:, 0])
        positive = torch.ones_like(others) > 0
        for rows in self._blocks():
            others[rows] = r[rows].scatter(1, index[rows], 0.0).sum(-1)
            positive[rows] = (r[rows] >= 0).all(-1)
        off = (at_label + others - 1).abs()
        exact = positive & (off <= tolerance(self.log_probs))
        fits = exact if bool(exact.all()) else positive & (off <= tolerance(self._carried))
        return Residual(at_label, others, positive, fits)

    @cached_property
    def _signs(self) -> tuple[Float[Tensor, " N"], Float[Tensor, " N"]]:
        """sum(Q) and the negative mass of any Q, from all its entries."""
        total, negative = torch.zeros_like(self.scale), torch.zeros_like(self.scale)
        for rows in self._blocks():
            p, q = self.log_probs[rows].exp(), self.q_rows(rows)
            total[rows] = q.sum(-1)
            rounding = (p - q).abs_().add_(p).mul_(gradient_tolerance(self._carried))  # of p_k - g_k / s
            negative[rows] = torch.where(q < rounding.neg_(), q, 0.0).sum(-1).abs()
        return total, negative

    @cached_property
    def _divergences(self) -> tuple[Float[Tensor, " N"], Float[Tensor, " N"]]:
        """H(Q) and KL(Q || p) of any Q, from its positive entries."""
        entropy, kl = torch.zeros_like(self.scale), torch.zeros_like(self.scale)
        for rows in self._blocks():
            q = self.q_rows(rows).clamp(min=0)
            log_q = q.log()
            entropy[rows] = -expectation(q, log_q)
            kl[rows] = expectation(q, log_q.sub_(self.log_probs[rows])).clamp(min=0)
        return entropy, kl

    def _excess(self, t: Float[Tensor, " N"], others: Float[Tensor, " N"]) -> Float[Tensor, " N"]:
        """The negative mass of (1 - t) times the residual's other entries."""
        return torch.where(t - 1 > coefficient_tolerance(t), (t - 1) * others, 0.0)

    def _blocks(self) -> Iterator[slice]:
        """Blocks of rows that fit into the cache."""
        return row_blocks(len(self.labels), self.logits.shape[-1], BLOCK_ENTRIES)

    @property
    def _index(self) -> Int[Tensor, "N 1"]:
        return self.labels[:, None].long()

    @cached_property
    def _carried(self) -> torch.dtype:
        """The dtype that Q, gradient or residual were computed in."""
        if isinstance(self.rounding, Tensor):
            return carried(self.rounding)
        return self.rounding or self.log_probs.dtype


def _below(a: Float[Tensor, " N"], b: Float[Tensor, " N"]) -> Float[Tensor, " N"]:
    """max(0, -(a + b)), where it exceeds the rounding of the terms."""
    return torch.where(a + b < -coefficient_tolerance(a) * (a.abs() + b.abs()), -(a + b), 0.0)


def _xlogx(values: Float[Tensor, " N"]) -> Float[Tensor, " N"]:
    return torch.special.xlogy(values, values)
