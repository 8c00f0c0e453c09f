"""Weight functions: the formula of a weight across tokens, with its parameters, misfit and the range of the tokens."""

from collections.abc import Iterator, Sequence
from copy import copy
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from qlens.core.tokens import Tokens
from qlens.lens.weights.features import WeightReading, plain
from qlens.lens.weights.smooth_laws import FEWEST, Smooth

FEWEST_CUT = 2  # tokens on either side of a threshold on anything but p_y
COUNTS = {2: "two", 3: "three"}  # numbers of values that a weight may take without a known rule
NEAR_ONE = 0.99  # probabilities above which thresholds are written as 1 - x


@dataclass(frozen=True)
class Law:
    """A weight function.

    Args:
        formula: with its numbers filled in, like "p_y^0.5".
        parameters: how many numbers were fitted.
        misfit: relative, root mean square over the tokens.
        values: the numbers, by name.
        domain: the range of the tokens it was fitted on, in words.
        where: the tokens on which it holds, in words, where it is 0 on the others; else "".
    """

    formula: str
    parameters: int
    misfit: float
    values: dict[str, float]
    domain: str = ""
    where: str = ""

    def __str__(self) -> str:
        return f"{self.formula} ({self.domain})" if self.domain else self.formula


def law(
    pull: Tensor,
    tokens: Tokens,
    tolerance: float = 1e-6,
    noise: Tensor | float = 1e-15,
    further: Sequence[WeightReading] = (),
) -> Law | None:
    """The simplest known formula of a weight (N,) on some tokens, or None.

    Known: a constant; powers of p_y, 1 - p_y, p_y / (1 - p_y), the largest p, the second, their difference, p_y / max p, the
    entropy (of the top k too), and of the ratio to another model; the same with an undetached weight; a + b p_y;
    thresholds, clips, masks; one value per sequence or pair;
    any of them times the advantage or the token's weight.

    Args:
        pull: the weight in unit scale, NaN where it is not known.
        tokens: the tokens that it belongs to.
        tolerance: relative misfit that counts as exact.
        noise: absolute rounding error of the gradient, (N,) or one number.
        further: the same weight on other tokens, of another vocabulary for example; the formula holds on all of them.

    Example:
        >>> import qlens
        >>> t = qlens.probes()
        >>> law(t.label_probs.sqrt(), t).formula
        'p_y^0.5'
    """
    readings = [
        one
        for one in (WeightReading(pull, tokens, noise).where_known(), *(other.where_known() for other in further))
        if len(one.pull)
    ]
    if sum(len(one.pull) for one in readings) < FEWEST:
        return None
    features = _Laws(readings, tolerance)
    simplest = next(iter(features.laws()), None)
    return simplest and Law(
        simplest.formula, simplest.parameters, simplest.misfit, simplest.values, features.domain, simplest.where
    )


def thresholds(readings: Sequence[WeightReading], on: np.ndarray) -> Iterator[str]:
    """Rules that hold on the tokens ``on`` of one or more readings and on no others: masks, or thresholds of a signal."""
    yield from (rule for rule, _, _ in _Laws(readings, 1e-6).rules(on))


class _Laws(Smooth):
    """All known formulas, tried on one weight."""

    def laws(self) -> Iterator[Law]:
        """The formulas that fit, simplest first."""
        everywhere = np.ones(len(self.b), bool)
        yield from (Law(f.formula, f.parameters, f.misfit, f.values) for f in self.smooth(everywhere))
        yield from self.switched()
        yield from self.clipped()
        yield from self.in_pieces()
        yield from self.few_valued()
        yield from self.grouped()

    def switched(self) -> Iterator[Law]:
        """A formula on some tokens and 0 on the others, separated by a threshold or a mask."""
        on = np.abs(self.b) > self.tolerance * max(np.abs(self.b).max(), 1e-300) * 1e-3
        on &= np.abs(self.b) > 10 * self.floor * self.tolerance
        usual = np.median(np.abs(self.b[on])) if on.any() else 0.0
        hidden = ~on & (10 * self.floor * self.tolerance >= usual)  # a usual weight would not be visible there
        if not usual or bool(hidden[~on].all()):
            return
        if hidden.any():
            yield from _Laws(self.without(hidden), self.tolerance).switched()
            return
        for rule, values, count in (*self.rules(on), *self.sided(on)):
            for inner in self.smooth(on):
                formula = f"{inner.formula} {rule}, 0 elsewhere"
                yield Law(formula, inner.parameters + count, inner.misfit, inner.values | values, where=rule)

    def without(self, hidden: np.ndarray) -> list[WeightReading]:
        """The readings without the tokens ``hidden``."""
        ends = np.cumsum([len(one.pull) for one in self.readings])[:-1]
        visible = [
            torch.from_numpy(~part).to(one.pull.device)
            for part, one in zip(np.split(hidden, ends), self.readings, strict=True)
        ]
        return [one[rows] for one, rows in zip(self.readings, visible, strict=True) if bool(rows.any())]

    def rules(self, on: np.ndarray) -> Iterator[tuple[str, dict[str, float], int]]:
        """Rules that hold on the tokens ``on`` and on no others, with their thresholds and how many these are."""
        for name, mask in self.masks.items():
            if (mask == on).all():
                yield f"where {name}", {}, 0
            if (~mask == on).all():
                yield f"where not {name}", {}, 0
        few = min(int(on.sum()), int((~on).sum())) < FEWEST_CUT  # then one of many signals may separate them by chance
        for name, x in list(self.signals().items())[: 1 if few else None]:
            low, high = x[on].min(), x[on].max()
            whole = bool((x == np.round(x)).all())
            key = self.log_p - self.log_rest if name == "p_y" else x  # resolves probabilities near 1
            # whole numbers are not rounded
            tie = -0.5 if whole else 1e-12 if name == "p_y" else 1e-9 * max(abs(low), abs(high))
            first, last = key[on].min(), key[on].max()  # at the threshold itself rounding decides
            near_one = name == "p_y" and high > NEAR_ONE
            slack = tie + (4 * np.finfo(float).eps * np.exp(last) if near_one else 0.0)  # 1 - p_y is rounded as p_y is
            below, above = ~on & (key <= first + tie), ~on & (key >= last - slack)
            if (below | above).sum() != (~on).sum():
                continue
            under, over = below & (key < first - tie), above & (key > last + slack)  # the tokens that each end excludes
            at_end = near_one and above.any() and not over.any()
            if (below.any() and not under.any()) or (above.any() and not over.any() and not at_end):
                continue
            ends, conditions = {}, []
            if below.any():
                cut = x[under].max()
                ends["low"] = low if whole else between(cut, low)  # of whole numbers the last that is on
                conditions.append(f"{name} >= {plain(ends['low'])}{_interval(plain(cut), plain(low))}")
            if at_end:
                ends["high"] = high
                conditions.append(f"{name} <= 1 - {plain(np.exp(self.log_rest)[on].min())} (where rounding decides)")
            elif above.any():
                cut = x[over].min()
                ends["high"] = high if whole else between(high, cut)
                text = f"{plain(ends['high'])}{_interval(plain(high), plain(cut))}"
                if near_one:
                    rest = np.exp(self.log_rest)
                    least, most = rest[over].max(), rest[on].min()
                    ends["high"] = 1 - between(least, most)
                    text = f"1 - {plain(between(least, most))}{_interval(f'1 - {plain(most)}', f'1 - {plain(least)}')}"
                conditions.append(f"{name} <= {text}")
            yield "where " + " and ".join(conditions), ends, len(conditions)

    def signals(self) -> dict[str, np.ndarray]:
        """The signals that a threshold may be on, by name."""
        signals = {"p_y": np.exp(self.log_p)}
        signals |= {f"p_y / {n}_y": np.exp(self.log_p - q) for n, q in self.models.items()}
        signals |= {f"{n}_y": np.exp(q) for n, q in self.models.items()}
        signals |= {"H": self.entropy, "H / ln V": self.entropy / self.log_size, "the largest p": self.largest}
        signals |= {"the largest p - the second": self.largest - self.second, "the second largest p": self.second}
        signals |= {"the label's rank (0 first)": self.rank}
        signals |= {f"the label's rank for the {n} (0 first)": rank for n, rank in self.ranks.items()}
        signals |= {f"H of the {n}": entropy for n, entropy in self.entropies.items()}
        return signals | {f"H_top-{k}": entropy for k, entropy in self.top.items()}

    def sided(self, on: np.ndarray) -> Iterator[tuple[str, dict[str, float], int]]:
        """The clip of a policy objective: on while the ratio is within its bound for the sign of the advantage."""
        if self.advantage is None:
            return
        for name, log_q in self.models.items():
            ratio, up = np.exp(self.log_p - log_q), self.advantage > 0
            ends = [(ratio[on & up], ratio[~on & up], 1), (ratio[on & ~up], ratio[~on & ~up], -1)]
            if any(
                len(inside) and len(outside) and (inside * side).max() >= (outside * side).min()
                for inside, outside, side in ends
            ):
                continue
            if not all(len(inside) and len(outside) for inside, outside, _ in ends):
                continue
            high, low = between(ends[0][0].max(), ends[0][1].min()), between(ends[1][1].max(), ends[1][0].min())
            rule = f"while p_y / {name}_y <= {plain(high)} (A > 0) or >= {plain(low)} (A < 0)"
            yield rule, {"high": high, "low": low}, 2

    def clipped(self) -> Iterator[Law]:
        """A formula clipped at a smallest or largest value, also times the advantage or the weight."""
        for symbol, factor in self.factors.items():
            if np.abs(factor).min() > 0:
                one = copy(self)
                one.b, one.floor, one.factors = self.b / factor, self.floor / np.abs(factor), {}
                for law in one.clipped_alone():
                    yield replace(law, formula=f"{symbol} ({law.formula})")
        yield from self.clipped_alone()

    def clipped_alone(self) -> Iterator[Law]:
        """A formula clipped at a smallest or largest value, without such a factor."""
        ends = {"at most": self.b.max(), "at least": self.b.min()}
        at_bound = {word: np.abs(self.b - end) <= self.tolerance * abs(end) for word, end in ends.items()}
        there = [word for word in ends if at_bound[word].sum() >= 2]
        for words in ([word] for word in there) if len(there) < 2 else (*([word] for word in there), there):
            cut = np.any([at_bound[word] for word in words], axis=0)
            if (~cut).sum() < FEWEST:
                continue
            for inner in self.smooth(~cut):
                if not self._varies(inner.weights, ~cut):
                    continue  # a step, not a clip
                if not all(self._beyond(inner.weights, ends[word], word, at_bound[word]) for word in words):
                    continue
                bounds = ", ".join(f"{word} {plain(ends[word])}" for word in words)
                numbers = inner.values | {word: float(ends[word]) for word in words}
                yield Law(f"{inner.formula}, {bounds}", inner.parameters + len(words), inner.misfit, numbers)

    def _varies(self, values: np.ndarray, where: np.ndarray) -> bool:
        """Whether a formula takes more than one value on some tokens."""
        return bool(np.ptp(values[where]) > 10 * self.tolerance * np.abs(values[where]).max())

    def _beyond(self, values: np.ndarray, end: float, word: str, clipped: np.ndarray) -> bool:
        """Whether a formula would be beyond its clip wherever the weight is clipped."""
        slack = 10 * self.tolerance * (abs(end) + self.floor[clipped])
        return bool((values[clipped] >= end - slack if word == "at most" else values[clipped] <= end + slack).all())

    def in_pieces(self) -> Iterator[Law]:
        """A formula on some tokens and one other value on the rest, separated by a threshold or a mask."""
        for value in self.repeated():
            on = ~self._near(value)
            if not value or int(on.sum()) < FEWEST:
                continue
            for rule, values, count in (*self.rules(on), *self.sided(on)):
                for inner in self.smooth(on):
                    formula = f"{inner.formula} {rule}, {plain(value)} elsewhere"
                    numbers = inner.values | values | {"elsewhere": value}
                    yield Law(formula, inner.parameters + count + 1, inner.misfit, numbers)

    def few_valued(self) -> Iterator[Law]:
        """A weight of two or three values, without a known rule for which."""
        values = sorted(self.repeated(2))
        if len(values) not in COUNTS or len(self.b) < FEWEST * len(values):
            return
        near = np.array([self._near(value) for value in values])
        within = np.array(
            [near[:, self.reading == place].any(1) for place in set(self.reading)]
        )  # which reading has which
        apart = within & (within.sum(0) == 1) if len(within) > 1 else within & False
        if near.any(0).all() and apart.any(1).sum() < 2:  # one value per reading is a factor of the reading
            *first, last = map(plain, values)
            nearest = np.select(list(near), values)
            formula = f"{COUNTS[len(values)]} values, {', '.join(first)} and {last}"
            yield Law(formula, len(values), self.misfit(nearest, ~self.rounded), {"low": values[0], "high": values[-1]})

    def _near(self, value: float) -> np.ndarray:
        """Where the weight has this value, (N,)."""
        return np.abs(self.b - value) <= 10 * self.tolerance * (abs(value) + self.floor)

    def repeated(self, least: int = 3) -> list[float]:
        """Values that the weight takes at several tokens, at most three, the rarest first."""
        counts: list[tuple[int, float]] = []
        remaining = np.ones(len(self.b), bool)
        while remaining.any() and len(counts) < 3:
            values = np.where(self.rounded, 0.0, self.b)[remaining]
            value = float(values[np.argmax([(np.abs(values - v) <= 1e-9 * abs(v)).sum() for v in values])])
            value = float(f"{value:.9g}")  # an exact 1 comes out as 1
            near = remaining & self._near(value)
            if int(near.sum()) < least:
                break
            counts.append((int(near.sum()), value))
            remaining &= ~near
        return [value for _, value in sorted(counts)]

    def grouped(self) -> Iterator[Law]:
        """One value per sequence, or per side of a pair up to its length."""
        for name, ids in self.groups.items():
            means = np.array([self.b[ids == i].mean() for i in ids])
            if all(
                np.ptp(means[self.reading == one]) <= self.tolerance * np.abs(means).max() for one in set(self.reading)
            ):
                continue  # one value per reading is a factor
            miss = self.fits(np.ones(len(ids), bool), means)
            if miss is not None and len(set(ids)) < len(ids):
                low, high = plain(self.b.min()), plain(self.b.max())
                yield Law(f"one value per {name}, {low} to {high}", len(set(ids)), miss, {})


def _interval(first: str, last: str) -> str:
    """The values of a signal between which a threshold lies, in words; "" where they print alike."""
    return "" if first == last else f" (seen between {first} and {last})"


def between(low: float, high: float) -> float:
    """The shortest number in (low, high], high above 0, the nearest to the middle."""
    candidates = (float(f"{value:.{d}g}") for d in range(1, 17) for value in ((low + high) / 2, high))
    return next((n for n in candidates if low < n <= high), high)
