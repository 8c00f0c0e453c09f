"""Matching: which registered method has the gradient of a loss, exactly, up to a factor, or most nearly."""

import math
from dataclasses import dataclass

from jaxtyping import Float
from torch import Tensor, float64

from qlens.errors import InputError
from qlens.registry import get, names
from qlens.tokens import Tokens

RELATIONS = ("identical", "up to a factor", "same targets at another scale", "near")


@dataclass(frozen=True)
class Match:
    """A registered method beside a gradient g.

    Args:
        spec: the method.
        angle: between g and the method's gradient g_m over all tokens, in degrees.
        factor: c that brings c g_m closest to g.
        misfit: |g - c g_m| / |g|.
        relation: one of ``RELATIONS``: g = g_m; g = c g_m; parallel token by token, so that both have the same target
            at another scale; or none of these.
    """

    spec: str
    angle: float
    factor: float
    misfit: float
    relation: str

    def __str__(self) -> str:
        if self.relation == "identical":
            return f"{self.spec}: the same gradient"
        if self.relation == "up to a factor":
            return f"{self.spec} x {self.factor:.6g}: the same gradient up to this factor"
        if self.relation == "same targets at another scale":
            return f"{self.spec}: parallel token by token, weighted otherwise (angle {self.angle:.1f} degrees)"
        return f"{self.spec} x {self.factor:.3g}: {self.angle:.1f} degrees away"


def nearest(grad: Float[Tensor, "N V"], tokens: Tokens, skip: str = "") -> list[Match]:
    """Every registered method that these tokens can feed, nearest first: by relation, angle and factor.

    Args:
        grad: logit gradients of the unreduced loss, (N, V).
        tokens: where they were taken; methods that need a field that is missing are left out.
        skip: a spec to leave out (the loss itself, if it is registered and at its defaults).

    Example:
        >>> import qlens
        >>> tokens = qlens.probes()
        >>> nearest(2.5 * qlens.get("kd").target(tokens).grad, tokens)[0].relation
        'up to a factor'
    """
    found = []
    for name in names():
        variant = get(name)
        if variant.spec != skip and all(getattr(tokens, field) is not None for field in variant.needs):
            try:
                other = variant.target(tokens).grad
            except InputError:  # a user's method may fit no tokens but its own
                continue
            found.append(_compare(variant.spec, grad, other))
    return sorted(found, key=_order)


def _order(match: Match) -> tuple:
    """By relation, then by angle; among the equally near the least factor, then the method with the fewest needs."""
    needs = len(get(match.spec).needs)
    factor = abs(math.log(abs(match.factor))) if match.factor else math.inf
    return RELATIONS.index(match.relation), round(match.angle, 3), round(factor, 6), needs, len(match.spec)


def _compare(spec: str, grad: Tensor, other: Tensor) -> Match:
    tolerance = 1e-6 if grad.dtype == float64 else 1e-3
    g, m = grad.double(), other.double()
    size, other_size = float(g.norm()), float(m.norm())
    if size == 0 or other_size == 0:
        same = size == other_size
        return Match(spec, 0.0 if same else 90.0, 1.0, float(not same), "identical" if same else "near")
    dot = float((g * m).sum())
    factor = dot / other_size**2
    misfit = float((g - factor * m).norm()) / size
    relation = "near"
    if misfit <= tolerance:  # a negative factor is a sign error, worth saying
        relation = "identical" if abs(factor - 1) <= tolerance else "up to a factor"
    elif _parallel(g, m, tolerance):
        relation = "same targets at another scale"
    angle = math.degrees(math.acos(max(-1.0, min(1.0, dot / (size * other_size)))))
    return Match(spec, angle, factor, misfit, relation)


def _parallel(g: Tensor, m: Tensor, tolerance: float) -> bool:
    """Whether every token's gradients point the same way, where both are there."""
    sizes = g.norm(dim=-1), m.norm(dim=-1)
    there = (sizes[0] > 1e-12 * sizes[0].max()) & (sizes[1] > 1e-12 * sizes[1].max())
    unit_g, unit_m = (x[there] / s[there, None] for x, s in zip((g, m), sizes, strict=True))
    return bool(there.any()) and bool(((unit_g - unit_m).norm(dim=-1) <= tolerance * 10).all())
