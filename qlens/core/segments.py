"""Segments: totals and means over the tokens of a sequence, of a pair or of the batch: the only place that adds tokens up."""

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from qlens.core.errors import InputError
from qlens.core.tokens import Tokens


class Groups:
    """Tokens that belong together, by their ids.

    Args:
        ids: which group each token belongs to, (N,); any integers, in any order.

    Attributes:
        index: the group of each token, numbered from 0, (N,).
        number: how many groups there are, G.

    Example:
        >>> groups = Groups(torch.tensor([7, 7, 3]))
        >>> groups.mean(torch.tensor([1.0, 2.0, 5.0]))[groups.index]
        tensor([1.5000, 1.5000, 5.0000])
    """

    def __init__(self, ids: Int[Tensor, " N"]):
        kept, self.index = ids.unique(return_inverse=True)
        self.number = len(kept)

    def total(self, values: Float[Tensor, " N"]) -> Float[Tensor, " G"]:
        """The sum over every group, differentiable."""
        return values.new_zeros(self.number).index_add(0, self.index, values)

    def mean(self, values: Float[Tensor, " N"]) -> Float[Tensor, " G"]:
        """The mean over every group, differentiable."""
        return self.total(values) / self.total(torch.ones_like(values))

    def first(self) -> Int[Tensor, " G"]:
        """The place of every group's first token."""
        place = torch.arange(len(self.index), device=self.index.device)
        return place.new_full((self.number,), len(place)).scatter_reduce(0, self.index, place, "amin")

    def size(self, like: Tensor) -> Float[Tensor, " N"]:
        """How many tokens the group of each token holds, (N,), in the dtype of ``like``."""
        return self.total(torch.ones_like(like))[self.index]


@dataclass(frozen=True, eq=False)
class Pairs:
    """The chosen and the rejected sequence of every pair among N tokens.

    Args:
        index: the pair of each token, (N,), numbered from 0.
        chosen: whether each token is of its pair's chosen sequence, (N,).
        size: how many tokens the sequence of each token holds, (N,).
        pairs: the tokens by pair.

    Raises:
        InputError: by ``of``: a pair lacks its chosen or its rejected sequence.
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
                wrong = int(ids[pairs.index == at][0])
                raise InputError(
                    f"pair {wrong} has no token of its {name} sequence: a pair needs both, in training within one micro-batch "
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
        """At every token, what belongs to its own sequence of the pair."""
        return torch.where(self.chosen, chosen[self.index], rejected[self.index])

    def split(self, losses: Float[Tensor, " G"]) -> Float[Tensor, " N"]:
        """A loss per pair, shared equally among the pair's tokens: the rows add up to it."""
        return (losses / self.pairs.total(torch.ones_like(self.size)))[self.index]
