"""Adapters: any loss as somebody writes it, as rows of an unreduced loss; its reduction found and undone."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from qlens.calling import LAID_OUT, Layout, call, kind, name_of, written
from qlens.errors import InputError
from qlens.tokens import Tokens, spread

FOUND_ON = 8  # rows: enough to see how a loss divides, few enough to be free
ROUNDING = 1e3  # units of rounding below which a gradient that no count explains is none
ALIKE = 0.01  # gradients this near are one gradient: losses may compute in bfloat16, and counts differ by far more

# What a scalar loss may have divided by, as a function of the rows and the layout they were shown in.
REDUCTIONS: dict[str, Callable[[int, Layout], int]] = {
    "sum": lambda n, layout: 1,
    "mean over unmasked": lambda n, layout: n * layout.copies,
    "mean over all": lambda n, layout: n * layout.copies + layout.masked,
    "mean over all, the unused last position included": lambda n, layout: n * layout.copies + layout.masked + 1,
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
            safe.append(_leaves_alone(fn, params, tokens))
        made = call(fn, params, tokens, Layout(), safe[0])
        if not isinstance(made, Tensor) and kind(fn) == "tokens":
            return made
        _check(made, tokens, name)
        if made.ndim and made.numel() == len(tokens):
            return made.reshape(-1)
        if made.ndim and kind(fn) not in LAID_OUT:
            raise InputError(
                f"{name} returned shape {tuple(made.shape)} for {len(tokens)} tokens: it must be () or (N,)"
            )
        if not made.ndim and not reduction:
            reduction.append(find_reduction(fn, params, tokens, name))
        # A Trainer-style loss may leave (B, T) unreduced: then there is nothing to undo.
        return made.sum() * (1 if made.ndim else REDUCTIONS[reduction[0]](len(tokens), Layout()))

    return run


def _leaves_alone(fn: Callable, params: dict[str, Any], tokens: Tokens) -> bool:
    """Whether a loss does not write on its inputs, seen on a few rows."""
    try:
        return not written(fn, params, _spread(tokens))
    except Exception:  # it may be made for all of these very rows; a true mistake is raised again by the call itself
        return False


def _shared(total: Tensor, logits: Tensor) -> Tensor:
    """Rows that add up to ``total``, each with the gradient of its own logits and no other's: so that rows can be weighted."""
    value = (total.detach() / len(logits)).expand(len(logits))
    if not total.requires_grad:
        return value
    (grad,) = torch.autograd.grad(total, logits)
    zero = torch.where(logits.isfinite(), logits - logits.detach(), 0.0)
    return value + (grad * zero).sum(-1)


def find_reduction(fn: Callable, params: dict[str, Any], tokens: Tokens, name: str) -> str:
    """How a scalar loss divides: the one count by which its gradient on the same rows is the same in every layout.

    Raises:
        InputError: no count explains it, or two calls on the same rows differ.
    """
    from qlens.probes import probes

    layouts = [Layout(), Layout(copies=2), Layout(copies=3)]
    if kind(fn) in LAID_OUT:
        layouts += [Layout(masked=40), Layout(copies=2, masked=70)]
    for rows_shown in (_spread(tokens), probes(tokens.logits.dtype, tokens.logits.device)):
        grads = [_grad(fn, params, rows_shown, layout) for layout in layouts]
        if grads[0].abs().max() > 0:  # a loss that skips these rows tells nothing about its division
            break
    else:
        return "sum"
    if _misfit([grads[0], _grad(fn, params, rows_shown, layouts[0])]) > ALIKE:
        raise InputError(
            f"{name} is not deterministic: two calls on the same tokens differ. Seed it, or switch dropout off."
        )
    n, misfits = len(rows_shown), {}
    for reduction, count in REDUCTIONS.items():
        undone = [g * (count(n, layout) / count(n, layouts[0])) for g, layout in zip(grads, layouts, strict=True)]
        misfits[reduction] = _misfit(undone)
    best = min(misfits, key=misfits.__getitem__)
    if misfits[best] <= ALIKE:
        return best
    if float(grads[0].abs().max()) < ROUNDING * torch.finfo(grads[0].dtype).eps:
        return "sum"  # nothing but rounding: there is no gradient to be divided
    ratio = float(grads[1].norm() / grads[0].norm())
    raise InputError(
        f"{name}: its reduction could not be found: with every row shown twice, a row's gradient changes by a factor "
        f"{ratio:.4g}, where a sum gives 1 and a mean 0.5. Return the unreduced loss (N,) instead."
    )


def _grad(fn: Callable, params: dict[str, Any], tokens: Tokens, layout: Layout) -> Tensor:
    """Gradient of the scalar loss on the first copy of every row, all copies added up as one row would be."""
    with torch.enable_grad():
        leaf = tokens.logits.detach().clone().requires_grad_()
        made = call(fn, params, tokens.replace(logits=leaf), layout).sum()
        if not made.requires_grad:
            raise InputError(
                f"{name_of(fn)} returned a value without a gradient: the logits are detached somewhere inside"
            )
        (grad,) = torch.autograd.grad(made, leaf)
    return grad / layout.copies


def _spread(tokens: Tokens) -> Tokens:
    """A few rows from all over."""
    return tokens[spread(len(tokens), FOUND_ON).to(tokens.logits.device)]


def _misfit(grads: list[Tensor]) -> float:
    """How far gradients that should be one are apart, as a share of the first."""
    return max(float((grad - grads[0]).norm() / grads[0].norm()) for grad in grads[1:])


def _check(made: Any, tokens: Tokens, name: str) -> None:
    if not isinstance(made, Tensor) or not made.is_floating_point():
        raise InputError(f"{name} must return a floating-point tensor, () or (N,), but returned {type(made).__name__}")
    if torch.is_grad_enabled() and tokens.logits.requires_grad and not made.requires_grad:
        raise InputError(f"{name} returned a value without a gradient: the logits are detached somewhere inside")
