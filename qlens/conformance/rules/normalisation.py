"""Normalisation over the vocabulary, read from a gradient: a second softmax, or a sigmoid per token."""

import math
from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor

from qlens.conformance.harness import Specimen
from qlens.conformance.rules.rule import Failed, Remark, relative
from qlens.conformance.synthetic_batches import WIDE
from qlens.core.tokens import Tokens

FACTORS = torch.logspace(-0.7, 1.7, 25, dtype=torch.float64).tolist()  # of probabilities before the second softmax
SIGMOID = 5.0  # the largest factor of a sigmoid: beyond it is a soft-cap
ROUGH_FIT = 0.03  # of the gradient, the most that a second softmax is off at the nearest of FACTORS; 0.008 measured
GOLDEN = (math.sqrt(5) - 1) / 2
PRECISION = 1e-7  # of the logarithm of a factor
SEARCH_ROWS = 6  # of a wide vocabulary, on which the factor is searched
FITS = 1e-3  # of the gradient, as a residual in float32; losses that are no second softmax are off by far more
BALANCED = 0.02  # how far the pull of the softmax and that of its targets may be apart
MOVED = 3.0  # by which half of the logits move, to see what the others' gradient makes of it
PART = 0.01  # of the gradient that the second softmax must make
Rows = Float[Tensor, "N V"]


def normalised_otherwise(loss: Specimen) -> tuple[str, type[Exception], str] | None:
    """The evidence on a loss that is no function of one softmax over the vocabulary, its outcome, and the consequence.

    Returns:
        A sentence, Failed or Remark, and the consequence; None where there is nothing to say.
    """
    tokens = loss.tokens()
    grad = loss.read(tokens).grad.double()
    grad = grad / grad.abs().max()
    z = tokens.logits.double()
    if not bool(grad.isfinite().all()):
        return None
    if (factor := _second_softmax(grad, tokens, z.softmax(-1), _through_softmax, FACTORS)) is not None:
        return _twice(factor, "probabilities", loss.vocabulary)
    sigmoids = [factor for factor in FACTORS if factor <= SIGMOID]
    if (factor := _second_softmax(grad, tokens, z.sigmoid(), _through_sigmoid, sigmoids)) is not None:
        return _twice(factor, "sigmoids of the logits", loss.vocabulary)
    if _is_binary_of_probabilities(grad, tokens.labels, z):
        evidence = (
            "binary cross-entropy of softmax probabilities over the whole vocabulary: beside cross-entropy, every "
            "other token is pushed down once more, the likelier the harder"
        )
        return evidence, Remark, ""
    if not _uncoupled(loss, tokens, loss.read(tokens).grad):
        return None
    single = f"no softmax couples the {loss.vocabulary} tokens of the vocabulary: each logit is pulled for itself"
    if _is_binary(grad, tokens.labels, z):
        evidence = f"binary cross-entropy over the whole vocabulary, a sigmoid for each token: {single}"
        return evidence, Failed, "sampling takes a softmax of these logits, whose probabilities were never trained"
    return (
        f"{single}, as where logits are fitted one by one; probabilities of a softmax are not what it trains",
        Remark,
        "",
    )


def _twice(factor: float, of_what: str, vocabulary: int) -> tuple[str, type[Exception], str]:
    times = "" if abs(factor - 1) < 0.01 else f"{factor:.3g} times the "
    least = math.log1p((vocabulary - 1) * math.exp(-factor))
    evidence = (
        f"its gradient is that of a softmax of {times}{of_what}: logits are normalised twice, so that for a sure and "
        f"right token -log p is still {least:.2f} (a vocabulary of {vocabulary})"
    )
    return (
        evidence,
        Failed,
        "gradients are small, and vanish where the model is sure and wrong: write log_softmax(logits) once",
    )


def _second_softmax(
    grad: Rows, tokens: Tokens, inner: Rows, through: Callable[[Rows, Rows], Rows], factors: list[float]
) -> float | None:
    """The factor b for which the gradient is that of cross-entropy on the logits b ``inner``; None if there is none.

    Of every row it must be a multiple of J (softmax(b inner) - t), J the derivative of ``inner``, t a mixture of the label and
    the other models' probabilities, with one b for all rows.
    """
    one_hot = torch.zeros_like(inner).scatter_(1, tokens.labels[:, None], 1.0)
    other_probs = [v.double().softmax(-1) for v in (tokens.teacher, tokens.reference) if v is not None]
    targets = [through(inner, each) for each in ((one_hot, *other_probs) if inner.shape[1] <= WIDE else (one_hot,))]
    if float(_fit(grad, targets)[1]) < FITS:  # labels alone explain it: nothing of a second softmax is in it
        return None

    def off(power: float, rows: Tensor | slice) -> tuple[Tensor, float]:
        q = (math.exp(power) * inner[rows]).softmax(-1)
        weights, gap = _fit(grad[rows], [through(inner[rows], q), *(target[rows] for target in targets)])
        return weights, float(gap)

    wide = inner.shape[1] > WIDE
    largest = grad.norm(dim=-1).topk(min(SEARCH_ROWS, len(grad))).indices if wide else slice(None)
    best = _lowest(lambda power: off(power, largest)[1], [math.log(factor) for factor in factors])
    if best is None:
        return None
    weights, gap = off(best, slice(None))
    pull, of_targets = weights[:, 0], weights[:, 1:].sum(-1)
    size = weights.abs().amax(-1)
    learning = size > 1e-6 * size.max()
    balanced = (pull + of_targets).abs()[learning] <= BALANCED * size[learning]
    if gap > FITS or not bool(balanced.all()) or not bool((pull[learning] > 0).all()):
        return None
    q = through(inner, (math.exp(best) * inner).softmax(-1))
    return math.exp(best) if float((pull[:, None] * q).norm()) > PART * float(grad.norm()) else None


def _lowest(gap: Callable[[float], float], grid: list[float]) -> float | None:
    """Where the gap is lowest, by golden section around the best of the grid; None where that is no rough fit."""
    gaps = [gap(power) for power in grid]
    at = gaps.index(min(gaps))
    if gaps[at] > ROUGH_FIT:
        return None
    low, high = grid[max(at - 1, 0)], grid[min(at + 1, len(grid) - 1)]
    left, right = high - GOLDEN * (high - low), low + GOLDEN * (high - low)
    gap_left, gap_right = gap(left), gap(right)
    while high - low > PRECISION:
        if gap_left < gap_right:
            high, right, gap_right = right, left, gap_left
            left = high - GOLDEN * (high - low)
            gap_left = gap(left)
        else:
            low, left, gap_left = left, right, gap_right
            right = low + GOLDEN * (high - low)
            gap_right = gap(right)
    return (low + high) / 2


def _fit(grad: Rows, features: list[Rows]) -> tuple[Tensor, Tensor]:
    """The weights of features in every row's gradient, (N, features), and how far they are from it, of its size."""
    matrix = torch.stack(features, -1)  # (N, V, features)
    size = matrix.norm(dim=1, keepdim=True).clamp(min=1e-300)
    unit = matrix / size
    q, r = torch.linalg.qr(unit)  # the pseudoinverse of r alone: that of V rows takes seconds where V is 50,000
    weights = torch.linalg.pinv(r, rtol=1e-12) @ (q.mT @ grad[..., None])
    gap = (unit @ weights)[..., 0] - grad
    return weights[..., 0] / size[:, 0], gap.norm() / grad.norm()


def _through_softmax(probs: Rows, slope: Rows) -> Rows:
    """The gradient by the logits from one by their probabilities."""
    return probs * (slope - (probs * slope).sum(-1, keepdim=True))


def _through_sigmoid(values: Rows, slope: Rows) -> Rows:
    return values * (1 - values) * slope


def _is_binary_of_probabilities(grad: Rows, labels: Tensor, z: Rows) -> bool:
    """Whether it is a sum over tokens k of -log p_k for the label, -log(1 - p_k) for every other, times a factor by row."""
    probs = z.softmax(-1)
    not_label = torch.ones_like(probs).scatter_(1, labels[:, None], 0.0)
    expected = _through_softmax(probs, not_label / (1 - probs)) + probs + not_label - 1
    plain = probs + not_label - 1  # that of cross-entropy, which it nears where all other tokens are unlikely
    return float(_fit(grad, [expected])[1]) < FITS <= float(_fit(grad, [plain])[1])


def _is_binary(grad: Rows, labels: Tensor, z: Rows) -> bool:
    """Whether every other token than the label is pushed by its sigmoid, but for one constant."""
    not_label = torch.ones_like(z, dtype=torch.bool).scatter_(1, labels[:, None], False)
    values = torch.stack([z.sigmoid()[not_label], torch.ones_like(z)[not_label]], -1)
    solution = torch.linalg.lstsq(values, grad[not_label][:, None]).solution
    gap = (values @ solution)[:, 0] - grad[not_label]
    return bool(solution[0] > 0) and float(gap.norm()) < FITS * float(grad[not_label].norm())


def _uncoupled(loss: Specimen, tokens: Tokens, grad: Rows) -> bool:
    """Whether the pull of a logit stays as it is while others move, the label's among them."""
    draw = torch.Generator().manual_seed(0)
    moved = torch.rand(grad.shape, generator=draw) < 0.5
    if not bool(grad[~moved].any()):
        return False
    perturbed = tokens.replace(logits=tokens.logits + MOVED * moved.to(tokens.logits))
    after = loss.read(perturbed).grad
    return relative(after[~moved], grad[~moved]) <= loss.tolerance
