"""Views: the tensors of one call, supervised rows as rows or as a (B, T) batch with all other inputs beside them."""

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from qlens.core.errors import InputError
from qlens.core.numerics import log_softmax
from qlens.core.supervised import IGNORE
from qlens.core.tokens import Tokens
from qlens.losses.layout.layouts import Layout, Style, originals, positions_in_texts, sequences


@dataclass(frozen=True, eq=False)
class View:
    """The tensors of one call.

    Args:
        logits: (M, V) or (B, T, V).
        labels: (M,) or (B, T), in the style's form: shifted or not, with -100 or ordinary ids.
        tokens: the N supervised rows.
        place: flat position of the logits of each row, (N,).
        attention: 1 at real positions, 0 at padding, shaped as the labels.
        ids: token ids that do not depend on the labels, shaped as the labels; copies of a text have the same.
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
        """Per-token values (N,) or (N, V) at their positions in the style, zero at all others."""
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
        """The value of the first token of every text, (B,)."""
        texts, width = self.labels.shape
        text, column = self.place // width, self.place % width
        first = torch.full((texts,), width, device=column.device).scatter_reduce(0, text, column, "amin")
        starts = column == first[text]
        return values.new_zeros(texts).index_copy(0, text[starts], values[starts])

    def per_token(self, values: Tensor) -> Tensor:
        """Weights or advantages (N,) in the style: at their positions, or one per text, (B,) or (B, 1)."""
        if not self.style.by_text:
            return self.spread(values)
        return self.by_text(values)[:, None] if self.style.fields == "column" else self.by_text(values)

    def mask(self) -> Tensor:
        """1 (or True) at supervised positions and 0 elsewhere; the opposite in an inverted style."""
        ones = self.spread(torch.ones(len(self.tokens), device=self.logits.device))
        return (1 - ones if self.style.inverted else ones).to(self.style.flag)

    def rows(self) -> Tensor:
        """The logits of the supervised rows, (N, V)."""
        return self.logits.reshape(-1, self.logits.shape[-1])[self.place]


def rows_view(tokens: Tokens, layout: Layout, style: Style, safe: bool = False) -> View:
    """A view of rows, followed by ``masked`` unsupervised ones; it holds copies, unless it is ``safe`` to hold the originals."""
    n, device = len(tokens), tokens.logits.device
    logits, labels = (tokens.logits, tokens.labels) if safe else (tokens.logits.clone(), tokens.labels.clone())
    if layout.masked:
        logits = torch.cat([logits, _noise(layout.masked, tokens)])
        labels = torch.cat([labels, labels.new_full((layout.masked,), 0 if style.clean else IGNORE)])
    attention = (torch.arange(n + layout.masked, device=device) < n).long()
    at = torch.arange(len(labels), device=device)
    return View(logits, labels, tokens, at[:n], attention, token_ids(at, logits.shape[1]), style)


def batch_view(tokens: Tokens, layout: Layout, style: Style) -> View:
    """A view of a batch with a text for every sequence: row i predicts the next label, the last position predicts none."""
    device = tokens.logits.device
    text, lengths, column = positions_in_texts(sequences(tokens, style, layout))
    width = layout.before + int(lengths.max()) + 1 + layout.masked
    place = text * width + layout.before + column
    size = len(lengths) * width
    logits = _noise(size, tokens).index_copy(0, place, tokens.logits).view(len(lengths), width, -1)
    labels = tokens.labels.new_full((size,), IGNORE).index_copy(0, place + 1, tokens.labels).view(-1, width)
    attention = (torch.arange(width, device=device) <= layout.before + lengths[:, None]).long()
    texts = originals(len(lengths), layout, style).to(device)
    ids = token_ids(13 * texts[:, None] + torch.arange(width, device=device), logits.shape[-1])
    return batch_of(logits, labels, tokens, place, attention, ids, style)


def batch_of(
    logits: Float[Tensor, "B T V"],
    labels: Int[Tensor, "B T"],
    tokens: Tokens,
    place: Int[Tensor, " N"],
    attention: Tensor,
    ids: Int[Tensor, "B T"],
    style: Style,
) -> View:
    """A view of a batch with unshifted labels (B, T), which are shifted and cleaned as the style asks."""
    if style.shape == "aligned":
        labels = torch.cat([labels[:, 1:], labels.new_full((len(labels), 1), IGNORE)], 1)
        attention = torch.cat([attention[:, 1:], attention.new_zeros(len(labels), 1)], 1)
    if style.clean:
        labels = labels.masked_fill(labels == IGNORE, 0)
    return View(logits, labels, tokens, place, attention, ids, style)


def token_ids(numbers: Tensor, vocabulary: int) -> Tensor:
    """Arbitrary token ids of numbered positions."""
    return (7 * numbers + 1) % vocabulary


def supervised(labels: Int[Tensor, "B T"]) -> Int[Tensor, " N"]:
    """The flat positions whose logits predict a label other than -100."""
    follows = torch.zeros_like(labels, dtype=torch.bool)
    follows[:, :-1] = labels[:, 1:] != IGNORE
    return follows.flatten().nonzero()[:, 0]


def arranged(value: Any, style: Style, wide: bool, listed: bool) -> Any:
    """An input in the dimension order of its style, and as a list of chunks if it is ``listed``.

    Args:
        value: (B, T), (B, T, V) or rows; anything but a tensor of texts is returned unchanged.
        style: gives the order and the chunks.
        wide: whether the input has an entry for every token of the vocabulary.
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


def pair_sums(values: Float[Tensor, " N"], tokens: Tokens, chosen: bool) -> Float[Tensor, " P"]:
    """The sum over the chosen, or the rejected, sequence of every pair.

    Raises:
        InputError: the tokens have no pairs, or a pair has one sequence only.
    """
    ids, side = tokens.require("pair"), tokens.require("chosen")
    members = (ids.unique()[:, None] == ids) & (side == chosen)
    if not bool(members.any(1).all()):
        raise InputError("pair: every pair needs a chosen and a rejected sequence")
    return members.to(values.dtype) @ values


def label_log_probs(logits: Float[Tensor, "N V"], labels: Int[Tensor, " N"]) -> Float[Tensor, " N"]:
    """log p of the labels, differentiable."""
    return log_softmax(logits).gather(-1, labels[:, None].long())[:, 0]


def _noise(number: int, tokens: Tokens) -> Tensor:
    """Logits of unsupervised positions: constants of ordinary size that every precision represents exactly."""
    draw = torch.Generator().manual_seed(number)
    row = torch.randn(1, tokens.logits.shape[1], generator=draw, dtype=torch.float32).bfloat16()
    return row.to(tokens.logits).expand(number, -1)
