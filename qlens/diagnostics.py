"""Diagnostics: what can be said of every target, in figures, one per token."""

from functools import cached_property

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from qlens.scales import balanced, effective_trust, tolerance
from qlens.tokens import expectation, one_hot


class Diagnostics:
    """What a ``Target`` is told by, whatever it is made of.

    A target with no pull but the label's, Q = a d + (1 - a) p, is known by its label and the entropy of p: its Q is not made.
    """

    @property
    def total(self) -> Float[Tensor, " N"]:
        """sum_k Q_k: 1 exactly when the loss sees logits only through softmax."""
        return self.q.sum(-1)

    @property
    def shift_invariant(self) -> Bool[Tensor, " N"]:
        """Whether adding a constant to the logits changes nothing, sum_k g_k = 0; where it does, the loss sees raw logits."""
        return balanced(self.grad)

    @cached_property
    def negative_mass(self) -> Float[Tensor, " N"]:
        """sum_k max(0, -Q_k): how far Q leaves the simplex."""
        if self.pushed is not None:
            return sum((-part).clamp(min=0) for part in self._split)
        return self.q.clamp(max=0).sum(-1).abs()

    @cached_property
    def in_simplex(self) -> Bool[Tensor, " N"]:
        """Whether Q is a distribution, to rounding."""
        rounding = tolerance(self.log_probs)
        fits = self.negative_mass <= rounding
        return fits if self.pushed is not None else fits & ((self.total - 1).abs() <= rounding)

    @property
    def effective_trust(self) -> Float[Tensor, " N"]:
        """-g_y / (1 - p_y): the pull toward the label, in unit scale, whatever the construction; NaN where 1 - p_y = 0."""
        return effective_trust(self.log_probs, self.labels, self.grad)

    @property
    def pull(self) -> Float[Tensor, " N"]:
        """-g_y, how hard the label is pulled, and ``room``, how hard SFT would: averaged over tokens, their ratio is the
        trust of a whole text. (A mean of effective trusts says little: near p_y = 1 they grow without bound.)"""
        if self.pushed is not None:
            return self.pushed * self._rest
        if isinstance(self.named, Tensor) and self.dense_grad is None:
            t, r_y = self.trust, self._at_label(self.named)
            return self.scale * (t * self._rest + (1 - t) * (r_y - self._at_label(self.log_probs).exp()))
        return -self._at_label(self.grad)

    @property
    def room(self) -> Float[Tensor, " N"]:
        """1 - p_y."""
        return 1 - self._at_label(self.log_probs).exp()

    @property
    def reshape(self) -> Float[Tensor, " N"]:
        """1/2 sum_{k != y} |Q_k - p_k (1 - Q_y)/(1 - p_y)|, in unit scale: how far the alternatives leave the student's own."""
        p, d = self.probs, one_hot(self.labels, self.logits.shape[-1], self.log_probs.dtype)
        q = p - self.grad
        p_y, q_y = (p * d).sum(-1, keepdim=True), (q * d).sum(-1, keepdim=True)
        kept = torch.where(p_y < 1, p * (1 - q_y) / (1 - p_y), 0.0)
        return ((q - kept).abs() * (1 - d)).sum(-1) / 2

    @property
    def entropy(self) -> Float[Tensor, " N"]:
        """H(Q) in nats; NaN where Q is signed."""
        return torch.where(self.in_simplex, self._entropy, torch.nan)

    @property
    def kl(self) -> Float[Tensor, " N"]:
        """KL(Q || p) in nats; NaN where Q is signed."""
        if self.pushed is not None:
            q_y, others = (part.clamp(min=0) for part in self._split)
            log_p, log_rest = self._at_label(self.log_probs), self._rest.log()
            made = _relative(q_y, log_p) + _relative(others, log_rest)
        else:
            made = -self._entropy - expectation(self.q.clamp(min=0), self.log_probs)
        return torch.where(self.in_simplex, made, torch.nan)

    @cached_property
    def _entropy(self) -> Float[Tensor, " N"]:
        """H of Q without what rounding left below zero; only read where Q is a distribution."""
        if self.pushed is None:
            q = self.q.clamp(min=0)
            return -torch.special.xlogy(q, q).sum(-1)
        q_y, others = (part.clamp(min=0) for part in self._split)
        p, log_p = self.probs, self._at_label(self.log_probs)
        known = torch.where(log_p > -torch.inf, log_p.exp() * log_p, 0.0)
        inner = torch.where(
            self._rest > 0, (-expectation(p, self.log_probs) + known) / self._rest + self._rest.log(), 0.0
        )
        return others * inner - torch.special.xlogy(q_y, q_y) - torch.special.xlogy(others, others)

    @cached_property
    def _rest(self) -> Float[Tensor, " N"]:
        """1 - p_y, added up over the others, so that it keeps its digits."""
        return self.probs.scatter(-1, self.labels[:, None].long(), 0.0).sum(-1)

    @property
    def _split(self) -> tuple[Tensor, Tensor]:
        """Q_y and all of Q beside it, of a target with no pull but the label's."""
        p_y = self._at_label(self.log_probs).exp()
        return p_y + self.pushed * self._rest, (1 - self.pushed) * self._rest

    def _at_label(self, values: Float[Tensor, "N V"]) -> Float[Tensor, " N"]:
        return values.gather(1, self.labels[:, None].long())[:, 0]


def _relative(mass: Float[Tensor, " N"], log_p: Float[Tensor, " N"]) -> Float[Tensor, " N"]:
    """mass log(mass / p), 0 where there is no mass."""
    return torch.special.xlogy(mass, mass) - torch.where(mass > 0, mass * log_p, 0.0)
