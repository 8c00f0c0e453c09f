"""Trying: one style on a few rows, what it shows, and the gradient of one call."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from qlens.core.autograd import ordinary, recorded
from qlens.core.numerics import spread
from qlens.core.tokens import Tokens
from qlens.losses import graphs
from qlens.losses.calling import call
from qlens.losses.layout.flattening import Flattened
from qlens.losses.layout.layouts import Layout, Style, tiled
from qlens.losses.layout.names import FIELD, role_of
from qlens.losses.layout.signature import inputs, name_of
from qlens.losses.return_values import loss_of
from qlens.losses.user_code import EndedError, blamed

ROWS = 8  # rows that a layout is tried on
MASKED = (5, 7, 4, 9)  # further positions, of which the first leaves no two sizes alike: nothing broadcasts by accident
WIDTHS = (6, 8, 13)  # further positions at which chunks are tried again
TURNED = 1e-3  # of its gradient: a row whose gradient turns by more reacts to a label
ROUNDING = 64  # machine epsilons of the largest gradient, below which a turn is rounding
AS_GIVEN = Layout()


class Trial(NamedTuple):
    """What a call in one style showed: whether supervised rows have gradient, react to their own labels, and to the
    per-token values of others; whether the value had a graph; and whether rows are treated as texts, or the other way."""

    style: Style
    lit: float
    reacts: float
    mislaid: bool = False
    graph: bool = True
    flattened: bool = False

    @property
    def full(self) -> bool:
        """Whether nothing speaks against this style; (B, 1) fits losses of tokens too, and speaks for nothing."""
        return self.lit == 1 and self.fits and self.style.fields != "column"

    @property
    def fits(self) -> bool:
        """Whether the rows that have gradient react to their own labels and values alone."""
        return self.lit > 0 and self.reacts == 1 and not self.mislaid and not self.flattened

    @property
    def plain_rows(self) -> bool:
        """Whether the loss takes rows (N, V), and learns from some of them only: it selects."""
        return self.style.shape == "rows" and self.lit > 0 and self.reacts == 1 and not self.mislaid


class Gradient(NamedTuple):
    """The gradient of one call, (N, V), and whether the value that it is of had a graph."""

    grad: Tensor
    graph: bool


def attempt(fn: Callable, params: Mapping[str, Any], tokens: Tokens, style: Style) -> Trial:
    """One style on a few rows: their gradients, and which of them turn or vanish as every third label changes.

    Raises:
        LossError: the loss raised.
    """
    layout = Layout(masked=_masked(tokens)) if inputs_masked(fn) or style.laid_out else Layout()
    with Flattened(None if style.laid_out else len(tokens) + layout.masked) as flattened:
        found = gradient(fn, params, tokens, style, layout)
    return _judged(fn, params, tokens, style, layout, found)._replace(flattened=flattened.seen)


def _judged(
    fn: Callable, params: Mapping[str, Any], tokens: Tokens, style: Style, layout: Layout, found: Gradient
) -> Trial:
    """What the gradient in one style shows, with that of other labels and other per-token values beside it."""
    base, graph = found
    size = base.norm(dim=-1)
    if not bool(base.isfinite().all()) or not bool(size.any()):
        return Trial(style, 0.0, 0.0, graph=graph)
    lit = float((size > 0).double().mean())
    mislaid = _mislaid(fn, params, tokens, style, layout, base)
    if lit < 0.5:  # a maximum over a text, say: the few rows that have gradient are asked one by one
        return Trial(style, lit, _own_labels(fn, params, tokens, style, layout, base), mislaid)
    some = torch.arange(len(tokens)) % 3 == 1
    other = grad_of(fn, params, changed(tokens, some), style, layout)
    least = (TURNED * size).clamp(min=ROUNDING * torch.finfo(size.dtype).eps * float(size.max()))
    turned = (across(other, base) > least) | ((size > 0) & (other.norm(dim=-1) <= TURNED * size))  # turned, or gone
    mine = some.to(turned.device) & (size > 0)
    if not bool(turned.any()) or not bool(mine.any()):
        return Trial(style, lit, float(not bool(turned.any())), mislaid)
    return Trial(style, lit, float(turned[mine].double().mean()), mislaid)


def _own_labels(
    fn: Callable, params: Mapping[str, Any], tokens: Tokens, style: Style, layout: Layout, base: Tensor
) -> float:
    """Of the rows with gradient, the share whose gradient changes with their own label."""
    rows, reacts = base.norm(dim=-1).nonzero()[:, 0].tolist(), 0
    for row in rows:
        after = grad_of(fn, params, changed(tokens, torch.arange(len(tokens)) == row), style, layout)
        reacts += bool((after - base)[row].norm() > TURNED * base[row].norm())
    return reacts / len(rows)


def attempt_at_widths(fn: Callable, params: Mapping[str, Any], tokens: Tokens, style: Style) -> Trial:
    """One style; in chunks, at several widths of the texts, which tell numbers of chunks and ways to cut apart.

    Raises:
        LossError: the loss raised.
    """
    trial = attempt(fn, params, tokens, style)
    if not style.chunks or not trial.full:
        return trial
    base = grad_of(fn, params, tokens, style, Layout(masked=MASKED[0]))
    for more in WIDTHS:
        other = grad_of(fn, params, tokens, style, Layout(masked=more))
        if bool(((other.norm(dim=-1) == 0) | (across(other, base) > TURNED * other.norm(dim=-1))).any()):
            return trial._replace(lit=0.5, reacts=0.0)
    return trial


def _masked(tokens: Tokens) -> int:
    """A number of further positions by which no width, and no number of rows, is the size of the vocabulary."""
    rows = len(tokens)
    longest = rows if tokens.sequence is None else int(tokens.sequence.unique(return_counts=True)[1].max())
    sizes = {tokens.logits.shape[1]}
    return next((more for more in MASKED if not sizes & {rows + more, longest + more, longest + 1 + more}), MASKED[0])


def inputs_masked(fn: Callable) -> bool:
    """Whether a loss takes a mask that tells supervised rows."""
    wanted = inputs(fn)
    return "mask" in wanted.required.values() or "mask" in wanted.optional.values()


def _mislaid(
    fn: Callable, params: Mapping[str, Any], tokens: Tokens, style: Style, layout: Layout, base: Tensor
) -> bool:
    """Whether a per-token value moves the gradient of other rows than its own: it stands at another place, or is broadcast."""
    wanted = inputs(fn)
    fields = {FIELD.get(role) for role in (*wanted.required.values(), *wanted.optional.values())}
    fields |= {FIELD.get(role_of(name) or "") for name in style.columns}
    last = torch.arange(len(tokens), device=base.device) >= len(tokens) // 2 - 1  # the second text, where there are two
    one = torch.arange(len(tokens), device=base.device) == 1
    for field in fields & {"weight", "advantage"}:
        value = getattr(tokens, str(field))
        if value is None and field == "weight":
            value = torch.ones(len(tokens), dtype=base.dtype, device=base.device)
        if value is None:
            continue
        for rows in (last,) if style.by_text else (last, one):
            other = tokens.replace(**{str(field): torch.where(rows, 3 * value + 1, value)})
            moved = (grad_of(fn, params, other, style, layout) - base).norm(dim=-1)
            seen = moved > TURNED * float(base.norm(dim=-1).max())
            if bool(seen[~rows].any()):
                return True
    return False


def changed(tokens: Tokens, rows: Tensor) -> Tokens:
    """The tokens with other labels in the given rows."""
    other = (tokens.labels + 1) % tokens.logits.shape[1]
    return tokens.replace(labels=torch.where(rows.to(other.device), other, tokens.labels))


def across(grad: Tensor, base: Tensor) -> Tensor:
    """The size of every row's part of ``grad`` at right angles to ``base``, (N,)."""
    along = (grad * base).sum(-1, keepdim=True) / base.square().sum(-1, keepdim=True)
    return (grad - torch.where(along.isfinite(), along, 0.0) * base).norm(dim=-1)


def grad_of(
    fn: Callable, params: Mapping[str, Any], tokens: Tokens, style: Style | None = None, layout: Layout = AS_GIVEN
) -> Tensor:
    """The gradient of the summed loss on the first copy of every row, all copies added up as one row would be, (N, V).

    Raises:
        LossError: the loss, or its backward, raised, or it returns a value other than zero that has no graph.
        InputError: it returns nothing that is a loss.
    """
    return gradient(fn, params, tokens, style, layout).grad


def gradient(
    fn: Callable, params: Mapping[str, Any], tokens: Tokens, style: Style | None = None, layout: Layout = AS_GIVEN
) -> Gradient:
    """The gradient as of ``grad_of``, and whether the loss returned a value with a graph: zeros may come without one."""
    with recorded():
        tokens = ordinary(tokens)
        leaf = tokens.logits.detach().clone().requires_grad_()

        def run() -> Any:
            return call(fn, params, tokens.with_logits(leaf), layout, style=style)

        result = loss_of(run(), name_of(fn))
        value = graphs.checked(result, name_of(fn), run, leaf).value
        with blamed(name_of(fn), kind=EndedError):
            (grad,) = torch.autograd.grad(value.sum(), leaf, allow_unused=True)
    made = torch.zeros_like(leaf) if grad is None else grad / layout.copies
    return Gradient(made, result.value.requires_grad and grad is not None)


def value_of(fn: Callable, params: Mapping[str, Any], tokens: Tokens, style: Style) -> Tensor:
    """The loss without its graph, in a call with one: of several things returned, the one that has a graph is the loss."""
    with recorded():
        tokens = ordinary(tokens)
        leaf = tokens.logits.detach().clone().requires_grad_()
        return loss_of(call(fn, params, tokens.with_logits(leaf), AS_GIVEN, style=style), name_of(fn)).value.detach()


def first_copy(
    fn: Callable, params: Mapping[str, Any], tokens: Tokens, style: Style, layout: Layout = AS_GIVEN
) -> Tensor:
    """The gradient of the summed loss on the first copy of every row alone, the others being constants, (N, V)."""
    many = tiled(tokens, layout)
    with recorded():
        tokens = ordinary(tokens)
        leaf = tokens.logits.detach().clone().requires_grad_()
        logits = torch.cat([leaf, many.logits[len(tokens) :].detach()])
        made = call(fn, params, many.with_logits(logits), layout._replace(copies=1), style=style)
        value = loss_of(made, name_of(fn)).value
        with blamed(name_of(fn), kind=EndedError):
            (grad,) = torch.autograd.grad(value.sum(), leaf, allow_unused=True)
    return torch.zeros_like(leaf) if grad is None else grad


def few(tokens: Tokens, group: int = 1) -> Tokens:
    """Eight rows in two sequences, one of which is chosen, if the tokens have sequences and pairs at all.

    Args:
        tokens: the rows that they are taken from.
        group: number of texts that a batch holds a multiple of; more than 1: two groups, of texts of two rows.
    """
    if group > 1 and tokens.sequence is not None:
        return texts_of(tokens, 2 * group)
    rows = ROWS if tokens.logits.shape[1] != ROWS else ROWS + 2  # logits that are no square
    index = spread(len(tokens), rows).to(tokens.logits.device)
    if len(index) < rows:
        index = index.repeat(rows)[:rows]
    some = tokens[index]
    second = torch.arange(rows, device=index.device) >= rows // 2 - 1
    return _with_fields(some, sequence=second.long(), pair=torch.zeros_like(index), chosen=~second)


def texts_of(tokens: Tokens, number: int, length: int = 2) -> Tokens:
    """That many texts, in pairs, of ``length`` rows each, or of as many as make up eight rows."""
    length = max(length, -(-ROWS // number))
    rows = torch.arange(number * length, device=tokens.logits.device)
    text = rows // length
    return _with_fields(tokens[rows % len(tokens)], sequence=text, pair=text // 2, chosen=text % 2 == 0)


def _with_fields(tokens: Tokens, **fields: Tensor) -> Tokens:
    """The tokens with other values in those of these fields that they have."""
    return tokens.replace(**{name: value for name, value in fields.items() if getattr(tokens, name) is not None})
