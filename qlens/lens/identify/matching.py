"""Matching: a gradient compared with that of a registered method: equal, equal up to a factor, or the angle between them."""

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
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
WORSE = 2.0  # methods within rounding rank last where their distance is more than this many times the smallest
TOGETHER = 2**16  # entries of the gradients that are compared at once, few enough for the cache
SHORT = 3  # significant digits of a short factor


@dataclass(frozen=True)
class Match:
    """A gradient g compared with the gradient g_m of a registered method.

    Args:
        spec: the method.
        angle: between g and g_m over all tokens, in degrees.
        factor: c that brings c g_m closest to g.
        misfit: |g - c g_m| / |g|.
        relation: one of ``RELATIONS``: g = g_m; g = c g_m; parallel on every token, so that both have the same target at
            another scale; or none of these.
        share: share of the tokens on which g = c g_m.
        rounding: |g - c g_m| relative to the rounding error, root mean square over tokens.
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
        """Whether g is the method's gradient up to a factor."""
        return self.relation in RELATIONS[:2]

    @property
    def odd(self) -> bool:
        """Whether a parameter or the factor has more than three digits."""
        parts = [self.factor, *(part for _, value in _changed(self.spec) for part in _parts(value))]
        return max(map(digits, parts)) > SHORT

    def __str__(self) -> str:
        if self.relation == "identical":
            return f"{self.spec}: the same gradient"
        if self.relation == "up to a factor":
            return f"{self.spec} x {self.factor:.6g}: the same gradient up to this factor"
        if self.relation == "same targets at another scale":
            return f"{self.spec}: the same target, with another scale on every token (angle {self.angle:.1f} degrees)"
        return f"{self.spec} x {self.factor:.3g}: {self.angle:.1f} degrees away"


def points(method: Method) -> list[Variant]:
    """A method at its defaults, its presets, and the ends and choices of each parameter."""
    variants = [method.variant(**parameters) for parameters in ({}, *method.modes.values(), *params.ends(method.fn))]
    return list({variant.spec: variant for variant in variants}.values())


def nearest(
    grad: Float[Tensor, "N V"], tokens: Tokens, skip: str = "", noise: Noise | None = None, every: bool = False
) -> list[Match]:
    """Every registered method whose fields the tokens have, at its nearest point: by relation, simplicity and angle.

    Each is taken at its defaults, its presets and the ends of its parameters; ``parameter_search.search`` goes between these.

    Args:
        grad: logit gradients of the unreduced loss, (N, V).
        tokens: the tokens that they belong to; methods that need a missing field are left out.
        skip: a spec to leave out (the loss itself, if it is registered).
        noise: rounding error of the gradient; by default estimated from its digits.
        every: whether to return all points of a method, not the simplest alone.

    Example:
        >>> import qlens
        >>> tokens = qlens.probes()
        >>> nearest(2.5 * qlens.get("kd").target(tokens).grad, tokens)[0].relation
        'up to a factor'
    """
    tokens = tokens.in_float64()
    noise = noise or rounding(grad, tokens)
    own = params.parse(skip)[0]
    every_point = [point for method in methods().values() for point in points(method) if point.spec != skip]
    grads = ((point.spec, other) for point in every_point if (other := method_gradient(point, tokens)) is not None)
    matches = [  # without the method itself, with a parameter that has no effect
        match for match in compare(grads, grad, noise)
        if match.relation != "identical" or params.parse(match.spec)[0] != own
    ]  # fmt: skip
    return ranked(matches if every else simplest(matches))


def simplest(matches: list[Match]) -> list[Match]:
    """The simplest match of every method, and its default too where that is the same up to a factor, ranked."""
    by_method: dict[str, list[Match]] = {}
    for match in matches:
        by_method.setdefault(params.parse(match.spec)[0], []).append(match)
    selection = []
    for name, own in by_method.items():
        best = min(own, key=order)
        # "eaft(normalizer=1.0)" names the released preset, "eaft x 2.9957" the factor
        default = [m for m in own if m.spec == name and m is not best and m.relation == RELATIONS[1]]
        selection += [best, *default]
    return ranked(selection)


def ranked(matches: list[Match]) -> list[Match]:
    """Matches in order; of those within rounding, the clearly further ones come last."""
    matches = list({match.spec: match for match in reversed(matches)}.values())
    best = min((match.rounding for match in matches if match.same), default=math.inf)
    return sorted(matches, key=lambda match: (match.same and match.rounding > max(WORSE * best, 0.1), order(match)))


def at(variant: Variant, grad: Float[Tensor, "N V"], tokens: Tokens, noise: Noise | None = None) -> Match | None:
    """The match of a gradient with one variant; None where the tokens lack a field that it needs."""
    other = method_gradient(variant, tokens)
    return None if other is None else compare([(variant.spec, other)], grad, noise or rounding(grad, tokens))[0]


def method_gradient(variant: Variant, tokens: Tokens) -> Float[Tensor, "N V"] | None:
    """The gradient of a variant; None where the tokens lack a field that it needs, or it is not finite."""
    grad = raw_gradient(variant, tokens)
    return grad if grad is not None and bool(grad.isfinite().all()) else None


def raw_gradient(variant: Variant, tokens: Tokens) -> Float[Tensor, "N V"] | None:
    """The gradient of a variant, finite or not; None where the tokens lack a field that it needs."""
    if any(getattr(tokens, field) is None for field in variant.needs):
        return None
    try:
        target = variant.target(tokens)
    except InputError:  # the parameters exclude each other, or a user's method takes other tokens only
        return None
    return (target if tokens.cache is None else target.at_cached(tokens)).grad


def order(match: Match) -> tuple:
    """By relation, the same gradient up to a factor first; then by simplicity, what is not the same by angle.

    Simple are few parameters beside the defaults, short numbers, a factor of 1 or a short one, few needs, a short name.
    """
    variant = get(match.spec)
    values = [value for _, value in _changed(match.spec)]
    simple = sum(1 + 0.1 * (max(map(digits, _parts(value)), default=1) - 1) for value in values) + factor_penalty(
        match.factor
    )
    ties = len(variant.needs), variant.method.on_model is not None, len(match.spec)
    relation, angle = max(RELATIONS.index(match.relation), 1), round(match.angle, 3)
    return (relation, round(simple, 6), *ties) if relation == 1 else (relation, angle, round(simple, 6), *ties)


def agreement(
    grad: Float[Tensor, "N V"], other: Float[Tensor, "N V"], noise: Noise, tolerance: float = TOLERANCE
) -> tuple[float, Bool[Tensor, " N"], Float[Tensor, " N"]]:
    """The factor c of most tokens, whether |g - c g_m| is rounding on every token, and its ratio to the rounding error."""
    (factor,), (distance,) = _agreements(grad.double(), other.double()[None], noise, tolerance)
    return factor, distance <= 1, distance


def _agreements(
    g: Float[Tensor, "N V"], m: Float[Tensor, "P N V"], noise: Noise, tolerance: float = TOLERANCE
) -> tuple[list[float], Float[Tensor, "P N"]]:
    """The factors of ``agreement`` and the ratios to the rounding error, for several methods at once."""
    sizes = g.norm(dim=-1), m.norm(dim=-1)
    dots = (g * m).sum(-1)
    usable = (sizes[0] > 10 * noise.rows) & (sizes[1] > 0)
    ratio = torch.where(usable, dots / sizes[1].square().clamp(min=1e-300), torch.nan)
    factors = ratio.nanmedian(-1).values.nan_to_num(1.0)
    relative = noise.rows / sizes[0].clamp(min=1e-300)
    least, found = max(1, len(g) // 10), torch.zeros(len(m), dtype=torch.bool, device=m.device)
    for within in dict.fromkeys((TOLERANCE, tolerance)):  # to the last digit, from the tokens that agree best
        allowed = within * sizes[0].maximum(factors.abs()[:, None] * sizes[1]) + noise.rows
        near = usable & ((g - factors[:, None, None] * m).norm(dim=-1) <= allowed * 3)
        number = near.sum(-1)
        enough = (number >= least) & ~found
        if not bool(enough.any()):
            continue
        weight = torch.where(near, 1 / allowed, 0.0)
        exact = (dots * weight**2).sum(-1) / (sizes[1] * weight).square().sum(-1)
        rough = within + 0.5 * torch.where(near, relative, torch.nan).nanmedian(-1).values
        spread = (rough / number.sqrt()).tolist()
        short = [
            written(v, by) if yes else v for v, by, yes in zip(exact.tolist(), spread, enough.tolist(), strict=True)
        ]
        factors, found = torch.where(enough, exact.new_tensor(short), factors), found | enough
    return factors.tolist(), distance_at(g, m, factors[:, None], noise, tolerance)


def distance_at(
    grad: Float[Tensor, "N V"],
    other: Float[Tensor, "*P N V"],
    factor: float | Float[Tensor, "*P 1"],
    noise: Noise,
    tolerance: float = TOLERANCE,
) -> Float[Tensor, "*P N"]:
    """|g - c g_m| relative to what rounding and the tolerance allow, at a known factor c."""
    times = factor[..., None] if isinstance(factor, Tensor) else factor
    allowed = tolerance * grad.norm(dim=-1).maximum(abs(factor) * other.norm(dim=-1)) + noise.rows
    return (grad - times * other).norm(dim=-1) / allowed.clamp(min=1e-300)


def angle_of(cosine: float) -> float:
    """The angle of a cosine, in degrees."""
    return math.degrees(math.acos(max(-1.0, min(1.0, cosine))))


def written(value: float, spread: float) -> float:
    """The shortest number within a relative distance."""
    candidates = (float(f"{value:.{count}g}") for count in range(1, 12))
    return next((near for near in candidates if abs(near - value) <= spread * abs(value)), value)


def compare(
    others: Iterable[tuple[str, Float[Tensor, "N V"]]], grad: Float[Tensor, "N V"], noise: Noise
) -> list[Match]:
    """The match of a gradient with each of some variants, given by spec and gradient; many at once where N V is small."""
    together, remaining, matches = max(1, TOGETHER // max(1, grad.numel())), iter(others), []
    while some := list(islice(remaining, together)):
        matches += _compare(
            [spec for spec, _ in some], grad.double(), torch.stack([m.double() for _, m in some]), noise
        )
    return matches


def _compare(specs: Sequence[str], g: Float[Tensor, "N V"], m: Float[Tensor, "P N V"], noise: Noise) -> list[Match]:
    size, other_sizes = float(g.norm()), m.flatten(1).norm(dim=-1)
    factors, distance = _agreements(g, m, noise)
    dots = (g * m).flatten(1).sum(-1)
    least = dots / other_sizes.square().clamp(min=1e-300)
    multiples = torch.stack([least, least.new_tensor(factors)])
    misfits = [(g - by[:, None, None] * m).flatten(1).norm(dim=-1).tolist() for by in multiples]
    columns = [other_sizes, dots, least, (distance <= 1).double().mean(-1), distance.square().mean(-1).sqrt()]
    per_method = zip(
        specs, *(column.tolist() for column in columns), factors, *misfits, _parallel(g, m, noise), strict=True
    )
    matches = []
    for spec, other_size, dot, by, share, chi, factor, misfit, misfit_at_factor, parallel in per_method:
        if size == 0 or other_size == 0:
            same = size == other_size
            relation = "identical" if same else "near"
            matches.append(Match(spec, 0.0 if same else 90.0, 1.0, float(not same), relation, float(same)))
            continue
        angle = angle_of(dot / (size * other_size))
        if share == 1 and factor != 0:  # a negative factor is a sign error
            relation = "identical" if factor == 1 else "up to a factor"
            matches.append(Match(spec, angle, factor, misfit_at_factor / size, relation, share, chi))
        else:
            relation = "same targets at another scale" if parallel else "near"
            matches.append(Match(spec, angle, by, misfit / size, relation, share, chi))
    return matches


def _parallel(g: Float[Tensor, "N V"], m: Float[Tensor, "P N V"], noise: Noise) -> list[bool]:
    """Whether the gradients are parallel on every token on which neither is zero, for several methods at once."""
    sizes = g.norm(dim=-1), m.norm(dim=-1)
    nonzero = (sizes[0] > (1e-12 * sizes[0].max()).maximum(10 * noise.rows)) & (
        sizes[1] > 1e-12 * sizes[1].amax(-1, keepdim=True)
    )
    unit_g, unit_m = (x / s.clamp(min=1e-300)[..., None] for x, s in zip((g, m), sizes, strict=True))
    allowed = 10 * TOLERANCE + noise.rows / sizes[0].clamp(min=1e-300)
    along = (unit_g - unit_m).norm(dim=-1) <= allowed
    return (nonzero.any(-1) & (along | ~nonzero).all(-1)).tolist()


def _changed(spec: str) -> list[tuple[str, Any]]:
    return list(params.parse(spec)[1].items())


def _parts(value: Any) -> Iterator[float]:
    for part in value if isinstance(value, tuple) else (value,):
        if isinstance(part, int | float) and not isinstance(part, bool):
            yield part


def digits(value: float) -> int:
    """The number of significant digits as written."""
    return len(f"{abs(value):.12g}".partition("e")[0].replace(".", "").strip("0")) or 1


def factor_penalty(factor: float) -> float:
    """The penalty of a factor in the order by simplicity: 0 for 1, less than a parameter for a short number."""
    number = digits(factor)
    short = 0.3 + 0.05 * number if number <= SHORT else 1.2 + 0.01 * number
    return (0.0 if abs(factor) == 1 else short) + (0.3 if factor < 0 else 0.0)
