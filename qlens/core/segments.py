"""Groups: totals and means over the tokens of a sequence, of a pair or of the batch: the only place that adds tokens up."""

import torch
from jaxtyping import Float, Int
from torch import Tensor


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
