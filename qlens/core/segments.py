"""Segments: sums and means over the tokens of sequences and of pairs."""

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from qlens.core.errors import InputError
from qlens.core.tokens import Tokens


class Groups:
    """Groups of tokens with the same id.

    Args:
        ids: the group of each token, (N,); any integers, in any order.

    Attributes:
        index: the group of each token, numbered from 0, (N,).
        number: how many groups there are, G.

    Example:
        >>> groups = Groups(torch.tensor([7, 7, 3]))
        >>> groups.mean(torch.tensor([1.0, 2.0, 5.0]))[groups.index]
        tensor([1.5000, 1.5000, 5.0000])
    """

    def __init__(self, ids: Int[Tensor, " N"]):
        unique, self.index = ids.unique(return_inverse=True)
        self.number = len(unique)

    def total(self, values: Float[Tensor, " N"]) -> Float[Tensor, " G"]:
        """The sum over each group, (G,), differentiable."""
        return values.new_zeros(self.number).index_add(0, self.index, values)

    def mean(self, values: Float[Tensor, " N"]) -> Float[Tensor, " G"]:
        """The mean over each group, (G,), differentiable."""
        return self.total(values) / self.total(torch.ones_like(values))

    def first(self) -> Int[Tensor, " G"]:
        """The row of each group's first token, (G,)."""
        rows = torch.arange(len(self.index), device=self.index.device)
        return rows.new_full((self.number,), len(rows)).scatter_reduce(0, self.index, rows, "amin")

    def size(self, like: Tensor) -> Float[Tensor, " N"]:
        """The number of tokens in each token's group, (N,), in the dtype of ``like``."""
        return self.total(torch.ones_like(like))[self.index]


@dataclass(frozen=True, eq=False)
class Pairs:
    """The chosen and the rejected sequence of every pair among N tokens.

    Args:
        index: the pair of each token, numbered from 0, (N,).
        chosen: whether each token is of its pair's chosen sequence, (N,).
        size: the number of tokens in each token's sequence, (N,).
        pairs: the pairs as groups.

    Raises:
        InputError: from ``of``: a pair lacks its chosen or its rejected sequence.
    """

    index: Int[Tensor, " N"]
    chosen: Bool[Tensor, " N"]
    size: Float[Tensor, " N"]
    pairs: Groups

    @classmethod
    def of(cls, tokens: Tokens) -> "Pairs":
        """The pairs that ``tokens.pair`` and ``tokens.chosen`` name."""
        ids, chosen = tokens.require("pair"), tokens.require("chosen").bool()
        pairs, values = Groups(ids), tokens.label_log_probs.detach()
        counts = [pairs.total(side.to(values)) for side in (chosen, ~chosen)]
        for name, count in zip(("chosen", "rejected"), counts, strict=True):
            if bool((count == 0).any()):
                at = int((count == 0).nonzero()[0, 0])
                pair = int(ids[pairs.index == at][0])
                raise InputError(
                    f"pair {pair} has no token of its {name} sequence: a pair needs both, in training within one micro-batch "
                    "(pack its two texts into one example, with position_ids and chosen per token)"
                )
        size = torch.where(chosen, counts[0][pairs.index], counts[1][pairs.index])
        return cls(pairs.index, chosen, size, pairs)

    def totals(self, values: Float[Tensor, " N"]) -> tuple[Float[Tensor, " G"], Float[Tensor, " G"]]:
        """The sums over the chosen and over the rejected sequence of every pair, differentiable."""
        chosen = torch.where(self.chosen, values, 0.0)
        return self.pairs.total(chosen), self.pairs.total(values - chosen)

    def means(self, values: Float[Tensor, " N"]) -> tuple[Float[Tensor, " G"], Float[Tensor, " G"]]:
        """The means over the chosen and over the rejected sequence of every pair, differentiable."""
        return self.totals(values / self.size)

    def signed(self, chosen: Float[Tensor, " G"], rejected: Float[Tensor, " G"]) -> Float[Tensor, " N"]:
        """The value of each token's own sequence, (N,), from values of the chosen and the rejected sequences."""
        return torch.where(self.chosen, chosen[self.index], rejected[self.index])

    def split(self, losses: Float[Tensor, " G"]) -> Float[Tensor, " N"]:
        """Losses of pairs divided equally among their tokens, (N,), so that the rows sum to them."""
        return (losses / self.pairs.total(torch.ones_like(self.size)))[self.index]
