"""Target: the distribution a loss drives the model toward, with the scale of the pull."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from functools import cached_property
from typing import Any, Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from qlens.core.errors import InputError
from qlens.core.scales import natural_scale, with_sum_
from qlens.core.target_metrics import Diagnostics
from qlens.core.tokens import Tokens, expectation, log_softmax, one_hot, precision

Scale = Literal["unit", "structural", "natural"]
NO_PULLS = "its pulls toward fixed targets are not known"
BLOCK = 64  # rows taken at a time
WHOLE = 0.05  # how far the sum of a residual may be from 1, in bfloat16 at a large vocabulary say


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
        pulls: total weight of the pulls toward fixed targets, (N,), or the reason why there is none.
        pushed: a in g = a (p - d), (N,), of a target with no other pull.
        named: the residual of a mixture, "student", "uniform" or probabilities (N, V).
        proper: rows whose Q is a distribution by construction, (N,); None where that has to be measured.
        rounding: the least precise dtype that holds the given Q, gradient or residual, or these numbers themselves, looked at
            when that is asked; None: the dtype of p.

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
    pulls: Float[Tensor, " N"] | str
    pushed: Float[Tensor, " N"] | None = None
    named: str | Float[Tensor, "N V"] | None = None
    proper: Bool[Tensor, " N"] | None = None
    rounding: torch.dtype | Tensor | None = None

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
            InputError: unknown residual name, shapes that do not fit, or values as in ``checked``.
        """
        trust, scale = _per_token("trust", trust, tokens), _per_token("scale", scale, tokens)
        named = _residual(residual, tokens)
        only = isinstance(residual, str) and residual == "student"  # no pull but the label's
        pulls = scale * trust if only else torch.where(trust < 0, torch.nan, scale)  # a negative trust pulls nowhere
        given = residual.detach() if isinstance(residual, Tensor) else None
        made = cls(tokens.logits.detach(), tokens.labels, None, None, scale, trust, pulls, named=named, rounding=given)
        return made.checked() if tokens.checked else made

    @classmethod
    def dense(cls, tokens: Tokens, q: Tensor, scale: Tensor | float = 1.0) -> "Target":
        """Any Q, (N, V), written out; its trust is the effective one."""
        log_probs = tokens.log_probs.detach()
        given = q.detach()
        q = given.to(log_probs.dtype)
        if q.shape != log_probs.shape:
            raise InputError(f"q has shape {tuple(q.shape)}, but the logits have {tuple(log_probs.shape)}")
        scale = _per_token("scale", scale, tokens)
        grad = scale[:, None] * (log_probs.exp() - q)
        made = cls(log_probs, tokens.labels, q, grad, scale, None, NO_PULLS, rounding=given)
        return made.checked() if tokens.checked else made

    @classmethod
    def from_grad(cls, tokens: Tokens, grad: Float[Tensor, "N V"]) -> "Target":
        """The target that a logit gradient implies, in unit scale: Q = p - g."""
        logits, given = tokens.logits.detach(), grad.detach()
        grad = given.to(precision(logits.dtype))
        q = torch.empty_like(grad)
        for z, g, q_rows in zip(*(x.split(BLOCK) for x in (logits, grad, q)), strict=True):  # a few rows stay cached
            torch.exp(log_softmax(z).to(g.dtype), out=q_rows).sub_(g)
        return cls(logits, tokens.labels, q, grad, torch.ones_like(grad[:, 0]), None, NO_PULLS, rounding=given)

    @classmethod
    def push(cls, tokens: Tokens, push: Tensor) -> "Target":
        """The target of a loss that sees the label's probability only, a = -dl / dlog p_y: Q = a d + (1 - a) p.

        As ``mix`` with the student as residual, but keeps its digits where a grows as 1 / (1 - p_y).
        """
        push = _per_token("push", push, tokens)
        logits = tokens.logits.detach()
        return cls(logits, tokens.labels, None, None, torch.ones_like(push), push, push, pushed=push)

    @classmethod
    def slope(cls, tokens: Tokens, slope: Float[Tensor, "N V"], push: Tensor | float = 0.0) -> "Target":
        """The target of a loss on all of p, A_k = dl / dp_k, beside a push on the label, in unit scale.

        Q = p + push (d - p) - p (A - sum_j p_j A_j); an entry with p_k = 0 has no slope that counts.
        """
        log_p = tokens.log_probs.detach()
        p = log_p.exp()
        slope = slope.detach().masked_fill(p == 0, 0.0)
        grad = with_sum_(p * (slope - expectation(p, slope)[:, None]), log_p, 0.0)
        index = tokens.labels[:, None].long()
        rest = p.scatter(1, index, 0.0).sum(-1, keepdim=True)
        pulled = p.scatter(1, index, -rest)  # p - d
        return cls.from_grad(tokens, grad + _per_token("push", push, tokens)[:, None] * pulled)

    def checked(self) -> "Target":
        """The same target, of parts that are what they are said to be.

        Raises:
            InputError: a scale below 0 or not finite, a trust that is NaN, or a residual that is no distribution.
        """
        if not bool((self.scale >= 0).all() & self.scale.isfinite().all()):
            at = int((~((self.scale >= 0) & self.scale.isfinite())).nonzero()[0, 0])
            raise InputError(f"scale must be finite and at least 0, got {float(self.scale[at]):g} at token {at}")
        if self.constructed is not None and bool(self.constructed.isnan().any()):
            raise InputError(
                f"trust is NaN at token {int(self.constructed.isnan().nonzero()[0, 0])}: it must be a number"
            )
        if isinstance(self.named, Tensor) and bool((off := (self.named.sum(-1) - 1).abs() > WHOLE).any()):
            at = int(off.nonzero()[0, 0])
            raise InputError(
                f"residual must be probabilities (N, V), but its row {at} sums to {float(self.named[at].sum()):g}: give "
                "logits.softmax(-1), or Target.dense for a Q of another sum"
            )
        return self

    @cached_property
    def log_probs(self) -> Float[Tensor, "N V"]:
        """The student's log p."""
        return log_softmax(self.logits)

    @cached_property
    def structural(self) -> Float[Tensor, " N"] | str:
        """The structural scale, the total weight of the pulls toward fixed targets, or the reason why there is none."""
        if isinstance(self.pulls, str) or bool((self.pulls >= 0).all()):
            return self.pulls
        return "a pull has negative weight"

    @property
    def label_only(self) -> bool:
        """Whether no pull but the label's is there, Q = t d + (1 - t) p."""
        return self.pushed is not None or (isinstance(self.named, str) and self.named == "student")

    @cached_property
    def q(self) -> Float[Tensor, "N V"]:
        """The target Q."""
        return self.q_rows(slice(None))

    def q_rows(self, rows: slice) -> Float[Tensor, "n V"]:
        """The target Q of some rows."""
        if self.dense_q is not None:
            return self.dense_q[rows]
        t, index = self.trust[rows, None], self.labels[rows, None].long()
        if self.label_only:
            return ((1 - t) * self.log_probs[rows].exp()).scatter_(1, index, self._label_mass[rows, None])
        if isinstance(self.named, Tensor):
            return ((1 - t) * self.named[rows]).scatter_add_(1, index, t)
        size = self.logits.shape[-1]
        return ((1 - t) / size).repeat(1, size).scatter_add_(1, index, t)

    @cached_property
    def grad(self) -> Float[Tensor, "N V"]:
        """The logit gradient g = s (p - Q)."""
        if self.dense_grad is not None:
            return self.dense_grad
        p, t, s = self.probs, self.trust[:, None], self.scale[:, None]
        if self.label_only:  # p - d = (1 - p_y)(p_{-y} - d)
            return p.scatter_(1, self._index, -self.rest[:, None]).mul_(self._total_push[:, None])
        r = self.named if isinstance(self.named, Tensor) else 1 / p.shape[-1]
        return (s * (p - (1 - t) * r)).scatter_(1, self._index, -self.pull[:, None])

    @property
    def _total_push(self) -> Float[Tensor, " N"]:
        """a in g = a (p - d), of a label-only target."""
        return self.scale * self.trust if self.pushed is None else self.pushed

    @cached_property
    def trust(self) -> Float[Tensor, " N"]:
        """The label coefficient of the construction; where that is no mixture, the effective trust, at this scale."""
        if self.constructed is not None:
            return self.constructed
        return self.effective_trust / self.scale

    def at(self, scale: Scale) -> "Target":
        """The same gradient at another scale: Q' = p - g / s'.

        ``unit``: s' = 1. ``structural``: the total weight of the pulls toward fixed targets. ``natural``: the smallest
        s' that leaves Q' no negative entry, max(0, max_k g_k / p_k); Q' = p where g = 0.

        Raises:
            InputError: an unknown scale, or ``structural`` where it is undefined (the reason is named).
        """
        if scale == "unit":
            wanted = torch.ones_like(self.scale)
        elif scale == "structural":
            if isinstance(self.structural, str):
                raise InputError(f"the structural scale is undefined here: {self.structural}")
            wanted = self.structural
        elif scale == "natural":
            wanted = self._natural_scale()
        else:
            raise InputError(f"scale must be 'unit', 'structural' or 'natural', got {scale!r}")
        same = wanted == self.scale
        if bool(same.all()):
            return self
        some = wanted > 0
        if self.label_only:
            push = self._total_push
            trust = torch.where(same, self.trust, torch.where(some, push / wanted, 0.0))
            return replace(self, scale=wanted, constructed=trust, pushed=push, named=None)
        # Q' = p + (Q - p) s / s' lies between p and Q where s <= s'
        if scale == "natural":
            proper = self.shift_invariant
        elif self.named is not None or self.proper is not None:
            proper = self.in_simplex & (same | ~some | ((self.scale >= 0) & (self.scale <= wanted)))
        else:
            proper = None
        q = self.probs - torch.where(some[:, None], self.grad / wanted[:, None].to(self.grad), 0.0)
        if scale == "natural":
            q = with_sum_(q, self.log_probs, 1.0, rows=proper)
        q = torch.where(same[:, None], self.q, q)  # nothing is lost on the way to the scale it already has
        trust = torch.where(same, self.trust, torch.where(some, self.trust * self.scale / wanted, 0.0))
        made = Target(self.logits, self.labels, q, self.grad, wanted, trust, self.pulls)
        return replace(made, proper=proper, rounding=self.rounding)

    def _natural_scale(self) -> Float[Tensor, " N"]:
        if not self.label_only:
            return natural_scale(self.log_probs, self.grad)
        push = self._total_push  # pushed down, the label's own Q is the first to reach 0
        down = torch.where(self.label_probs > 0, -push * self.rest / self.label_probs, 0.0)
        return torch.where(push > 0, torch.where(self.rest > 0, push, 0.0), down.clamp(min=0))

    def weighted(self, weight: Float[Tensor, " N"]) -> "Target":
        """The same Q, pulled ``weight`` times as hard."""
        pulls = self.pulls if isinstance(self.pulls, str) else self.pulls * weight
        made = replace(self, scale=self.scale * weight, pulls=pulls)
        if self.pushed is not None:
            return replace(made, pushed=self.pushed * weight)
        return made if self.dense_grad is None else replace(made, dense_grad=self.dense_grad * weight[:, None])

    def __getitem__(self, rows: Any) -> "Target":
        """The chosen rows: ``target[mask]``, ``target[2:5]``."""
        return self._each(lambda value: value[rows])

    def cpu(self) -> "Target":
        """The same target on the CPU."""
        return self._each(Tensor.cpu)

    @classmethod
    def join(cls, parts: Sequence["Target"]) -> "Target":
        """One target of the rows of several, made by one method."""
        joined: dict[str, Any] = {}
        for name in (field.name for field in fields(cls)):
            values = [getattr(part, name) for part in parts]
            tensors = all(isinstance(value, Tensor) for value in values)
            joined[name] = (
                torch.cat(values) if tensors else next((v for v in values if not isinstance(v, Tensor)), None)
            )
        return cls(**joined)

    def _each(self, change: Callable[[Tensor], Tensor]) -> "Target":
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        return Target(**{name: change(v) if isinstance(v, Tensor) else v for name, v in values.items()})

    @property
    def probs(self) -> Float[Tensor, "N V"]:
        """The student's p."""
        return self.log_probs.exp()

    @property
    def residual(self) -> Float[Tensor, "N V"]:
        """(Q - trust d) / (1 - trust); NaN rows where trust = 1."""
        t, p = self.trust[:, None], self.probs
        if self.label_only:
            left = p
        elif self.named is not None:
            left = self.named if isinstance(self.named, Tensor) else torch.full_like(p, 1 / p.shape[-1])
        else:
            left = (self.q - t * one_hot(self.labels, p.shape[-1], p.dtype)) / (1 - t)
        return torch.where(t == 1, torch.nan, left)


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
