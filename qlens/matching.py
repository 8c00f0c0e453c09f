"""Matching: which registered method has the gradient of a loss, exactly, up to a factor, or most nearly."""

import math
from dataclasses import dataclass

from jaxtyping import Float
from torch import Tensor, float64

from qlens import params
from qlens.errors import InputError
from qlens.registry import get, methods
from qlens.tokens import Tokens
from qlens.variant import Method, Variant

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

    @property
    def same(self) -> bool:
        """Whether it is the gradient, up to a factor."""
        return self.relation in RELATIONS[:2]

    def __str__(self) -> str:
        if self.relation == "identical":
            return f"{self.spec}: the same gradient"
        if self.relation == "up to a factor":
            return f"{self.spec} x {self.factor:.6g}: the same gradient up to this factor"
        if self.relation == "same targets at another scale":
            return f"{self.spec}: parallel token by token, weighted otherwise (angle {self.angle:.1f} degrees)"
        return f"{self.spec} x {self.factor:.3g}: {self.angle:.1f} degrees away"


def points(method: Method) -> list[Variant]:
    """A method at its defaults, its modes, and the ends and choices of each parameter."""
    variants = [method.variant(**given) for given in ({}, *method.modes.values(), *params.ends(method.fn))]
    return list({variant.spec: variant for variant in variants}.values())


def nearest(grad: Float[Tensor, "N V"], tokens: Tokens, skip: str = "", tolerance: float | None = None) -> list[Match]:
    """Every registered method that these tokens can feed, at the point nearest: by relation, angle, factor and simplicity.

    Each is tried at its defaults, its modes and the ends of its parameters; ``identify.search`` goes between these.

    Args:
        grad: logit gradients of the unreduced loss, (N, V).
        tokens: where they were taken; methods that need a field that is missing are left out.
        skip: a spec to leave out (the loss itself, if it is registered).
        tolerance: the relative misfit that counts as rounding; by default that of the gradient's dtype.

    Example:
        >>> import qlens
        >>> tokens = qlens.probes()
        >>> nearest(2.5 * qlens.get("kd").target(tokens).grad, tokens)[0].relation
        'up to a factor'
    """
    found = []
    for method in methods().values():
        matches = [
            match for point in points(method) if point.spec != skip and (match := at(point, grad, tokens, tolerance))
        ]
        if method.name == params.parse(skip)[0]:  # a parameter that changes nothing makes no other method
            matches = [match for match in matches if match.relation != "identical"]
        if matches:
            best = min(matches, key=order)
            default = [m for m in matches if m.spec == method.name and m is not best and m.relation == RELATIONS[1]]
            found += [
                best,
                *default,
            ]  # "eaft(normalizer=1.0)" says which released mode it is, "eaft x 2.9957" by how much
    return sorted(found, key=order)


def at(variant: Variant, grad: Float[Tensor, "N V"], tokens: Tokens, tolerance: float | None = None) -> Match | None:
    """A gradient beside one variant's; None where the tokens cannot feed it."""
    other = taught(variant, tokens)
    return None if other is None else _compare(variant.spec, grad, other, tolerance)


def taught(variant: Variant, tokens: Tokens) -> Float[Tensor, "N V"] | None:
    """A variant's gradient; None where the tokens cannot feed it, or it is not finite."""
    if any(getattr(tokens, field) is None for field in variant.needs):
        return None
    try:
        grad = variant.target(tokens).grad
    except InputError:  # these parameters do not go together, or a user's method fits no tokens but its own
        return None
    return grad if bool(grad.isfinite().all()) else None


def order(match: Match) -> tuple:
    """By relation; what is one, by simplicity: the least factor, parameters and needs; what is not, by angle."""
    needs, given = len(get(match.spec).needs), match.spec.count("=")
    factor = abs(math.log(abs(match.factor))) if match.factor else math.inf
    simple = round(factor, 2), given, needs, len(match.spec)
    relation, angle = RELATIONS.index(match.relation), round(match.angle, 3)
    return (relation, *simple, angle) if relation < 2 else (relation, angle, *simple)


def _compare(spec: str, grad: Tensor, other: Tensor, tolerance: float | None) -> Match:
    tolerance = tolerance or (1e-6 if grad.dtype == float64 else 1e-3)
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
