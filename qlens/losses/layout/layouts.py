"""Layouts: supervised rows laid out as a loss wants them, as rows or as (B, T) batches, with every other input beside them."""

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from qlens.core.errors import InputError
from qlens.core.numerics import log_softmax
from qlens.core.supervised import IGNORE
from qlens.core.tokens import Tokens


class Layout(NamedTuple):
    """How often and with what beside them rows are shown in one call.

    Args:
        copies: how often each row is shown; a copy of a sequence is a sequence of its own.
        masked: further positions that are not supervised, in each sequence.
        split: whether rows are dealt to sequences anew, of unequal lengths.
        interleave: whether the copies of a sequence follow it, instead of following all sequences.
        before: positions that are not supervised before the rows of each sequence, as a prompt.
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
        shape: "rows" (N, V) with (N,) labels; "batch": (B, T, V) with unshifted (B, T) labels; "aligned": (B, T, V) with
            labels that are shifted already.
        boxed: whether logits are given as the ``logits`` of a model's outputs.
        fields: where per-token values of a batch stand: at the "labels", at the "logits" that predict them, "shifted"
            (B, T - 1), or "rows" (N,); "texts": at the logits, but advantages and weights (B,), a text's own being its first
            token's; "column": the same as (B, 1).
        clean: whether unsupervised labels are ordinary ids, with a mask to tell them, instead of -100.
        optional: whether inputs that default to None are given.
        flag: type of the masks.
        inverted: whether a mask marks what is ignored.
        several: whether rows without sequences are dealt to four, because the loss compares rows of a batch.
        counted: whether a count that defaults to None is given.
        ids: whether a model's input_ids are the labels, because the loss takes its labels from there.
        head: the diagonal of a model's head, or the factor between the scales of hidden states; the logits are the same.
        columns: further columns of a model's inputs that the loss asks for.
        alike: whether other models' outputs are given as the student's are, as outputs or as logits; else the other way.
        order: "texts": (B, T, ...); "positions": sequence first, (T, B, ...); "mixed": logits (T, B, V), all else (B, T);
            "classes": logits (B, V, T), all else (B, T).
        chunks: number of chunks of a list of logits, along the tokens; 0: no list. ``cut``: "chunk" or "tensor_split".
        container: of labels: "one-hot", "pair" (labels, mask), "dict"; of inputs: "pair" (ids, labels); of "outputs": a tuple.
        group: number of texts that every batch holds a multiple of, for a loss of groups of texts; 1: any number.
        pairs: how a batch holds the texts of pairs: "halves", all chosen before all rejected; "alternate", each chosen text
            before its rejected one; "rejected halves" and "rejected alternate", the rejected before the chosen; "": texts
            are given as they come.
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
    alike: bool = True
    order: str = "texts"
    chunks: int = 0
    cut: str = "chunk"
    container: str = ""
    pairs: str = ""
    group: int = 1

    @property
    def laid_out(self) -> bool:
        """Whether the loss sees batches of texts, (B, T)."""
        return self.shape != "rows"

    @property
    def by_text(self) -> bool:
        """Whether advantages and weights are given one for each text."""
        return self.fields in ("texts", "column")


class Counts(NamedTuple):
    """Supervised rows, positions, these with the last of each text, texts, rows of each text, positions that are no padding."""

    rows: int
    positions: int
    columns: int
    texts: int
    own: Float[Tensor, " N"] | int
    attended: int


@dataclass(frozen=True, eq=False)
class View:
    """One call's inputs: logits and labels in the layout, and the place of every supervised row in them.

    Args:
        logits: (M, V) or (B, T, V).
        labels: (M,) or (B, T), as the style wants them: shifted or not, with -100 or ordinary ids.
        tokens: the N supervised rows.
        place: the flat position whose logits are row i's, (N,).
        attention: 1 on real positions, 0 on padding, of the labels' shape.
        ids: token ids that depend on no label, of the labels' shape; a copy of a text has the same.
        style: how the loss is called.
    """

    logits: Tensor
    labels: Tensor
    tokens: Tokens
    place: Int[Tensor, " N"]
    attention: Tensor
    ids: Tensor
    style: Style

    def spread(self, values: Tensor) -> Tensor:
        """Per-token values (N,) or (N, V) where the style wants them, zero elsewhere."""
        shape = self.labels.shape
        if self.style.fields == "rows" and self.style.laid_out:
            return values[self.place.argsort()]
        if not self.style.laid_out:
            return values.new_zeros(*shape, *values.shape[1:]).index_copy(0, self.place, values)
        at, fields = self.place, self.style.fields
        if values.ndim == 1 and self.style.shape == "batch" and fields != "logits" and not self.style.by_text:
            if fields == "shifted":
                at, shape = at - at // shape[1], (shape[0], shape[1] - 1)
            else:
                at = at + 1
        flat = values.new_zeros(shape[0] * shape[1], *values.shape[1:])
        return flat.index_copy(0, at, values).view(*shape, *values.shape[1:])

    def by_text(self, values: Tensor) -> Tensor:
        """The value of every text's first token, (B,)."""
        texts, width = self.labels.shape
        text, column = self.place // width, self.place % width
        first = torch.full((texts,), width, device=column.device).scatter_reduce(0, text, column, "amin")
        starts = column == first[text]
        return values.new_zeros(texts).index_copy(0, text[starts], values[starts])

    def per_token(self, values: Tensor) -> Tensor:
        """Weights or advantages (N,) where the style wants them, or one for every text, (B,) or (B, 1)."""
        if not self.style.by_text:
            return self.spread(values)
        return self.by_text(values)[:, None] if self.style.fields == "column" else self.by_text(values)

    def mask(self) -> Tensor:
        """1 (or True) on supervised positions; the opposite in an inverted style."""
        ones = self.spread(torch.ones(len(self.tokens), device=self.logits.device))
        return (1 - ones if self.style.inverted else ones).to(self.style.flag)


def rows_view(tokens: Tokens, layout: Layout, style: Style, safe: bool = False) -> View:
    """Rows as they are, with ``masked`` more that a mask leaves out; the tokens' own tensors where it is ``safe``."""
    n, device = len(tokens), tokens.logits.device
    logits, labels = (tokens.logits, tokens.labels) if safe else (tokens.logits.clone(), tokens.labels.clone())
    if layout.masked:
        logits = torch.cat([logits, _noise(layout.masked, tokens)])
        labels = torch.cat([labels, labels.new_full((layout.masked,), 0 if style.clean else IGNORE)])
    attention = (torch.arange(n + layout.masked, device=device) < n).long()
    at = torch.arange(len(labels), device=device)
    return View(logits, labels, tokens, at[:n], attention, token_ids(at, logits.shape[1]), style)


def batch_view(tokens: Tokens, layout: Layout, style: Style) -> View:
    """Every sequence as a text: row i predicts the label one on; the last position predicts nothing; then ``masked`` more."""
    device = tokens.logits.device
    sequence = sequences(tokens, style, layout)
    text, lengths, column = _dealt(sequence)
    width = layout.before + int(lengths.max()) + 1 + layout.masked
    place = text * width + layout.before + column
    size = len(lengths) * width
    logits = _noise(size, tokens).index_copy(0, place, tokens.logits).view(len(lengths), width, -1)
    labels = tokens.labels.new_full((size,), IGNORE).index_copy(0, place + 1, tokens.labels).view(-1, width)
    attention = (torch.arange(width, device=device) <= layout.before + lengths[:, None]).long()
    texts = _originals(len(lengths), layout, style).to(device)
    ids = token_ids(13 * texts[:, None] + torch.arange(width, device=device), logits.shape[-1])
    return batch_of(logits, labels, tokens, place, attention, ids, style)


def _originals(number: int, layout: Layout, style: Style) -> Int[Tensor, " B"]:
    """The text that each text of a batch is a copy of."""
    texts = torch.arange(number)
    if not style.pairs:
        return texts // layout.copies if layout.interleave else texts % (number // layout.copies or 1)
    pairs = number // 2
    pair, side = (texts % pairs, texts // pairs) if style.pairs.endswith("halves") else (texts // 2, texts % 2)
    return 2 * (pair // layout.copies if layout.interleave else pair % (pairs // layout.copies or 1)) + side


def token_ids(numbers: Tensor, vocabulary: int) -> Tensor:
    """Token ids of numbered positions."""
    return (7 * numbers + 1) % vocabulary


def batch_of(
    logits: Float[Tensor, "B T V"],
    labels: Int[Tensor, "B T"],
    tokens: Tokens,
    place: Int[Tensor, " N"],
    attention: Tensor,
    ids: Int[Tensor, "B T"],
    style: Style,
) -> View:
    """A batch with unshifted labels (B, T), as the style wants it."""
    if style.shape == "aligned":
        labels = torch.cat([labels[:, 1:], labels.new_full((len(labels), 1), IGNORE)], 1)
        attention = torch.cat([attention[:, 1:], attention.new_zeros(len(labels), 1)], 1)
    if style.clean:
        labels = labels.masked_fill(labels == IGNORE, 0)
    return View(logits, labels, tokens, place, attention, ids, style)


def supervised(labels: Int[Tensor, "B T"]) -> Int[Tensor, " N"]:
    """The flat positions whose logits predict the labels that are not -100."""
    follows = torch.zeros_like(labels, dtype=torch.bool)
    follows[:, :-1] = labels[:, 1:] != IGNORE
    return follows.flatten().nonzero()[:, 0]


def arranged(value: Any, style: Style, wide: bool, listed: bool) -> Any:
    """An input in the order of its style, and as a list of chunks where it is ``listed``.

    Args:
        value: (B, T), (B, T, V) or rows; what is no tensor of texts stays.
        style: the order and the chunks.
        wide: whether it has an entry for every token of the vocabulary.
        listed: whether the loss takes it in chunks.
    """
    if not isinstance(value, Tensor) or value.ndim < (2 if style.laid_out else 1):
        return value
    if style.order == "classes" and wide and value.ndim == 3:
        return value.transpose(1, 2).contiguous()
    if style.order == "positions" or (style.order == "mixed" and wide):
        return value.transpose(0, 1).contiguous()
    if style.chunks and listed:
        return list(getattr(value, style.cut)(style.chunks, dim=int(style.laid_out)))
    return value


def sequences(tokens: Tokens, style: Style, layout: Layout) -> Int[Tensor, " N"]:
    """The sequence of every row: its own, or one for all, or four for a loss that compares rows of a batch."""
    n, device = len(tokens), tokens.logits.device
    if style.pairs:
        pairs, pair = tokens.require("pair").unique(return_inverse=True)
        chosen = tokens.require("chosen")
        second = (chosen if style.pairs.startswith("rejected") else ~chosen).long()
        return second * len(pairs) + pair if style.pairs.endswith("halves") else 2 * pair + second
    if layout.split:  # of lengths 1, 2, 4, ...
        return (torch.arange(n, device=device) + 1).log2().long()
    if tokens.sequence is not None:
        return tokens.sequence
    parts = 4 if style.several and n >= 4 else 1
    return torch.arange(n, device=device) * parts // n


def tiled(tokens: Tokens, layout: Layout) -> Tokens:
    """Every row ``copies`` times over; copies of a sequence or a pair are sequences and pairs of their own."""
    if layout.copies == 1:
        return tokens
    copies, device = layout.copies, tokens.logits.device
    many = tokens[torch.arange(len(tokens), device=device).repeat(copies)]
    turn = torch.arange(copies, device=device).repeat_interleave(len(tokens))
    changed = {}
    for name in ("sequence", "pair"):
        value = getattr(many, name)
        if value is not None:
            apart = value * copies + turn if layout.interleave else value + turn * (value.max() + 1)
            changed[name] = apart
    return many.replace(**changed)


def counts(tokens: Tokens, layout: Layout, style: Style, pairs: bool = False) -> Counts:
    """What a mean over these rows may divide by, in this layout."""
    many = tiled(tokens, layout)
    if pairs or style.pairs:
        number = len(many.require("pair").unique())
        return Counts(number, number, number, number, 1, number)
    if not style.laid_out:
        return Counts(len(many), len(many) + layout.masked, len(many) + layout.masked, 1, len(many), len(many))
    text, lengths, _ = _dealt(sequences(many, style, layout))
    width = layout.before + int(lengths.max()) + 1 + layout.masked
    own = lengths[text][: len(tokens)].to(torch.float64)
    attended = len(many) + layout.before * len(lengths)
    return Counts(len(many), len(lengths) * (width - 1), len(lengths) * width, len(lengths), own, attended)


def pair_sums(values: Float[Tensor, " N"], tokens: Tokens, chosen: bool) -> Float[Tensor, " P"]:
    """The sum over the chosen, or the rejected, sequence of every pair.

    Raises:
        InputError: the tokens hold no pairs.
    """
    ids, side = tokens.require("pair"), tokens.require("chosen")
    mine = (ids.unique()[:, None] == ids) & (side == chosen)
    if not bool(mine.any(1).all()):
        raise InputError("pair: every pair needs a chosen and a rejected sequence")
    return mine.to(values.dtype) @ values


def label_log_probs(logits: Float[Tensor, "N V"], labels: Int[Tensor, " N"]) -> Float[Tensor, " N"]:
    """log p of the labels, differentiable."""
    return log_softmax(logits).gather(-1, labels[:, None].long())[:, 0]


def _dealt(sequence: Int[Tensor, " N"]) -> tuple[Tensor, Tensor, Tensor]:
    """The text of every row, 0, 1, ...; the length of every text; and the column of every row in its text."""
    _, text, lengths = sequence.unique(return_inverse=True, return_counts=True)
    order = text.argsort(stable=True)
    starts = lengths.cumsum(0) - lengths
    column = torch.empty_like(text)
    column[order] = torch.arange(len(text), device=text.device) - starts[text[order]]
    return text, lengths, column


def _noise(number: int, tokens: Tokens) -> Tensor:
    """Logits of unsupervised positions: constants, of the size of ordinary ones, exact in every precision."""
    draw = torch.Generator().manual_seed(number)
    made = torch.randn(1, tokens.logits.shape[1], generator=draw, dtype=torch.float32).bfloat16()
    return made.to(tokens.logits).expand(number, -1)
