"""Batch statistics: a registered method whose gradient a loss has up to a factor that differs from batch to batch."""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from qlens import matching
from qlens.findings.fits import pushes_only
from qlens.findings.noise import Noise, rounding
from qlens.findings.reading import Reading
from qlens.lens import gradient
from qlens.registry import Variant, get
from qlens.tokens import Tokens

TRIED = 12  # matching methods that are compared on other batches
EQUAL = 1e-4  # relative difference of factors that are one
NEAR_ONE, NEARLY = 1e-9, 1e-4  # 1 - p_y below which a weight is not read; difference of means that are one
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
    """

    spec: str
    by: str
    constant: float
    factors: tuple[tuple[float, int], ...]
    here: float
    wide: float | None = None

    @property
    def named(self) -> str:
        """The method and what it is divided by."""
        if not self.spec:
            return f"every token's weight is divided by {self.by}"
        times = "" if abs(self.constant - 1) < EQUAL else f" times {self.constant:.5g}"
        return f"{self.spec}{times} divided by {self.by}" if self.by else f"{self.spec} times a factor of the batch"

    def __str__(self) -> str:
        if not self.factors:
            return self.named
        seen = ", ".join(f"{factor:.4g} with {number} tokens" for factor, number in self.factors)
        return f"{self.named} (so far times {seen})" if not self.by else f"{self.named} (times {seen})"


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
    read = [(other, *_read(variant, other)) for other in _batches(variant, shown, trial)]
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
            scaled.append(_statistic(match.spec, factors, given, trial is not None))
    if any(match.same for match in kept):
        return matching.ranked(kept), None
    if not scaled:
        return matching.ranked(kept), _weights([(shown.tokens, shown.grad, shown.noise), *batches])
    fewest = min(map(_order, scaled))
    alike = [one for one in scaled if _order(one) == fewest]
    detached = _slope_off(variant, shown.given) if len(alike) > 1 else False
    return matching.ranked(kept), next(
        (one for one in alike if _slope_off(get(one.spec), shown.given) == detached), alike[0]
    )


def _order(one: Normalised) -> tuple:
    return not one.by, abs(one.constant - 1) > EQUAL, "(" in one.spec, len(get(one.spec).needs)


def _batches(variant: Variant, shown: Reading, trial: Reading | None) -> Iterator[Tokens]:
    """Batches of other tokens: the trial tokens, some of those shown, and those of low label probability."""
    if trial is not None:
        yield trial.given
    tokens, p = shown.given, shown.tokens.label_probs
    ids = tokens.pair if tokens.pair is not None else tokens.sequence
    some = torch.arange(len(p), device=p.device) % 3 > 0 if ids is None else ids < (ids.min() + ids.max() + 1) // 2
    if 1 < int(some.sum()) < len(p):
        yield tokens[some]
    if "pair" in variant.needs:
        return
    ends = (p < 1e-3) | (p > 0.9)
    for rows in (p < LOW, p >= LOW, ends, (p > 0.05) & (p < LOW), torch.arange(len(p), device=p.device) % 5 == 1):
        if 1 < int(rows.sum()) < len(p):
            yield tokens[rows]


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

    return {
        "the batch's mean weight": lambda t: float(weights(t).mean()),
        "the batch's largest weight": lambda t: float(weights(t).max()),
        "the batch's mean loss": lambda t: float(losses(t).mean()),
        "1 + the batch's mean loss": lambda t: 1 + float(losses(t).mean()),
        "the batch's largest loss": lambda t: float(losses(t).max()),
        "the standard deviation of the batch's losses": lambda t: float(losses(t).std()),
        "the batch's mean cross-entropy": lambda t: float(nll(t).mean()),
        "the square root of the number of tokens": lambda t: len(t) ** 0.5,
        "the number of tokens": lambda t: float(len(t)),
    }


def _weights(batches: Sequence[tuple[Tokens, Tensor, Noise]]) -> Normalised | None:
    """Whether weights on the label alone have the same mean, or the same largest, in every batch."""
    of: dict[str, list[float]] = {"the batch's mean weight": [], "the batch's largest weight": []}
    for tokens, grad, noise in batches:
        if not pushes_only(grad, tokens, noise):
            return None
        tokens = tokens.with_precision(torch.float64)
        rest = tokens.rest_log_probs.exp()
        weight = torch.where(rest > NEAR_ONE, -tokens.gather(grad.double()) / rest, 0.0)[rest > NEAR_ONE]
        of["the batch's mean weight"].append(float(weight.mean()))
        gate = (
            float(weight[weight != 0].std()) <= NEARLY if int((weight != 0).sum()) > 1 else True
        )  # its largest is 1 anyway
        of["the batch's largest weight"].append(float("nan") if gate else float(weight.max()))
    for by, values in of.items():
        if (
            not any(map(math.isnan, values))
            and max(values) - min(values) <= NEARLY * max(map(abs, values))
            and max(map(abs, values)) > 0
        ):
            return Normalised("", by, 1.0, (), 1.0)
    return None


def _statistic(spec: str, factors: Sequence[float], batches: Sequence[Tokens], wide: bool) -> Normalised:
    """What the factors of a method on several batches are divided by."""
    by, constant = "", 1.0
    for name, of in _statistics(get(spec)).items():
        made = torch.tensor([factor * of(tokens) for factor, tokens in zip(factors, batches, strict=True)])
        if bool(made.isfinite().all()) and float(made.max() - made.min()) <= EQUAL * float(made.abs().max()):
            by, constant = name, matching.written(float(made.mean()), EQUAL)
            break
    seen = tuple((factor, len(tokens)) for factor, tokens in zip(factors, batches, strict=True))
    return Normalised(spec, by, constant, seen, factors[0], factors[1] if wide else None)


def _slope_off(variant: Variant, tokens: Tokens) -> bool:
    from qlens.findings.scope import held_constant

    return bool(held_constant(variant.loss, tokens)[0])
