"""Residuals: the distributions that may be parts of a target, by name; some have a parameter to be fitted."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from qlens.core.numerics import log_softmax, one_hot
from qlens.core.tokens import Tokens

TEMPERATURE = ("temperature", (0.1, 0.2, 0.4, 0.6, 0.8, 1.3, 2.0, 3.5, 6.0, 10.0))
ETA = ("eta", (0.1, 0.3, 0.5, 0.7, 0.9, 1.2, 1.6))
K = ("k", (1, 2, 3, 4, 5, 6, 8, 10, 12, 16, 20, 24, 32, 48, 50, 64, 100, 128, 256))


@dataclass(frozen=True)
class Residual:
    """A distribution R per token: a function of the tokens and, if it has a ``parameter``, of one number."""

    name: str
    of: Callable[..., Float[Tensor, "N V"]]
    parameter: str = ""
    grid: tuple[float, ...] = ()

    def at(self, tokens: Tokens, value: float | None) -> Float[Tensor, "N V"]:
        """R, (N, V), in float64."""
        probs = self.of(tokens) if value is None or not self.parameter else self.of(tokens, value)
        return probs.detach().double()

    def name_at(self, value: float | None) -> str:
        """The name with the value of the parameter filled in."""
        return self.name.format(value) if self.parameter and value is not None else self.name


def dictionary(tokens: Tokens, own: Mapping[str, Tensor] | None = None) -> list[Residual]:
    """All residuals whose fields the tokens have, the label first; ``own`` adds probabilities (N, V) by name."""
    residuals = [
        Residual("the label", lambda t: t.one_hot),
        Residual("uniform", lambda t: torch.full_like(t.probs, 1 / t.logits.shape[1])),
    ]
    for name in ("teacher", "reference", "old"):
        if getattr(tokens, name) is not None:
            residuals.append(Residual(_CALLED[name], lambda t, name=name: t.log_probs_of(name).exp()))
    residuals.append(Residual("the student's most probable token", _argmax))
    if tokens.second is not None:
        residuals.append(Residual("a second pass of the student", lambda t: t.log_probs_of("second").exp()))
    for name, probs in (own or {}).items():
        residuals.append(Residual(name, lambda t, probs=probs: probs))
    residuals.append(
        Residual("the student at temperature {:.4g}", lambda t, tau: log_softmax(t.logits / tau).exp(), *TEMPERATURE)
    )
    if tokens.reference is not None:
        residuals.append(Residual("the student-reference mix (eta = {:.4g})", _mix("reference"), *ETA))
    if tokens.teacher is not None:
        size = tokens.logits.shape[1]
        k = ("k", tuple(k for k in K[1] if k < size))
        residuals += [
            Residual("the student-teacher mix (eta = {:.4g})", _mix("teacher"), *ETA),
            Residual("the teacher at temperature {:.4g}", _tempered_teacher, *TEMPERATURE),
            Residual("the teacher's top {:.0f}", _top, *k),
            Residual("the teacher's top {:.0f}, the tail as the student's", _bucket, *k),
            Residual("the teacher's top {:.0f}, the tail spread evenly", _spread, *k),
            Residual("the student on the teacher's top {:.0f}", _student_on_top, *k),
        ]
    return residuals


_CALLED = {"teacher": "the teacher", "reference": "the reference", "old": "the old policy"}


def _argmax(t: Tokens) -> Tensor:
    return one_hot(t.logits.argmax(-1), t.logits.shape[1], t.probs.dtype)


def _mix(model: str) -> Callable:
    """p^(1 - eta) r^eta, normalised."""
    return lambda t, eta: log_softmax((1 - eta) * t.log_probs + eta * t.log_probs_of(model)).exp()


def _tempered_teacher(t: Tokens, tau: float) -> Tensor:
    return log_softmax(t.require("teacher") / tau).exp()


def _teacher_top(t: Tokens, k: float) -> Tensor:
    """A mask of the teacher's k most probable tokens, (N, V)."""
    ids = t.require("teacher").topk(int(k), -1).indices
    return torch.zeros_like(t.logits).scatter(1, ids, 1.0).bool()


def _normal(weights: Tensor) -> Tensor:
    return weights / weights.sum(-1, keepdim=True)


def _top(t: Tokens, k: float) -> Tensor:
    return _normal(t.log_probs_of("teacher").exp() * _teacher_top(t, k))


def _student_on_top(t: Tokens, k: float) -> Tensor:
    return _normal(t.probs * _teacher_top(t, k))


def _bucket(t: Tokens, k: float) -> Tensor:
    in_top, teacher = _teacher_top(t, k), t.log_probs_of("teacher").exp()
    rest = (teacher * ~in_top).sum(-1, keepdim=True)
    return torch.where(in_top, teacher, rest * _normal(t.probs * ~in_top))


def _spread(t: Tokens, k: float) -> Tensor:
    in_top, teacher = _teacher_top(t, k), t.log_probs_of("teacher").exp()
    rest = (teacher * ~in_top).sum(-1, keepdim=True)
    return torch.where(in_top, teacher, rest / (~in_top).sum(-1, keepdim=True))
