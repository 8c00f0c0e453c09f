"""From padded batches to supervised tokens: the only place that shifts, masks, pads or knows -100."""

from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Int, Shaped
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from qlens.errors import InputError, brief

COLUMNS = {
    "critical": torch.bool,
    "hint": torch.bool,
    "chosen": torch.bool,
    "pair": torch.long,
    "advantage": torch.float32,
    "weight": torch.float32,
}
"""Fields of Tokens that data may carry beside input_ids and labels: a list as long as these, or one value per example."""

IGNORE = -100
"""The label of a token that nothing is learned from."""


LAYOUT = ("labels", "attention_mask", "position_ids")
"""Inputs that say which tokens of a batch are supervised."""

INPUTS = ("position_ids", "token_type_ids")
"""Inputs of models that have one integer per token."""


def collate(
    examples: Sequence[Mapping[str, Any]], pad_id: int = 0, inputs: Collection[str] = INPUTS
) -> dict[str, Tensor]:
    """A right-padded batch of ``{"input_ids", "labels"}``: input_ids, attention_mask and labels, each (B, T).

    Padding is neither attended to nor supervised, so any ``pad_id`` will do for a tokenizer that has none. Columns named
    as in ``COLUMNS`` (critical, advantage, weight, ...) come along as (B, T), a value per example being every token's.

    An example may hold several texts, one after the other (packed): ``position_ids`` start again where a text begins, or
    ``seq_lengths`` are the texts' lengths. Where a row is packed, the batch has position_ids and no attention_mask, as
    transformers' models look for texts to keep apart only without a mask; every column of padding then has position 0.

    Args:
        examples: lists or tensors by name, one value per token.
        pad_id: what input_ids are filled up with.
        inputs: names of further inputs of the model, one integer per token, that come along as (B, T), filled up with 0;
            other keys of an example are no inputs and left out.

    Raises:
        InputError: an example lacks input_ids or labels, they differ in length, a column is not in every example, or an
            input is not one integer per token.

    Example:
        >>> collate([{"input_ids": [5, 6, 7], "labels": [-100, 6, 7]}, {"input_ids": [5], "labels": [-100]}])["labels"]
        tensor([[-100,    6,    7],
                [-100, -100, -100]])
    """
    for number, example in enumerate(examples):
        sizes = {name: len(example[name]) if name in example else None for name in ("input_ids", "labels")}
        if None in sizes.values() or len(set(sizes.values())) > 1:
            raise InputError(f"example {number} of the batch needs input_ids and labels of one length, got {sizes}")

    def padded(name: str, rows: list, fill: int, dtype: torch.dtype = torch.long) -> Tensor:
        tensors = [_exactly(name, row, dtype) for row in rows]
        return pad_sequence(tensors, batch_first=True, padding_value=fill)

    examples = [_with_positions(example) for example in examples]
    ids = [example["input_ids"] for example in examples]
    seen = [example.get("attention_mask", [1] * len(row)) for example, row in zip(examples, ids, strict=True)]
    labels = [example["labels"] for example in examples]
    batch = {
        "input_ids": padded("input_ids", ids, pad_id),
        "attention_mask": padded("attention_mask", seen, 0),
        "labels": padded("labels", labels, IGNORE),
    }
    for name in dict.fromkeys(("position_ids", *inputs)):
        if name not in batch and any(name in example for example in examples):
            batch[name] = padded(name, [_input(example, name) for example in examples], 0)
    for name, dtype in COLUMNS.items():
        if any(name in example for example in examples):
            batch[name] = padded(name, [_column(example, name) for example in examples], 0, dtype)
    if "position_ids" in batch and (positions := packed(batch["position_ids"], batch["attention_mask"])) is not None:
        batch["position_ids"] = positions
        del batch["attention_mask"]
    return batch


def _exactly(name: str, row: Any, dtype: torch.dtype) -> Tensor:
    """An example's values as a tensor of a type that holds them.

    Raises:
        InputError: it does not, as of 1.5 among whole numbers or 2 in a mask; or they are no numbers.
    """
    try:
        given = torch.as_tensor(row)
        made = given.to(dtype)
        exact = not given.is_complex() and (dtype.is_floating_point or bool((made == given).all()))
    except (TypeError, ValueError, RuntimeError, OverflowError):
        exact, made = False, torch.empty(0)
    if not exact:
        wanted = {torch.long: "whole numbers", torch.bool: "true and false, or 1 and 0"}.get(dtype, "numbers")
        raise InputError(f"{name} must hold {wanted} in every example of the batch, got {brief(row)}")
    return made


def _with_positions(example: Mapping[str, Any]) -> Mapping[str, Any]:
    """An example with position_ids where it has ``seq_lengths``."""
    if "seq_lengths" not in example or "position_ids" in example:
        return example
    lengths, size = _exactly("seq_lengths", example["seq_lengths"], torch.long).tolist(), len(example["input_ids"])
    if sum(lengths) != size or min(lengths, default=0) < 1:
        raise InputError(f"seq_lengths must be lengths of texts that add up to {size} tokens, got {lengths}")
    return {**example, "position_ids": [at for length in lengths for at in range(length)]}


def _input(example: Mapping[str, Any], name: str) -> Tensor:
    """An example's values of an input of the model, one integer per token."""
    size, value = len(example["input_ids"]), example.get(name)
    if value is None and name == "position_ids":  # a text alone among packed ones
        return torch.arange(size)
    try:
        row = torch.as_tensor(value)
    except (TypeError, ValueError, RuntimeError):
        row = torch.empty(0)
    if row.shape != (size,) or row.is_floating_point() or row.is_complex():
        found = "lacks it" if value is None else f"has {type(value).__name__} {str(value)[:40]} for {size} tokens"
        raise InputError(
            f"{name!r} is an input of the model, and collate takes one integer per token for it in every example: one "
            f"{found}; give QTrainer(data_collator=...) for other inputs, or drop the column"
        )
    return row


def _column(example: Mapping[str, Any], name: str) -> list:
    """An example's values of a column, one per token."""
    size, value = len(example["input_ids"]), example.get(name)
    row = list(value) if isinstance(value, Sequence | Tensor) else [value] * size
    if value is None or len(row) != size:
        found = "lacks it" if value is None else f"has {len(row)} values for {size} tokens"
        raise InputError(f"column {name!r} must hold one value, or one per token, in every example: one {found}")
    return row


def positions(attention_mask: Int[Tensor, "B T"]) -> Int[Tensor, "B T"]:
    """Position ids that count real tokens only, so that padding on the left moves nothing."""
    return (attention_mask.cumsum(-1) - 1).clamp(min=0)


def restarts(position_ids: Int[Tensor, "B T"]) -> Bool[Tensor, "B T"]:
    """Where a text begins: in the first column, and wherever positions do not go up.

    Example:
        >>> restarts(torch.tensor([[0, 1, 2, 0, 1]])).int()
        tensor([[1, 0, 0, 1, 0]], dtype=torch.int32)
    """
    starts = torch.ones_like(position_ids, dtype=torch.bool)
    starts[:, 1:] = position_ids[:, 1:] <= position_ids[:, :-1]
    return starts


def packed(position_ids: Int[Tensor, "B T"], attention_mask: Int[Tensor, "B T"] | None) -> Int[Tensor, "B T"] | None:
    """Position ids of a batch in which a row holds several texts, 0 at padding; None where every row is one text.

    Raises:
        InputError: the mask hides a token inside a text, which position ids cannot say.
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
        InputError: another type; in an unsigned one, -100 is some other id.
    """
    if labels.dtype not in (torch.int64, torch.int32, torch.int16, torch.int8):
        unsigned = ", in which -100 is some other id" if str(labels.dtype).startswith("torch.uint") else ""
        raise InputError(f"labels are {labels.dtype}{unsigned}: give integers that can be -100, such as torch.long")
    return labels.long()


class Supervised:
    """The positions of a batch that predict a supervised label: position t - 1 for every label at t that counts.

    A label is supervised unless it is -100, begins its row or its packed sequence (``position_ids`` do not go up there), or
    follows padding: nothing predicts those.

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
        """What ``values``, laid out as the labels are, say of every supervised label itself."""
        return values.flatten()[self.index + 1]

    def context(
        self, input_ids: Int[Tensor, "B T"], vocabulary: int, rows: slice = slice(None)
    ) -> Bool[Tensor, "N vocabulary"]:
        """Which tokens stand before each supervised label (or some of them) in its own sequence, the label itself left out.

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
        seen = torch.zeros(len(index), vocabulary + 1, dtype=torch.bool, device=at.device).scatter(1, ids, True)
        return seen[:, :vocabulary].scatter(1, labels[:, None].long(), False)


def count_pairs(method: str, where: Supervised, batch: Mapping[str, Tensor]) -> int:
    """How many pairs the supervised tokens of a batch belong to.

    Raises:
        InputError: the batch has no column ``pair``, which the method needs.
    """
    if "pair" not in batch:
        raise InputError(f"{method} needs 'pair': give the data a column of that name")
    return where.at_labels(batch["pair"].to(where.labels.device)).unique().numel()
