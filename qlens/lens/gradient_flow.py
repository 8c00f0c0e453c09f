"""Gradient flow: the fixed point that training on a loss converges to, as the target moves with the student."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float
from scipy.integrate import LSODA
from scipy.special import entr, softmax

from qlens.core.autograd import gradient
from qlens.core.display import Result
from qlens.core.errors import InputError
from qlens.core.tokens import Tokens
from qlens.lens.exact import without_casts
from qlens.registry import Variant, resolve

GRID = np.geomspace(0.01, 1e5, 141)  # times, in steps of gradient descent on the logits at rate 1
USUAL = (0.01, 100.0)  # range of |g| / |p - d| in which time is counted in such steps
SIZE = 4  # of the vocabulary
MOST_STEPS = 300  # a smooth loss takes 250
RATE, TAIL = 0.03, 2000  # rate and steps of the gradient descent that takes over where the solver sticks
ROLLED = 8  # most permutations of the ids that are tested
STILL, ALIKE = 0.005, 0.01  # differences that two printed digits do not show, and hardly show


@dataclass(frozen=True, eq=False, repr=False)
class Destination(Result):
    """The fixed point of a loss on one distribution: print it, or read ``end``, ``sentence``, ``times``, ``probs``, ``plot()``.

    Args:
        spec: the loss.
        frequencies, start: label frequency of each entry, and the distribution at time 0, (size,).
        times, probs: log-spaced times in steps of gradient descent at rate 1, (T,); p at each, (T, size).
        settled: whether no entry moved by 0.005 over the last three quarters of the time.
        by_id: whether permuting the ids changes the gradient, so that other ids may converge elsewhere.
        teacher, reference: the distributions that the loss was given, (size,); None where it needs none.

    Example:
        >>> destination("dft").end.round(2)
        array([1., 0., 0., 0.])
    """

    spec: str
    frequencies: Float[np.ndarray, " size"]
    start: Float[np.ndarray, " size"]
    times: Float[np.ndarray, " T"]
    probs: Float[np.ndarray, "T size"]
    settled: bool
    by_id: bool = False
    teacher: Float[np.ndarray, " size"] | None = None
    reference: Float[np.ndarray, " size"] | None = None

    @property
    def end(self) -> Float[np.ndarray, " size"]:
        """The last distribution, (size,)."""
        return self.probs[-1]

    @property
    def sentence(self) -> str:
        """The fixed point in one sentence."""
        seen = self.frequencies > 0
        labels, where = _listed(100 * self.frequencies[seen], ".3g"), _listed(self.end[seen], ".2f")
        if len(seen) > SIZE:
            labels += f" (V = {len(seen)})"
        if self.by_id:
            labels += f" at ids {_listed(seen.nonzero()[0], 'd')}"
        tail = "; with other label ids it converges elsewhere" if self.by_id else ""
        if not self.settled:
            time = f"t = {self.times[-1]:.2g}"
            return f"With label frequencies {labels} training has reached {where} at {time} and is still moving{tail}."
        return f"With label frequencies {labels} training converges to {where}: {self._verdict()}{tail}."

    @property
    def table(self) -> pd.DataFrame:
        """A row per time: the time, and the probability of every entry, p_0, p_1, ..."""
        columns = {f"p_{entry}": probs for entry, probs in enumerate(self.probs.T)}
        return pd.DataFrame({"time": self.times, **columns})

    def plot(self) -> Any:
        """The figure: every entry's probability against time (matplotlib)."""
        from qlens.analysis.plots.flow_figure import figure_destination

        return figure_destination(self)

    def to_dict(self) -> dict[str, Any]:
        """Everything, for JSON."""
        lists = {name: value.tolist() for name, value in vars(self).items() if isinstance(value, np.ndarray)}
        return vars(self) | lists | {"end": self.end.tolist(), "sentence": self.sentence}

    def _verdict(self) -> str:
        f, end = self.frequencies, self.end
        if np.allclose(end, f, atol=STILL):
            return "the label frequencies"
        for name, other in (("teacher", self.teacher), ("reference", self.reference)):
            way = np.zeros_like(f) if other is None else other - f
            share = (end - f) @ way / max(way @ way, ALIKE**2)
            if 0 < share < 1 + ALIKE and np.allclose(end, f + share * way, atol=ALIKE):
                part = "" if share > 1 - ALIKE else f"{share:.0%} of the way from the label frequencies to "
                return f"{part}the {name}'s distribution"
        top = int(end.argmax())
        if end[top] > 1 - ALIKE:
            return "the majority wins outright" if f[top] == f.max() else f"entry {top} wins, against the majority"
        if np.allclose(end, self.start, atol=ALIKE):
            return "where it started"
        unseen = end[f == 0].sum()
        tail = f", with {unseen:.2f} on entries that are never labels" if unseen > ALIKE else ""
        return f"{'sharper' if entr(end).sum() < entr(f).sum() else 'flatter'} than the label frequencies{tail}"

    def to_frame(self) -> pd.DataFrame:
        """``table``: a row per time."""
        return self.table

    def __repr__(self) -> str:
        return f"Destination({self.spec}: {_listed(self.end, '.2f')}{'' if self.settled else ', still moving'})"

    def __str__(self) -> str:
        return f"{self.spec}: {self.sentence}"


def destination(
    loss: Variant | str | Callable,
    frequencies: Sequence[float] = (0.55, 0.45),
    *,
    size: int = SIZE,
    start: Sequence[float] | None = None,
    teacher: Sequence[float] | None = None,
    reference: Sequence[float] | None = None,
) -> Destination:
    r"""The fixed point of the expected gradient flow of a loss on one distribution with varying labels.

    .. math:: \dot z = -\sum_y f_y\, g(z, y), \qquad p = \mathrm{softmax}(z), \qquad 0 \le t \le 10^5

    It differs from the Q of one step where Q moves with the student: sft converges to f, dft to the majority. The logits are
    free and centred. Where thresholds stop the solver, gradient descent goes on for 60 units of time. Where the gradient is far
    from the size of p - d, because of a weight of 1e-9 for example, time is scaled by that.

    Args:
        loss: a Variant, a spec, FILE.py:FUNCTION, or a callable (see ``implied_target``).
        frequencies: f, label frequencies of entries 0, 1, ...; the other entries are never labels.
        size: of the vocabulary, V; a few entries suffice, and thousands are slow.
        start, reference: probabilities (size,), by default uniform and the start; the old policy is always the start.
        teacher: probabilities (size,); by default it prefers entry 1: (0.35, 0.5, 0.1, 0.05) at size 4.

    The second pass is the student, every advantage is 1, every token is critical, hinted and a sequence of its own; the
    entries that are never labels are the negatives.

    Returns:
        A Destination: printable, with ``end``, ``sentence``, ``table`` and ``plot()``.

    Raises:
        InputError: arguments that are no probabilities; a loss of another scope than "token"; one that fails or is not finite.

    Example:
        >>> print(destination("dft"))
        dft: With label frequencies 55/45 training converges to 1.00/0.00: the majority wins outright.
    """
    variant = resolve(loss)
    if variant.scope != "token":
        why = f"its gradient depends on the {variant.scope}, not on one token alone; give a loss of scope 'token'"
        raise InputError(f"loss: {variant.spec} has scope {variant.scope!r}: {why}")
    f = _probabilities("frequencies", frequencies)
    if not isinstance(size, int) or size < max(2, len(f)):
        raise InputError(f"size must be a whole number, at least 2 and the {len(f)} frequencies, got {size!r}")
    f = np.pad(f, (0, size - len(f)))
    p = np.full(size, 1 / size) if start is None else _probabilities("start", start, size)
    if p.min() <= 0:
        raise InputError(f"start must be positive, got 0 for entry {int(p.argmin())}: no step of the logits leaves 0")
    q, r = _prefers_second(size) if teacher is None else teacher, p if reference is None else reference
    others = {"teacher": _probabilities("teacher", q, size), "reference": _probabilities("reference", r, size)}
    field = _Field(variant, f, others | {"old": p})
    start_logits = _centred(np.log(p))
    pace = field.pace(start_logits)
    times, logits = _follow(lambda t, z: field.flow(z) / pace, start_logits)
    grid = np.append(GRID[GRID < times[-1]], times[-1])
    probs = np.stack([np.interp(np.log1p(grid), np.log1p(times), p_k) for p_k in softmax(logits, -1).T], -1)
    settled = bool(np.ptp(probs[grid >= grid[-1] / 4], 0).max() < STILL)
    given = {name: others[name] for name in others if name in variant.needs}
    return Destination(variant.spec, f, p, grid / pace, probs, settled, field.by_id(start_logits), **given)


class _Field:
    """The vector field of the flow: one row of Tokens per label that occurs."""

    def __init__(self, variant: Variant, f: np.ndarray, models: dict[str, np.ndarray]):
        (self.seen,) = f.nonzero()
        self.variant, self.f = variant, f
        shape, ones = (len(self.seen), len(f)), torch.ones(len(self.seen), dtype=torch.float64)
        fixed = {name: torch.from_numpy(probs).log().expand(shape) for name, probs in models.items()}
        fixed |= {"labels": torch.from_numpy(self.seen), "sequence": torch.arange(len(self.seen)), "advantage": ones}
        fixed |= {"critical": ones > 0, "hint": ones > 0, "negatives": torch.from_numpy(f == 0).expand(shape)}
        self.fixed, self.dtype = fixed, torch.float64
        self.variant = without_casts(variant, self.tokens(np.zeros(len(f))))
        self.explicit = variant.built_in and not variant.derived  # then no graph is needed

    def tokens(self, z: np.ndarray) -> Tokens:
        """A row per label that occurs, at logits z, (size,)."""
        logits = torch.tensor(z).expand(len(self.seen), len(self.f))
        return Tokens.unchecked(logits=logits, second=logits, **self.fixed).with_precision(self.dtype)

    def gradient(self, tokens: Tokens) -> np.ndarray:
        """g at every label, (labels, size)."""
        spec = self.variant.spec
        try:
            g = self.variant.target(tokens).grad if self.explicit else gradient(self.variant.loss, tokens)
        except InputError:
            if self.dtype == torch.float32:
                raise
            self.dtype = torch.float32  # a loss may require it
            try:
                return self.gradient(tokens.with_precision(torch.float32))
            except InputError:
                self.dtype = torch.float64
            raise
        except Exception as error:  # a user's loss may raise anything
            raise InputError(f"loss: {spec} raised {type(error).__name__}: {error}") from error
        if not bool(g.isfinite().all()):
            raise InputError(f"loss: the gradient of {spec} is not finite at p = {tokens.probs[0].numpy().round(6)}")
        return g.double().numpy()

    def flow(self, z: np.ndarray) -> np.ndarray:
        """dz/dt at centred logits."""
        pull = self.f[self.seen] @ self.gradient(self.tokens(z))
        return -_centred(pull)

    def pace(self, z: np.ndarray) -> float:
        """The largest |g| / |p - d| for p_y from the start's to nearly 1; 1 where it is of the usual size."""
        largest, one_hot = 0.0, np.eye(len(z))[self.seen]
        for push in (0.0, 2.0, 4.0, 8.0):
            for row, label in enumerate(one_hot):
                moved = _centred(z + push * label)
                away = np.linalg.norm(softmax(moved) - label)
                largest = max(largest, float(np.linalg.norm(self.gradient(self.tokens(moved))[row]) / away))
            if USUAL[0] <= largest <= USUAL[1]:
                return 1.0
        return largest or 1.0

    def by_id(self, z: np.ndarray) -> bool:
        """Whether permuting the ids changes the gradient."""
        tokens = self.tokens(_centred(z + 0.3 * np.cos(np.arange(len(z)))))
        before = self.gradient(tokens)
        for by in range(1, min(len(z), ROLLED)):
            rolled = {name: value.roll(by, -1) for name, value in tokens.fields().items() if value.ndim == 2}
            after = self.gradient(tokens.replace(labels=(tokens.labels + by) % len(z), **rolled))
            if np.abs(np.roll(before, by, -1) - after).max() > 1e-6 * np.abs(before).max():
                return True
        return False


def _centred(values: np.ndarray) -> np.ndarray:
    return values - values.mean()


def _follow(flow: Callable[[float, np.ndarray], np.ndarray], z: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Times (T,) and logits (T, size) along the flow."""
    solver, states = LSODA(flow, 0.0, z, GRID[-1], rtol=1e-5, atol=1e-6), [(0.0, z)]
    while solver.status == "running" and len(states) < MOST_STEPS:
        solver.step()
        states.append((solver.t, solver.y.copy()))
    for _ in range(0 if solver.status == "finished" else TAIL):
        t, z = states[-1]
        states.append((t + RATE, z + RATE * flow(t, z)))
    return np.array([t for t, _ in states]), np.stack([z for _, z in states])


def _prefers_second(size: int) -> np.ndarray:
    """0.35, 0.5, then 0.1, 0.1 / 2, 0.1 / 3, ..., normalised."""
    teacher = np.array([0.35, 0.5, *(0.1 / np.arange(1, size - 1))])
    return teacher / teacher.sum()


def _probabilities(name: str, given: Sequence[float], size: int | None = None) -> np.ndarray:
    try:
        probs = np.asarray(given, dtype=np.float64)
    except (TypeError, ValueError):
        probs = np.array(np.nan)  # refused below, with the rest
    if probs.shape != (size or probs.size,) or not (probs >= 0).all() or abs(probs.sum() - 1) > 1e-6:
        raise InputError(f"{name} must be {size or 'some'} probabilities that sum to 1, got {given!r}")
    return probs / probs.sum()


def _listed(values: np.ndarray, form: str) -> str:
    return "/".join(format(value, form) for value in values[:5]) + ("/..." if len(values) > 5 else "")
