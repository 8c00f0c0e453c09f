"""Mixture: a gradient as a sum of pulls toward named distributions, g = sum_j w_j (p - R_j)."""

from dataclasses import dataclass
from typing import Any

import pandas as pd
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from qlens.core.display import Result
from qlens.lens.rounding import TOLERANCE

RAW = "nothing (raw logits)"


@dataclass(frozen=True, eq=False, repr=False)
class Mixture(Result):
    """The decomposition g = sum_j w_j (p - R_j) of a gradient, exact or the best there is.

    Args:
        parts: the weight w_j of each distribution at every token, unit scale, (N,) by name; 1 minus their sum is the
            student's own share of Q.
        index: the tokens that were looked at, (N,).
        misfit: |g - sum| / |g|, root mean square over the tokens on which parameters were fitted.
        held: the same over the held-out tokens.
        explains: whether both are rounding.
        unique: where the weights are identifiable, (N,); elsewhere distributions coincide.
        parameter: name and value of the parameter that was fitted for all tokens, or None.
        closest: the relative error of the best non-negative mixture of all distributions, where none is exact.
        alike: distributions that coincide, as pairs of names; the first stands for both.
        digits: relative precision of the weights.
        noise: absolute precision of every token's weights, (N,).

    Example:
        >>> import qlens
        >>> qlens.explain("kd_hybrid").mixture
        Mixture(the label, the teacher: exact)
    """

    parts: dict[str, Float[Tensor, " N"]]
    index: Tensor
    misfit: float
    held: float
    explains: bool
    unique: Bool[Tensor, " N"]
    parameter: tuple[str, float] | None = None
    closest: float | None = None
    alike: tuple[tuple[str, str], ...] = ()
    digits: float = TOLERANCE
    noise: Float[Tensor, " N"] | None = None

    @property
    def sure(self) -> Bool[Tensor, " N"]:
        """The tokens whose weights are known to 1 % of the largest of them."""
        if self.noise is None or not self.parts:
            return self.unique
        largest = torch.stack([pull.abs() for pull in self.parts.values()]).amax(0)
        return self.unique & (self.noise <= 0.01 * largest)

    @property
    def signed(self) -> bool:
        """Whether some weight is negative."""
        return any(bool(self.away(name).any()) for name in self.parts)

    def away(self, name: str) -> Bool[Tensor, " n"]:
        """The identifiable tokens on which a distribution has a negative weight."""
        weights, rounding = self.parts[name][self.unique], 0.0 if self.noise is None else self.noise[self.unique]
        return weights < -self.digits * weights.abs().max().clamp(min=1) - rounding if len(weights) else weights < 0

    def toward(self, name: str) -> Bool[Tensor, " n"]:
        """The identifiable tokens on which a distribution has a positive weight."""
        weights, rounding = self.parts[name][self.unique], 0.0 if self.noise is None else self.noise[self.unique]
        return weights > self.digits * weights.abs().max().clamp(min=1e-300) + rounding if len(weights) else weights > 0

    @property
    def pull(self) -> Float[Tensor, " N"]:
        """The sum of the weights of every token, (N,): the structural scale where none is negative."""
        return torch.stack(list(self.parts.values())).sum(0) if self.parts else torch.zeros(len(self.index))

    @property
    def trust(self) -> Float[Tensor, " N"]:
        """The label's weight, the trust of the construction, (N,); 0 where it is rounding."""
        pull = self.parts.get("the label", torch.zeros(len(self.index), dtype=torch.float64))
        return pull if self.noise is None else torch.where(pull.abs() <= self.noise, 0.0, pull)

    @property
    def shares(self) -> dict[str, Float[Tensor, " N"]]:
        """The coefficients in Q = sum_j w_j R_j + (1 - sum_j w_j) p, (N,) by name: the weights, and "the student"."""
        return {**self.parts, "the student": 1 - self.pull}

    def to_frame(self) -> pd.DataFrame:
        """A row per token: its index, whether its weights are identifiable, and the columns of ``shares``."""
        shares = {name: share.numpy() for name, share in self.shares.items()}
        return pd.DataFrame({"token": self.index.numpy(), "identifiable": self.unique.numpy(), **shares})

    def plot(self) -> Any:
        """The figure: the shares of Q, stacked for every token (matplotlib)."""
        from qlens.analysis.plots import figure_mixture

        return figure_mixture(self)

    def to_dict(self) -> dict[str, Any]:
        """Everything as plain values, for JSON."""
        return {
            "explains": self.explains, "signed": self.signed, "misfit": self.misfit, "held": self.held,
            "parameter": self.parameter, "closest": self.closest,
            "parts": {name: weight.tolist() for name, weight in self.parts.items()},
            "unique": self.unique.tolist(), "tokens": self.index.tolist(),
        }  # fmt: skip

    def __repr__(self) -> str:
        fit = "exact" if self.explains else f"leaves {max(self.misfit, self.held):.2g} of the gradient"
        return f"Mixture({', '.join(self.parts) or 'nothing'}: {fit})"

    def __str__(self) -> str:
        rows = [f"  {name}: {float(w.min()):.4g} to {float(w.max()):.4g}" for name, w in self.parts.items()]
        return "\n".join([f"{self!r}, weights on {len(self.index)} tokens:", *rows])
