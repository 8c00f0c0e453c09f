"""Target: the distribution a loss drives the model toward, with the scale of the pull."""

from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from qlens.errors import InputError
from qlens.tokens import Tokens, expectation, log_softmax, one_hot, precision

Scale = Literal["unit", "structural", "natural"]
NO_PULLS = "its pulls toward fixed targets are not known"
BLOCK = 64  # rows taken at a time


@dataclass(frozen=True, eq=False)
class Target:
    r"""Q and s in g = s (p - Q), at N tokens; everything detached.

    Args:
        logits: the student's, (N, V), or its log p: their softmax is p.
        labels: the observed tokens, (N,).
        q: the target Q, (N, V); may be signed, never clipped.
        grad: the logit gradient g = s (p - Q), (N, V); kept beside Q because p - Q cancels where p is tiny.
        scale: s, (N,).
        constructed: the label coefficient of the construction, (N,); None where the target is no mixture of known parts.
        structural: total weight of the pulls toward fixed targets, (N,), or the reason why there is none.

    Source: Xie et al. 2026 (arXiv 2606.11189), Q = p - g and Q = trust d + (1 - trust) residual.

    Example:
        >>> import torch
        >>> tokens = Tokens(logits=torch.zeros(1, 4), labels=torch.tensor([0]))
        >>> Target.mix(tokens, trust=0.6, residual="uniform").q
        tensor([[0.7000, 0.1000, 0.1000, 0.1000]])
    """

    logits: Float[Tensor, "N V"]
    labels: Int[Tensor, " N"]
    q: Float[Tensor, "N V"]
    grad: Float[Tensor, "N V"]
    scale: Float[Tensor, " N"]
    constructed: Float[Tensor, " N"] | None
    structural: Float[Tensor, " N"] | str

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
        log_probs = tokens.log_probs.detach()
        p, d = log_probs.exp(), tokens.one_hot
        trust, scale = _per_token("trust", trust, tokens), _per_token("scale", scale, tokens)
        r = _residual(residual, p)
        t, s = trust[:, None], scale[:, None]
        grad = s * (t * (p - d) + (1 - t) * (p - r))
        if isinstance(residual, str) and residual == "student":  # no pull but the label's
            pulls = scale * trust
        else:
            pulls = scale
        negative = bool((pulls < 0).any() | (trust < 0).any())
        structural = "a pull has negative weight" if negative else pulls
        return cls(log_probs, tokens.labels, t * d + (1 - t) * r, grad, scale, trust, structural)

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
        log_probs = tokens.log_probs.detach()
        push = _per_token("push", push, tokens)
        rest = tokens.rest_log_probs.detach().exp()
        grad = (push * rest)[:, None] * (tokens.others - tokens.one_hot)  # p - d = (1 - p_y)(p_{-y} - d)
        structural = "a pull has negative weight" if bool((push < 0).any()) else push
        return cls(log_probs, tokens.labels, log_probs.exp() - grad, grad, torch.ones_like(push), push, structural)

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

    @property
    def total(self) -> Float[Tensor, " N"]:
        """sum_k Q_k: 1 exactly when the loss sees logits only through softmax."""
        return self.q.sum(-1)

    @property
    def shift_invariant(self) -> Bool[Tensor, " N"]:
        """Whether adding a constant to the logits changes nothing, sum_k g_k = 0; where it does, the loss sees raw logits."""
        return balanced(self.grad)

    @property
    def negative_mass(self) -> Float[Tensor, " N"]:
        """sum_k max(0, -Q_k): how far Q leaves the simplex."""
        return (-self.q).clamp(min=0).sum(-1)

    @property
    def in_simplex(self) -> Bool[Tensor, " N"]:
        """Whether Q is a distribution, to rounding."""
        rounding = tolerance(self.q)
        return (self.negative_mass <= rounding) & ((self.total - 1).abs() <= rounding)

    @property
    def effective_trust(self) -> Float[Tensor, " N"]:
        """-g_y / (1 - p_y): the pull toward the label, in unit scale, whatever the construction; NaN where 1 - p_y = 0."""
        return effective_trust(self.log_probs, self.labels, self.grad)

    @property
    def pull(self) -> Float[Tensor, " N"]:
        """-g_y, how hard the label is pulled, and ``room``, how hard SFT would: averaged over tokens, their ratio is the
        trust of a whole text. (A mean of effective trusts says little: near p_y = 1 they grow without bound.)"""
        return -self.grad.gather(1, self.labels[:, None].long())[:, 0]

    @property
    def room(self) -> Float[Tensor, " N"]:
        """1 - p_y."""
        return 1 - self.probs.gather(1, self.labels[:, None].long())[:, 0]

    @property
    def reshape(self) -> Float[Tensor, " N"]:
        """1/2 sum_{k != y} |Q_k - p_k (1 - Q_y)/(1 - p_y)|, in unit scale: how far the alternatives leave the student's own."""
        p, d = self.probs, one_hot(self.labels, self.q.shape[-1], self.q.dtype)
        q = p - self.grad
        p_y, q_y = (p * d).sum(-1, keepdim=True), (q * d).sum(-1, keepdim=True)
        kept = torch.where(p_y < 1, p * (1 - q_y) / (1 - p_y), 0.0)
        return ((q - kept).abs() * (1 - d)).sum(-1) / 2

    @property
    def entropy(self) -> Float[Tensor, " N"]:
        """H(Q) in nats; NaN where Q is signed."""
        return torch.where(self.in_simplex, -expectation(self._positive, self._positive.log()), torch.nan)

    @property
    def kl(self) -> Float[Tensor, " N"]:
        """KL(Q || p) in nats; NaN where Q is signed."""
        kl = expectation(self._positive, self._positive.log() - self.log_probs)
        return torch.where(self.in_simplex, kl, torch.nan)

    @property
    def _positive(self) -> Float[Tensor, "N V"]:
        """Q without the rounding below zero; only read where Q is a distribution."""
        return self.q.clamp(min=0)


def effective_trust(
    log_probs: Float[Tensor, "N V"], labels: Int[Tensor, " N"], grad: Float[Tensor, "N V"]
) -> Float[Tensor, " N"]:
    """-g_y / (1 - p_y) in unit scale, (N,); NaN where nothing is left to pull, 1 - p_y = 0.

    Where sum(g) = 0 that is the others' share, sum_{k != y} g_k / sum_{k != y} p_k, which keeps its digits as p_y -> 1.
    """
    index = labels[:, None].long()
    rest = log_probs.exp().scatter(1, index, 0.0).sum(-1)
    pull = torch.where(balanced(grad), grad.scatter(1, index, 0.0).sum(-1), -grad.gather(1, index)[:, 0])
    return torch.where(rest > 0, pull / rest, torch.nan)


def balanced(grad: Float[Tensor, "N V"]) -> Bool[Tensor, " N"]:
    """Whether sum_k g_k = 0, to rounding."""
    return grad.sum(-1).abs() <= tolerance(grad) * grad.abs().amax(-1).clamp(min=1)


def tolerance(values: Tensor) -> float:
    """What counts as rounding in this dtype."""
    return 1e-9 if values.dtype == torch.float64 else 1e-5


def natural_scale(log_probs: Float[Tensor, "N V"], grad: Float[Tensor, "N V"]) -> Float[Tensor, " N"]:
    """max(0, max_k g_k / p_k) over p_k > 0, (N,), in float64: the smallest s whose Q has no negative entry."""
    p = log_probs.double().exp()
    ratio = torch.where(p > 0, grad.double() / p, -torch.inf)
    return ratio.amax(-1).clamp(min=0).to(log_probs.dtype)


def _per_token(name: str, value: Tensor | float, tokens: Tokens) -> Float[Tensor, " N"]:
    rows = len(tokens)
    value = torch.as_tensor(value, dtype=precision(tokens.logits.dtype), device=tokens.logits.device).detach()
    if value.ndim > 1 or (value.ndim == 1 and len(value) != rows):
        raise InputError(f"{name} has shape {tuple(value.shape)}, but there are {rows} tokens")
    return value.expand(rows).clone()


def _residual(residual: str | Tensor, p: Float[Tensor, "N V"]) -> Float[Tensor, "N V"]:
    if isinstance(residual, Tensor):
        if residual.shape != p.shape:
            raise InputError(f"residual has shape {tuple(residual.shape)}, but the logits have {tuple(p.shape)}")
        return residual.detach().to(p.dtype)
    if residual == "student":
        return p
    if residual == "uniform":
        return torch.full_like(p, 1 / p.shape[-1])
    raise InputError(f"residual must be 'student', 'uniform' or probabilities (N, V), got {residual!r}")
