"""Laws: the formula that a pull follows across tokens, with its parameters, its misfit and the domain it was seen on."""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from scipy.optimize import minimize_scalar
from torch import Tensor

from qlens.findings.features import Features, Seen, line, plain
from qlens.tokens import Tokens

FEWEST = 5  # tokens that a law must hold on beyond its parameters


@dataclass(frozen=True)
class Law:
    """A formula for a pull, in the words of the field.

    Args:
        formula: with its numbers filled in, like "p_y^0.5".
        parameters: how many numbers were fitted.
        misfit: relative, root mean square over the tokens.
        values: the numbers, by name.
        domain: where it was seen.
    """

    formula: str
    parameters: int
    misfit: float
    values: dict[str, float]
    domain: str = ""

    def __str__(self) -> str:
        return f"{self.formula} ({self.domain})" if self.domain else self.formula


def law(
    pull: Tensor, tokens: Tokens, tolerance: float = 1e-6, noise: Tensor | float = 1e-15, further: Sequence[Seen] = ()
) -> Law | None:
    """The simplest formula that a pull (N,) follows on these tokens, or None if none of the known ones does.

    Known: a constant; powers of p_y, 1 - p_y, p_y / (1 - p_y), the entropy (of the top k too), and of the ratio to another
    model; those with a weight that carries its gradient; a + b p_y; thresholds, clips, masks; one value per sequence or pair;
    any of them times the advantage or the token's weight.

    Args:
        pull: the pull in unit scale, NaN where it is not known.
        tokens: where it was read.
        tolerance: the relative misfit that counts as exact.
        noise: the rounding of the gradient, absolute, (N,) or one number; divided by 1 - p_y, that of a pull.
        further: the same pull at other tokens, of another vocabulary, say; the formula holds on all of them.

    Example:
        >>> import qlens
        >>> t = qlens.probes()
        >>> law(t.label_probs.sqrt(), t).formula
        'p_y^0.5'
    """
    seen = [one for one in (Seen(pull, tokens, noise).known(), *(other.known() for other in further)) if len(one.pull)]
    if sum(len(one.pull) for one in seen) < FEWEST:
        return None
    features = _Laws(seen, tolerance)
    found = next(iter(features.laws()), None)
    return found and Law(found.formula, found.parameters, found.misfit, found.values, features.domain)


def thresholds(seen: Seen, on: np.ndarray) -> Iterator[str]:
    """What tells some tokens from the others, in words: a mask, or a threshold of a signal."""
    yield from (rule for rule, _, _ in _Laws([seen], 1e-6).rules(on))


class _Laws(Features):
    """The formulas that are known, each tried on a pull."""

    def laws(self) -> Iterator[Law]:
        """Everything that fits, simplest first."""
        everywhere = np.ones(len(self.b), bool)
        yield from self.smooth(everywhere)
        yield from self.switched()
        yield from self.clipped()
        yield from self.grouped()

    def smooth(self, where: np.ndarray) -> Iterator[Law]:
        """Laws without steps that hold on the tokens ``where``."""
        b = self.b[where]
        if len(b) < FEWEST or np.abs(b).max() == 0:
            if len(b) and np.abs(b).max() == 0:
                yield Law("0", 0, 0.0, {})
            return
        yield from self.powers(where, self.b, "")
        yield from self.affine(where)
        yield from self.carried(where)
        for said, factor in self.factors.items():
            if np.abs(factor[where]).min() > 0:
                yield from self.powers(where, self.b / factor, f"{said} ")

    def powers(self, where: np.ndarray, values: np.ndarray, times: str) -> Iterator[Law]:
        """c times a power of one feature, by a line through the logarithms."""
        b = values[where]
        sign = np.sign(b[np.abs(self.b[where]) > self.floor[where] * self.tolerance])  # of a pull beyond rounding
        if not len(sign) or not (sign == sign[0]).all():
            return
        factor = self.factors[times.strip()] if times else 1.0
        size = np.maximum(np.abs(b), 1e-300)
        logs, named = np.log(size), "-" if sign[0] < 0 else ""
        weight = 1 / (1 + self.floor[where] / size)  # what is rounding says little
        for name, feature in self.powered():
            x = feature[where]
            for free in (False, True):
                if name == "" and not free:
                    c, a = float(np.average(logs, weights=weight)), 0.0
                elif name == "" or not np.isfinite(x).all() or np.ptp(x) < 1e-9:
                    continue
                else:
                    c, a = line(x, logs, weight, free)
                if name and abs(a) < 1e-3:
                    continue
                base = np.where(np.isfinite(feature), feature, 0.0)

                def form(power: float, size: float, base: np.ndarray = base) -> np.ndarray:
                    return sign[0] * size * np.exp(power * base) * factor

                if found := self.shortest(where, form, (a, math.exp(min(c, 700.0)))):
                    miss, (power, size) = found
                    said = {"c": float(sign[0]) * size} | ({"a": power} if name else {})
                    yield Law(_product(named, size, name, power, times), int(free) + int(bool(name)), miss, said)

    def powered(self) -> Iterator[tuple[str, np.ndarray]]:
        """Logarithms of what may be raised to a power, by name."""
        yield "", np.zeros(len(self.b))
        yield "p_y", self.log_p
        yield "(1 - p_y)", self.log_rest
        yield "(p_y / (1 - p_y))", self.log_p - self.log_rest
        for name, log_q in self.models.items():
            yield f"(p_y / {name}_y)", self.log_p - log_q
            yield f"{name}_y", log_q
        with np.errstate(divide="ignore"):
            yield "H", np.log(self.entropy)
            yield "(1 + H)", np.log1p(self.entropy)
            for k, entropy in self.top.items():
                yield f"H_top-{k}", np.log(np.maximum(entropy, 0))
            for k, mass in self.mass.items():
                yield f"p_top-{k}", np.log(mass)

    def affine(self, where: np.ndarray) -> Iterator[Law]:
        """a + b p_y, and p_y's own ratio to other models: a + b r_y / p_y."""
        features = {"p_y": np.exp(self.log_p)}
        for name, log_q in self.models.items():
            features[f"{name}_y / p_y"] = np.exp(log_q - self.log_p)
            features[f"log({name}_y / p_y)"] = log_q - self.log_p
        for name, x in features.items():
            if (alone := self.shortest(where, lambda c, x=x: c * x, (self._scaled(x, where)[1],))) is not None:
                miss, (c,) = alone
                yield Law(f"{'-' if c < 0 else ''}{_times(abs(c))}{name}", 1, miss, {"c": c})
            a = np.stack([np.ones_like(x), x], 1)
            weight = 1 / (np.abs(self.b[where]) + self.floor[where])
            (low, slope), *_ = np.linalg.lstsq(a[where] * weight[:, None], self.b[where] * weight, rcond=None)
            found = self.shortest(where, lambda low, slope, x=x: low + slope * x, (float(low), float(slope)))
            if found is not None and abs(slope) > 1e-6:
                miss, (low, slope) = found
                between = "-" if slope < 0 else "+"
                yield Law(f"{plain(low)} {between} {_times(abs(slope))}{name}", 2, miss, {"a": low, "b": slope})

    def carried(self, where: np.ndarray) -> Iterator[Law]:
        """A weight w(p_y) on -log p_y that carries its own gradient: w + p_y w' log p_y."""
        forms: dict[str, tuple[Callable[[float], np.ndarray], tuple[float, float]]] = {
            "p_y^{0} (1 + {0} log p_y), the weight p_y^{0}": (
                lambda a: np.exp(a * self.log_p) * (1 + a * self.log_p),
                (-0.99, 8.0),
            ),
            "(1 - p_y)^{0} (1 - {0} p_y log p_y / (1 - p_y)), the weight (1 - p_y)^{0}": (
                lambda a: np.exp(a * self.log_rest) * (1 - a * np.exp(self.log_p - self.log_rest) * self.log_p),
                (0.05, 12.0),
            ),
        }
        for name, (form, (low, high)) in forms.items():
            a = _best(lambda a, form=form: self.misfit(self._scaled(form(a), where)[0], where), low, high)
            found = self.shortest(where, lambda a, c, form=form: c * form(a), (a, self._scaled(form(a), where)[1]))
            if found is not None and abs(a) > 1e-3:
                miss, (a, c) = found
                text = name.format(plain(a)) if a != 1 else name.replace("^{0}", "").replace("{0} ", "")
                formula = f"{_times(c)}{text} carrying its own gradient"
                yield Law(formula, 2, miss, {"c": c, "a": a})

    def _scaled(self, made: np.ndarray, where: np.ndarray) -> tuple[np.ndarray, float]:
        x, weight = made[where], 1 / (np.abs(self.b[where]) + self.floor[where])
        c = float((x * self.b[where] * weight**2).sum() / max((x * x * weight**2).sum(), 1e-300))
        c = float(f"{c:.9g}")  # an exact 1 comes out as 1
        return c * made, c

    def switched(self) -> Iterator[Law]:
        """A law on some tokens and nothing on the others, told apart by a threshold or a mask."""
        on = np.abs(self.b) > self.tolerance * max(np.abs(self.b).max(), 1e-300) * 1e-3
        on &= np.abs(self.b) > 10 * self.floor * self.tolerance
        usual = np.median(np.abs(self.b[on])) if on.any() else 0.0
        if not usual or bool((10 * self.floor * self.tolerance >= usual)[~on].all()):
            return  # a usual pull would not be seen where none is
        for rule, values, count in (*self.rules(on), *self.sided(on)):
            for inner in self.smooth(on):
                formula = f"{inner.formula} {rule}, 0 elsewhere"
                yield Law(formula, inner.parameters + count, inner.misfit, inner.values | values)

    def rules(self, on: np.ndarray) -> Iterator[tuple[str, dict[str, float], int]]:
        """What tells the tokens that are on from the others."""
        for name, mask in self.masks.items():
            if (mask == on).all():
                yield f"where {name}", {}, 0
            if (~mask == on).all():
                yield f"where not {name}", {}, 0
        signals = {"p_y": np.exp(self.log_p)}
        signals |= {f"p_y / {n}_y": np.exp(self.log_p - q) for n, q in self.models.items()}
        signals |= {f"{n}_y": np.exp(q) for n, q in self.models.items()} | {"H": self.entropy}
        signals |= {"the label's rank (0 first)": self.rank}
        for name, x in signals.items():
            low, high = x[on].min(), x[on].max()
            whole = bool((x == np.round(x)).all())  # of whole numbers the last that is on
            # at the threshold itself rounding decides; whole numbers are not rounded
            tie = -0.5 if whole else 1e-9 * max(abs(low), abs(high))
            below, above = x[~on & (x <= low + tie)], x[~on & (x >= high - tie)]
            if len(below) + len(above) != (~on).sum():
                continue
            ends, said = {}, []
            if len(below):
                ends["low"] = low if whole else between(below.max(), low)
                said.append(f"{name} >= {plain(ends['low'])} (seen between {plain(below.max())} and {plain(low)})")
            if len(above):
                ends["high"] = high if whole else between(high, above.min())
                said.append(f"{name} <= {plain(ends['high'])} (seen between {plain(high)} and {plain(above.min())})")
            yield "where " + " and ".join(said), ends, len(said)

    def sided(self, on: np.ndarray) -> Iterator[tuple[str, dict[str, float], int]]:
        """The clip of a policy's objective: on while the ratio has not gone too far the way that the advantage pays."""
        if self.advantage is None:
            return
        for name, log_q in self.models.items():
            ratio, up = np.exp(self.log_p - log_q), self.advantage > 0
            ends = [(ratio[on & up], ratio[~on & up], 1), (ratio[on & ~up], ratio[~on & ~up], -1)]
            if any(len(kept) and len(cut) and (kept * side).max() >= (cut * side).min() for kept, cut, side in ends):
                continue
            if not all(len(kept) and len(cut) for kept, cut, _ in ends):
                continue
            high, low = between(ends[0][0].max(), ends[0][1].min()), between(ends[1][1].max(), ends[1][0].min())
            rule = f"while p_y / {name}_y <= {plain(high)} (A > 0) or >= {plain(low)} (A < 0)"
            yield rule, {"high": high, "low": low}, 2

    def clipped(self) -> Iterator[Law]:
        """A law that is held at a least or a greatest value, or at both."""
        ends = {"at most": self.b.max(), "at least": self.b.min()}
        held = {word: np.abs(self.b - end) <= self.tolerance * abs(end) for word, end in ends.items()}
        there = [word for word in ends if held[word].sum() >= 2]
        for words in ([word] for word in there) if len(there) < 2 else (*([word] for word in there), there):
            cut = np.any([held[word] for word in words], axis=0)
            if (~cut).sum() < FEWEST:
                continue
            for inner in self.smooth(~cut):
                if inner.formula == "0":
                    continue  # that is a switch
                said = ", ".join(f"{word} {plain(ends[word])}" for word in words)
                numbers = inner.values | {word: float(ends[word]) for word in words}
                yield Law(f"{inner.formula}, {said}", inner.parameters + len(words), inner.misfit, numbers)

    def grouped(self) -> Iterator[Law]:
        """One value per sequence, or per side of a pair up to its length."""
        for name, ids in self.groups.items():
            means = np.array([self.b[ids == i].mean() for i in ids])
            miss = self.fits(np.ones(len(ids), bool), means)
            if miss is not None and len(set(ids)) < len(ids):
                low, high = plain(self.b.min()), plain(self.b.max())
                yield Law(f"one value per {name}, {low} to {high}", len(set(ids)), miss, {})


def _best(cost: Callable[[float], float], low: float, high: float) -> float:
    """The least of a one-dimensional cost: the best of a grid, then the bottom beside it."""
    grid = np.linspace(low, high, 60)
    at = int(np.argmin([cost(a) for a in grid]))
    bounds = grid[max(at - 1, 0)], grid[min(at + 1, len(grid) - 1)]
    return float(minimize_scalar(cost, bounds=bounds, method="bounded", options={"xatol": 1e-12}).x)


def between(low: float, high: float) -> float:
    """The shortest number in (low, high], high above 0; what somebody may have written."""
    return next((n for d in range(1, 17) if low < (n := float(f"{high:.{d}g}")) <= high), high)


def _times(c: float) -> str:
    return "" if c == 1 else f"{plain(c)} "


def _product(sign: str, size: float, name: str, a: float, times: str = "") -> str:
    """sign size times name^a as somebody would write it."""
    power = "" if a == 1 or not name else f"^{plain(a)}"
    if name.startswith("H_top-"):
        k = int(name.removeprefix("H_top-"))
        if abs(math.log(size) + a * math.log(math.log(k))) < 1e-6:
            whole = f"{name} / ln {k}"
            return sign + times + (f"({whole}){power}" if power else whole)
    words = [plain(size)] if size != 1 or not (name or times) else []
    return sign + " ".join([*words, *([times.strip()] if times else []), *([name + power] if name else [])])
