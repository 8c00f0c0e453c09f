"""Features: what a law of trust may be written in, at every token, and how far a formula is off."""

import math

import numpy as np
import torch
from torch import Tensor

from qlens.tokens import Tokens, expectation

TOP_K = (2, 3, 5, 10, 20, 30, 50, 100)


class Features:
    """What a law may be written in, at every token, as numpy arrays."""

    def __init__(self, tokens: Tokens, pull: np.ndarray, tolerance: float, noise: float):
        self.b, self.tolerance = pull, tolerance
        with torch.no_grad():
            self.log_p = numpy_of(tokens.label_log_probs)
            self.log_rest = numpy_of(tokens.rest_log_probs)
            p = tokens.probs.double()
            self.entropy = numpy_of(-expectation(p, tokens.log_probs.double()))
            size = tokens.logits.shape[1]
            self.top = {k: numpy_of(_top_entropy(tokens, k)) for k in TOP_K if k < size}
            self.models = {
                name: numpy_of(tokens.gather(tokens.log_probs_of(name)))
                for name in ("reference", "old", "teacher")
                if getattr(tokens, name) is not None
            }
        self.advantage = None if tokens.advantage is None else numpy_of(tokens.advantage)
        self.masks = {
            n: getattr(tokens, n).cpu().numpy() for n in ("critical", "hint") if getattr(tokens, n) is not None
        }
        self.groups = {
            n: getattr(tokens, n).cpu().numpy() for n in ("sequence", "pair") if getattr(tokens, n) is not None
        }
        self.floor = noise / tolerance / np.maximum(np.exp(self.log_rest), 1e-300) + 1e-30

    @property
    def domain(self) -> str:
        """Where the pull was seen."""
        low, high = (plain(math.exp(end(self.log_p))) for end in (min, max))
        rest = math.exp(self.log_rest.min())
        high = f"1 - {rest:.1g}" if rest < 1e-3 else high
        return f"on {len(self.b)} tokens, p_y {low} to {high}, entropy {self.entropy.min():.2g} to {self.entropy.max():.2g} nats"

    def misfit(self, made: np.ndarray, where: np.ndarray | None = None) -> float:
        """Relative and root mean square, with what rounding alone makes of a pull counted as the tolerance."""
        size = np.maximum(np.abs(self.b), np.abs(made)) + self.floor
        off = np.abs(self.b - made) / size
        return float(np.sqrt(np.mean(np.square(off if where is None else off[where]))))

    def fits(self, where: np.ndarray, made: np.ndarray) -> float | None:
        """The misfit there, if it is rounding."""
        miss = self.misfit(made, where)
        return miss if miss <= self.tolerance else None


def plain(value: float) -> str:
    """A number as it is printed: five digits."""
    return f"{value:.5g}"


def _top_entropy(tokens: Tokens, k: int) -> Tensor:
    top = tokens.logits.double().topk(k, -1).values.log_softmax(-1)
    return -(top.exp() * top).sum(-1)


def numpy_of(values: Tensor) -> np.ndarray:
    """The same in numpy, float64."""
    return values.detach().double().cpu().numpy()


def line(x: np.ndarray, y: np.ndarray, weight: np.ndarray, free: bool) -> tuple[float, float]:
    """c and a in y = c + a x, by weighted least squares; without ``free`` through the origin."""
    a = np.stack([np.ones_like(x) if free else np.zeros_like(x), x], 1)
    (c, slope), *_ = np.linalg.lstsq(a * weight[:, None], y * weight, rcond=None)
    return float(c), float(slope)
