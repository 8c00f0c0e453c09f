"""Leaks: why sum(Q) is not 1. A loss that sees raw logits, beyond their softmax, and what is left when that is undone."""

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
class Leak:
    """A cause of sum(Q) != 1, and the loss without it.

    Args:
        cause: in words, with its number; "" where none of the known ones explains it.
        value: the weight, or the cap.
        grad: the gradient with the cause undone, (M, V).
        tokens: the tokens as the rest of the loss sees them, (M, V).
        rows: which of the tokens these are; all, unless the cause hides what a label would have got.
        uncoupled: a sentence on a loss that pulls its logits without a softmax, so that nothing can be undone; "" of others.
    """

    cause: str
    value: float
    grad: Float[Tensor, "N V"]
    tokens: Tokens
    rows: Int[Tensor, " M"]
    uncoupled: str = ""


def leak(grad: Float[Tensor, "N V"], tokens: Tokens, noise: Noise | None = None) -> Leak | None:
    r"""The likely cause of :math:`\sum_k g_k \ne 0`, or None where the sums are zero up to rounding.

    A loss without a softmax (of the label's raw logit, binary cross-entropy or squared error of each logit) is told first.

    A z-loss :math:`\lambda \log^2 Z` has :math:`\sum_k g_k = 2 \lambda \log Z`; a penalty on the logits' squares, on their mean
    square or on log Z itself is told by its own sums; behind a soft-cap :math:`c \tanh(z / c)` the sums are zero again once g is
    divided by the cap's slope; clamped logits have no gradient beyond a level.

    Args:
        grad: logit gradients of the unreduced loss, (N, V).
        tokens: where they were taken.
        noise: the rounding of the gradient; by default what its digits show.

    Example:
        >>> import qlens
        >>> from qlens.lens import gradient
        >>> from qlens.registry import resolve
        >>> t = qlens.probes()
        >>> loss = lambda logits, labels: (0.01 * logits.logsumexp(-1) ** 2).mean()
        >>> leak(gradient(resolve(loss).loss, t), t).cause
        'a z-loss: 0.01 log(Z)^2'
    """
    tokens, noise = tokens.with_precision(torch.float64), noise or rounding(grad, tokens)
    g, z = grad.detach().double(), tokens.logits.detach()
    total, size = g.sum(-1), g.norm(dim=-1)
    seen = total.abs() > TOLERANCE * size + noise.sums
    if not bool(seen.any()):
        return None
    if (found := _uncoupled(g, z, tokens, noise)) is not None:
        return found
    digits = TOLERANCE + float((noise.sums / total.abs())[seen].min())  # to which the number is known
    for found in (
        *_penalties(g, z, total, tokens, noise, digits),
        *_capped(g, z, tokens, noise, digits),
        *_clamped(g, z, tokens),
    ):
        balanced, rows = found.grad, found.rows.to(g.device)
        grown = (balanced.norm(dim=-1) / size[rows].clamp(min=1e-300)).clamp(min=1)
        allowed = 10 * TOLERANCE * (balanced.norm(dim=-1) + size[rows]) + 4 * noise.sums[rows] * grown
        if bool((balanced.sum(-1).abs() <= allowed).all()):
            return found
    return Leak("", math.nan, g, tokens, torch.arange(len(tokens)))


def _uncoupled(g: Tensor, z: Tensor, tokens: Tokens, noise: Noise) -> Leak | None:
    """Losses of raw logits without any softmax: the label's own logit, or each logit for itself."""
    d, everything = tokens.one_hot, torch.arange(len(g))
    others = (g * (1 - d)).norm(dim=-1)
    if bool((others <= TOLERANCE * g.norm(dim=-1) + noise.rows).all()):
        pull = -tokens.gather(g)
        low, high = (plain(float(end)) for end in (pull.min(), pull.max()))
        by = low if low == high else f"{low} to {high}"
        word = "lowers" if float(pull.max()) <= 0 else "raises"
        said = (
            f"It {word} the label's raw logit by {by.replace('-', '') if word == 'lowers' else by} and takes nothing from the "
            f"others: there is no softmax in it (log_softmax forgotten?), so that Q = p {'-' if word == 'lowers' else '+'} "
            f"{'' if by in ('1', '-1') else 'this times '}d and the logit moves for ever"
        )
        return Leak(
            f"it {word} the label's raw logit, without a softmax", float(pull.median()), g, tokens, everything, said
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
            said = f"Its gradient is that of {name}{times}: each logit is pulled for itself, no softmax couples them"
            return Leak(f"{name}{times}, without a softmax", factor, g, tokens, everything, said)
    return None


def _penalties(g: Tensor, z: Tensor, total: Tensor, tokens: Tokens, noise: Noise, digits: float) -> Iterator[Leak]:
    """Terms added to the loss, each by the one weight at which it accounts for all the sums."""
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
        as_good = bool(
            (off[1] <= 2 * off[0] + noise.sums).all()
        )  # what a short number is off by would hide small gradients
        weight = short if as_good else exact
        yield Leak(cause.format(f"{short:.5g}"), weight, g - weight * term, tokens, torch.arange(len(g)))


def _capped(g: Tensor, z: Tensor, tokens: Tokens, noise: Noise, digits: float) -> Iterator[Leak]:
    """A soft-cap by the one height at which the sums vanish."""
    finite = z.masked_fill(z.isinf(), 0.0)

    rounded = noise.sums / TOLERANCE + 1e-300  # a sum that is rounding says nothing of a cap

    def uncapped(log_c: float) -> Tensor:
        return g / (1 - torch.tanh(finite / math.exp(log_c)) ** 2).clamp(min=1e-12)

    def off(log_c: float) -> float:
        made = uncapped(log_c)
        return float((made.sum(-1).abs() / (made.norm(dim=-1) + rounded)).square().mean())

    grid = torch.linspace(*map(math.log, CAPS), 80).tolist()
    best = min(range(len(grid)), key=lambda i: off(grid[i]))
    if best in (0, len(grid) - 1):  # no cap in this range
        return
    bounds = grid[best - 1], grid[best + 1]
    log_c = float(minimize_scalar(off, bounds=bounds, method="bounded", options={"xatol": 1e-12}).x)
    cap = written(math.exp(log_c), 10 * digits)
    capped = tokens.replace(logits=cap * torch.tanh(z / cap))
    cause = f"a soft-cap: {cap:.5g} tanh(z / {cap:.5g})"
    yield Leak(cause, cap, uncapped(math.log(cap)), capped, torch.arange(len(g)))


def _clamped(g: Tensor, z: Tensor, tokens: Tokens) -> Iterator[Leak]:
    """Logits cut off at a level, beyond which nothing has a gradient."""
    still = (g == 0) & z.isfinite()
    if not bool(still.any()) or bool(still.all()):
        return
    low, high = float(z[~still].min()), float(z[~still].max())  # what has a gradient lies between
    over, under = still & (z >= high), still & (z <= low)
    if not bool((over | under == still).all()):
        return
    ends, said = {}, []
    if bool(under.any()):
        ends["min"] = _shortest(float(z[under].max()), low)
        said.append(f"below about {ends['min']:.3g}")
    if bool(over.any()):
        ends["max"] = _shortest(high, float(z[over].min()))
        said.append(f"above about {ends['max']:.3g}")
    if len(ends) == 2:  # one number for both ends, where they agree on one
        least, most = max(high, -low), min(float(z[over].min()), -float(z[under].max()))
        if least <= most:
            size = _shortest(least, most)
            ends, said = {"min": -size, "max": size}, [f"beyond about -{size:.3g} and {size:.3g}"]
    held = z.clamp(**ends)
    p = held.softmax(-1) * still  # what the clamped entries would have had to give
    share = -g.sum(-1, keepdim=True) / p.sum(-1, keepdim=True).clamp(min=1e-300)
    rows = (~tokens.gather(still)).nonzero()[:, 0]  # a clamped label's own pull is lost
    grad, kept = (g + share * p)[rows], tokens[rows].replace(logits=held[rows])
    value = ends.get("max", ends.get("min", 0.0))
    yield Leak(f"{CLAMPED}: no gradient {' or '.join(said)}", value, grad, kept, rows.cpu())


def _shortest(low: float, high: float) -> float:
    """The number with the fewest digits from low to high: what somebody may have written."""
    middle = (low + high) / 2
    tried = (float(f"{value:.{digits}g}") for digits in range(1, 17) for value in (middle, low, high))
    return next((n for n in tried if low <= n <= high), middle)
