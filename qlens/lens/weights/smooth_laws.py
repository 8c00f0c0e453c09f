"""Smooth weight functions: powers, lines and undetached weights, fitted to the last digit."""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
from scipy.optimize import minimize_scalar

from qlens.lens.weights.features import Features, line, plain

FEWEST = 5  # tokens on which a formula must hold
EPSILONS = (math.log(1e-13), math.log(0.5))  # range of the logarithm of an epsilon beside p_y


@dataclass(frozen=True)
class Fit:
    """A formula that fits.

    Args:
        formula: with its numbers filled in.
        parameters: how many numbers were fitted.
        misfit: relative, root mean square over the tokens on which it was fitted.
        values: the numbers, by name.
        weights: its value at every token, also where it was not fitted, (N,).
    """

    formula: str
    parameters: int
    misfit: float
    values: dict[str, float]
    weights: np.ndarray


class Smooth(Features):
    """The formulas without steps, tried on one weight."""

    @property
    def rounded(self) -> np.ndarray:
        """Where the weight is no more than the rounding of the gradient, (N,)."""
        return np.abs(self.b) <= self.floor * self.tolerance

    @property
    def log_nll(self) -> np.ndarray:
        """The logarithm of -log p_y, to its last digit near p_y = 1 too, (N,)."""
        near_one = self.log_rest < math.log(0.5)
        rest = np.exp(np.where(near_one, self.log_rest, math.log(0.5)))
        with np.errstate(divide="ignore"):
            return np.log(np.where(near_one, -np.log1p(-rest), -self.log_p))

    def smooth(self, where: np.ndarray) -> Iterator[Fit]:
        """Formulas without steps that hold on the tokens ``where``."""
        there = int((~self.rounded[where]).sum())
        if where.any() and not there:
            yield Fit("0", 0, 0.0, {}, weights=np.zeros(len(self.b)))
        if int(where.sum()) < FEWEST or there < FEWEST:
            return
        yield from self.powers(where, self.b, "")
        yield from self.guarded(where)
        yield from self.affine(where)
        yield from self.undetached(where)
        for symbol, factor in self.factors.items():
            if np.abs(factor[where]).min() > 0:
                yield from self.powers(where, self.b / factor, f"{symbol} ")

    def powers(self, where: np.ndarray, values: np.ndarray, times: str) -> Iterator[Fit]:
        """c times a power of one feature, by a line through the logarithms."""
        b = values[where]
        sign = np.sign(b[~self.rounded[where]])
        if not len(sign) or not (sign == sign[0]).all():
            return
        factor = self.factors[times.strip()] if times else 1.0
        size = np.maximum(np.abs(b), 1e-300)
        logs, minus = np.log(size), "-" if sign[0] < 0 else ""
        weight = 1 / (1 + self.floor[where] / size)  # rounding gets little weight
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

                if fit := self.shortest(where, form, (a, math.exp(min(c, 700.0)))):
                    miss, (power, size) = fit
                    numbers = {"c": float(sign[0]) * size} | ({"a": power} if name else {})
                    if name == "(H / ln V)" and len(self.vocabularies) < 2 and len(plain(size)) > 4:
                        continue  # a factor of H itself
                    formula = product(minus, size, name, power, times)
                    yield Fit(formula, int(free) + int(bool(name)), miss, numbers, weights=form(power, size))

    def powered(self) -> Iterator[tuple[str, np.ndarray]]:
        """Logarithms of the features that may be raised to a power, by name."""
        yield "", np.zeros(len(self.b))
        yield "p_y", self.log_p
        yield "(1 - p_y)", self.log_rest
        yield "(p_y / (1 - p_y))", self.log_p - self.log_rest
        yield "(-log p_y)", self.log_nll
        with np.errstate(divide="ignore"):
            yield "max p", np.log(self.largest)
            yield "(1 - max p)", self.log_below_largest
            yield "(max p - second p)", np.log(self.largest - self.second)
            yield "(second p)", np.log(self.second)
            yield "(p_y / max p)", self.log_p - np.log(self.largest)
            yield "sum(p^2)", np.log(self.squares)
        for name, log_q in self.models.items():
            yield f"(p_y / {name}_y)", self.log_p - log_q
            yield f"{name}_y", log_q
        with np.errstate(divide="ignore"):
            yield "(H / ln V)", np.log(self.entropy) - np.log(self.log_size)
            yield "H", np.log(self.entropy)
            yield "(1 + H)", np.log1p(self.entropy)
            yield "exp(H)", self.entropy
            for name, entropy in self.entropies.items():
                yield f"(H of the {name})", np.log(entropy)
            for k, entropy in self.top.items():
                yield f"H_top-{k}", np.log(np.maximum(entropy, 0))
            for k, mass in self.mass.items():
                yield f"p_top-{k}", np.log(mass)

    def guarded(self, where: np.ndarray) -> Iterator[Fit]:
        """Powers times p_y / (p_y + eps), the effect of an epsilon beside p_y inside a logarithm."""
        b, there = self.b[where], ~self.rounded[where]
        sign = np.sign(b[there])
        if not (sign == sign[0]).all():
            return
        size = np.maximum(np.abs(b), 1e-300)
        weight = 1 / (1 + self.floor[where] / size)
        for name, base in (("", 0 * self.log_p), ("p_y", self.log_p), ("(1 - p_y)", self.log_rest)):

            def guard(log_eps: float) -> np.ndarray:
                return self.log_p - np.logaddexp(self.log_p, log_eps)

            def fitted(log_eps: float, base: np.ndarray = base, name: str = name) -> tuple[float, float, float]:
                """The squared error of the best power with this epsilon, its factor and its exponent."""
                logs = np.log(size) - guard(log_eps)[where]
                if name:
                    c, a = line(base[where], logs, weight, True)
                else:
                    c, a = float(np.average(logs, weights=weight**2)), 0.0
                return float(np.mean(np.square((logs - c - a * base[where]) * weight))), c, a

            def form(eps: float, a: float, c: float, base: np.ndarray = base) -> np.ndarray:
                return sign[0] * c * np.exp(a * base + guard(math.log(max(eps, 1e-300))))

            log_eps = best(lambda log_eps: fitted(log_eps)[0], *EPSILONS)
            _, c, a = fitted(log_eps)
            off = 1 - np.exp(guard(log_eps)[where][there])
            if (off > 1e-5).sum() < FEWEST or (name and abs(a) < 1e-3):
                continue
            if fit := self.shortest(where, form, (math.exp(log_eps), a, math.exp(min(c, 700.0)))):
                miss, (eps, a, c) = fit
                power = f"p_y^{plain(a + 1)}" if name == "p_y" else "p_y"
                outer = product("", c, name if name != "p_y" else "", a) if name == "(1 - p_y)" else multiple(c).strip()
                words = " ".join(filter(None, [outer, f"{power} / (p_y + {plain(eps)})"]))
                formula = f"{'-' if sign[0] < 0 else ''}{words}"
                numbers = {"c": float(sign[0]) * c, "epsilon": eps} | ({"a": a} if name else {})
                yield Fit(formula, 2 + int(bool(name)), miss, numbers, weights=form(eps, a, c))

    def affine(self, where: np.ndarray) -> Iterator[Fit]:
        """Lines a + b x in p_y, in entropies and other features, and in the ratio r_y / p_y to another model."""
        features = {"p_y": np.exp(self.log_p), "H / ln V": self.entropy / self.log_size, "H": self.entropy}
        features |= {"max p": self.largest, "(second p)": self.second, "(max p - second p)": self.largest - self.second}
        features |= {"sum(p^2)": self.squares}
        features |= {f"H of the {n} / ln V": entropy / self.log_size for n, entropy in self.entropies.items()}
        features |= {f"H_top-{k} / ln {k}": entropy / math.log(k) for k, entropy in self.top.items()}
        for name, log_q in self.models.items():
            features[f"{name}_y / p_y"] = np.exp(log_q - self.log_p)
            features[f"log({name}_y / p_y)"] = log_q - self.log_p
        for name, x in features.items():
            whole = "H" not in name  # a multiple of an entropy is fitted by ``powers``
            alone = self.shortest(where, lambda c, x=x: c * x, (self._scaled(x, where)[1],)) if whole else None
            if alone is not None:
                miss, (c,) = alone
                yield Fit(f"{'-' if c < 0 else ''}{multiple(abs(c))}{name}", 1, miss, {"c": c}, weights=c * x)
            a = np.stack([np.ones_like(x), x], 1)
            weight = 1 / (np.abs(self.b[where]) + self.floor[where])
            (low, slope), *_ = np.linalg.lstsq(a[where] * weight[:, None], self.b[where] * weight, rcond=None)
            fit = self.shortest(where, lambda low, slope, x=x: low + slope * x, (float(low), float(slope)))
            if fit is not None and abs(slope) > 1e-6:
                miss, (low, slope) = fit
                if name == "H / ln V" and len(self.vocabularies) < 2 and len(plain(abs(slope))) > 4:
                    continue  # a factor of H itself
                operator, weights = "-" if slope < 0 else "+", low + slope * x
                formula = f"{plain(low)} {operator} {multiple(abs(slope))}{name}"
                yield Fit(formula, 2, miss, {"a": low, "b": slope}, weights=weights)

    def undetached(self, where: np.ndarray) -> Iterator[Fit]:
        """An undetached weight w(p_y) on -log p_y: w + p_y w' log p_y."""
        forms: dict[str, tuple[Callable[[float], np.ndarray], tuple[float, float]]] = {
            "p_y^{0} (1 + {0} log p_y), the undetached weight p_y^{0}": (
                lambda a: np.exp(a * self.log_p) * (1 + a * self.log_p),
                (-0.99, 8.0),
            ),
            "(1 - p_y)^{0} (1 - {0} p_y log p_y / (1 - p_y)), the undetached weight (1 - p_y)^{0}": (
                lambda a: np.exp(a * self.log_rest) * (1 - a * np.exp(self.log_p - self.log_rest) * self.log_p),
                (0.05, 12.0),
            ),
        }
        for name, (form, (low, high)) in forms.items():
            a = best(lambda a, form=form: self.misfit(self._scaled(form(a), where)[0], where), low, high)
            fit = self.shortest(where, lambda a, c, form=form: c * form(a), (a, self._scaled(form(a), where)[1]))
            if fit is not None and abs(a) > 1e-3:
                miss, (a, c) = fit
                text = name.format(plain(a)) if a != 1 else name.replace("^{0}", "").replace("{0} ", "")
                formula = f"{multiple(c)}{text}"
                yield Fit(formula, 2, miss, {"c": c, "a": a}, weights=c * form(a))

    def _scaled(self, values: np.ndarray, where: np.ndarray) -> tuple[np.ndarray, float]:
        """Values times the factor that fits best on the tokens ``where``, by weighted least squares; and that factor."""
        x, weight = values[where], 1 / (np.abs(self.b[where]) + self.floor[where])
        c = float((x * self.b[where] * weight**2).sum() / max((x * x * weight**2).sum(), 1e-300))
        c = float(f"{c:.9g}")  # an exact 1 comes out as 1
        return c * values, c


def best(cost: Callable[[float], float], low: float, high: float) -> float:
    """The minimum of a one-dimensional cost: the best of a grid, then a bounded search around it."""
    grid = np.linspace(low, high, 60)
    at = int(np.argmin([cost(a) for a in grid]))
    bounds = grid[max(at - 1, 0)], grid[min(at + 1, len(grid) - 1)]
    return float(minimize_scalar(cost, bounds=bounds, method="bounded", options={"xatol": 1e-12}).x)


def multiple(c: float) -> str:
    """A factor as printed before a formula, "" where it is 1."""
    return "" if c == 1 else f"{plain(c)} "


def product(sign: str, size: float, name: str, a: float, times: str = "") -> str:
    """The formula sign * size * times * name^a, without factors and powers of 1."""
    power = "" if a == 1 or not name else f"^{plain(a)}"
    if name.startswith("H_top-"):
        k = int(name.removeprefix("H_top-"))
        if abs(math.log(size) + a * math.log(math.log(k))) < 1e-6:
            whole = f"{name} / ln {k}"
            return sign + times + (f"({whole}){power}" if power else whole)
    words = [plain(size)] if size != 1 or not (name or times) else []
    return sign + " ".join([*words, *([times.strip()] if times else []), *([name + power] if name else [])])
