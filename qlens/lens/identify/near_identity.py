"""Near matches: methods whose gradient a loss has on most tokens, and the difference on the others."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from qlens.core.tokens import Tokens
from qlens.lens.identify import matching
from qlens.lens.reading import Reading
from qlens.lens.weights.features import WeightReading, plain
from qlens.lens.weights.weight_law import Law, thresholds
from qlens.registry import get

LOOSE, EXACT = 0.01, 2e-6  # relative distances up to which a gradient counts as the method's, and as equal to it
CORE, SURE = 1e-4, 0.4  # relative distance up to which a share of 0.4 of the tokens must agree
SIMPLE = 0.4  # share of tokens that a parameter must add
SAMPLED = 8  # tokens whose loss is evaluated one at a time
MOST_LIKE = 0.5  # share of tokens that must have the method's gradient
LARGEST = 0.1  # largest number added to p_y that counts as an epsilon
FAR, NEARLY_ALL = 0.1, 0.95  # most distance on the other tokens, or least share of tokens, at which a match is reported
EPSILONS = 1.6  # largest ratio of the epsilons read from single tokens


@dataclass(frozen=True)
class NearMatch:
    """A method whose gradient a loss has on most tokens.

    Args:
        spec: the method.
        factor: c in g = c g_m.
        share: share of the tokens on which that holds.
        tokens: their number.
        why: the difference on the others, in words; "" where there are none.
        distance: the largest relative distance on the tokens where it holds.
        left: the largest relative distance on the others, where no rule separates them and the reason is unknown; else 0.
    """

    spec: str
    factor: float
    share: float
    tokens: int
    why: str
    distance: float = 0.0
    left: float = 0.0

    @property
    def method_with_factor(self) -> str:
        """The method with its factor."""
        return self.spec if abs(self.factor - 1) < CORE else f"{self.spec} times {self.factor:.5g}"

    @property
    def exact(self) -> bool:
        """Whether it is the method at its defaults up to rounding, and the difference on the others is known."""
        return self.distance <= EXACT and "(" not in self.spec and not self.left

    @property
    def conclusive(self) -> bool:
        """Whether it describes the loss: on nearly all tokens, or on tokens that a rule separates from the others."""
        return self.left <= FAR or (self.share >= NEARLY_ALL and "(" not in self.spec)

    def agrees(self, at: Reading) -> torch.Tensor:
        """The tokens on which a gradient is the method's times the factor, up to 1 %, (n,)."""
        return _agrees(at, self.spec, self.factor)

    def __str__(self) -> str:
        count = round(self.share * self.tokens)
        near = (
            f"{self.method_with_factor}, up to {self.distance:.0e},"
            if self.distance > EXACT
            else self.method_with_factor
        )
        return f"{near} on {count} of the {self.tokens} tokens tried" + (f"; {self.why}" if self.why else "")


def near_match(
    reading: Reading, loss: Callable[[Tokens], Tensor], specs: Sequence[str], further: Reading | None = None
) -> NearMatch | None:
    """The simplest of some methods that has the gradient on most tokens up to 1 %, or None.

    Args:
        reading: the gradient.
        loss: the unreduced loss, evaluated on single tokens where only the mean is known.
        specs: the methods.
        further: the gradient on other tokens, on which the same rule must separate the exceptions.
    """
    candidates = []
    for spec in specs:
        other = matching.method_gradient(get(spec), reading.tokens)
        if other is None or not bool(other.any()):
            continue
        factor, agree, _ = matching.agreement(reading.grad, other, reading.noise, LOOSE)
        nonzero = ~reading.zero_rows | (other.norm(dim=-1) > reading.noise.rows)
        share = float((agree & nonzero).sum() / nonzero.sum().clamp(min=1))
        close = (reading.grad - factor * other.double()).norm(dim=-1) <= CORE * reading.grad.norm(
            dim=-1
        ) + reading.noise.rows
        if share >= MOST_LIKE and factor != 0 and float((close & nonzero).sum() / nonzero.sum().clamp(min=1)) >= SURE:
            candidates.append((share, spec, factor, other.double(), agree))
    if not candidates:
        return None
    # a simpler method counts for more than some tokens
    _, spec, factor, other, agree = max(
        candidates, key=lambda one: (one[0] - SIMPLE * _simple(one[1], one[2])[1], -len(one[1]))
    )
    same = agree & ~reading.zero_rows
    relative = (reading.grad - factor * other).norm(dim=-1) / reading.grad.norm(dim=-1).clamp(min=1e-300)
    distance = float(relative[same].max())
    rule = _rule([(reading, agree), *([(further, _agrees(further, spec, factor))] if further is not None else [])])
    why, unexplained = ("", 0.0) if bool(agree.all()) else _difference(reading, loss, factor * other, agree, rule)
    return NearMatch(spec, factor, float(agree.double().mean()), len(agree), why, distance, unexplained)


def gate(reading: Reading, loss: Callable[[Tokens], Tensor], law: Law) -> NearMatch | None:
    """The method that equals the loss where its only weight function holds, with no gradient elsewhere; or None.

    Args:
        reading: the gradient.
        loss: the unreduced loss.
        law: the weight function of the label, the only part of the decomposition.
    """
    nonzero = ~reading.zero_rows
    some = reading[nonzero]
    near = matching.nearest(some.grad, some.tokens, noise=some.noise) if bool(nonzero.any()) else []
    if not near or not near[0].same:
        return None
    others = int((~nonzero).sum())
    constant = _constant_value(reading, loss, ~nonzero) if others else ""
    why = f"it is that method {law.where}; on the other {others} its gradient is zero{constant}"
    return NearMatch(near[0].spec, near[0].factor, float(nonzero.double().mean()), len(nonzero), why)


def _simple(spec: str, factor: float) -> tuple:
    return matching.order(matching.Match(spec, 0.0, factor, 0.0, "up to a factor"))


def _agrees(reading: Reading, spec: str, factor: float) -> torch.Tensor:
    """Where a gradient is that of a method times a factor, (N,)."""
    other = matching.method_gradient(get(spec), reading.tokens)
    if other is None:
        return torch.zeros(len(reading.grad), dtype=torch.bool, device=reading.grad.device)
    return matching.distance_at(reading.grad, other.double(), factor, reading.noise, LOOSE) <= 1


def _difference(
    reading: Reading, loss: Callable[[Tokens], Tensor], other: torch.Tensor, agree: torch.Tensor, rule: str
) -> tuple[str, float]:
    """The difference where a gradient is not the method's, in words; and its size where the reason is unknown, else 0."""
    g, apart = reading.grad, ~agree
    sizes, others = g.norm(dim=-1), other.norm(dim=-1)
    if bool(reading.zero_rows[apart].all()):
        return (
            f"on the other {int(apart.sum())} its gradient is zero{_constant_value(reading, loss, apart)}{_by_rule(rule)}",
            0.0,
        )
    ratio = (g * other).sum(-1) / others.square().clamp(min=1e-300)
    along = (g - ratio[:, None] * other).norm(dim=-1) <= 0.02 * sizes + reading.noise.rows
    far = (g - other).norm(dim=-1) / sizes.maximum(others).clamp(min=1e-300)
    most, at = float(far[apart].max()), int(torch.where(apart, far, -1.0).argmax())
    p = reading.tokens.label_probs
    low, high = float(ratio[apart].min()), float(ratio[apart].max())
    if bool(along[apart].all()) and high - low <= CORE * max(abs(low), abs(high)):
        factor = float((other * g)[apart].sum() / other[apart].square().sum())
        return f"on the others its gradient is {plain(matching.written(factor, CORE))} times that{_by_rule(rule)}", 0.0
    size = f"up to {most:.0%} away (at p_y = {float(p[at]):.2g})"
    shrunk = apart & (ratio > 0.01) & (ratio < 0.999) & (sizes > 100 * reading.noise.rows)
    if bool(along[apart].all()) and int(shrunk.sum()) >= 2:
        epsilon = (p * (1 / ratio - 1))[shrunk]
        small = bool((epsilon > 0).all()) and float(epsilon.max()) < LARGEST
        if small and float(epsilon.max() / epsilon.min()) < EPSILONS:
            beside = f"an epsilon of about {float(epsilon.median()):.1g} beside p_y, inside a logarithm"
            return f"on the others {size}: {beside}", 0.0
    return f"on the others {size}{_by_rule(rule)}", 0.0 if rule else most


def _constant_value(reading: Reading, loss: Callable[[Tokens], Tensor], apart: torch.Tensor) -> str:
    """Why the tokens have no gradient: one constant value of the loss, or a threshold or mask, in words."""
    values = reading.losses.double()
    if float(values.max() - values.min()) <= 1e-9 * float(values.abs().max()):  # only the mean is known
        rows = apart.nonzero()[:SAMPLED, 0].tolist()
        with torch.no_grad():
            values = torch.stack([loss(reading.inputs[[row]]).sum().double() for row in rows])
    else:
        values = values[apart]
    if float(values.max() - values.min()) > 1e-6 * max(1.0, float(values.abs().max())):
        return ": a threshold or a mask"
    return f", where the loss is held at {plain(float(values[0]) + 0.0)}: a clamp{'' if values[0] else ' or a mask'}"


def _by_rule(rule: str) -> str:
    return f"; it is that method {rule}" if rule else ""


def _rule(readings: Sequence[tuple[Reading, torch.Tensor]]) -> str:
    """The rule that separates the tokens with a method's gradient from the others, in words; "" if there is no simple one."""
    on = np.concatenate([agree.cpu().numpy() for _, agree in readings])
    if on.all() or not on.any():
        return ""
    features = [WeightReading(agree.double().cpu(), at.tokens, at.noise.rows.cpu()) for at, agree in readings]
    return next(thresholds(features, on), "")
