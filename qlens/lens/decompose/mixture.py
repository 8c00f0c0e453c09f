"""Mixture: the pulls toward named distributions that explain a gradient."""

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from qlens.lens.rounding import TOLERANCE

RAW = "nothing (raw logits)"


@dataclass(frozen=True, eq=False)
class Mixture:
    """What explains a gradient, or comes nearest to it.

    Args:
        parts: pull toward each distribution at every token, in unit scale, (N,) by name; what is left of 1 stays the student's.
        index: the tokens of the gradient that were looked at, (N,).
        misfit: |g - sum| / |g|, root mean square over the tokens on which parameters were fitted.
        held: the same over the other tokens.
        explains: whether both are rounding.
        unique: where the parts can be told apart, (N,); elsewhere their residuals coincide with the student's or each other's.
        parameter: name and value of what was fitted for all tokens at once, or None.
        closest: for a gradient that nothing explains, the misfit of the best non-negative mixture of everything known.
        alike: residuals that coincide here, as pairs of names: the first stands for both.
        digits: how precisely a pull is known, relative.
        noise: how precisely every token's pulls are known, absolute, (N,): the nearer two distributions, the less.
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
        """The tokens whose pulls are known to a hundredth of the largest of them, beyond rounding."""
        if self.noise is None or not self.parts:
            return self.unique
        largest = torch.stack([pull.abs() for pull in self.parts.values()]).amax(0)
        return self.unique & (self.noise <= 0.01 * largest)

    @property
    def signed(self) -> bool:
        """Whether some token is pushed away from one of the distributions."""
        return any(bool(self.away(name).any()) for name in self.parts)

    def away(self, name: str) -> Bool[Tensor, " n"]:
        """Which of the tokens that can tell the parts apart are pushed away from a distribution."""
        known, rounding = self.parts[name][self.unique], 0.0 if self.noise is None else self.noise[self.unique]
        return known < -self.digits * known.abs().max().clamp(min=1) - rounding if len(known) else known < 0

    def toward(self, name: str) -> Bool[Tensor, " n"]:
        """Which of the same tokens are pulled toward it."""
        known, rounding = self.parts[name][self.unique], 0.0 if self.noise is None else self.noise[self.unique]
        return known > self.digits * known.abs().max().clamp(min=1e-300) + rounding if len(known) else known > 0

    @property
    def pull(self) -> Float[Tensor, " N"]:
        """The total pull on every token: the structural scale where no part is negative."""
        return torch.stack(list(self.parts.values())).sum(0) if self.parts else torch.zeros(len(self.index))

    @property
    def trust(self) -> Float[Tensor, " N"]:
        """The pull toward the label, 0 where it is no more than rounding."""
        pull = self.parts.get("the label", torch.zeros(len(self.index), dtype=torch.float64))
        return pull if self.noise is None else torch.where(pull.abs() <= self.noise, 0.0, pull)
