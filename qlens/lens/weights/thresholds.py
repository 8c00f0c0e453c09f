"""Thresholds: tokens on both sides of every step of a gradient along the label's logit, so that thresholds are exact."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from qlens.core.autograd import gradient
from qlens.core.errors import InputError
from qlens.core.tokens import Tokens
from qlens.lens.identify.matching import written
from qlens.lens.reading import Reading
from qlens.registry.variant import Variant

ROWS = 16  # tokens whose label's logit is moved
APART = 11  # rows between two of these tokens
POINTS = 64  # values of that logit in the first scan
REACH = 16.0  # how far the logarithm of p_y / (1 - p_y) is moved, either way
STEPS = 3  # intervals of every row that are bisected
HALVINGS = 24  # bisections of an interval of half a nat
STEP = 1e-3  # relative change of a weight over the last interval that counts as a step
TINY = 1e-12  # weights below it count as zero
EXACT = 1e-6  # relative difference to a short number


@dataclass(frozen=True)
class Edges:
    """Tokens at the steps of a loss.

    Args:
        rows: the tokens that they differ from in the label's logit only, (M,).
        logits: (M, V), just below and just above every step.
        numbers: possible values of a threshold there, of p_y, of its ratio to another model or of the loss.
    """

    rows: Tensor
    logits: Tensor
    numbers: tuple[float, ...]


def edges(loss: Callable[[Tokens], Tensor], tokens: Tokens) -> Edges | None:
    """The steps of a per-token loss along the label's logit, bisected down to rounding; None where there are none.

    Args:
        loss: an unreduced loss, tokens -> (N,), in which no token needs another.
        tokens: the tokens of which some are moved, in float64.
    """
    rows = _spread_rows(tokens)
    index = tokens.labels[rows, None].long()
    z = tokens.logits.detach()[rows]
    rest = z.scatter(1, index, -torch.inf).logsumexp(-1)

    def weights_at(places: Tensor, at: Tensor) -> Tensor:
        """Label weights of some rows at these values of log p_y / (1 - p_y)."""
        changed_logits = _with_label_logit(z[places], index[places], rest[places] + at)
        grad = gradient(loss, tokens[rows[places]].replace(logits=changed_logits)).double()
        return -grad.gather(1, index[places])[:, 0] * (1 + at.exp())

    odds = torch.linspace(-REACH, REACH, POINTS, dtype=z.dtype, device=z.device)
    places = torch.arange(len(rows), device=z.device).repeat_interleave(POINTS)
    weights = weights_at(places, odds.repeat(len(rows))).reshape(len(rows), POINTS)
    if not bool(weights.isfinite().all()):
        return None
    change = _change(weights[:, :-1], weights[:, 1:])
    at = change.topk(STEPS, -1).indices
    places = torch.arange(len(rows), device=z.device).repeat_interleave(STEPS)
    low, high = odds[at.flatten()], odds[at.flatten() + 1]
    ends = weights[places, at.flatten()], weights[places, at.flatten() + 1]
    size = (
        ends[0].abs().maximum(ends[1].abs()).clamp(min=TINY)
    )  # of the whole interval, in which a weight may pass through 0
    for _ in range(HALVINGS):
        middle = (low + high) / 2
        middle_weights = weights_at(places, middle)
        lower = (ends[0] - middle_weights).abs() >= (middle_weights - ends[1]).abs()
        low, high = torch.where(lower, low, middle), torch.where(lower, middle, high)
        ends = torch.where(lower, ends[0], middle_weights), torch.where(lower, middle_weights, ends[1])
    step = ((ends[0] - ends[1]).abs() > STEP * size) & ends[0].isfinite() & ends[1].isfinite()
    if not bool(step.any()):
        return None
    places, low, high = places[step], low[step], high[step]
    both = torch.cat([places, places])
    logits = _with_label_logit(z[both], index[both], rest[both] + torch.cat([low, high]))
    return Edges(rows[both], logits, _numbers(tokens[rows[places]].replace(logits=logits[: len(places)])))


def with_edges(variant: Variant, at: Reading) -> tuple[Reading, tuple[float, ...]]:
    """A reading in float64 with tokens at the steps of the loss added, and possible thresholds; else the reading itself."""
    if {at.arithmetic, at.inputs.logits.dtype} != {torch.float64}:
        return at, ()
    try:
        steps = edges(variant.loss, at.inputs)
        if steps is None:
            return at, ()
        index = torch.cat([torch.arange(len(at.inputs), device=steps.rows.device), steps.rows])
        logits = torch.cat([at.inputs.logits, steps.logits])
        wider = Reading.of(variant, at.inputs[index].replace(logits=logits))
    except InputError:  # the loss refuses such tokens
        return at, ()
    return (wider, steps.numbers) if wider.finite else (at, ())


def _spread_rows(tokens: Tokens) -> Tensor:
    """Rows spread over all, at a distance that shares no factor with the periods of masks and advantages."""
    return (torch.arange(min(ROWS, len(tokens)), device=tokens.logits.device) * APART % len(tokens)).unique()


def _with_label_logit(logits: Tensor, index: Tensor, label: Tensor) -> Tensor:
    return logits.scatter(1, index, label[:, None].to(logits))


def _change(one: Tensor, other: Tensor) -> Tensor:
    """The relative difference of two weights."""
    return (one - other).abs() / one.abs().maximum(other.abs()).clamp(min=TINY)


def _numbers(tokens: Tokens) -> tuple[float, ...]:
    """Short numbers that a threshold at these tokens may have."""
    log_p = tokens.label_log_probs.detach()
    candidates = [log_p.exp(), -log_p]
    for name in ("reference", "old", "teacher"):
        if getattr(tokens, name) is not None:
            ratio = (log_p - tokens.gather(tokens.log_probs_of(name))).exp()
            candidates += [ratio, ratio - 1, 1 - ratio]
    values = {written(value, EXACT) for part in candidates for value in part.tolist()}
    return tuple(sorted(value for value in values if len(f"{abs(value):.8g}".replace(".", "").lstrip("0")) <= 4))
