"""Target: the distribution Q toward which a loss drives the model, with the scale of its gradient."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from functools import cached_property
from typing import Any, Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from qlens.core.deprecation import renamed_arguments
from qlens.core.errors import InputError
from qlens.core.numerics import expectation, log_softmax, one_hot, precision, softmax
from qlens.core.scales import with_sum_
from qlens.core.target.checks import check_values, per_token, residual_of
from qlens.core.target.display import Display
from qlens.core.target.metrics import Metrics
from qlens.core.target.scaling import Scale, rescaled
from qlens.core.tokens import Tokens

NO_PULLS = "its pulls toward fixed targets are not known"


@dataclass(frozen=True, eq=False, repr=False)
class Target(Metrics, Display):
    r"""Target distribution Q and scale s in the logit gradient g = s (p - Q), at N tokens; everything detached.

    Make one with ``Target.mix`` or ``Target.dense``, or from a gradient or a loss's slopes with ``from_grad``,
    ``push`` and ``slope``.

    Args:
        logits: the student's logits (N, V), or log p: their softmax is p.
        labels: the observed tokens, ids (N,).
        dense_q: Q (N, V), possibly signed, never clipped; None where it follows from the other fields.
        dense_grad: g (N, V); kept beside Q because p - Q cancels where p is tiny. Without ``dense_q`` Q is p - g.
        scale: s (N,).
        constructed: the label's coefficient in the construction (N,); None where Q is no mixture of known parts.
        pulls: total weight of the pulls toward fixed targets (N,), or the reason why it is undefined.
        pushed: a (N,) in g = a (p - d), of a target whose only pull is the label's.
        named: the residual of a mixture, "student", "uniform" or probabilities (N, V).
        proper: rows (N,) whose Q is a distribution by construction; None where that has to be measured.
        rounding: the least precise dtype that holds Q, gradient or residual, or these numbers, from which it is found
            when needed; None for the dtype of p.

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
        """The mixture Q = trust d + (1 - trust) residual.

        Args:
            tokens: the student's logits and labels.
            trust: the label's coefficient, a number or (N,).
            residual: "student" (p), "uniform" or probabilities (N, V).
            scale: s, a number or (N,).

        Raises:
            InputError: an unknown residual, shapes that do not fit, or values as in ``checked``.
        """
        trust, scale = per_token("trust", trust, tokens), per_token("scale", scale, tokens)
        named = residual_of(residual, tokens)
        only_label = isinstance(residual, str) and residual == "student"
        pulls = scale * trust if only_label else torch.where(trust < 0, torch.nan, scale)
        probs = residual.detach() if isinstance(residual, Tensor) else None
        target = cls(
            tokens.logits.detach(), tokens.labels, None, None, scale, trust, pulls, named=named, rounding=probs
        )
        return target.checked() if tokens.checked else target

    @classmethod
    def dense(cls, tokens: Tokens, q: Tensor, scale: Tensor | float = 1.0) -> "Target":
        """Any Q (N, V), as it is given; its trust is the label weight.

        Args:
            tokens: the student's logits and labels.
            q: the target, (N, V), possibly signed.
            scale: s, a number or (N,).

        Raises:
            InputError: shapes that do not fit, or values as in ``checked``.
        """
        log_probs = tokens.log_probs.detach()
        rounding = q.detach()
        q = rounding.to(log_probs.dtype)
        if q.shape != log_probs.shape:
            raise InputError(f"q has shape {tuple(q.shape)}, but the logits have {tuple(log_probs.shape)}")
        scale = per_token("scale", scale, tokens)
        grad = scale[:, None] * (log_probs.exp() - q)
        target = cls(log_probs, tokens.labels, q, grad, scale, None, NO_PULLS, rounding=rounding)
        return target.checked() if tokens.checked else target

    @classmethod
    def from_grad(cls, tokens: Tokens, grad: Float[Tensor, "N V"]) -> "Target":
        """The target of a logit gradient (N, V) at unit scale, Q = p - g."""
        logits, rounding = tokens.logits.detach(), grad.detach()
        grad = rounding.to(precision(logits.dtype))
        return cls(logits, tokens.labels, None, grad, torch.ones_like(grad[:, 0]), None, NO_PULLS, rounding=rounding)

    @classmethod
    @renamed_arguments(push="label_weight")
    def push(cls, tokens: Tokens, label_weight: Tensor | float) -> "Target":
        """The target of a loss of p_y alone: Q = a d + (1 - a) p with label weight a = -dl / dlog p_y.

        As ``mix`` with the student as residual, but keeps its digits where a grows as 1 / (1 - p_y).

        Args:
            tokens: the student's logits and labels.
            label_weight: a, a number or (N,).
        """
        weight = per_token("label_weight", label_weight, tokens)
        logits = tokens.logits.detach()
        return cls(logits, tokens.labels, None, None, torch.ones_like(weight), weight, weight, pushed=weight)

    @classmethod
    @renamed_arguments(push="label_weight")
    def slope(cls, tokens: Tokens, slope: Float[Tensor, "N V"], label_weight: Tensor | float = 0.0) -> "Target":
        """The target of a loss of all probabilities at unit scale: Q = p + a (d - p) - p (A - sum_j p_j A_j).

        Args:
            tokens: the student's logits and labels.
            slope: A_k = dl / dp_k, (N, V); ignored where p_k = 0.
            label_weight: a, of a further loss of p_y alone, a number or (N,).
        """
        log_p = tokens.log_probs.detach()
        p = log_p.exp()
        slope = slope.detach().masked_fill(p == 0, 0.0)
        grad = with_sum_(p * (slope - expectation(p, slope)[:, None]), log_p, 0.0)
        index = tokens.labels[:, None].long()
        rest = p.scatter(1, index, 0.0).sum(-1, keepdim=True)
        pulled = p.scatter(1, index, -rest)  # p - d
        return cls.from_grad(tokens, grad + per_token("label_weight", label_weight, tokens)[:, None] * pulled)

    def checked(self) -> "Target":
        """This target, after a check of its values.

        Raises:
            InputError: a scale below 0 or not finite, a trust that is NaN, or a residual that is no distribution.
        """
        check_values(self.scale, self.constructed, self.named)
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
        """Whether the label's is the only pull, Q = t d + (1 - t) p."""
        return self.pushed is not None or (isinstance(self.named, str) and self.named == "student")

    @cached_property
    def q(self) -> Float[Tensor, "N V"]:
        """The target Q."""
        return self.q_rows(slice(None))

    def q_rows(self, rows: slice) -> Float[Tensor, "n V"]:
        """The target Q of some rows."""
        if self.dense_q is not None:
            return self.dense_q[rows]
        if self.dense_grad is not None:
            return softmax(self.logits[rows]).to(self.dense_grad).sub_(self.dense_grad[rows])
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
        """The label's coefficient in the construction; where that is no mixture, the label weight over the scale."""
        if self.constructed is not None:
            return self.constructed
        return self.label_weight / self.scale

    def at(self, scale: Scale) -> "Target":
        """The same gradient at another scale: Q' = p - g / s'.

        Args:
            scale: "unit" is s' = 1; "structural" the total weight of the pulls toward fixed targets; "natural" the
                smallest s' for which Q' has no negative entry, max(0, max_k g_k / p_k), with Q' = p where g = 0.

        Raises:
            InputError: an unknown scale, or "structural" where it is undefined (the reason is named).

        Example:
            >>> import torch
            >>> tokens = Tokens(logits=torch.zeros(1, 2), labels=torch.tensor([0]))
            >>> Target.push(tokens, 2.0).at("natural").scale
            tensor([2.])
        """
        return rescaled(self, scale)

    def weighted(self, weight: Float[Tensor, " N"]) -> "Target":
        """The same Q with ``weight`` times the scale."""
        pulls = self.pulls if isinstance(self.pulls, str) else self.pulls * weight
        target = replace(self, scale=self.scale * weight, pulls=pulls)
        if self.pushed is not None:
            return replace(target, pushed=self.pushed * weight)
        if self.dense_grad is None:
            return target
        return replace(target, dense_q=self.q, dense_grad=self.dense_grad * weight[:, None])

    def with_sums_of(self, other: "Target") -> "Target":
        """This target, with log p and the sums over the vocabulary that ``other``, at the same tokens, has computed already."""
        pairs = ((self.logits, other.logits), (self.labels, other.labels))
        if all(a.data_ptr() == b.data_ptr() and a.shape == b.shape for a, b in pairs):
            computed = {name: other.__dict__[name] for name in ("log_probs", "rest") if name in other.__dict__}
            self.__dict__.update(computed)
        return self

    def __getitem__(self, rows: Any) -> "Target":
        """A selection of rows: ``target[mask]``, ``target[2:5]``."""
        return self._each(lambda value: value[rows])

    def cpu(self) -> "Target":
        """The same target on the CPU."""
        return self._each(Tensor.cpu)

    @classmethod
    def join(cls, parts: Sequence["Target"]) -> "Target":
        """The rows of several targets of one method in one."""
        joined: dict[str, Any] = {}
        for name in (field.name for field in fields(cls)):
            values = [getattr(part, name) for part in parts]
            if all(isinstance(value, Tensor) for value in values):
                joined[name] = torch.cat(values)
            else:
                joined[name] = next((value for value in values if not isinstance(value, Tensor)), None)
        return cls(**joined)

    def at_cached(self, tokens: Tokens) -> "Target":
        """This target of cached tokens, with their log p and sums over the vocabulary."""
        if self.dense_grad is None:
            self.__dict__.update(log_probs=tokens.log_probs, rest=tokens.rest)
            if self.label_only:
                self.__dict__["grad"] = tokens.label_grad * self._total_push[:, None]
        return self

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
