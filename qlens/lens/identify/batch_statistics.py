"""Batch statistics: a registered method whose gradient a loss has up to a factor that differs from batch to batch."""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

import torch
from torch import Tensor

from qlens.core.autograd import gradient
from qlens.core.errors import InputError
from qlens.core.tokens import Tokens
from qlens.lens.identify import matching
from qlens.lens.identify.parameter_fits import pushes_only
from qlens.lens.reading import Reading
from qlens.lens.rounding import Noise, rounding
from qlens.lens.weights.features import plain
from qlens.losses.notes.seen_tokens import as_given
from qlens.registry import Variant, get

TRIED = 12  # matching methods that are compared on other batches
EQUAL = 1e-4  # relative difference of factors that are one
NEAR_ONE, NEARLY = 1e-9, 1e-4  # 1 - p_y below which a weight is not read; difference of means that are one
QUANTILES = (0.05, 0.1, 0.2, 0.25, 0.3, 0.4, 0.5, 0.6, 0.7, 0.75, 0.8, 0.9, 0.95, 0.99)
PUSHES = (-16.0, -8.0, -4.0, -2.0, -1.0, 0.0, 1.0, 2.0, 4.0, 8.0, 16.0)  # of the labels' logits, on the way to a level
HALVINGS, NEAREST = 36, 1e-7  # of the interval between two of them; how closely the level is then known, relative
LOW = 0.5  # label probability below which one of the batches is


@dataclass(frozen=True)
class Normalised:
    """A method whose gradient a loss has in every batch, times a factor of the batch.

    Args:
        spec: the method; "" for weights that no method has.
        by: what of the batch it is divided by, in words; "" where that is not known.
        constant: the factor beside that.
        factors: c in g = c g_m on each batch tried, and how many tokens that had; none without a method.
        here: c on the tokens shown.
        wide: c on the wider trial tokens, or None.
        switch: at which mean loss of the batch the factor changes from one value to another, in words; "" where it does not.
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


def elsewhere(
    near: Sequence[matching.Match], variant: Variant, shown: Reading, trial: Reading | None
) -> tuple[list[matching.Match], Normalised | None]:
    """Matches of a loss that needs its whole batch, as they hold on other batches: other numbers, other compositions.

    A method that has the gradient in every batch, but times another factor, is no match; it is returned apart.

    Args:
        near: the methods that match on the tokens shown and the trial tokens, among others, nearest first.
        variant: the loss.
        shown: its gradient on the tokens shown.
        trial: its gradient on the wider trial tokens.
    """
    tried_on = list(other_batches(variant, shown, trial))
    read = [(other, *_read(variant, other)) for other, _ in tried_on]
    batches = [one for place, one in enumerate(read) if bool(one[1].any()) or (place == 0 and trial is not None)]
    kept, scaled = [], []
    tried = {match.spec for match in [match for match in near if match.same][:TRIED]}
    for match in near:
        if not match.same or match.spec not in tried:
            kept += [] if match.same else [match]
            continue
        others = [matching.at(get(match.spec), grad, tokens, noise) for tokens, grad, noise in batches]
        if any(other is None or not other.same for other in others):
            kept.append(replace(match, relation=matching.RELATIONS[3]))
            continue
        factors = [match.factor, *(other.factor for other in others if other is not None)]
        if max(factors) - min(factors) <= EQUAL * max(map(abs, factors)):
            kept.append(match)
        else:
            kept.append(replace(match, relation=matching.RELATIONS[2]))
            given = [shown.given, *(tokens for tokens, _, _ in batches)]
            scaled.append(_statistic(variant, match.spec, factors, given, trial is not None))
    if any(match.same for match in kept):
        return matching.ranked(kept), None
    if not scaled:
        every = torch.arange(len(shown.given), device=shown.grad.device)
        return matching.ranked(kept), _weights(
            [
                (shown.tokens, shown.grad, shown.noise, every),
                *((*one, rows) for one, (_, rows) in zip(read, tried_on, strict=True)),
            ]
        )
    fewest = min(map(_order, scaled))
    alike = [one for one in scaled if _order(one) == fewest]
    detached = _slope_off(variant, shown.given) if len(alike) > 1 else False
    return matching.ranked(kept), next(
        (one for one in alike if _slope_off(get(one.spec), shown.given) == detached), alike[0]
    )


def _order(one: Normalised) -> tuple:
    return not one.by, abs(one.constant - 1) > EQUAL, "(" in one.spec, len(get(one.spec).needs)


def other_batches(variant: Variant, shown: Reading, trial: Reading | None) -> Iterator[tuple[Tokens, Tensor | None]]:
    """The batches of ``_other_batches``, with advantages that a loss standardises itself standardised over each."""
    for tokens, rows in _other_batches(variant, shown, trial):
        try:
            yield as_given(variant.method.fn, variant.params, tokens) if variant.derived else tokens, rows
        except InputError:  # a loss of groups of texts takes no batch of other numbers of texts
            continue


def _other_batches(variant: Variant, shown: Reading, trial: Reading | None) -> Iterator[tuple[Tokens, Tensor | None]]:
    """Batches of other tokens: the trial tokens, some of those shown, and those of low label probability; and their places
    among those shown, None of the trial tokens.
    """
    if trial is not None:
        yield trial.given, None
    tokens, p = shown.given, shown.tokens.label_probs
    ids = tokens.pair if tokens.pair is not None else tokens.sequence
    some = torch.arange(len(p), device=p.device) % 3 > 0 if ids is None else ids < (ids.min() + ids.max() + 1) // 2
    if 1 < int(some.sum()) < len(p):
        yield tokens[some], some.nonzero()[:, 0]
    if variant.compares_pairs:
        return
    ends = (p < 1e-3) | (p > 0.9)
    for rows in (p < LOW, p >= LOW, ends, (p > 0.05) & (p < LOW), torch.arange(len(p), device=p.device) % 5 == 1):
        if 1 < int(rows.sum()) < len(p):
            yield tokens[rows], rows.nonzero()[:, 0]


def _read(variant: Variant, tokens: Tokens) -> tuple[Tensor, Noise]:
    grad = gradient(variant.loss, tokens)
    return grad, rounding(grad, tokens)


def _statistics(variant: Variant) -> dict[str, Callable[[Tokens], float]]:
    """What a batch may be divided by, for a method."""

    def weights(tokens: Tokens) -> Tensor:
        return variant.target(tokens).effective_trust.double().nan_to_num()

    def losses(tokens: Tokens) -> Tensor:
        with torch.no_grad():
            return variant.loss(tokens).double()

    def nll(tokens: Tokens) -> Tensor:
        return -tokens.label_log_probs.double()

    quantiles = {
        f"the {q:g}-quantile of the batch's weights": lambda t, q=q: float(weights(t).quantile(q)) for q in QUANTILES
    }
    return {
        "the batch's mean weight": lambda t: float(weights(t).mean()),
        "the batch's largest weight": lambda t: float(weights(t).max()),
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


def _weights(batches: Sequence[tuple[Tokens, Tensor, Noise, Tensor | None]]) -> Normalised | None:
    """Whether weights on the label alone have the same mean, or the same largest, in every batch, and in batches that share
    tokens are the same there up to one factor.
    """
    whole: Tensor | None = None
    of: dict[str, list[float]] = {"the batch's mean weight": [], "the batch's largest weight": []}
    for tokens, grad, noise, rows in batches:
        if not bool(grad.any()):
            if rows is not None and whole is not None and bool(whole[rows].any()):  # a gate of the batch
                return None
            continue
        if not pushes_only(grad, tokens, noise):
            return None
        tokens = tokens.with_precision(torch.float64)
        rest = tokens.rest_log_probs.exp()
        weight = torch.where(rest > NEAR_ONE, -tokens.gather(grad.double()) / rest, 0.0)
        if rows is not None:
            whole = weight if whole is None else whole
            if not _proportional(weight, whole[rows]):
                return None
        weight = weight[rest > NEAR_ONE]
        of["the batch's mean weight"].append(float(weight.mean()))
        gate = (
            float(weight[weight != 0].abs().std()) <= NEARLY if int((weight != 0).sum()) > 1 else True
        )  # all of one size, as of a hinge on pairs: the largest is no divisor
        of["the batch's largest weight"].append(float("nan") if gate else float(weight.max()))
    for by, values in of.items():
        if (
            not any(map(math.isnan, values))
            and max(values) - min(values) <= NEARLY * max(map(abs, values))
            and max(map(abs, values)) > 0
        ):
            return Normalised("", by, 1.0, (), 1.0)
    return None


def _proportional(weights: Tensor, others: Tensor) -> bool:
    """Whether the weights of the same tokens in two batches are the same up to one factor."""
    factor = (weights * others).sum() / others.square().sum().clamp(min=1e-300)
    size = weights.abs().maximum((factor * others).abs())
    return bool(((weights - factor * others).abs() <= NEARLY * size + 1e-9 * weights.abs().max()).all())


def _statistic(loss: Variant, spec: str, factors: Sequence[float], batches: Sequence[Tokens], wide: bool) -> Normalised:
    """What the factors of a method on several batches are divided by."""
    by, constant = "", 1.0
    for name, of in _statistics(get(spec)).items():
        made = torch.tensor([factor * of(tokens) for factor, tokens in zip(factors, batches, strict=True)])
        if bool(made.isfinite().all() and made.all()) and float(made.max() - made.min()) <= EQUAL * float(
            made.abs().max()
        ):
            by, constant = name, matching.written(float(made.mean()), EQUAL)
            break
    seen = tuple((factor, len(tokens)) for factor, tokens in zip(factors, batches, strict=True))
    switch = "" if by else _switch(loss, get(spec), factors, batches)
    return Normalised(spec, by, constant, seen, factors[0], factors[1] if wide else None, switch)


def _switch(loss: Variant, variant: Variant, factors: Sequence[float], batches: Sequence[Tokens]) -> str:
    """Two factors that the batch's mean loss tells apart, in words; "" where that does not."""
    values = sorted({matching.written(factor, EQUAL) for factor in factors})
    if len(values) != 2:
        return ""
    texts = [0 if tokens.sequence is None else len(tokens.sequence.unique()) for tokens in batches]
    below, above = (
        {number for number, factor in zip(texts, factors, strict=True) if abs(factor - value) <= EQUAL * abs(value)}
        for value in values
    )
    if not below & above:  # the number of texts tells the factors apart as well
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
    """The mean loss at which the factor of a method changes, halved down along the labels' logits of one batch; or None."""
    tokens = tokens.with_precision(torch.float64)

    def at(push: float) -> tuple[float, bool | None]:
        """The mean loss of the batch with its labels' logits moved, and whether the factor is the one above the level."""
        moved = tokens.replace(logits=tokens.logits.detach() + push * tokens.one_hot)
        made = matching.taught(variant, moved)
        if made is None:
            return math.nan, None
        grad, made = gradient(loss.loss, moved).double(), made.double()
        factor = float((grad * made).sum() / made.square().sum().clamp(min=1e-300))
        side = next((i == 0 for i, one in enumerate((above, below)) if abs(factor - one) <= EQUAL * abs(one)), None)
        with torch.no_grad():
            return float(variant.loss(moved).double().mean()), side

    tried = [(push, *at(push)) for push in PUSHES]
    steps = [(one, other) for one, other in pairwise(tried) if (one[2], other[2]) == (True, False)]
    if len(steps) != 1:
        return None
    (low, high_loss, _), (high, low_loss, _) = steps[0]
    for _ in range(HALVINGS):
        middle = (low + high) / 2
        mean, side = at(middle)
        if side is None:
            return None
        low, high_loss, high, low_loss = (middle, mean, high, low_loss) if side else (low, high_loss, middle, mean)
    if not high_loss - low_loss <= NEAREST * high_loss:
        return None
    return matching.written((low_loss + high_loss) / 2, NEAREST)


def _slope_off(variant: Variant, tokens: Tokens) -> bool:
    from qlens.lens.decompose.dependence import held_constant

    return bool(held_constant(variant.loss, tokens)[0])
