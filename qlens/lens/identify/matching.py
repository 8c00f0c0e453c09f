"""Matching: which registered method has the gradient of a loss, exactly, up to a factor, or most nearly."""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from qlens.core.errors import InputError
from qlens.core.tokens import Tokens
from qlens.lens.rounding import TOLERANCE, Noise, rounding
from qlens.registry import get, methods, params
from qlens.registry.method import Method
from qlens.registry.variant import Variant

RELATIONS = ("identical", "up to a factor", "same targets at another scale", "near")
WORSE = 2.0  # of methods within rounding of a gradient, those count that are at most this much further than the nearest
SHORT = 3  # significant digits of a factor that somebody wrote


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
        share: of the tokens on which g = c g_m.
        rounding: the distance from g to c g_m as a share of what rounding explains, root mean square over tokens.
    """

    spec: str
    angle: float
    factor: float
    misfit: float
    relation: str
    share: float = 0.0
    rounding: float = math.inf

    @property
    def same(self) -> bool:
        """Whether it is the gradient, up to a factor."""
        return self.relation in RELATIONS[:2]

    @property
    def odd(self) -> bool:
        """Whether a number of it has more digits than somebody would have written."""
        parts = [self.factor, *(part for _, value in _changed(self.spec) for part in _parts(value))]
        return max(map(digits, parts)) > SHORT

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


def nearest(
    grad: Float[Tensor, "N V"], tokens: Tokens, skip: str = "", noise: Noise | None = None, every: bool = False
) -> list[Match]:
    """Every registered method that these tokens can feed, at the point nearest: by relation, simplicity and angle.

    Each is tried at its defaults, its modes and the ends of its parameters; ``identify.search`` goes between these.

    Args:
        grad: logit gradients of the unreduced loss, (N, V).
        tokens: where they were taken; methods that need a field that is missing are left out.
        skip: a spec to leave out (the loss itself, if it is registered).
        noise: the rounding of the gradient; by default what its digits show.
        every: whether all points of a method are wanted, not the simplest alone.

    Example:
        >>> import qlens
        >>> tokens = qlens.probes()
        >>> nearest(2.5 * qlens.get("kd").target(tokens).grad, tokens)[0].relation
        'up to a factor'
    """
    tokens = tokens.with_precision(torch.float64)
    noise = noise or rounding(grad, tokens)
    found = []
    for method in methods().values():
        matches = [
            match for point in points(method) if point.spec != skip and (match := at(point, grad, tokens, noise))
        ]
        if method.name == params.parse(skip)[0]:  # a parameter that changes nothing makes no other method
            matches = [match for match in matches if match.relation != "identical"]
        found += matches if every else simplest(matches)
    return ranked(found)


def simplest(matches: list[Match]) -> list[Match]:
    """Of every method the simplest match, and the default too where that is the same up to a factor, ranked."""
    found = []
    for name in dict.fromkeys(params.parse(match.spec)[0] for match in matches):
        own = [match for match in matches if params.parse(match.spec)[0] == name]
        best = min(own, key=order)
        # "eaft(normalizer=1.0)" says which released mode it is, "eaft x 2.9957" by how much
        default = [m for m in own if m.spec == name and m is not best and m.relation == RELATIONS[1]]
        found += [best, *default]
    return ranked(found)


def ranked(matches: list[Match]) -> list[Match]:
    """In order; of those within rounding, what is clearly further than the best comes after what is not."""
    matches = list({match.spec: match for match in reversed(matches)}.values())
    best = min((match.rounding for match in matches if match.same), default=math.inf)
    return sorted(matches, key=lambda match: (match.same and match.rounding > max(WORSE * best, 0.1), order(match)))


def at(variant: Variant, grad: Float[Tensor, "N V"], tokens: Tokens, noise: Noise | None = None) -> Match | None:
    """A gradient beside one variant's; None where the tokens cannot feed it."""
    other = taught(variant, tokens)
    return None if other is None else _compare(variant.spec, grad, other, noise or rounding(grad, tokens))


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
    """By relation, the same gradient up to a factor first; then by simplicity, what is not the same by angle.

    Simple are few parameters beside the defaults, short numbers, a factor of 1 or a short one, few needs, a short name.
    """
    variant = get(match.spec)
    given = [value for _, value in _changed(match.spec)]
    simple = sum(1 + 0.1 * (max(map(digits, _parts(value)), default=1) - 1) for value in given) + clumsy(match.factor)
    ties = len(variant.needs), variant.method.on_model is not None, len(match.spec)
    relation, angle = max(RELATIONS.index(match.relation), 1), round(match.angle, 3)
    return (relation, round(simple, 6), *ties) if relation == 1 else (relation, angle, round(simple, 6), *ties)


def agreement(
    grad: Float[Tensor, "N V"], other: Float[Tensor, "N V"], noise: Noise, tolerance: float = TOLERANCE
) -> tuple[float, Bool[Tensor, " N"], Float[Tensor, " N"]]:
    """The factor c that most tokens agree on, whether |g - c g_m| is rounding at every token, and its share of rounding."""
    g, m = grad.double(), other.double()
    sizes = g.norm(dim=-1), m.norm(dim=-1)
    ratio = (g * m).sum(-1) / sizes[1].square().clamp(min=1e-300)
    telling = (sizes[0] > 10 * noise.rows) & (sizes[1] > 0)
    factor = float(ratio[telling].median()) if bool(telling.any()) else 1.0
    for within in dict.fromkeys((TOLERANCE, tolerance)):  # to its last digit, from the tokens that agree most closely
        allowed = within * sizes[0].maximum(abs(factor) * sizes[1]) + noise.rows
        near = telling & ((g - factor * m).norm(dim=-1) <= allowed * 3)
        if int(near.sum()) >= max(1, len(g) // 10):
            weight = 1 / allowed[near, None]
            factor = float((g[near] * m[near] * weight**2).sum() / (m[near] * weight).square().sum())
            spread = within + 0.5 * float((noise.rows / sizes[0].clamp(min=1e-300))[near].median())
            factor = written(factor, spread / int(near.sum()) ** 0.5)
            break
    allowed = tolerance * sizes[0].maximum(abs(factor) * sizes[1]) + noise.rows
    off = (g - factor * m).norm(dim=-1) / allowed.clamp(min=1e-300)
    return factor, off <= 1, off


def written(value: float, spread: float) -> float:
    """The shortest number within a relative distance: what somebody may have written."""
    tried = (float(f"{value:.{count}g}") for count in range(1, 12))
    return next((near for near in tried if abs(near - value) <= spread * abs(value)), value)


def _compare(spec: str, grad: Tensor, other: Tensor, noise: Noise) -> Match:
    g, m = grad.double(), other.double()
    size, other_size = float(g.norm()), float(m.norm())
    if size == 0 or other_size == 0:
        same = size == other_size
        return Match(spec, 0.0 if same else 90.0, 1.0, float(not same), "identical" if same else "near", float(same))
    dot = float((g * m).sum())
    angle = math.degrees(math.acos(max(-1.0, min(1.0, dot / (size * other_size)))))
    factor, agree, off = agreement(g, m, noise)
    share, chi = float(agree.double().mean()), float(off.square().mean().sqrt())
    if bool(agree.all()) and factor != 0:  # a negative factor is a sign error, worth saying
        misfit = float((g - factor * m).norm()) / size
        return Match(spec, angle, factor, misfit, "identical" if factor == 1 else "up to a factor", share, chi)
    least = dot / other_size**2
    misfit = float((g - least * m).norm()) / size
    relation = "same targets at another scale" if _parallel(g, m, noise) else "near"
    return Match(spec, angle, least, misfit, relation, share, chi)


def _parallel(g: Tensor, m: Tensor, noise: Noise) -> bool:
    """Whether every token's gradients point the same way, where both are there."""
    sizes = g.norm(dim=-1), m.norm(dim=-1)
    there = (sizes[0] > (1e-12 * sizes[0].max()).maximum(10 * noise.rows)) & (sizes[1] > 1e-12 * sizes[1].max())
    unit_g, unit_m = (x[there] / s[there, None] for x, s in zip((g, m), sizes, strict=True))
    allowed = 10 * TOLERANCE + noise.rows[there] / sizes[0][there]
    return bool(there.any()) and bool(((unit_g - unit_m).norm(dim=-1) <= allowed).all())


def _changed(spec: str) -> list[tuple[str, Any]]:
    return list(params.parse(spec)[1].items())


def _parts(value: Any) -> Iterator[float]:
    for part in value if isinstance(value, tuple) else (value,):
        if isinstance(part, int | float) and not isinstance(part, bool):
            yield part


def digits(value: float) -> int:
    """Significant digits of a number as it is written."""
    return len(f"{abs(value):.12g}".partition("e")[0].replace(".", "").strip("0")) or 1


def clumsy(factor: float) -> float:
    """How much a factor takes from simplicity: nothing where it is 1, less than a parameter where it is short."""
    number = digits(factor)
    short = 0.3 + 0.05 * number if number <= SHORT else 1.2 + 0.01 * number
    return (0.0 if abs(factor) == 1 else short) + (0.3 if factor < 0 else 0.0)
