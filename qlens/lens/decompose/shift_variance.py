"""Shift-variance: losses that change when a constant is added to the logits, so that sum(Q) is not 1, and the cause removed."""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from scipy.optimize import minimize_scalar
from torch import Tensor

from qlens.core.tokens import Tokens
from qlens.lens.identify.matching import written
from qlens.lens.rounding import TOLERANCE, Noise, rounding
from qlens.lens.weights.features import plain

CLAMPED = "clamped logits"
CAPS = (0.5, 400.0)  # soft-caps looked for, in logits


@dataclass(frozen=True, eq=False)
class ShiftVariance:
    """The cause of sum(Q) != 1, and the gradient without it.

    Args:
        cause: in words, with its number; "" if unknown.
        value: the weight of a penalty, or the height of a cap.
        grad: the gradient with the cause removed, (M, V).
        tokens: the tokens as the remaining loss sees them, M rows.
        rows: indices of these among the tokens, (M,); rows of which the cause hides the label's gradient are left out.
        uncoupled: a sentence on a loss without any softmax, from which nothing can be removed; "" otherwise.
    """

    cause: str
    value: float
    grad: Float[Tensor, "N V"]
    tokens: Tokens
    rows: Int[Tensor, " M"]
    uncoupled: str = ""


def shift_variance(grad: Float[Tensor, "N V"], tokens: Tokens, noise: Noise | None = None) -> ShiftVariance | None:
    r"""The likely cause of :math:`\sum_k g_k \ne 0`, or None where the sums are zero up to rounding.

    Tested in this order: losses without a softmax (the label's raw logit, binary cross-entropy or squared error of each
    logit); a z-loss :math:`\lambda \log^2 Z`, whose sums are :math:`2 \lambda \log Z`; penalties on the logits' squares, their
    mean square or log Z, each by its own sums; a soft-cap :math:`c \tanh(z / c)`, without whose slope the sums are zero;
    clamped logits, whose gradient is zero beyond a level.

    Args:
        grad: logit gradients of the unreduced loss, (N, V).
        tokens: the tokens that they belong to.
        noise: rounding error of the gradient; by default estimated from its digits.

    Returns:
        The cause, or None.

    Example:
        >>> import qlens
        >>> from qlens.lens import gradient
        >>> from qlens.registry import resolve
        >>> t = qlens.probes()
        >>> loss = lambda logits, labels: (0.01 * logits.logsumexp(-1) ** 2).mean()
        >>> shift_variance(gradient(resolve(loss).loss, t), t).cause
        'a z-loss: 0.01 log(Z)^2'
    """
    tokens, noise = tokens.with_precision(torch.float64), noise or rounding(grad, tokens)
    g, z = grad.detach().double(), tokens.logits.detach()
    total, size = g.sum(-1), g.norm(dim=-1)
    nonzero = total.abs() > TOLERANCE * size + noise.sums
    if not bool(nonzero.any()):
        return None
    if (uncoupled := _uncoupled(g, z, tokens, noise)) is not None:
        return uncoupled
    digits = TOLERANCE + float((noise.sums / total.abs())[nonzero].min())  # resolution of the sums
    for candidate in (
        *_penalties(g, z, total, tokens, noise, digits),
        *_capped(g, z, tokens, noise, digits),
        *_clamped(g, z, tokens),
    ):
        balanced, rows = candidate.grad, candidate.rows.to(g.device)
        grown = (balanced.norm(dim=-1) / size[rows].clamp(min=1e-300)).clamp(min=1)
        allowed = 10 * TOLERANCE * (balanced.norm(dim=-1) + size[rows]) + 4 * noise.sums[rows] * grown
        if bool((balanced.sum(-1).abs() <= allowed).all()):
            return candidate
    return ShiftVariance("", math.nan, g, tokens, torch.arange(len(tokens)))


def _uncoupled(g: Tensor, z: Tensor, tokens: Tokens, noise: Noise) -> ShiftVariance | None:
    """Losses without a softmax: of the label's raw logit, or of each logit on its own."""
    d, everything = tokens.one_hot, torch.arange(len(g))
    others = (g * (1 - d)).norm(dim=-1)
    if bool((others <= TOLERANCE * g.norm(dim=-1) + noise.rows).all()):
        pull = -tokens.gather(g)
        low, high = (plain(float(end)) for end in (pull.min(), pull.max()))
        by = low if low == high else f"{low} to {high}"
        word = "lowers" if float(pull.max()) <= 0 else "raises"
        sentence = (
            f"It {word} the label's raw logit by {by.replace('-', '') if word == 'lowers' else by} and takes nothing from the "
            f"others: there is no softmax in it (log_softmax forgotten?), so that Q = p {'-' if word == 'lowers' else '+'} "
            f"{'' if by in ('1', '-1') else 'this times '}d and the logit never stops moving"
        )
        return ShiftVariance(
            f"it {word} the label's raw logit, without a softmax", float(pull.median()), g, tokens, everything, sentence
        )
    finite = z.masked_fill(z.isinf(), 0.0)
    forms = {
        "binary cross-entropy of each logit (sigmoid(z) - d)": torch.sigmoid(z) - d,
        "the squared error between logits and one-hot labels (z - d)": finite - d,
    }
    for name, form in forms.items():
        factor = float((g * form).sum() / form.square().sum())
        if bool(((g - factor * form).norm(dim=-1) <= TOLERANCE * g.norm(dim=-1) + noise.rows).all()):
            times = "" if abs(factor - 1) < TOLERANCE else f" times {plain(factor)}"
            sentence = (
                f"Its gradient is that of {name}{times}: each logit is trained on its own, no softmax couples them"
            )
            return ShiftVariance(f"{name}{times}, without a softmax", factor, g, tokens, everything, sentence)
    return None


def _penalties(
    g: Tensor, z: Tensor, total: Tensor, tokens: Tokens, noise: Noise, digits: float
) -> Iterator[ShiftVariance]:
    """Penalties on the logits, each with the weight that fits the sums of all rows best."""
    p, log_z, finite = z.softmax(-1), z.logsumexp(-1, keepdim=True), z.masked_fill(z.isinf(), 0.0)
    terms = {
        "a z-loss: {} log(Z)^2": 2 * log_z * p,
        "a penalty on the normaliser: {} log(Z)": p,
        "a penalty on the logits: {} sum(z^2)": 2 * finite,
        "a penalty on the logits: {} mean(z^2)": 2 * finite / z.shape[1],
    }
    for cause, term in terms.items():
        sums = term.sum(-1)
        exact = float((total * sums).sum() / (sums * sums).sum())
        short = written(exact, digits)
        off = [(total - weight * sums).abs() for weight in (exact, short)]
        as_good = bool((off[1] <= 2 * off[0] + noise.sums).all())  # a rounded weight would hide small gradients
        weight = short if as_good else exact
        yield ShiftVariance(cause.format(f"{short:.5g}"), weight, g - weight * term, tokens, torch.arange(len(g)))


def _capped(g: Tensor, z: Tensor, tokens: Tokens, noise: Noise, digits: float) -> Iterator[ShiftVariance]:
    """A soft-cap, with the one height at which the sums vanish."""
    finite = z.masked_fill(z.isinf(), 0.0)

    rounded = noise.sums / TOLERANCE + 1e-300  # sums that are rounding do not count

    def uncapped(log_c: float) -> Tensor:
        return g / (1 - torch.tanh(finite / math.exp(log_c)) ** 2).clamp(min=1e-12)

    def off(log_c: float) -> float:
        uncapped_grad = uncapped(log_c)
        return float((uncapped_grad.sum(-1).abs() / (uncapped_grad.norm(dim=-1) + rounded)).square().mean())

    grid = torch.linspace(*map(math.log, CAPS), 80).tolist()
    best = min(range(len(grid)), key=lambda i: off(grid[i]))
    if best in (0, len(grid) - 1):  # no cap in this range
        return
    bounds = grid[best - 1], grid[best + 1]
    log_c = float(minimize_scalar(off, bounds=bounds, method="bounded", options={"xatol": 1e-12}).x)
    cap = written(math.exp(log_c), 10 * digits)
    capped = tokens.replace(logits=cap * torch.tanh(z / cap))
    cause = f"a soft-cap: {cap:.5g} tanh(z / {cap:.5g})"
    yield ShiftVariance(cause, cap, uncapped(math.log(cap)), capped, torch.arange(len(g)))


def _clamped(g: Tensor, z: Tensor, tokens: Tokens) -> Iterator[ShiftVariance]:
    """Clamped logits: no gradient beyond a level."""
    still = (g == 0) & z.isfinite()  # without a gradient
    if not bool(still.any()) or bool(still.all()):
        return
    low, high = float(z[~still].min()), float(z[~still].max())  # what has a gradient lies between
    over, under = still & (z >= high), still & (z <= low)
    if not bool((over | under == still).all()):
        return
    ends, words = {}, []
    if bool(under.any()):
        ends["min"] = _shortest(float(z[under].max()), low)
        words.append(f"below about {ends['min']:.3g}")
    if bool(over.any()):
        ends["max"] = _shortest(high, float(z[over].min()))
        words.append(f"above about {ends['max']:.3g}")
    if len(ends) == 2:  # one number for both ends, where they agree on one
        least, most = max(high, -low), min(float(z[over].min()), -float(z[under].max()))
        if least <= most:
            size = _shortest(least, most)
            ends, words = {"min": -size, "max": size}, [f"beyond about -{size:.3g} and {size:.3g}"]
    clamped = z.clamp(**ends)
    p = clamped.softmax(-1) * still  # the clamped entries' share of the missing gradient
    share = -g.sum(-1, keepdim=True) / p.sum(-1, keepdim=True).clamp(min=1e-300)
    rows = (~tokens.gather(still)).nonzero()[:, 0]  # a clamped label's own gradient is lost
    grad, clamped_tokens = (g + share * p)[rows], tokens[rows].replace(logits=clamped[rows])
    value = ends.get("max", ends.get("min", 0.0))
    yield ShiftVariance(f"{CLAMPED}: no gradient {' or '.join(words)}", value, grad, clamped_tokens, rows.cpu())


def _shortest(low: float, high: float) -> float:
    """The number with the fewest digits between low and high."""
    middle = (low + high) / 2
    candidates = (float(f"{value:.{digits}g}") for digits in range(1, 17) for value in (middle, low, high))
    return next((n for n in candidates if low <= n <= high), middle)
