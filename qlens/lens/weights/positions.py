"""Position weights: weights by position, found by putting copies of one token at all positions of the batch."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from qlens.core.errors import InputError
from qlens.core.tokens import Tokens
from qlens.lens.identify.matching import written
from qlens.lens.reading import Reading
from qlens.lens.rounding import TOLERANCE, rounding
from qlens.lens.weights.features import numpy_of, plain
from qlens.lens.weights.label_weights import trial_gradient
from qlens.registry.variant import Variant

EQUAL = 1e-5  # relative difference of two weights that count as equal
NONE = 1e-7  # share of the largest weight that counts as rounding
EXACT = 1e-9  # relative difference to a short number
FEWEST = 4  # positions on which a formula must hold
PLACED = (0.35, 0.8)  # label probabilities of the tokens that are put at every position
LISTED = 6  # weights that are printed where no formula is known
IN_SEQUENCE, IN_BATCH = "t the position in its sequence, 0 first", "i the row of the batch, 0 first"
WORDS = {
    "t": IN_SEQUENCE,
    "e": "e the number of tokens of its sequence that follow",
    "t / n": f"{IN_SEQUENCE}, n the length of its sequence",
    "(t + 1) / n": f"{IN_SEQUENCE}, n the length of its sequence",
    "t / T": f"{IN_SEQUENCE}, T the length of the longest sequence",
    "(t + 1) / T": f"{IN_SEQUENCE}, T the length of the longest sequence",
    "t / (T - 1)": f"{IN_SEQUENCE}, T the length of the longest sequence",
    "i": IN_BATCH,
    "j": "j the number of rows that follow",
    "i / N": f"{IN_BATCH}, N the number of rows",
    "(i + 1) / N": f"{IN_BATCH}, N the number of rows",
    "i / (N - 1)": f"{IN_BATCH}, N the number of rows",
}


@dataclass(frozen=True)
class PositionWeights:
    """Weights by position.

    Args:
        formula: with the meaning of its symbols; "" if unknown.
        weights: of every token shown, in order.
        besides: a further factor of the sequence or batch, in words; "" where there is none.
    """

    formula: str
    weights: tuple[float, ...]
    besides: str = ""

    def __str__(self) -> str:
        low, high = plain(min(self.weights)), plain(max(self.weights))
        first = ", ".join(plain(weight) for weight in self.weights[:LISTED])
        text = self.formula or f"from {low} to {high} without a known formula, {first}, ... on the tokens shown"
        return text + (f", times {self.besides}" if self.besides else "")


def weights_at(
    loss: Callable[[Tokens], Tensor], tokens: Tokens, rows: Sequence[int], precision: torch.dtype
) -> Tensor | None:
    """The weight of every position of a batch, (N,); None where positions change more than a factor.

    The batch keeps its sequences, and one of its tokens is put at all positions. Weights are label weights where the tokens
    agree on these; otherwise the largest is 1.

    Args:
        loss: an unreduced loss, tokens -> (N,).
        tokens: the batch.
        rows: two or more tokens that are put there, of different label probabilities.
        precision: what the loss computes in.
    """
    ratios, absolute = [], []
    for row in rows:
        same = tokens[torch.full((len(tokens),), row, device=tokens.logits.device)]
        same = same.replace(sequence=tokens.sequence, pair=tokens.pair, chosen=tokens.chosen)
        grad = trial_gradient(loss, same)
        base = grad[int(grad.norm(dim=-1).argmax())]
        if not bool(grad.isfinite().all() and base.any()):
            return None
        ratio = (grad @ base) / base.square().sum()
        distance = (grad - ratio[:, None] * base).norm(dim=-1)
        if bool((distance > 10 * TOLERANCE * grad.norm(dim=-1) + rounding(grad, same, precision).rows).any()):
            return None
        ratios.append(ratio)
        label = int(tokens.labels[row])
        absolute.append(float(-base[label] / (1 - tokens.label_probs[row].double())))
    if any(bool(((other - ratios[0]).abs() > 100 * EQUAL * ratios[0].abs() + EQUAL**2).any()) for other in ratios[1:]):
        return None
    same_size = max(absolute) - min(absolute) <= EQUAL * max(map(abs, absolute))
    return ratios[0] * (written(absolute[0], EXACT) if same_size else 1.0)


def unweighted(
    variant: Variant, readings: Sequence[Reading]
) -> tuple[PositionWeights | None, list[tuple[Reading, Tensor]]]:
    """The position weights of a loss, None where other tokens count too; its readings divided by them, and the rows of each.

    Args:
        variant: the loss.
        readings: its gradient on the tokens shown, and on others.
    """
    weighed, without = [], []
    for at in readings:
        significant = at.grad.norm(dim=-1) > 1e3 * at.noise.rows
        if not bool(significant.any()):
            return None, []
        p = at.tokens.label_probs
        rows = [int(torch.where(significant, (p - target).abs(), torch.inf).argmin()) for target in PLACED]
        try:
            weights = weights_at(variant.loss, at.inputs, rows, at.arithmetic)
        except InputError:  # a loss may refuse such a batch
            return None, []
        if weights is None:
            return None, []
        nonzero = weights.nonzero()[:, 0]
        weighed.append((weights, at.inputs))
        without.append((at[nonzero].weighted(1 / weights[nonzero]), nonzero.cpu()))
    return describe_weights(weighed), without


def describe_weights(parts: Sequence[tuple[Tensor, Tokens]]) -> PositionWeights:
    """Position weights of one or more batches, the first that of the tokens shown, by the simplest formula that fits all."""
    weights = np.concatenate([numpy_of(weight) for weight, _ in parts])
    places = [_places(tokens, batch) for batch, (_, tokens) in enumerate(parts)]
    joined = {name: np.concatenate([one[name] for one in places]) for name in places[0]}
    groups = {"": np.zeros(len(weights)), "a factor of its batch": joined.pop("batch")}
    groups["a factor of its sequence"] = joined.pop("sequence")
    shown_weights = tuple(parts[0][0].tolist())
    for besides, ids in groups.items():
        scaled = weights / _largest(weights, ids) if besides else weights
        if formula := next(_formulas(scaled, joined), ""):
            return PositionWeights(formula, shown_weights, besides)
    return PositionWeights("", shown_weights)


def _places(tokens: Tokens, batch: int) -> dict[str, np.ndarray]:
    """The positions that a formula may depend on, by name, and the sequence and batch of every token."""
    number = len(tokens)
    ids = np.arange(number) if tokens.sequence is None else tokens.sequence.cpu().numpy()
    row = np.arange(number, dtype=float)
    places = {"i": row, "j": number - 1 - row, "i / N": row / number, "(i + 1) / N": (row + 1) / number}
    places["i / (N - 1)"] = row / max(number - 1, 1)
    if tokens.sequence is not None:
        t = np.array([(ids[:place] == ids[place]).sum() for place in range(number)], dtype=float)
        n = np.array([(ids == one).sum() for one in ids], dtype=float)
        longest = n.max()
        by_length = {"t / n": t / n, "(t + 1) / n": (t + 1) / n, "t / T": t / longest, "(t + 1) / T": (t + 1) / longest}
        places = {"t": t, "e": n - 1 - t, **by_length, "t / (T - 1)": t / max(longest - 1, 1), **places}
    return places | {"sequence": ids + batch * 10**6, "batch": np.full(number, batch)}


def _largest(weights: np.ndarray, ids: np.ndarray) -> np.ndarray:
    """The largest weight of every token's group; 1 where that is 0."""
    largest = {one: np.abs(weights[ids == one]).max() for one in set(ids.tolist())}
    return np.array([largest[one] or 1.0 for one in ids.tolist()])


def _formulas(weights: np.ndarray, places: dict[str, np.ndarray]) -> Iterator[str]:
    """The formulas of the weights that fit, simplest first."""
    everywhere = np.ones(len(weights), bool)
    for name, x in places.items():
        for formula, _ in (*_step(weights, name, x), *_smooth(weights, name, x, everywhere)):
            yield f"{formula} ({WORDS[name]})"
    for name, x in places.items():
        for end, word in ((weights.max(), "at most"), (weights.min(), "at least")):
            clipped = np.abs(weights - end) <= EQUAL * abs(end) + 1e-12
            if len(set(x[~clipped])) < FEWEST - 1 or len(set(x[clipped])) < 2:
                continue
            for formula, values in _smooth(weights, name, x, ~clipped):
                beyond = (
                    values[clipped] >= end * (1 - EQUAL)
                    if word == "at most"
                    else values[clipped] <= end * (1 + EQUAL) + 1e-12
                )
                if bool(beyond.all()):
                    yield f"{formula}, {word} {_short(end)} ({WORDS[name]})"


def _step(weights: np.ndarray, name: str, x: np.ndarray) -> Iterator[tuple[str, np.ndarray]]:
    """One weight up to a place and another after it."""
    values = sorted({_short(weight) for weight in weights})
    if len(values) != 2:
        return
    low, high = (x[[_short(weight) == value for weight in weights]] for value in values)
    for first, second, at in ((values[0], values[1], low), (values[1], values[0], high)):
        other = high if at is low else low
        if at.max() < other.min():
            yield f"{first} where {name} <= {plain(at.max())}, {second} elsewhere", x


def _smooth(weights: np.ndarray, name: str, x: np.ndarray, where: np.ndarray) -> Iterator[tuple[str, np.ndarray]]:
    """Lines, powers and geometric weights fitted on the tokens ``where``, with their values on all tokens."""
    w, at = weights[where], x[where]
    if len(set(at)) < FEWEST - 1:
        return
    forms: list[tuple[np.ndarray, np.ndarray, Callable[[float, float], tuple[str, np.ndarray]]]] = []
    if name in ("t", "e", "i", "j") and bool((w > 0).all()):
        forms.append((np.log(w), at, lambda c, a: (_times(c, f"{plain(np.exp(a))}^{name}"), np.exp(c + a * x))))
    forms.append((w, at, lambda c, a: (_line(c, a, name), c + a * x)))
    if name in ("t", "e", "i", "j") and bool((w > 0).all()):
        log_place = np.log1p(x)
        forms.append(
            (np.log(w), log_place[where], lambda c, a: (_times(c, _power(name, a)), np.exp(c + a * log_place)))
        )
    for y, along, form in forms:
        columns = np.stack([np.ones_like(along), along], 1)
        (c, a), *_ = np.linalg.lstsq(columns, y, rcond=None)
        c, a = (float(f"{value:.8g}") if abs(value) > NONE * np.abs(y).max() else 0.0 for value in (c, a))
        formula, values = form(c, a)
        if a and bool((np.abs(values[where] - w) <= EQUAL * np.abs(w) + 1e-9 * np.abs(weights).max()).all()):
            yield formula, values


def _power(name: str, a: float) -> str:
    """The formula (name + 1)^a as text."""
    short = _short(a)
    return f"1 / ({name} + 1)" if short == "-1" else f"({name} + 1)^{short}"


def _times(log_c: float, formula: str) -> str:
    return formula if abs(log_c) < EQUAL else f"{plain(np.exp(log_c))} {formula}"


def _line(c: float, a: float, name: str) -> str:
    slope = name if abs(abs(a) - 1) < EQUAL else f"{_short(abs(a))} {name}"
    if c == 0:
        return f"{'-' if a < 0 else ''}{slope}"
    return f"{_short(c)} {'-' if a < 0 else '+'} {slope}"


def _short(value: float) -> str:
    return plain(written(float(value), EQUAL) if abs(value) > 1e-12 else 0.0)
