"""Features: the quantities that a weight function may depend on, at every token, and the misfit of a formula."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from qlens.core.numerics import expectation, row_blocks
from qlens.core.tokens import Tokens

TOP_K = (2, 3, 5, 10, 20, 30, 50, 100)
GROUPS = 10**6  # distance between the ids of sequences and pairs of two readings


@dataclass(frozen=True, eq=False)
class TokenFeatures:
    """The quantities that a weight function may depend on, at N tokens.

    Args:
        vocabulary: V.
        arrays: the quantities by name, (N,) each.
    """

    vocabulary: int
    arrays: Mapping[str, np.ndarray]

    @classmethod
    @torch.no_grad()
    def of(cls, tokens: Tokens) -> "TokenFeatures":
        """The features of tokens, from some rows at a time."""
        size = tokens.logits.shape[1]
        blocks = [_arrays(tokens[rows]) for rows in row_blocks(len(tokens), size)]
        return cls(size, {name: np.concatenate([block[name] for block in blocks]) for name in blocks[0]})

    @property
    def rest_log_probs(self) -> Tensor:
        """log(1 - p_y), (N,)."""
        return torch.from_numpy(self.arrays["log_rest"])

    def __len__(self) -> int:
        return len(self.arrays["log_p"])

    def __getitem__(self, rows: Tensor) -> "TokenFeatures":
        """The features of some rows."""
        index = rows.cpu().numpy()
        return TokenFeatures(self.vocabulary, {name: values[index] for name, values in self.arrays.items()})


@dataclass(frozen=True, eq=False)
class WeightReading:
    """The weight of every token, (N,), and the rounding error of the gradient it was read from, (N,) or one number."""

    pull: Tensor
    tokens: Tokens | TokenFeatures
    noise: Tensor | float

    def __getitem__(self, rows: Tensor) -> "WeightReading":
        """The reading of some rows."""
        noise = self.noise[rows] if isinstance(self.noise, Tensor) else self.noise
        at = rows if isinstance(self.tokens, TokenFeatures) else rows.to(self.tokens.logits.device)
        return WeightReading(self.pull[rows], self.tokens[at], noise)

    def where_known(self) -> "WeightReading":
        """The reading of the tokens whose weight is known."""
        return self[~self.pull.isnan()]

    @cached_property
    def features(self) -> TokenFeatures:
        """The features of the tokens."""
        return self.tokens if isinstance(self.tokens, TokenFeatures) else TokenFeatures.of(self.tokens)

    def arrays(self, place: int) -> dict[str, np.ndarray]:
        """The features, the weight as "b" and its rounding error; ids of groups differ between places."""
        noise = self.noise if isinstance(self.noise, Tensor) else torch.full((len(self.pull),), self.noise)
        arrays = dict(self.features.arrays) | {"b": numpy_of(self.pull), "noise": numpy_of(noise)}
        arrays |= {"reading": np.full(len(self.pull), float(place))}
        return arrays | {name: arrays[name] + place * GROUPS for name in ("sequence", "pair") if name in arrays}


class Features:
    """The features of the tokens of one or more readings, as numpy arrays."""

    def __init__(self, readings: Sequence[WeightReading], tolerance: float):
        self.readings = readings
        self.tolerance, self.vocabularies = tolerance, sorted({one.features.vocabulary for one in readings})
        parts = [one.arrays(place) for place, one in enumerate(readings)]
        joined = {
            name: np.concatenate([part[name] for part in parts])
            for name in parts[0]
            if all(name in part for part in parts)
        }
        self.b, self.log_p, self.log_rest, self.entropy = (joined[n] for n in ("b", "log_p", "log_rest", "entropy"))
        self.rank, self.largest, self.log_size = (joined[n] for n in ("rank", "largest", "log_size"))
        self.second, self.log_below_largest = joined["second"], joined["log_below_largest"]
        self.squares = joined["squares"]
        self.reading = joined["reading"]
        self.ranks, self.entropies = (
            {n: joined[f"{n} {what}"] for n in ("reference", "old", "teacher") if f"{n} {what}" in joined}
            for what in ("rank", "entropy")
        )
        self.top = {k: joined[f"top {k}"] for k in TOP_K if f"top {k}" in joined}
        self.mass = {k: joined[f"mass {k}"] for k in TOP_K if f"mass {k}" in joined}
        self.models = {name: joined[name] for name in ("reference", "old", "teacher") if name in joined}
        self.factors = {
            symbol: joined[name] for name, symbol in (("advantage", "A"), ("weight", "weight")) if name in joined
        }
        self.advantage = joined.get("advantage")
        self.masks = {name: joined[name] for name in ("critical", "hint") if name in joined}
        self.groups = {name: joined[name] for name in ("sequence", "pair") if name in joined}
        self.floor = joined["noise"] / tolerance / np.maximum(np.exp(self.log_rest), 1e-300) + 1e-30

    @property
    def domain(self) -> str:
        """The range of the tokens, in words."""
        low, high = (plain(math.exp(end(self.log_p))) for end in (min, max))
        rest = math.exp(self.log_rest.min())
        high = f"1 - {rest:.1g}" if rest < 1e-3 else high
        return f"on {len(self.b)} tokens, p_y {low} to {high}, entropy {self.entropy.min():.2g} to {self.entropy.max():.2g} nats"

    def misfit(self, values: np.ndarray, where: np.ndarray | None = None) -> float:
        """Relative root mean square error of a formula's values; an error of the size of rounding counts as the tolerance."""
        size = np.maximum(np.abs(self.b), np.abs(values)) + self.floor
        with np.errstate(invalid="ignore"):  # a form that overflows does not fit
            error = np.abs(self.b - values) / size
        return float(np.sqrt(np.mean(np.square(error if where is None else error[where]))))

    def fits(self, where: np.ndarray, values: np.ndarray) -> float | None:
        """The misfit on some tokens; None where it is more than rounding."""
        miss = self.misfit(values, where)
        return miss if miss <= self.tolerance else None

    def shortest(
        self, where: np.ndarray, form: Callable[..., np.ndarray], values: tuple[float, ...]
    ) -> tuple[float, tuple[float, ...]] | None:
        """The misfit of a form and its numbers, rounded to as few digits as fit about as well; None where it does not fit."""
        with np.errstate(over="ignore"):
            least = self.fits(where, form(*values))
            if least is None:
                return None
            allowed, short_values = max(2 * least, 0.1 * self.tolerance), list(values)
            for place, value in enumerate(values):  # one after the other
                for digits in (1, 2, 3, 4):
                    near = [*short_values[:place], float(f"{value:.{digits}g}"), *short_values[place + 1 :]]
                    if self.misfit(form(*near), where) <= allowed:
                        short_values = near
                        break
        return self.misfit(form(*short_values), where), tuple(short_values)


def _arrays(tokens: Tokens) -> dict[str, np.ndarray]:
    """The features of tokens, by name."""
    tokens = tokens.with_precision(torch.float64)
    log_p, size = tokens.log_probs, tokens.logits.shape[1]
    p = log_p.exp()
    sizes = [k for k in TOP_K if k < size]
    likely, ids = log_p.topk(max([2, *sizes]), -1)
    tensors = {
        "log_p": tokens.gather(log_p), "log_rest": tokens.rest_of(log_p), "entropy": -expectation(p, log_p),
        "rank": _rank(tokens, tokens.logits), "largest": likely[:, 0].exp(), "log_size": torch.full_like(p[:, 0], math.log(size)),
        "second": likely[:, 1].exp(), "log_below_largest": log_p.scatter(1, ids[:, :1], -torch.inf).logsumexp(-1),
        "squares": p.square().sum(-1),
    }  # fmt: skip
    tensors |= {f"top {k}": _entropy(likely[:, :k].log_softmax(-1)) for k in sizes}
    tensors |= {f"mass {k}": likely[:, :k].exp().sum(-1) for k in sizes}
    for name in ("reference", "old", "teacher"):
        if getattr(tokens, name) is not None:
            log_q = tokens.log_probs_of(name)
            tensors[name], tensors[f"{name} rank"] = tokens.gather(log_q), _rank(tokens, log_q)
            tensors[f"{name} entropy"] = -expectation(log_q.exp(), log_q)
    arrays = {name: numpy_of(value) for name, value in tensors.items()}
    for name in ("advantage", "weight", "critical", "hint", "sequence", "pair"):
        value = getattr(tokens, name)
        if value is not None:
            arrays[name] = value.detach().cpu().numpy()
    return arrays


def _rank(tokens: Tokens, values: Tensor) -> Tensor:
    """The number of entries above the label's, (N,)."""
    return (values > tokens.gather(values)[:, None]).sum(-1)


def plain(value: float) -> str:
    """A number as it is printed: five digits."""
    return f"{value + 0.0:.5g}"


def percent(share: float | None) -> str:
    """A share as printed: whole per cent, two digits below one per cent."""
    if share is None:
        return "an unknown share"
    return f"{share:.0%}" if share >= 0.01 or share <= 0 else f"{100 * share:.2g}%"


def _entropy(log_p: Tensor) -> Tensor:
    return -(log_p.exp() * log_p).nan_to_num(0.0).sum(-1)


def numpy_of(values: Tensor) -> np.ndarray:
    """A tensor as a numpy array in float64."""
    return values.detach().double().cpu().numpy()


def line(x: np.ndarray, y: np.ndarray, weight: np.ndarray, free: bool) -> tuple[float, float]:
    """c and a in y = c + a x, by weighted least squares; without ``free`` through the origin."""
    a = np.stack([np.ones_like(x) if free else np.zeros_like(x), x], 1)
    (c, slope), *_ = np.linalg.lstsq(a * weight[:, None], y * weight, rcond=None)
    return float(c), float(slope)
