"""Layouts: the styles in which a loss is called, and the sequences, copies and counts of a batch in one of them."""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from qlens.core.tokens import Tokens


class Layout(NamedTuple):
    """How many times rows are passed in one call, and which unsupervised positions are added.

    Args:
        copies: number of copies of each row; a copy of a sequence is a separate sequence.
        masked: number of unsupervised positions appended to each sequence.
        split: whether rows are dealt to new sequences of unequal lengths.
        interleave: whether the copies of a sequence follow it, instead of following all sequences.
        before: number of unsupervised positions before the rows of each sequence, as a prompt.
    """

    copies: int = 1
    masked: int = 0
    split: bool = False
    interleave: bool = False
    before: int = 0


@dataclass(frozen=True)
class Style:
    """How a loss is called.

    Args:
        shape: "rows": logits (N, V) and labels (N,); "batch": logits (B, T, V) and unshifted labels (B, T); "aligned": logits
            (B, T, V) and labels (B, T) that are shifted already.
        boxed: whether logits are passed as the ``logits`` of a model's outputs.
        fields: positions of per-token values in a batch: "labels"; "logits", the positions that predict them; "shifted",
            (B, T - 1); "rows", (N,); "texts", as "logits", but advantages and weights are (B,), the value of each text's
            first token; "column", the same as (B, 1).
        clean: whether unsupervised labels are ordinary ids, marked by a mask, instead of -100.
        optional: whether inputs whose default is None are passed.
        flag: dtype of the masks.
        inverted: whether masks mark the ignored positions.
        several: whether rows without sequences are dealt to four sequences, for a loss that compares the rows of a batch.
        counted: whether a count whose default is None is passed.
        ids: whether a model's input_ids are the labels, for a loss that reads its labels from there.
        head: diagonal of a model's head, or the factor between hidden states and their rescaled copy; logits do not change.
        columns: names of further columns of a model's inputs that the loss reads.
        same_form: whether other models' outputs are passed as the student's are, as outputs or as logits.
        order: "texts": (B, T, ...); "positions": sequence first, (T, B, ...); "mixed": logits (T, B, V), other inputs (B, T);
            "classes": logits (B, V, T), other inputs (B, T).
        chunks: number of chunks of a list of logits, along the tokens; 0: logits are a tensor.
        cut: function that makes the chunks, "chunk" or "tensor_split".
        container: of labels: "one-hot", "pair" (labels, mask) or "dict"; of inputs: "pair" (ids, labels); of outputs:
            "outputs", a tuple.
        pairs: order of the texts of pairs: "halves", all chosen before all rejected; "alternate", each chosen text before its
            rejected one; "rejected halves" and "rejected alternate", the rejected before the chosen; "", no pairs.
        group: number of texts that every batch is a multiple of, for a loss of groups of texts; 1: any number.
    """

    shape: str = "rows"
    boxed: bool = False
    fields: str = "labels"
    clean: bool = False
    optional: bool = True
    flag: torch.dtype = torch.float32
    inverted: bool = False
    several: bool = False
    counted: bool = False
    ids: bool = False
    head: float = 1.0
    columns: tuple[str, ...] = ()
    same_form: bool = True
    order: str = "texts"
    chunks: int = 0
    cut: str = "chunk"
    container: str = ""
    pairs: str = ""
    group: int = 1

    @property
    def laid_out(self) -> bool:
        """Whether the loss takes batches of texts, (B, T)."""
        return self.shape != "rows"

    @property
    def by_text(self) -> bool:
        """Whether advantages and weights have one value per text."""
        return self.fields in ("texts", "column")


class Counts(NamedTuple):
    """The numbers that a mean over a batch may divide by.

    Args:
        rows: supervised rows.
        positions: positions, without the last one of each text.
        columns: positions, the last one of each text included.
        texts: texts.
        own: supervised rows in the text of each row, (N,), or their number.
        attended: positions that are not padding.
    """

    rows: int
    positions: int
    columns: int
    texts: int
    own: Float[Tensor, " N"] | int
    attended: int


def sequences(tokens: Tokens, style: Style, layout: Layout) -> Int[Tensor, " N"]:
    """The text number of every row: the tokens' sequences, else one text, or four for a loss that compares rows."""
    n, device = len(tokens), tokens.logits.device
    if style.pairs:
        pairs, pair = tokens.require("pair").unique(return_inverse=True)
        chosen = tokens.require("chosen")
        second = (chosen if style.pairs.startswith("rejected") else ~chosen).long()
        return second * len(pairs) + pair if style.pairs.endswith("halves") else 2 * pair + second
    if layout.split:  # texts of 1, 2, 4, ... rows
        return (torch.arange(n, device=device) + 1).log2().long()
    if tokens.sequence is not None:
        return tokens.sequence
    parts = 4 if style.several and n >= 4 else 1
    return torch.arange(n, device=device) * parts // n


def originals(number: int, layout: Layout, style: Style) -> Int[Tensor, " B"]:
    """For each text of a batch, the number of the text that it is a copy of."""
    texts = torch.arange(number)
    if not style.pairs:
        return texts // layout.copies if layout.interleave else texts % (number // layout.copies or 1)
    pairs = number // 2
    pair, side = (texts % pairs, texts // pairs) if style.pairs.endswith("halves") else (texts // 2, texts % 2)
    return 2 * (pair // layout.copies if layout.interleave else pair % (pairs // layout.copies or 1)) + side


def tiled(tokens: Tokens, layout: Layout) -> Tokens:
    """The rows ``copies`` times over; copies of a sequence or a pair are separate sequences and pairs."""
    if layout.copies == 1:
        return tokens
    copies, device = layout.copies, tokens.logits.device
    many = tokens[torch.arange(len(tokens), device=device).repeat(copies)]
    turn = torch.arange(copies, device=device).repeat_interleave(len(tokens))
    changed = {}
    for name in ("sequence", "pair"):
        value = getattr(many, name)
        if value is not None:
            changed[name] = value * copies + turn if layout.interleave else value + turn * (value.max() + 1)
    return many.replace(**changed)


def counts(tokens: Tokens, layout: Layout, style: Style, pairs: bool = False) -> Counts:
    """The numbers that a mean over these rows may divide by in a layout; ``pairs``: the loss is one of pairs of sums."""
    many = tiled(tokens, layout)
    if pairs or style.pairs:
        number = len(many.require("pair").unique())
        return Counts(number, number, number, number, 1, number)
    if not style.laid_out:
        return Counts(len(many), len(many) + layout.masked, len(many) + layout.masked, 1, len(many), len(many))
    text, lengths, _ = positions_in_texts(sequences(many, style, layout))
    width = layout.before + int(lengths.max()) + 1 + layout.masked
    own = lengths[text][: len(tokens)].to(torch.float64)
    attended = len(many) + layout.before * len(lengths)
    return Counts(len(many), len(lengths) * (width - 1), len(lengths) * width, len(lengths), own, attended)


def positions_in_texts(sequence: Int[Tensor, " N"]) -> tuple[Tensor, Tensor, Tensor]:
    """The text of every row, numbered from 0; the length of every text; and the place of every row in its text."""
    _, text, lengths = sequence.unique(return_inverse=True, return_counts=True)
    order = text.argsort(stable=True)
    starts = lengths.cumsum(0) - lengths
    column = torch.empty_like(text)
    column[order] = torch.arange(len(text), device=text.device) - starts[text[order]]
    return text, lengths, column
