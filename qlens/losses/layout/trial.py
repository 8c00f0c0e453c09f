"""Trials: whether one style fits a loss, by its gradient on a few rows and by what changed labels and values do to it."""

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from qlens.core.autograd import ordinary, recorded
from qlens.core.numerics import spread
from qlens.core.tokens import Tokens
from qlens.losses import graphs
from qlens.losses.calling import call, is_built_in
from qlens.losses.layout.flattening import Flattened
from qlens.losses.layout.layouts import Layout, Style, tiled
from qlens.losses.layout.names import FIELD, role_of
from qlens.losses.layout.signature import inputs, name_of
from qlens.losses.return_values import loss_of
from qlens.losses.states import State
from qlens.losses.user_code import EndedError, user_errors

ROWS = 8  # rows of a trial
MASKED = (
    5,
    7,
    4,
    9,
)  # numbers of further positions; the first that makes no two sizes equal is used, against broadcasts
WIDTHS = (6, 8, 13)  # numbers of further positions at which chunks are tried again
TURNED = 1e-3  # relative change of a row's gradient that counts as a reaction to a label
ROUNDING = 64  # machine epsilons of the largest gradient, below which a change is rounding
AS_GIVEN = Layout()


class Trial(NamedTuple):
    """The outcome of calls in one style.

    Args:
        style: how the loss was called.
        coverage: share of the supervised rows that have a gradient.
        reacts: share of these whose gradient changes with their own label, and with no other.
        misplaced: whether a per-token value changes the gradient of other rows.
        graph: whether the value had a graph.
        flattened: whether the loss reduced rows as if they were texts, or broadcast (N, 1) against (N,).
    """

    style: Style
    coverage: float
    reacts: float
    misplaced: bool = False
    graph: bool = True
    flattened: bool = False

    @property
    def full(self) -> bool:
        """Whether every row fits; never for (B, 1) advantages, which fit losses of tokens as well."""
        return self.coverage == 1 and self.fits and self.style.fields != "column"

    @property
    def fits(self) -> bool:
        """Whether the rows that have a gradient react to their own labels and values alone."""
        return self.coverage > 0 and self.reacts == 1 and not self.misplaced and not self.flattened

    @property
    def plain_rows(self) -> bool:
        """Whether the loss takes rows (N, V) and has a gradient at some of them, as a loss that selects rows."""
        return self.style.shape == "rows" and self.coverage > 0 and self.reacts == 1 and not self.misplaced


class Gradient(NamedTuple):
    """The gradient of one call, (N, V), and whether the value had a graph."""

    grad: Tensor
    graph: bool


def attempt(fn: Callable, params: Mapping[str, Any], tokens: Tokens, style: Style) -> Trial:
    """A trial of one style on a few rows.

    Raises:
        LossError: the loss raised.
    """
    layout = Layout(masked=_masked(tokens)) if inputs_masked(fn) or style.laid_out else Layout()
    with Flattened(None if style.laid_out else len(tokens) + layout.masked) as flattened:
        gradient = gradient_of(fn, params, tokens, style, layout)
    if flattened.expanded and style.laid_out and not style.several and tokens.sequence is None:
        gradient_of(
            fn, params, tokens, replace(style, several=True), layout
        )  # one text may fit a tensor of the loss's own
    return _outcome(fn, params, tokens, style, layout, gradient)._replace(flattened=flattened.detected)


def _outcome(
    fn: Callable, params: Mapping[str, Any], tokens: Tokens, style: Style, layout: Layout, gradient: Gradient
) -> Trial:
    """The outcome of a call with this gradient, after further calls with other labels and other per-token values."""
    base, graph = gradient
    size = base.norm(dim=-1)
    if not bool(base.isfinite().all()) or not bool(size.any()):
        return Trial(style, 0.0, 0.0, graph=graph)
    coverage = float((size > 0).double().mean())
    misplaced = _misplaced(fn, params, tokens, style, layout, base)
    if coverage < 0.5:  # as of a maximum over a text: the rows that have a gradient are tried one by one
        return Trial(style, coverage, _reacting_alone(fn, params, tokens, style, layout, base), misplaced)
    third = torch.arange(len(tokens)) % 3 == 1
    other = grad_of(fn, params, changed(tokens, third), style, layout)
    least = (TURNED * size).clamp(min=ROUNDING * torch.finfo(size.dtype).eps * float(size.max()))
    vanished = (size > 0) & (other.norm(dim=-1) <= TURNED * size)
    reacted = (across(other, base) > least) | vanished
    expected = third.to(reacted.device) & (size > 0)
    if not bool(reacted.any()) or not bool(expected.any()):
        return Trial(style, coverage, float(not bool(reacted.any())), misplaced)
    return Trial(style, coverage, float(reacted[expected].double().mean()), misplaced)


def _reacting_alone(
    fn: Callable, params: Mapping[str, Any], tokens: Tokens, style: Style, layout: Layout, base: Tensor
) -> float:
    """Of the rows with a gradient, the share whose gradient changes with their own label."""
    rows, number = base.norm(dim=-1).nonzero()[:, 0].tolist(), 0
    for row in rows:
        after = grad_of(fn, params, changed(tokens, torch.arange(len(tokens)) == row), style, layout)
        number += bool((after - base)[row].norm() > TURNED * base[row].norm())
    return number / len(rows)


def attempt_at_widths(fn: Callable, params: Mapping[str, Any], tokens: Tokens, style: Style) -> Trial:
    """A trial of one style; in chunks at several widths, to tell numbers of chunks and ways to cut apart.

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
            return trial._replace(coverage=0.5, reacts=0.0)
    return trial


def _masked(tokens: Tokens) -> int:
    """A number of further positions that makes neither a width nor the number of rows equal to the vocabulary."""
    rows = len(tokens)
    longest = rows if tokens.sequence is None else int(tokens.sequence.unique(return_counts=True)[1].max())
    vocabulary = tokens.logits.shape[1]
    return next(
        (more for more in MASKED if vocabulary not in (rows + more, longest + more, longest + 1 + more)), MASKED[0]
    )


def inputs_masked(fn: Callable) -> bool:
    """Whether a loss takes a mask of the supervised rows."""
    loss_inputs = inputs(fn)
    return "mask" in loss_inputs.required.values() or "mask" in loss_inputs.optional.values()


def _misplaced(
    fn: Callable, params: Mapping[str, Any], tokens: Tokens, style: Style, layout: Layout, base: Tensor
) -> bool:
    """Whether a per-token value changes the gradient of other rows: its position is wrong, or it is broadcast."""
    loss_inputs = inputs(fn)
    fields = {FIELD.get(role) for role in (*loss_inputs.required.values(), *loss_inputs.optional.values())}
    fields |= {FIELD.get(role_of(name) or "") for name in style.columns}
    second_text = torch.arange(len(tokens), device=base.device) >= len(tokens) // 2 - 1
    second_row = torch.arange(len(tokens), device=base.device) == 1
    for field in fields & {"weight", "advantage"}:
        value = getattr(tokens, str(field))
        if value is None and field == "weight":
            value = torch.ones(len(tokens), dtype=base.dtype, device=base.device)
        if value is None:
            continue
        for rows in (second_text,) if style.by_text else (second_text, second_row):
            other = tokens.replace(**{str(field): torch.where(rows, 3 * value + 1, value)})
            change = (grad_of(fn, params, other, style, layout) - base).norm(dim=-1)
            reacted = change > TURNED * float(base.norm(dim=-1).max())
            if bool(reacted[~rows].any()):
                return True
    return False


def changed(tokens: Tokens, rows: Tensor) -> Tokens:
    """The tokens with other labels in the given rows."""
    other = (tokens.labels + 1) % tokens.logits.shape[1]
    return tokens.replace(labels=torch.where(rows.to(other.device), other, tokens.labels))


def across(grad: Tensor, base: Tensor) -> Tensor:
    """The size of each row's component of ``grad`` orthogonal to ``base``, (N,)."""
    along = (grad * base).sum(-1, keepdim=True) / base.square().sum(-1, keepdim=True)
    return (grad - torch.where(along.isfinite(), along, 0.0) * base).norm(dim=-1)


def grad_of(
    fn: Callable, params: Mapping[str, Any], tokens: Tokens, style: Style | None = None, layout: Layout = AS_GIVEN
) -> Tensor:
    """The gradient of the summed loss at every row, (N, V), averaged over its copies.

    Raises:
        LossError: the loss, or its backward, raised, or it returns a value other than zero that has no graph.
        InputError: it returns nothing that is a loss.
    """
    return gradient_of(fn, params, tokens, style, layout).grad


def gradient_of(
    fn: Callable, params: Mapping[str, Any], tokens: Tokens, style: Style | None = None, layout: Layout = AS_GIVEN
) -> Gradient:
    """The gradient as of ``grad_of``, and whether the value had a graph: a loss may return zero without one."""
    with recorded():
        tokens, leaf = _with_leaf(tokens)

        def run() -> Any:
            return call(fn, params, tokens.with_logits(leaf), layout, style=style)

        result = loss_of(run(), name_of(fn))
        value = graphs.checked(result, name_of(fn), run, leaf).value
        grad = _derivative(fn, value, leaf)
    return Gradient(
        torch.zeros_like(leaf) if grad is None else grad / layout.copies,
        result.value.requires_grad and grad is not None,
    )


def value_of(fn: Callable, params: Mapping[str, Any], tokens: Tokens, style: Style) -> Tensor:
    """The detached loss; computed with a graph, which of several returned values is the loss is seen by that."""
    with recorded():
        tokens, leaf = _with_leaf(tokens)
        return loss_of(call(fn, params, tokens.with_logits(leaf), AS_GIVEN, style=style), name_of(fn)).value.detach()


def first_copy(
    fn: Callable, params: Mapping[str, Any], tokens: Tokens, style: Style, layout: Layout = AS_GIVEN
) -> Tensor:
    """The gradient of the summed loss at the first copy of every row, the others held constant, (N, V)."""
    many = tiled(tokens, layout)
    with recorded():
        tokens, leaf = _with_leaf(tokens)
        logits = torch.cat([leaf, many.logits[len(tokens) :].detach()])
        result = call(fn, params, many.with_logits(logits), layout._replace(copies=1), style=style)
        grad = _derivative(fn, loss_of(result, name_of(fn)).value, leaf)
    return torch.zeros_like(leaf) if grad is None else grad


def _with_leaf(tokens: Tokens) -> tuple[Tokens, Tensor]:
    """The tokens as ordinary tensors, and a leaf of their logits."""
    tokens = ordinary(tokens)
    return tokens, tokens.logits.detach().clone().requires_grad_()


def _derivative(fn: Callable, value: Tensor, leaf: Tensor) -> Tensor | None:
    """The gradient of the sum of a value, None if it does not depend on the leaf."""
    with user_errors(name_of(fn), kind=EndedError):
        return torch.autograd.grad(value.sum(), leaf, allow_unused=True)[0]


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


def holds_rows(fn: Callable, tokens: Tokens) -> bool:
    """Whether a loss holds tensors, arrays or lists of its own with an entry per token, or with a distribution per row.

    A teacher's probabilities in a closure, for example: such a loss can be called on all of these tokens only.
    """
    rows, vocabulary = tokens.logits.shape
    shapes = [] if is_built_in(fn) else State([fn]).shapes()
    return any(
        shape[0] == rows != vocabulary or (len(shape) == 3 and shape[-1] == vocabulary) for shape in shapes if shape
    )


def sample(fn: Callable, tokens: Tokens, group: int = 1) -> Tokens:
    """The rows on which a loss is tried: ``few`` of them, or all where it holds values of its own for every row."""
    return tokens if holds_rows(fn, tokens) else few(tokens, group)


def texts_of(tokens: Tokens, number: int, length: int = 2) -> Tokens:
    """That many texts, in pairs, of ``length`` rows each, or of as many as make up eight rows."""
    length = max(length, -(-ROWS // number))
    rows = torch.arange(number * length, device=tokens.logits.device)
    text = rows // length
    return _with_fields(tokens[rows % len(tokens)], sequence=text, pair=text // 2, chosen=text % 2 == 0)


def _with_fields(tokens: Tokens, **fields: Tensor) -> Tokens:
    """The tokens with other values in those of these fields that they have."""
    return tokens.replace(**{name: value for name, value in fields.items() if getattr(tokens, name) is not None})
