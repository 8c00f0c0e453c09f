"""Batch gates: losses that weigh a token by how it compares with the other tokens of its batch."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from qlens.core.numerics import expectation
from qlens.core.tokens import Tokens
from qlens.lens.identify import matching
from qlens.lens.identify.other_batches import BatchReading
from qlens.lens.reading import Reading
from qlens.lens.rounding import TOLERANCE
from qlens.lens.weights.features import numpy_of, plain
from qlens.lens.weights.label_weights import OPEN
from qlens.registry import get, methods

EQUAL = 1e-4  # relative difference of two weights that count as equal
TIE = 1e-9  # relative difference of two signals that count as equal
FEWEST = 3  # batches in which some tokens pass and some do not


@dataclass(frozen=True)
class BatchGate:
    """A gate whose threshold depends on the batch.

    Args:
        spec: the method behind the gate; "" if unknown.
        rule: which tokens pass, in words.
        count: how many pass, in words.
        other: the weight of the others as a share of that of the tokens that pass.
        factors: of the method on the tokens that pass, in every batch tried.
        on: which of the tokens shown pass.
    """

    spec: str
    rule: str
    count: str
    other: float
    factors: tuple[float, ...]
    on: tuple[bool, ...]

    def __str__(self) -> str:
        others = f"{f'weight {plain(self.other)}' if self.other else '0'} on the others"
        passed = f"of {self.rule}, {others}" if self.rule else f"that pass it, {others}"
        if not self.spec:
            return f"a gate that depends on the batch: it counts the tokens {passed} ({self.count})"
        low, high = min(self.factors), max(self.factors)
        same = high - low <= EQUAL * max(abs(low), abs(high))
        times = (
            "" if same and abs(low - 1) < EQUAL else f" times {plain(low)}" if same else " times a factor of the batch"
        )
        return f"{self.spec}{times} behind a gate that depends on the batch: on the tokens {passed} ({self.count})"


def batch_gate(shown: Reading, others: Sequence[BatchReading], near: Sequence[matching.Match]) -> BatchGate | None:
    """The gate of a loss that depends on its batch: in every batch its rows are a method's, times one of two numbers; or None.

    Args:
        shown: the gradient on the tokens shown.
        others: the gradient on other batches.
        near: the methods nearest to it.
    """
    if not all(bool(batch.grad.isfinite().all()) for batch in others):
        return None
    batches = [BatchReading(shown.tokens, shown.grad, shown.noise, None)]
    batches += [
        batch._replace(tokens=batch.tokens.with_precision(torch.float64), grad=batch.grad.double()) for batch in others
    ]
    likely = [match.spec for match in near if match.relation == matching.RELATIONS[2]]
    usual = [spec for spec in ("sft", "dft", "reinforce") if spec in methods()]
    gates = (_gate_of(spec, batches) for spec in dict.fromkeys([*usual, *likely]))
    return next((gate for gate in gates if gate is not None), None)


def _gate_of(spec: str, batches: Sequence[BatchReading]) -> BatchGate | None:
    """The gate in front of one method: two weights in every batch, one rule that separates them; or None."""
    split, factors, others = [], [], []
    for batch in batches:
        two_factors = _two_factors(spec, batch)
        if two_factors is None:
            return None
        on, known, high, low = two_factors
        split.append((batch.tokens, on, known))
        factors.append(high)
        others.append(low / high)
    mixed = [place for place, (_, on, known) in enumerate(split) if bool(on[known].any() and (~on[known]).any())]
    if len(mixed) < FEWEST or max(others[i] for i in mixed) - min(others[i] for i in mixed) > EQUAL:
        return None
    rule = _rule(split)
    count = _passing_counts([split[place] for place in mixed])
    low = matching.written(others[mixed[0]], EQUAL) if abs(others[mixed[0]]) > EQUAL else 0.0
    if rule and low > 1:  # the rule must describe the tokens of larger weight
        return None
    return BatchGate(spec, rule, count, low, tuple(factors[place] for place in mixed), tuple(split[0][1].tolist()))


def _two_factors(spec: str, batch: BatchReading) -> tuple[Tensor, Tensor, float, float] | None:
    """The rows with the larger of a method's two factors, the rows whose factor is known, and both factors; or None."""
    other = matching.method_gradient(get(spec), batch.tokens)
    if other is None:
        return None
    m, size = other.double(), other.double().norm(dim=-1)
    known = (batch.tokens.rest_log_probs.exp() > OPEN) & (size > 1e-12 * size.max())
    ratio = (batch.grad * m).sum(-1) / size.square().clamp(min=1e-300)
    off = (batch.grad - ratio[:, None] * m).norm(dim=-1)
    if bool((off > 10 * TOLERANCE * batch.grad.norm(dim=-1) + batch.noise.rows)[known].any()) or not bool(known.any()):
        return None
    high = float(ratio[known][ratio[known].abs().argmax()])
    allowed = EQUAL * abs(high) + batch.noise.rows / size.clamp(min=1e-300)
    on = (ratio - high).abs() <= allowed
    smaller = ratio[known & ~on]
    low = float(smaller.median()) if len(smaller) else 0.0
    if high == 0 or (len(smaller) and bool(((ratio - low).abs() > allowed)[known & ~on].any())):
        return None
    return on, known, high, low


def _signals(tokens: Tokens) -> Iterator[tuple[str, np.ndarray]]:
    """The signals that a gate may compare, by name."""
    p, log_p = tokens.label_probs, tokens.label_log_probs
    entropy = -expectation(tokens.probs, tokens.log_probs)
    signals = {"p_y": p, "entropy": entropy, "largest p": tokens.probs.amax(-1)}
    if tokens.advantage is not None:
        signals["advantage"] = tokens.advantage.double()
    if tokens.weight is not None:
        signals["weight"] = tokens.weight.double()
    for name, values in signals.items():
        yield name, numpy_of(values)
    if tokens.sequence is not None:
        ids = tokens.sequence
        member = (ids[:, None] == ids).double()
        loss = -(member @ log_p)
        yield "mean loss of their sequence", numpy_of(loss / member.sum(-1))
        yield "total loss of their sequence", numpy_of(loss)
        yield "sequence length", numpy_of(member.sum(-1))


def _rule(split: Sequence[tuple[Tokens, Tensor, Tensor]]) -> str:
    """The rule by which tokens pass in every batch, in words; "" where no known one fits."""
    tables = [dict(_signals(tokens)) for tokens, _, _ in split]
    for name in tables[0]:
        for sign, word in ((1, "larger"), (-1, "smaller")):
            values = [
                (sign * table[name], numpy_of(on) > 0, numpy_of(known) > 0)
                for table, (_, on, known) in zip(tables, split, strict=True)
            ]
            mixed = [
                (x, on & known, ~on & known) for x, on, known in values if (on & known).any() and (~on & known).any()
            ]
            if all(x[on].min() >= x[off].max() - 1e-12 * max(abs(x[off].max()), 1) for x, on, off in mixed):
                extreme = {"larger": "largest", "smaller": "smallest"}[word]
                level = _level(mixed, sign)
                alone = all(np.ptp(x[on]) <= 1e-9 * np.abs(x[on]).max() for x, on, _ in mixed)
                if alone and ("sequence" in name or name == "p_y"):
                    what = "sequence" if "sequence" in name else "token"
                    of = name.removesuffix(" of their sequence").removeprefix("sequence ")
                    least = "minimum" if (sign > 0) == (what == "token") else "maximum"
                    return f"the one {what} with the {extreme} {of} in its batch, a {least} over {what}s and no mean"
                return f"{name} {level}" if level else f"the {extreme} {name} in their batch"
    return ""


def _level(values: Sequence[tuple[np.ndarray, np.ndarray, np.ndarray]], sign: int) -> str:
    """The statistic of the batch that a signal of the passing tokens is above or below, in words; "" if unknown."""
    side = "above" if sign > 0 else "below"
    if all(
        x[off].max() <= x.mean() + TIE * abs(x.mean()) and x.mean() <= x[on].min() + TIE * abs(x.mean())
        for x, on, off in values
    ):
        return f"{side} the batch's mean of it"
    low, high = 0.0, 1.0
    for x, on, off in values:
        if len(x) < 2:
            continue
        under, over = x[off].max(), x[on].min()  # equal values up to rounding may fall on either side
        first, last = int((x < under - TIE * abs(under)).sum()), int((x <= over + TIE * abs(over)).sum()) - 1
        low, high = max(low, first / (len(x) - 1)), min(high, last / (len(x) - 1))
    if low > high + 1e-9:
        return ""
    shares = (float(f"{(low + high) / 2:.{digits}g}") for digits in (1, 2, 3))
    share = next((one for one in shares if low - 1e-9 <= one <= high + 1e-9), (low + high) / 2)
    return f"{side} its {share if sign > 0 else round(1 - share, 6):.4g}-quantile in the batch"


def _passing_counts(split: Sequence[tuple[Tokens, Tensor, Tensor]]) -> str:
    """The numbers of tokens that pass in the first batches, in words."""
    return "in the batches tried " + ", ".join(f"{int(on.sum())} of {len(on)}" for _, on, _ in split[:3])
