"""Parameter fits: the parameters at which a method has a gradient, by grid scans and least squares."""

import math
from collections.abc import Iterator, Mapping, Sequence
from itertools import combinations
from typing import Any

import numpy as np
from jaxtyping import Float
from scipy.optimize import least_squares
from torch import Tensor

from qlens.core.errors import InputError
from qlens.core.tokens import Tokens
from qlens.lens.identify import matching
from qlens.lens.identify.matching import Match
from qlens.lens.rounding import TOLERANCE, Noise, rounding
from qlens.registry import params
from qlens.registry.method import Method

CHOICES = 2  # settings of the non-numeric parameters from which the numbers are fitted
STARTS = 4  # points of a method from which the search starts
STEPS = 12  # evaluations of least squares
PROMISING = 0.05  # relative misfit below which numbers are also fitted one by one
PINNED = 0.05  # relative precision to which a threshold must be determined before it is reported
NOTHING = 1e-6  # numbers below it may be rounded to 0
ROUNDS = 2  # scans over all parameters of a method
NUMBERS = (
    -2.0, -1.0, -0.5, -0.1, 0.005, 0.02, 0.06, *(n / 20 for n in range(2, 20)), 0.98, 0.995, 0.28, 1.1, 1.2, 1.28, 1.3,
    1.4, 1.6, 2.0, 3.0, 5.0, 10.0,
)  # fmt: skip
SIMPLER, NARROWED = 2, 2  # rounds of setting parameters to their defaults; of closing in on a threshold
FLOORS, TINY = ("floor", "log_zero"), 1e-3  # guards against log 0 are not fitted below this value
WHOLE = (*range(1, 33), 40, 50, 64, 100, 128)


def pushes_only(
    grad: Float[Tensor, "N V"], tokens: Tokens, noise: Noise | None = None, tolerance: float = TOLERANCE
) -> bool:
    """Whether every token's gradient is a multiple of p - d, so that the ratios of the other entries stay as they are."""
    tokens, noise, grad = tokens.in_float64(), noise or rounding(grad, tokens), grad.double()
    log_probs = tokens.log_probs.detach()
    along = log_probs.exp() - tokens.one_hot
    push = (grad * along).sum(-1, keepdim=True) / along.square().sum(-1, keepdim=True).clamp(min=1e-300)
    distance = (grad - push * along).norm(dim=-1)
    return bool((distance <= tolerance * grad.norm(dim=-1) + noise.rows).all())


class Fit:
    """The fit of one method to a gradient: parameters one at a time over a grid, then all numbers by least squares."""

    def __init__(self, method: Method, grad: Tensor, tokens: Tokens, noise: Noise):
        self.method, self.tokens, self.grad, self.noise = method, tokens, grad.double(), noise
        self.numbers: Sequence[float] = ()  # further values of thresholds
        self.g, self.goal = self.grad, 0.1 * TOLERANCE
        self._costs: dict[tuple, float] = {}
        self._minima: dict[tuple, dict[str, Any]] = {}  # where least squares ended, by start and free numbers
        rows = self.g.norm(dim=-1) + noise.rows / TOLERANCE
        self.weight = 1 / rows.clamp(min=1e-300)[:, None]  # a token counts as much as any other
        self.weighted = self.g * self.weight
        grads = [(matching.method_gradient(variant, tokens), variant.params) for variant in matching.points(method)]
        self.kinds = {pushes_only(method_grad, tokens) for method_grad, _ in grads if method_grad is not None}
        starts = [(self.size(method_grad), parameters) for method_grad, parameters in grads]
        self.starts = sorted(starts, key=lambda start: start[0])
        self.best, self.params = self.starts[0]

    def residuals(self, parameters: dict[str, Any]) -> np.ndarray | None:
        """The residuals of the gradient at these parameters and the best factor, (N V,); None for invalid parameters."""
        residuals = self._residuals_of(self._gradient(parameters))
        return None if residuals is None else residuals.flatten().cpu().numpy()

    def cost(self, parameters: dict[str, Any]) -> float:
        """The root mean square of the residuals, relative to the gradient."""
        key = tuple(parameters.values())
        if key not in self._costs:
            self._costs[key] = self.size(self._gradient(parameters))
        return self._costs[key]

    def _gradient(self, parameters: dict[str, Any]) -> Tensor | None:
        """The method's gradient at these parameters, finite or not; None where they are out of their range."""
        try:
            return matching.raw_gradient(self.method.variant(**parameters), self.tokens)
        except InputError:
            return None

    def _residuals_of(self, method_grad: Tensor | None) -> Tensor | None:
        """The residuals of the gradient after the best multiple of a method's gradient, (N, V); None if that is not finite."""
        if method_grad is None:
            return None
        a = method_grad.double() * self.weight
        factor = float((a * self.weighted).sum() / (a * a).sum().clamp(min=1e-300))
        if not math.isfinite(factor):
            return None
        return (self.weighted - a * factor) / len(a) ** 0.5

    def size(self, method_grad: Tensor | None) -> float:
        """The root mean square of the residuals of a method's gradient."""
        residuals = self._residuals_of(method_grad)
        return math.inf if residuals is None else float(residuals.norm())

    def glance(self) -> None:
        """Fit all numbers from the default and the nearest choice of the other parameters, whole numbers at every choice."""
        optima = []
        for start in self.choices()[:CHOICES]:
            self.best, self.params = start
            self.polish()
            optima.append((self.best, self.params))
            if self.best <= TOLERANCE:
                return
        whole = [name for name, value in self.params.items() if type(value) is int]
        for start in self.choices() if whole else ():
            self.best, self.params = start
            self.scan(whole)
            optima.append((self.best, self.params))
            if self.best <= TOLERANCE:
                return
        self.best, self.params = min(optima, key=lambda one: one[0], default=(self.best, self.params))

    def choices(self) -> list[tuple[float, dict[str, Any]]]:
        """The best start for the default and for every choice of the non-numeric parameters, the nearest first."""
        plain, best_starts = params.defaults(self.method.fn), {}
        for best, parameters in self.starts:
            others = tuple((n, v) for n, v in parameters.items() if not isinstance(v, float | tuple) and v != plain[n])
            best_starts.setdefault(others, (best, parameters))
        rank = sorted(best_starts, key=lambda others: (len(others) > 0, best_starts[others][0]))
        return [best_starts[others] for others in rank if np.isfinite(best_starts[others][0])]

    def search(self) -> bool:
        """Scan every parameter over its grid from several starts; whether the method has the gradient anywhere."""
        for start in [(self.best, self.params), *self.starts[:STARTS]]:
            self.best, self.params = start
            for _ in range(ROUNDS):
                before = self.best
                self.scan(list(self.params))
                self.polish()
                if self.best <= TOLERANCE:
                    return True
                if self.best > 0.9 * before:
                    break
        return False

    def scan(self, names: list[str]) -> None:
        """One parameter at a time over its grid."""
        for name in names:
            for other in _candidates(self.params[name], self.hints.get(name), self.numbers):
                if self.best > self.goal:
                    self.take(self.params | {name: other})

    @property
    def hints(self) -> Mapping[str, Any]:
        """The annotations of the method's parameters."""
        return params.hints(self.method.fn)

    def take(self, parameters: dict[str, Any]) -> None:
        """Replace the parameters by these if they are better."""
        cost = self.cost(parameters)
        if cost < self.best * (1 - 1e-9):
            self.best, self.params = cost, parameters

    def polish(self) -> None:
        """Fit all numbers by least squares, then one by one where that is not enough."""
        free = [(name, i) for name, value in self.params.items() for i in _numbers(value)]
        free = [(name, i) for name, i in free if abs(_part(self.params[name], i)) > TINY or name not in FLOORS]
        if free and self.best > self.goal:
            self.descend(free)
        for one in free if len(free) > 1 else ():
            if TOLERANCE < self.best < PROMISING:
                self.descend([one])

    def descend(self, free: list[tuple[str, int | None]]) -> None:
        """Least squares over some numbers from the current parameters."""
        start, invalid = dict(self.params), np.full(self.g.numel(), 1e3)
        key = (*start.values(), *free)
        if key in self._minima:
            self.take(self._minima[key])
            return
        x0 = np.array([_part(start[name], i) for name, i in free])

        def objective(x: np.ndarray) -> np.ndarray:
            residuals = self.residuals(_filled(start, free, x))
            return invalid if residuals is None else residuals

        size, options = np.maximum(np.abs(x0), 0.1), dict(xtol=1e-13, ftol=1e-13, gtol=1e-15, max_nfev=STEPS)
        self._minima[key] = _filled(start, free, least_squares(objective, x0, x_scale=size, **options).x)
        self.take(self._minima[key])

    def simpler(self) -> dict[str, Any]:
        """Parameters with defaults and short numbers where these fit about as well."""
        parameters, plain = dict(self.params), params.defaults(self.method.fn)
        allowed = max(matching.WORSE * self.cost(parameters), self.goal)
        for name, value in plain.items():  # parameters without effect
            if parameters[name] != value and self.cost(parameters | {name: value}) <= allowed:
                parameters[name] = value
        for _ in range(SIMPLER):
            changed = [name for name, value in parameters.items() if value != plain[name]]
            candidates = [parameters]
            for names in (*combinations(changed, 1), *combinations(changed, 2)):
                other = parameters | {name: plain[name] for name in names}
                self.best, self.params = self.cost(other), other
                free = [(name, i) for name in changed if name not in names for i in _numbers(other[name])]
                if allowed < self.best < 1 and free:
                    self.descend(free)
                if self.best <= allowed:
                    candidates.append(self.params)
            candidates = [self.short(other, allowed) for other in candidates]
            simplest = min(candidates, key=lambda other: matching.order(self.match(other)))
            if simplest == parameters:
                break
            parameters = simplest
        return parameters

    def short(self, parameters: dict[str, Any], allowed: float) -> dict[str, Any]:
        """Parameters whose numbers have as few digits as fit about as well."""
        parameters, plain = dict(parameters), params.defaults(self.method.fn)
        for name, value in parameters.items():
            for other in _rounded(value) if value != plain[name] else ():
                if other != value and self.cost(parameters | {name: other}) <= allowed:
                    parameters[name] = other
                    break
        return parameters

    def match(self, parameters: dict[str, Any]) -> Match:
        """The match of the method at these parameters."""
        match = matching.at(self.method.variant(**parameters), self.grad, self.tokens, self.noise)
        assert match is not None
        return match

    def pinned(self, parameters: dict[str, Any]) -> bool:
        """Whether these tokens determine every number that is not a default; a threshold between tokens may be free."""
        plain = params.defaults(self.method.fn)
        for name, value in parameters.items():
            for i in _numbers(value) if value != plain[name] else ():
                near = [
                    _filled(parameters, [(name, i)], np.array([_part(value, i) * by]))
                    for by in (1 - PINNED, 1 + PINNED)
                ]
                if any(self.cost(other) <= self.goal for other in near if _part(value, i)):
                    return False
        return True

    def narrow(self, name: str) -> None:
        """Refine a threshold between its neighbours among the numbers tried."""
        for _ in range(NARROWED):
            value = self.params[name]
            if not isinstance(value, float) or self.best <= self.goal:
                return
            low = max((n for n in NUMBERS if n < value), default=value / 2)
            high = min((n for n in NUMBERS if n > value), default=value * 2)
            for other in np.linspace(low, high, 9)[1:-1].tolist():
                self.take(self.params | {name: other})


class ThresholdFit(Fit):
    """The fit of a method to a gradient that it has on most tokens, by the share of tokens rather than by squares.

    A token on the wrong side of a clip may be off by a thousand times its gradient, which would dominate least squares.
    """

    def size(self, method_grad: Tensor | None) -> float:
        """The root mean square over tokens of the relative distance at the factor of most tokens, each at most 1."""
        if method_grad is None or not bool(method_grad.isfinite().all()):
            return math.inf
        method_grad = method_grad.double()
        factor, _, _ = matching.agreement(self.g, method_grad, self.noise)
        larger = self.g.norm(dim=-1).maximum(abs(factor) * method_grad.norm(dim=-1)) + self.noise.rows / TOLERANCE
        relative = (self.g - factor * method_grad).norm(dim=-1) / larger.clamp(min=1e-300)
        return float(relative.clamp(max=1.0).square().mean().sqrt())


def _filled(start: dict[str, Any], free: list[tuple[str, int | None]], x: np.ndarray) -> dict[str, Any]:
    parameters = dict(start)
    for (name, i), value in zip(free, x.tolist(), strict=True):
        parameters[name] = (
            value if i is None else tuple(value if j == i else old for j, old in enumerate(parameters[name]))
        )
    return parameters


def _part(value: Any, i: int | None) -> float:
    return value if i is None else value[i]


def _numbers(value: Any) -> Iterator[int | None]:
    """The places of real numbers in a parameter: None for the whole of it, or indices of a tuple."""
    if isinstance(value, float):
        yield None
    elif isinstance(value, tuple):
        yield from (i for i, part in enumerate(value) if isinstance(part, float))


def _candidates(value: Any, hint: Any, numbers: Sequence[float] = ()) -> list[Any]:
    """Other values of a parameter."""
    near: list[Any] = params.special_values(hint) if hint is not None else []
    if isinstance(value, bool) or isinstance(value, str):
        return near
    if isinstance(value, int):
        return [*near, *WHOLE]
    if isinstance(value, float):
        return [*near, *NUMBERS, *numbers, *(value * f for f in (0.5, 0.8, 1.25, 2.0))]
    if value is None and any(isinstance(one, float) for one in near):  # None, but a number is allowed
        return [*near, *NUMBERS, *numbers]
    if isinstance(value, tuple):
        return [
            tuple(n if j == i else v for j, v in enumerate(value))
            for i in range(len(value))
            for n in (*NUMBERS, *numbers)
        ]
    return near


def _rounded(value: Any) -> Iterator[Any]:
    if isinstance(value, float):
        yield from (0.0,) if abs(value) < NOTHING else ()
        yield from (float(f"{value:.{digits}g}") for digits in (1, 2, 3, 4, 5, 6, 8))
    elif isinstance(value, tuple):
        yield from (tuple(float(f"{part:.{digits}g}") for part in value) for digits in (1, 2, 3, 4, 5, 6))
