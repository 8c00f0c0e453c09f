"""Target: the distribution a loss drives the model toward, with the scale of the pull."""

from dataclasses import dataclass, replace
from functools import cached_property
from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

from qlens.diagnostics import Diagnostics
from qlens.errors import InputError
from qlens.scales import effective_trust, natural_scale
from qlens.tokens import Tokens, expectation, log_softmax, one_hot, precision

Scale = Literal["unit", "structural", "natural"]
NO_PULLS = "its pulls toward fixed targets are not known"
BLOCK = 64  # rows taken at a time


@dataclass(frozen=True, eq=False)
class Target(Diagnostics):
    r"""Q and s in g = s (p - Q), at N tokens; everything detached.

    Args:
        logits: the student's, (N, V), or its log p: their softmax is p.
        labels: the observed tokens, (N,).
        dense_q: the target Q, (N, V); may be signed, never clipped. None: made from ``push`` or ``named`` when asked for.
        dense_grad: the logit gradient g = s (p - Q), (N, V); kept beside Q because p - Q cancels where p is tiny.
        scale: s, (N,).
        constructed: the label coefficient of the construction, (N,); None where the target is no mixture of known parts.
        structural: total weight of the pulls toward fixed targets, (N,), or the reason why there is none.
        pushed: a in g = a (p - d), (N,), of a target with no other pull.
        named: the residual of a mixture, "student", "uniform" or probabilities (N, V).

    Source: Xie et al. 2026 (arXiv 2606.11189), Q = p - g and Q = trust d + (1 - trust) residual.

    Example:
        >>> import torch
        >>> tokens = Tokens(logits=torch.zeros(1, 4), labels=torch.tensor([0]))
        >>> Target.mix(tokens, trust=0.6, residual="uniform").q
        tensor([[0.7000, 0.1000, 0.1000, 0.1000]])
    """

    logits: Float[Tensor, "N V"]
    labels: Int[Tensor, " N"]
    dense_q: Float[Tensor, "N V"] | None
    dense_grad: Float[Tensor, "N V"] | None
    scale: Float[Tensor, " N"]
    constructed: Float[Tensor, " N"] | None
    structural: Float[Tensor, " N"] | str
    pushed: Float[Tensor, " N"] | None = None
    named: str | Float[Tensor, "N V"] | None = None

    @classmethod
    def mix(
        cls,
        tokens: Tokens,
        trust: Tensor | float,
        residual: Literal["student", "uniform"] | Tensor,
        scale: Tensor | float = 1.0,
    ) -> "Target":
        """Q = trust d + (1 - trust) residual; residual by name, or probabilities (N, V).

        Raises:
            InputError: unknown residual name, or shapes that do not fit.
        """
        trust, scale = _per_token("trust", trust, tokens), _per_token("scale", scale, tokens)
        named = _residual(residual, tokens)
        if isinstance(residual, str) and residual == "student":  # no pull but the label's
            pulls = scale * trust
        else:
            pulls = scale
        negative = bool((pulls < 0).any() | (trust < 0).any())
        structural = "a pull has negative weight" if negative else pulls
        return cls(tokens.logits.detach(), tokens.labels, None, None, scale, trust, structural, named=named)

    @classmethod
    def dense(cls, tokens: Tokens, q: Tensor, scale: Tensor | float = 1.0) -> "Target":
        """Any Q, (N, V), written out; its trust is the effective one."""
        log_probs = tokens.log_probs.detach()
        q = q.detach().to(log_probs.dtype)
        if q.shape != log_probs.shape:
            raise InputError(f"q has shape {tuple(q.shape)}, but the logits have {tuple(log_probs.shape)}")
        scale = _per_token("scale", scale, tokens)
        return cls(log_probs, tokens.labels, q, scale[:, None] * (log_probs.exp() - q), scale, None, NO_PULLS)

    @classmethod
    def from_grad(cls, tokens: Tokens, grad: Float[Tensor, "N V"]) -> "Target":
        """The target that a logit gradient implies, in unit scale: Q = p - g."""
        logits = tokens.logits.detach()
        grad = grad.detach().to(precision(logits.dtype))
        q = torch.empty_like(grad)
        for z, g, q_rows in zip(
            *(x.split(BLOCK) for x in (logits, grad, q)), strict=True
        ):  # what is still in the cache
            torch.softmax(z.to(g.dtype), -1, out=q_rows).sub_(g)
        return cls(logits, tokens.labels, q, grad, torch.ones_like(grad[:, 0]), None, NO_PULLS)

    @classmethod
    def push(cls, tokens: Tokens, push: Tensor) -> "Target":
        """The target of a loss that sees the label's probability only, a = -dl / dlog p_y: Q = a d + (1 - a) p.

        As ``mix`` with the student as residual, but keeps its digits where a grows as 1 / (1 - p_y).
        """
        push = _per_token("push", push, tokens)
        structural = "a pull has negative weight" if bool((push < 0).any()) else push
        logits = tokens.logits.detach()
        return cls(logits, tokens.labels, None, None, torch.ones_like(push), push, structural, pushed=push)

    @classmethod
    def slope(cls, tokens: Tokens, slope: Float[Tensor, "N V"], push: Tensor | float = 0.0) -> "Target":
        """The target of a loss on all of p, A_k = dl / dp_k, beside a push on the label, in unit scale.

        Q = p + push (d - p) - p (A - sum_j p_j A_j); an entry with p_k = 0 has no slope that counts.
        """
        p = tokens.log_probs.detach().exp()
        slope = slope.detach().masked_fill(p == 0, 0.0)
        grad = p * (slope - expectation(p, slope)[:, None])
        push = _per_token("push", push, tokens)[:, None]
        return cls.from_grad(tokens, grad + push * (p - tokens.one_hot))

    @cached_property
    def log_probs(self) -> Float[Tensor, "N V"]:
        """The student's log p."""
        return log_softmax(self.logits)

    @cached_property
    def q(self) -> Float[Tensor, "N V"]:
        """The target Q."""
        if self.dense_q is not None:
            return self.dense_q
        if self.pushed is not None:
            return self.probs - self.grad
        t = self.trust[:, None]
        return ((1 - t) * self._residual).scatter_add_(1, self.labels[:, None].long(), t)

    @cached_property
    def grad(self) -> Float[Tensor, "N V"]:
        """The logit gradient g = s (p - Q)."""
        if self.dense_grad is not None:
            return self.dense_grad
        p = self.probs
        d = one_hot(self.labels, p.shape[-1], p.dtype)
        if self.pushed is not None:  # p - d = (1 - p_y)(p_{-y} - d)
            tokens = Tokens(logits=self.logits, labels=self.labels)
            return (self.pushed * tokens.rest_log_probs.exp())[:, None] * (tokens.others - d)
        t, s = self.trust[:, None], self.scale[:, None]
        return s * (t * (p - d) + (1 - t) * (p - self._residual))

    @property
    def _residual(self) -> Float[Tensor, "N V"]:
        """The residual of a mixture, as probabilities."""
        if isinstance(self.named, Tensor):
            return self.named
        p = self.probs
        return p if self.named == "student" else torch.full_like(p, 1 / p.shape[-1])

    @cached_property
    def trust(self) -> Float[Tensor, " N"]:
        """The label coefficient of the construction; where that is no mixture, the effective trust, at this scale."""
        if self.constructed is not None:
            return self.constructed
        return effective_trust(self.log_probs, self.labels, self.grad / self.scale[:, None])

    def at(self, scale: Scale) -> "Target":
        """The same gradient at another scale: Q' = p - g / s'.

        ``unit``: s' = 1. ``structural``: the total weight of the pulls toward fixed targets. ``natural``: the smallest
        s' that leaves Q' no negative entry, max(0, max_k g_k / p_k); Q' = p where g = 0.

        Raises:
            InputError: an unknown scale, or ``structural`` where it is undefined (the reason is named).
        """
        if scale == "unit":
            if bool((self.scale == 1).all()):
                return self
            wanted = torch.ones_like(self.scale)
        elif scale == "structural":
            if isinstance(self.structural, str):
                raise InputError(f"the structural scale is undefined here: {self.structural}")
            wanted = self.structural
        elif scale == "natural":
            wanted = natural_scale(self.log_probs, self.grad)
        else:
            raise InputError(f"scale must be 'unit', 'structural' or 'natural', got {scale!r}")
        some = wanted > 0
        q = self.probs - torch.where(some[:, None], self.grad / wanted[:, None].to(self.grad), 0.0)
        same = wanted == self.scale
        q = torch.where(same[:, None], self.q, q)  # nothing is lost on the way to the scale it already has
        trust = torch.where(same, self.trust, torch.where(some, self.trust * self.scale / wanted, 0.0))
        return Target(self.logits, self.labels, q, self.grad, wanted, trust, self.structural)

    def weighted(self, weight: Float[Tensor, " N"]) -> "Target":
        """The same Q, pulled ``weight`` times as hard."""
        structural = self.structural if isinstance(self.structural, str) else self.structural * weight
        if self.named is not None:
            return replace(self, scale=self.scale * weight, structural=structural)
        grad = self.grad * weight[:, None]
        return Target(self.logits, self.labels, self.q, grad, self.scale * weight, self.trust, structural)

    @property
    def probs(self) -> Float[Tensor, "N V"]:
        """The student's p."""
        return self.log_probs.exp()

    @property
    def residual(self) -> Float[Tensor, "N V"]:
        """(Q - trust d) / (1 - trust); NaN rows where trust = 1."""
        t = self.trust[:, None]
        left = self.q - t * one_hot(self.labels, self.q.shape[-1], self.q.dtype)
        return torch.where(t == 1, torch.nan, left / (1 - t))


def _per_token(name: str, value: Tensor | float, tokens: Tokens) -> Float[Tensor, " N"]:
    rows = len(tokens)
    value = torch.as_tensor(value, dtype=precision(tokens.logits.dtype), device=tokens.logits.device).detach()
    if value.ndim > 1 or (value.ndim == 1 and len(value) != rows):
        raise InputError(f"{name} has shape {tuple(value.shape)}, but there are {rows} tokens")
    return value.expand(rows).clone()


def _residual(residual: str | Tensor, tokens: Tokens) -> str | Float[Tensor, "N V"]:
    if isinstance(residual, Tensor):
        if residual.shape != tokens.logits.shape:
            shapes = f"{tuple(residual.shape)}, but the logits have {tuple(tokens.logits.shape)}"
            raise InputError(f"residual has shape {shapes}")
        return residual.detach().to(precision(tokens.logits.dtype))
    if residual not in ("student", "uniform"):
        raise InputError(f"residual must be 'student', 'uniform' or probabilities (N, V), got {residual!r}")
    return residual
