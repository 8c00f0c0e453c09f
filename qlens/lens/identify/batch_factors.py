"""Batch factors: methods whose gradient a loss has in every batch, times a factor of the batch."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

import torch
from torch import Tensor

from qlens.core.autograd import gradient
from qlens.core.tokens import Tokens
from qlens.lens.decompose.detached import is_detached
from qlens.lens.identify import matching
from qlens.lens.identify.other_batches import BatchReading
from qlens.lens.identify.parameter_fits import pushes_only
from qlens.lens.reading import Reading
from qlens.lens.weights.features import plain
from qlens.lens.weights.label_weights import label_weights
from qlens.registry import Variant, get

TRIED = 12  # matching methods that are compared on other batches
EQUAL = 1e-4  # relative difference of two factors that count as equal
CLOSE = 1e-4  # relative difference of two means that count as equal
QUANTILES = (0.05, 0.1, 0.2, 0.25, 0.3, 0.4, 0.5, 0.6, 0.7, 0.75, 0.8, 0.9, 0.95, 0.99)
OFFSETS = (-16.0, -8.0, -4.0, -2.0, -1.0, 0.0, 1.0, 2.0, 4.0, 8.0, 16.0)  # of the labels' logits, to find a level
HALVINGS, LEVEL = 36, 1e-7  # of the interval between two offsets; relative precision of the level
MEAN, LARGEST = "the batch's mean weight", "the batch's largest weight"


@dataclass(frozen=True)
class BatchFactor:
    """A method whose gradient a loss has in every batch, times a factor of the batch.

    Args:
        spec: the method; "" for weights of no method.
        by: the statistic of the batch that it is divided by; "" if unknown.
        constant: the constant factor besides that.
        factors: c in g = c g_m on each batch tried, with the batch's number of tokens; none without a method.
        here: c on the tokens shown.
        wide: c on the trial tokens, or None.
        switch: the mean loss at which the factor changes from one value to another, in words; "" where it does not.
    """

    spec: str
    by: str
    constant: float
    factors: tuple[tuple[float, int], ...]
    here: float
    wide: float | None = None
    switch: str = ""

    @property
    def named(self) -> str:
        """The method and what it is divided by."""
        if not self.spec:
            return f"every token's weight is divided by {self.by}"
        times = "" if abs(self.constant - 1) < EQUAL else f" times {self.constant:.5g}"
        if self.switch:
            return f"{self.spec} {self.switch}"
        return f"{self.spec}{times} divided by {self.by}" if self.by else f"{self.spec} times a factor of the batch"

    def __str__(self) -> str:
        if not self.factors or self.switch:
            return self.named
        low, high = (f"{end(factor for factor, _ in self.factors):.4g}" for end in (min, max))
        return f"{self.named} (times {low} to {high} in the {len(self.factors)} batches tried)"

    def simplicity(self) -> tuple:
        """Sort key: known statistics first, then a constant of 1, default parameters and few needs."""
        return not self.by, abs(self.constant - 1) > EQUAL, "(" in self.spec, len(get(self.spec).needs)


def on_other_batches(
    near: Sequence[matching.Match],
    variant: Variant,
    shown: Reading,
    trial: Reading | None,
    readings: Sequence[BatchReading],
) -> tuple[list[matching.Match], BatchFactor | None]:
    """The matches of a loss that depends on its batch, compared on other batches; and a method times a factor of the batch.

    Args:
        near: matches on the tokens shown and the trial tokens, nearest first.
        variant: the loss.
        shown: its gradient on the tokens shown.
        trial: its gradient on the trial tokens.
        readings: its gradient on other batches.
    """
    batches = [one for i, one in enumerate(readings) if bool(one.grad.any()) or (i == 0 and trial is not None)]
    confirmed, scaled = [], []
    compared = {match.spec for match in [match for match in near if match.same][:TRIED]}
    for match in near:
        if not match.same or match.spec not in compared:
            confirmed += [] if match.same else [match]
            continue
        others = [matching.at(get(match.spec), one.grad, one.tokens, one.noise) for one in batches]
        if any(other is None or not other.same for other in others):
            confirmed.append(replace(match, relation=matching.RELATIONS[3]))
            continue
        factors = [match.factor, *(other.factor for other in others if other is not None)]
        if max(factors) - min(factors) <= EQUAL * max(map(abs, factors)):
            confirmed.append(match)
        else:
            confirmed.append(replace(match, relation=matching.RELATIONS[2]))
            batch_tokens = [shown.inputs, *(one.tokens for one in batches)]
            scaled.append(_batch_factor(variant, match.spec, factors, batch_tokens, trial is not None))
    ranked = matching.ranked(confirmed)
    if any(match.same for match in confirmed):
        return ranked, None
    if not scaled:
        every = torch.arange(len(shown.inputs), device=shown.grad.device)
        return ranked, _weights([BatchReading(shown.tokens, shown.grad, shown.noise, every), *readings])
    simplest = min(one.simplicity() for one in scaled)
    alike = [one for one in scaled if one.simplicity() == simplest]
    detached = is_detached(variant.loss, shown.inputs) if len(alike) > 1 else False
    same = (one for one in alike if is_detached(get(one.spec).loss, shown.inputs) == detached)
    return ranked, next(same, alike[0])


def _statistics(variant: Variant) -> dict[str, Callable[[Tokens], float]]:
    """The statistics that a batch may be divided by, for a method, by name."""

    def weights(tokens: Tokens) -> Tensor:
        return variant.target(tokens).label_weight.double().nan_to_num()

    def losses(tokens: Tokens) -> Tensor:
        with torch.no_grad():
            return variant.loss(tokens).double()

    def nll(tokens: Tokens) -> Tensor:
        return -tokens.label_log_probs.double()

    quantiles = {
        f"the {q:g}-quantile of the batch's weights": lambda t, q=q: float(weights(t).quantile(q)) for q in QUANTILES
    }
    return {
        MEAN: lambda t: float(weights(t).mean()),
        LARGEST: lambda t: float(weights(t).max()),
        "the batch's smallest weight": lambda t: float(weights(t).min()),
        "the batch's median weight": lambda t: float(weights(t).median()),
        "the standard deviation of the batch's weights": lambda t: float(weights(t).std()),
        "the standard deviation of the batch's weights (divided by N)": lambda t: float(weights(t).std(correction=0)),
        "the root mean square of the batch's weights": lambda t: float(weights(t).square().mean().sqrt()),
        "the norm of the batch's weights": lambda t: float(weights(t).norm()),
        "the sum of the batch's weights": lambda t: float(weights(t).sum()),
        **quantiles,
        "the batch's mean loss": lambda t: float(losses(t).mean()),
        "1 + the batch's mean loss": lambda t: 1 + float(losses(t).mean()),
        "the batch's largest loss": lambda t: float(losses(t).max()),
        "the standard deviation of the batch's losses": lambda t: float(losses(t).std()),
        "the batch's mean cross-entropy": lambda t: float(nll(t).mean()),
        "the number of texts, not of tokens": lambda t: (
            math.nan if t.sequence is None else len(t.sequence.unique()) / len(t)
        ),
        "the square root of the number of tokens": lambda t: len(t) ** 0.5,
        "the number of tokens": lambda t: float(len(t)),
    }


def _weights(batches: Sequence[BatchReading]) -> BatchFactor | None:
    """Weights of no registered method whose mean, or largest value, is the same in every batch; None where it is not.

    In batches that share tokens the weights must be the same up to one factor.
    """
    whole: Tensor | None = None
    statistics: dict[str, list[float]] = {MEAN: [], LARGEST: []}
    for tokens, grad, noise, rows in batches:
        if not bool(grad.any()):
            if (
                rows is not None and whole is not None and bool(whole[rows].any())
            ):  # a gate that compares with the batch
                return None
            continue
        if not pushes_only(grad, tokens, noise):
            return None
        weight, known = label_weights(grad, tokens)
        if rows is not None:
            whole = weight if whole is None else whole
            if not _proportional(weight, whole[rows]):
                return None
        weight = weight[known]
        statistics[MEAN].append(float(weight.mean()))
        nonzero = weight[weight != 0]
        # Weights of one size, as of a gate or of a hinge on pairs, have no largest one to divide by.
        gate = float(nonzero.abs().std()) <= CLOSE if len(nonzero) > 1 else True
        statistics[LARGEST].append(math.nan if gate else float(weight.max()))
    for by, values in statistics.items():
        largest = max(map(abs, values))
        if not any(map(math.isnan, values)) and max(values) - min(values) <= CLOSE * largest and largest > 0:
            return BatchFactor("", by, 1.0, (), 1.0)
    return None


def _proportional(weights: Tensor, others: Tensor) -> bool:
    """Whether the weights of the same tokens in two batches are the same up to one factor."""
    factor = (weights * others).sum() / others.square().sum().clamp(min=1e-300)
    size = weights.abs().maximum((factor * others).abs())
    return bool(((weights - factor * others).abs() <= CLOSE * size + 1e-9 * weights.abs().max()).all())


def _batch_factor(
    loss: Variant, spec: str, factors: Sequence[float], batches: Sequence[Tokens], wide: bool
) -> BatchFactor:
    """A method with its factors on several batches, and the statistic that explains them."""
    by, constant = "", 1.0
    for name, statistic in _statistics(get(spec)).items():
        constants = torch.tensor([factor * statistic(tokens) for factor, tokens in zip(factors, batches, strict=True)])
        usable = bool(constants.isfinite().all() and constants.all())
        if usable and float(constants.max() - constants.min()) <= EQUAL * float(constants.abs().max()):
            by, constant = name, matching.written(float(constants.mean()), EQUAL)
            break
    factors_by_batch = tuple((factor, len(tokens)) for factor, tokens in zip(factors, batches, strict=True))
    switch = "" if by else _switch(loss, get(spec), factors, batches)
    return BatchFactor(spec, by, constant, factors_by_batch, factors[0], factors[1] if wide else None, switch)


def _switch(loss: Variant, variant: Variant, factors: Sequence[float], batches: Sequence[Tokens]) -> str:
    """Two factors that the batch's mean loss distinguishes, in words; "" where it does not."""
    values = sorted({matching.written(factor, EQUAL) for factor in factors})
    if len(values) != 2:
        return ""
    texts = [0 if tokens.sequence is None else len(tokens.sequence.unique()) for tokens in batches]
    first, second = (
        {number for number, factor in zip(texts, factors, strict=True) if abs(factor - value) <= EQUAL * abs(value)}
        for value in values
    )
    if not first & second:  # the number of texts distinguishes the factors as well
        return ""
    with torch.no_grad():
        means = [float(variant.loss(tokens).double().mean()) for tokens in batches]
    low, high = (
        [mean for mean, factor in zip(means, factors, strict=True) if abs(factor - value) <= EQUAL * abs(value)]
        for value in values
    )
    if max(low) < min(high):
        ends, (below, above) = (max(low), min(high)), values
    elif max(high) < min(low):
        ends, (above, below) = (max(high), min(low)), values
    else:
        return ""
    flooding = ", flooding" if above == -below > 0 else ""
    exact = _level(loss, variant, batches[0], above, below)
    level = f"a level between {ends[0]:.3g} and {ends[1]:.3g}" if exact is None else plain(exact)
    return f"times {plain(above)} while the batch's mean loss is above {level}, times {plain(below)} below it{flooding}"


def _level(loss: Variant, variant: Variant, tokens: Tokens, above: float, below: float) -> float | None:
    """The mean loss at which the factor of a method changes, by bisection along the labels' logits; or None."""
    tokens = tokens.with_precision(torch.float64)

    def at(offset: float) -> tuple[float, bool | None]:
        """The mean loss of the batch with its labels' logits moved, and whether the factor is that above the level."""
        moved_tokens = tokens.replace(logits=tokens.logits.detach() + offset * tokens.one_hot)
        other = matching.method_gradient(variant, moved_tokens)
        if other is None:
            return math.nan, None
        grad, other = gradient(loss.loss, moved_tokens).double(), other.double()
        factor = float((grad * other).sum() / other.square().sum().clamp(min=1e-300))
        side = next(
            (i == 0 for i, value in enumerate((above, below)) if abs(factor - value) <= EQUAL * abs(value)), None
        )
        with torch.no_grad():
            return float(variant.loss(moved_tokens).double().mean()), side

    scan = [(offset, *at(offset)) for offset in OFFSETS]
    steps = [(one, other) for one, other in pairwise(scan) if (one[2], other[2]) == (True, False)]
    if len(steps) != 1:
        return None
    (low, high_loss, _), (high, low_loss, _) = steps[0]
    for _ in range(HALVINGS):
        middle = (low + high) / 2
        mean, side = at(middle)
        if side is None:
            return None
        low, high_loss, high, low_loss = (middle, mean, high, low_loss) if side else (low, high_loss, middle, mean)
    if not high_loss - low_loss <= LEVEL * high_loss:
        return None
    return matching.written((low_loss + high_loss) / 2, LEVEL)
