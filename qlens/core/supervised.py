"""Supervised positions: the shift, mask, padding and packing of a batch, and the label -100."""

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Int, Shaped
from torch import Tensor

from qlens.core.errors import InputError

IGNORE = -100
"""The label of a token that is not supervised."""


LAYOUT = ("labels", "attention_mask", "position_ids")
"""Model inputs that determine which tokens of a batch are supervised."""


def positions(attention_mask: Int[Tensor, "B T"]) -> Int[Tensor, "B T"]:
    """Position ids that count tokens without padding, so that left padding changes nothing."""
    return (attention_mask.cumsum(-1) - 1).clamp(min=0)


def restarts(position_ids: Int[Tensor, "B T"]) -> Bool[Tensor, "B T"]:
    """Where texts begin: in the first column, and where position ids do not increase.

    Example:
        >>> restarts(torch.tensor([[0, 1, 2, 0, 1]])).int()
        tensor([[1, 0, 0, 1, 0]], dtype=torch.int32)
    """
    starts = torch.ones_like(position_ids, dtype=torch.bool)
    starts[:, 1:] = position_ids[:, 1:] <= position_ids[:, :-1]
    return starts


def packed(position_ids: Int[Tensor, "B T"], attention_mask: Int[Tensor, "B T"] | None) -> Int[Tensor, "B T"] | None:
    """The position ids of a packed batch, 0 at padding; None if every row holds one text.

    Raises:
        InputError: the mask hides a token inside a text, which position ids cannot express.
    """
    starts = restarts(position_ids)[:, 1:]
    if attention_mask is None:
        return position_ids if bool(starts.any()) else None
    real = attention_mask.bool()
    if not bool((starts & real[:, 1:] & real[:, :-1]).any()):
        return None
    hidden = real[:, 1:] & ~real[:, :-1] & (position_ids[:, 1:] != 0) & ~starts
    if bool(hidden.any()):
        row = int(hidden.any(-1).nonzero()[0, 0])
        raise InputError(
            f"attention_mask hides a token inside a text of packed row {row}: give that token label -100 instead, or every "
            "text a row of its own"
        )
    return position_ids.masked_fill(~real, 0)


def signed(labels: Tensor) -> Int[Tensor, "*N"]:
    """Labels as int64, of an integer type that holds -100.

    Raises:
        InputError: another type, for example an unsigned one, which has no -100.
    """
    if labels.dtype not in (torch.int64, torch.int32, torch.int16, torch.int8):
        unsigned = ", in which -100 is some other id" if str(labels.dtype).startswith("torch.uint") else ""
        raise InputError(f"labels are {labels.dtype}{unsigned}: give integers that can be -100, such as torch.long")
    return labels.long()


class Supervised:
    """The positions of a batch that predict a supervised label: t - 1 for every supervised label at t.

    A label is supervised unless it is -100, begins its row or its packed sequence (where ``position_ids`` do not
    increase), or follows padding.

    Args:
        labels: unshifted, (B, T), -100 where nothing is learned.
        attention_mask: (B, T), 0 at padding; right padding works without it.
        position_ids: (B, T), for packed rows.

    Attributes:
        labels: the supervised labels, (N,).
        sequence: which sequence each belongs to, (N,), numbered from 0.

    Raises:
        InputError: shapes that do not fit, or labels of a type that cannot hold -100.

    Example:
        >>> Supervised(torch.tensor([[7, -100, 8, 9]])).labels
        tensor([8, 9])
    """

    def __init__(self, labels: Tensor, attention_mask: Tensor | None = None, position_ids: Tensor | None = None):
        for name, value in (("labels", labels), ("attention_mask", attention_mask), ("position_ids", position_ids)):
            if value is not None and (value.ndim != 2 or value.shape != labels.shape):
                shapes = f"{tuple(value.shape)} and {tuple(labels.shape)}"
                raise InputError(f"{name} and labels must both be (B, T), got {shapes}")
        labels = signed(labels)
        starts = torch.zeros_like(labels, dtype=torch.bool)
        starts[:, 0] = True
        if attention_mask is not None:
            starts[:, 1:] |= attention_mask[:, :-1] == 0
        if position_ids is not None:
            starts |= restarts(position_ids)
        # Every row begins with a start, so that shifting the flat batch never carries a label across rows.
        next_labels = F.pad(labels.masked_fill(starts, IGNORE).flatten()[1:], (0, 1), value=IGNORE)
        self.shape = labels.shape
        self.index = (next_labels != IGNORE).nonzero()[:, 0]
        self.labels = next_labels[self.index]
        self.segment = starts.flatten().cumsum(0)
        self.sequence = self.segment[self.index].unique(return_inverse=True)[1]

    @classmethod
    def of(cls, batch: Mapping[str, Tensor]) -> "Supervised":
        """The supervised positions of a model's inputs: labels, with attention_mask and position_ids where given."""
        if "labels" not in batch:
            raise InputError(f"the batch has no labels, only {sorted(batch)}: nothing in it is supervised")
        return cls(batch["labels"], batch.get("attention_mask"), batch.get("position_ids"))

    def __len__(self) -> int:
        return len(self.labels)

    def take(self, values: Shaped[Tensor, "B T *D"]) -> Shaped[Tensor, " N *D"]:
        """The rows of ``values`` that predict a supervised label, differentiable.

        Raises:
            InputError: values do not begin with the labels' (B, T).
        """
        if values.shape[:2] != self.shape:
            raise InputError(f"values have shape {tuple(values.shape)}, but the labels are {tuple(self.shape)}")
        return values.flatten(0, 1).index_select(0, self.index)

    def at_labels(self, values: Shaped[Tensor, "B T"]) -> Shaped[Tensor, " N"]:
        """The entries of ``values`` at the supervised labels themselves."""
        return values.flatten()[self.index + 1]

    def context(
        self, input_ids: Int[Tensor, "B T"], vocabulary: int, rows: slice | Int[Tensor, " n"] = slice(None)
    ) -> Bool[Tensor, "N vocabulary"]:
        """A mask of the tokens that precede each supervised label in its own sequence, without the label itself.

        Example:
            >>> ids = torch.tensor([[2, 0, 2, 1]])
            >>> Supervised(torch.tensor([[-100, -100, 2, 1]])).context(ids, 3)
            tensor([[ True, False, False],
                    [ True, False,  True]])
        """
        width = self.shape[1]
        index, labels = self.index[rows], self.labels[rows]
        row, at = index // width, index % width
        before = torch.arange(width, device=at.device) <= at[:, None]
        own = self.segment.view(self.shape)[row] == self.segment[index][:, None]
        ids = input_ids[row].masked_fill(~(before & own), vocabulary)
        earlier_tokens = torch.zeros(len(index), vocabulary + 1, dtype=torch.bool, device=at.device).scatter(
            1, ids, True
        )
        return earlier_tokens[:, :vocabulary].scatter(1, labels[:, None].long(), False)


def count_pairs(method: str, where: Supervised, batch: Mapping[str, Tensor]) -> int:
    """The number of pairs among the supervised tokens of a batch.

    Raises:
        InputError: the batch has no column ``pair``, which the method needs.
    """
    if "pair" not in batch:
        raise InputError(f"{method} needs 'pair': give the data a column of that name")
    return where.at_labels(batch["pair"].to(where.labels.device)).unique().numel()
