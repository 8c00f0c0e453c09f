"""Adapters: any loss as somebody writes it, as rows of an unreduced loss; its reduction found and undone."""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from qlens.calling import Layout, call, inputs, kind, name_of, written
from qlens.draws import Replay
from qlens.errors import InputError
from qlens.graphs import leaves
from qlens.layouts import Counts, Style, counts
from qlens.results import loss_of
from qlens.styles import few, grad_of, inputs_masked, style_of
from qlens.target import Target
from qlens.tokens import Tokens, spread

FOUND_ON = 8  # rows: enough to see how a loss divides, few enough to be free
DRAWS = 800  # rows, over several calls, that the gradient of a loss that draws numbers is averaged over
ROUNDING = 1e3  # units of rounding below which a gradient that no count explains is none
ALIKE = 0.01  # gradients this near are one gradient: losses may compute in bfloat16, and counts differ by far more

# What a scalar loss may have divided by, of the rows and the layout they were shown in; a tensor (N,) is a number for each row.
REDUCTIONS: dict[str, Callable[[Counts], Any]] = {
    "sum": lambda c: 1,
    "mean over unmasked": lambda c: c.rows,
    "mean over all": lambda c: c.positions,
    "mean over all, the unused last position included": lambda c: c.columns,
    "sum of each text, mean over texts": lambda c: c.texts,
    "mean of each text, mean over texts": lambda c: c.texts * c.own,
    "mean of each text, sum over texts": lambda c: c.own,
}


def rows(fn: Callable, params: dict[str, Any], name: str) -> Callable[[Tokens], Any]:
    """The loss as a function from tokens to rows, (N,); what a tokens function returns that is no tensor is handed on.

    A scalar loss is multiplied by what it divided by; every row then has an equal share of its value, and the gradient
    of its own logits.
    """
    unreduced = undone(fn, params, name)

    def run(tokens: Tokens) -> Any:
        made = unreduced(tokens)
        return _shared(made, tokens.logits) if isinstance(made, Tensor) and not made.ndim else made

    return run


def undone(fn: Callable, params: dict[str, Any], name: str) -> Callable[[Tokens], Any]:
    """The loss with its reduction undone, as a function of tokens: rows (N,), or a scalar that is their sum."""
    reduction: list[str] = []  # found at the first call that needs it
    safe: list[bool] = []  # whether it leaves its inputs alone: seen on a few rows, so that the others need no copy

    def run(tokens: Tokens) -> Any:
        if not len(tokens):
            return tokens.logits[:, :0].sum(-1)  # no rows, but a graph
        if not safe:
            with Replay(tokens.logits.device, fn).again():  # what is tried first must not change what a loss draws
                safe.append(_leaves_alone(fn, params, tokens))
        style = style_of(fn, params, tokens)
        made = call(fn, params, tokens, Layout(), safe[0], style)
        if kind(fn) == "tokens" and isinstance(made, Target):
            return made
        made = loss_of(made, name).value
        if made.ndim and made.numel() == len(tokens) and not style.laid_out:
            return made.reshape(-1)
        if made.ndim and not style.laid_out and not (pairwise(fn) or made.ndim == 1):
            raise InputError(
                f"{name} returned shape {tuple(made.shape)} for {len(tokens)} tokens: it must be () or (N,)"
            )
        if made.ndim:  # what is unreduced over texts, pairs or positions leaves nothing to undo
            return made.sum()
        if not reduction:
            with Replay(tokens.logits.device, fn).again():
                reduction.append(find_reduction(fn, params, tokens, name))
        divisor = REDUCTIONS[reduction[0]](counts(tokens, Layout(), style, pairwise(fn)))
        return _times(fn, params, tokens, safe[0], style, divisor) if isinstance(divisor, Tensor) else made * divisor

    return run


def pairwise(fn: Callable) -> bool:
    """Whether a loss is one of pairs, given the summed log-probabilities of chosen and rejected sequences."""
    return any(role.endswith("chosen log probs") for role in inputs(fn).required.values())


def _times(fn: Callable, params: dict[str, Any], tokens: Tokens, safe: bool, style: Style, divisor: Tensor) -> Tensor:
    """The loss with the gradient of every row multiplied by its own divisor, as one scalar."""
    through = tokens.logits * 1
    if through.requires_grad:
        through.register_hook(lambda grad: grad * (divisor / len(tokens)).to(grad)[:, None])
    made = call(fn, params, tokens.with_logits(through), Layout(), safe, style)
    return loss_of(made, name_of(fn)).value * len(tokens)


def _leaves_alone(fn: Callable, params: dict[str, Any], tokens: Tokens) -> bool:
    """Whether a loss does not write on its inputs, seen on a few rows."""
    try:
        return not written(fn, params, _spread(tokens))
    except InputError:  # it may be made for all of these very rows; a true mistake is raised again by the call itself
        return False


def _shared(total: Tensor, logits: Tensor) -> Tensor:
    """Rows that add up to ``total``, each with the gradient of its own logits and no other's: so that rows can be weighted.

    A parameter of the loss's own has its gradient by all rows together, where they are weighted alike.
    """
    value = (total.detach() / len(logits)).expand(len(logits))
    if not total.requires_grad:
        return value
    learned = leaves(total, logits)
    grads = torch.autograd.grad(total, (logits, *learned))
    return _Shares.apply(value, grads, logits, *learned)


class _Shares(torch.autograd.Function):
    """Values of rows, (N,), with a given gradient each, (N, V), and gradients of parameters by all of them."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, grads: tuple[Tensor, ...], *inputs: Tensor) -> Tensor:
        ctx.save_for_backward(*grads)
        return value.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *upstream: Tensor) -> tuple:  # pyright: ignore[reportIncompatibleMethodOverride]
        (u,), (rows, *learned) = upstream, ctx.saved_tensors
        if learned and bool((u != u[0]).any()):
            raise InputError(
                "a loss that returns a scalar and has a parameter of its own that requires a gradient has none of it for rows "
                "that are weighted differently: return the unreduced loss (N,) instead, or detach the parameter"
            )
        return None, None, u[:, None] * rows, *(u[0] * grad for grad in learned)


def find_reduction(fn: Callable, params: dict[str, Any], tokens: Tokens, name: str) -> str:
    """How a scalar loss divides: the one count by which its gradient on the same rows is the same in every layout.

    Raises:
        InputError: no count explains it, or two calls on the same rows differ.
    """
    from qlens.probes import probes

    style, replay = style_of(fn, params, tokens), Replay(tokens.logits.device, fn)

    def read(shown: Tokens, layout: Layout) -> Tensor:
        with replay.again():  # the same draws, from the same state
            return grad_of(fn, params, shown, style, layout)

    for rows_shown in (
        few(tokens) if pairwise(fn) else _spread(tokens),
        probes(tokens.logits.dtype, tokens.logits.device),
    ):
        base = read(rows_shown, Layout())
        if base.abs().max() > 0:  # a loss that skips these rows tells nothing about its division
            break
    else:
        return "sum"
    if _misfit([base, read(rows_shown, Layout())]) > ALIKE:
        raise InputError(
            f"{name} is not deterministic: two calls on the same tokens differ, and not by the random generators of torch, numpy "
            "or Python. Draw by one of these, or return the unreduced loss (N,)."
        )
    misfits: dict[str, float] = {}
    grads: list[Tensor] = []
    for interleave in (False, True) if style.laid_out else (False,):
        layouts = [Layout(), Layout(2, 0, False, interleave), Layout(3, 0, False, interleave)]
        if style.laid_out or inputs_masked(fn):
            layouts += [Layout(1, 7), Layout(2, 12, False, interleave)]
        grads = [read(rows_shown, layout) for layout in layouts]
        for reduction in REDUCTIONS:
            off = _misfit(_multiplied(reduction, fn, grads, rows_shown, layouts, style))
            misfits[reduction] = min(off, misfits.get(reduction, off))
    best = min(misfits, key=misfits.__getitem__)
    alike = [reduction for reduction, off in misfits.items() if off <= max(ALIKE / 100, 2 * misfits[best])]
    if misfits[best] <= ALIKE:
        of_any_length = by_length(alike, fn, params, rows_shown, style) if style.laid_out and len(alike) > 1 else ""
        return of_any_length or (alike[0] if len(alike) > 1 else best)
    with replay.again():
        draws = _misfit([base, *(grad_of(fn, params, rows_shown, style) for _ in range(16))]) > ALIKE
    if draws:  # other numbers in every layout
        return by_average(fn, params, rows_shown, style, name)
    if float(grads[0].abs().max()) < ROUNDING * torch.finfo(grads[0].dtype).eps:
        return "sum"  # nothing but rounding: there is no gradient to be divided
    ratio = float(grads[1].norm() / grads[0].norm())
    raise InputError(
        f"{name}: its reduction could not be found: with every row shown twice, a row's gradient changes by a factor "
        f"{ratio:.4g}, where a sum gives 1 and a mean 0.5. Return the unreduced loss (N,) instead."
    )


def by_average(fn: Callable, params: dict[str, Any], tokens: Tokens, style: Style, name: str) -> str:
    """How a scalar loss divides that draws numbers: the count by which its gradients, averaged over many draws, are nearest.

    Raises:
        InputError: no count is much nearer than any other.
    """
    layouts = [Layout(), Layout(2), Layout(3)]
    if style.laid_out or inputs_masked(fn):
        layouts += [Layout(1, 7), Layout(2, 12)]
    calls = math.ceil(DRAWS / len(tokens))
    grads = [sum(grad_of(fn, params, tokens, style, layout) for _ in range(calls)) / calls for layout in layouts]
    off: dict[str, float] = {}
    for reduction in REDUCTIONS:
        first, *others = _multiplied(reduction, fn, grads, tokens, layouts, style)
        off[reduction] = max(abs(float((other * first).sum() / first.square().sum()) - 1) for other in others)
    best = min(off, key=off.__getitem__)
    rest = [far for far in off.values() if far - off[best] > 1e-9]  # those that are the same here are one
    if off[best] < 0.2 and all(far > 2 * off[best] + 0.05 for far in rest):
        return best
    raise InputError(
        f"{name} draws numbers and reduces them itself, by a count that could not be found from {calls} calls: return the "
        "unreduced loss (N,) instead, or switch dropout off"
    )


def by_length(alike: list[str], fn: Callable, params: dict[str, Any], tokens: Tokens, style: Style) -> str:
    """The one of these reductions that holds for texts of unequal lengths too; "" where none does."""
    layouts = [Layout(), Layout(split=True)]
    try:
        grads = [grad_of(fn, params, tokens, style, layout) for layout in layouts]
    except InputError:  # a loss of pairs, say, takes no texts in other numbers
        return ""
    off = {name: _misfit(_multiplied(name, fn, grads, tokens, layouts, style)) for name in alike}
    best = min(off, key=off.__getitem__)
    return best if off[best] <= ALIKE else ""


def _multiplied(
    reduction: str, fn: Callable, grads: list[Tensor], tokens: Tokens, layouts: list[Layout], style: Style
) -> list[Tensor]:
    """Gradients in several layouts, each multiplied by what this reduction divides by there."""
    made = []
    for grad, layout in zip(grads, layouts, strict=True):
        divisor = REDUCTIONS[reduction](counts(tokens, layout, style, pairwise(fn)))
        made.append(grad * (divisor.to(grad)[:, None] if isinstance(divisor, Tensor) else divisor))
    return made


def _spread(tokens: Tokens) -> Tokens:
    """A few rows from all over."""
    return tokens[spread(len(tokens), FOUND_ON).to(tokens.logits.device)]


def _misfit(grads: list[Tensor]) -> float:
    """How far gradients that should be one are apart, as a share of the first."""
    return max(float((grad - grads[0]).norm() / grads[0].norm()) for grad in grads[1:])
