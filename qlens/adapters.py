"""Adapters: any loss as somebody writes it, as rows of an unreduced loss; its kind read, its reduction found and undone."""

import inspect
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from qlens.batching import IGNORE
from qlens.errors import InputError
from qlens.tokens import Tokens

KINDS = ("tokens", "logits", "outputs", "model")
FOUND_ON = 8  # rows: enough to see how a loss divides, few enough to be free
ALIKE = 0.01  # gradients this near are one gradient: losses may compute in bfloat16, and counts differ by far more


class Layout(NamedTuple):
    """How rows are laid out in a call: each ``copies`` times, with ``masked`` further positions labelled -100."""

    copies: int = 1
    masked: int = 0


# What a scalar loss may have divided by, as a function of the rows and the layout they were shown in.
REDUCTIONS: dict[str, Callable[[int, Layout], int]] = {
    "sum": lambda n, layout: 1,
    "mean over unmasked": lambda n, layout: n * layout.copies,
    "mean over all": lambda n, layout: n * layout.copies + layout.masked,
    "mean over all, the unused last position included": lambda n, layout: n * layout.copies + layout.masked + 1,
}


def kind(fn: Callable) -> str:
    """'tokens', 'logits', 'outputs' or 'model', by the name of the first parameter (torch's own ``input`` is logits).

    Raises:
        InputError: the first parameter has another name, or there is none.
    """
    first = next(iter(signature(fn)), "nothing")
    first = "logits" if first == "input" else first
    if first not in KINDS:
        raise InputError(
            f"{_name(fn)} takes {first!r} first; a loss is told by its first parameter, one of: tokens, "
            "logits (then labels), outputs (then labels)"
        )
    if first == "model":
        raise InputError(f"{_name(fn)} takes a model: losses that never show their logits cannot be read yet")
    return first


def signature(fn: Callable) -> dict[str, inspect.Parameter]:
    """The parameters of a callable by name; of a module, those of its forward."""
    if isinstance(fn, nn.Module):
        fn = fn.forward
    variadic = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    return {name: p for name, p in inspect.signature(fn).parameters.items() if p.kind not in variadic}


def extra_inputs(fn: Callable) -> tuple[str, ...]:
    """What a loss asks for beyond its first inputs: parameters without a default, to be filled from Tokens."""
    skipped = 1 if kind(fn) == "tokens" else 2
    bare = [name for name, p in list(signature(fn).items())[skipped:] if p.default is p.empty]
    bare = [name for name in bare if name != "num_items_in_batch"]
    unknown = [name for name in bare if name not in Tokens.__dataclass_fields__]
    if unknown:
        raise InputError(f"{_name(fn)}: give {unknown[0]!r} a default, or name a field of Tokens")
    return tuple(bare)


def rows(fn: Callable, params: dict[str, Any], name: str) -> Callable[[Tokens], Any]:
    """The loss as a function from tokens to rows, (N,); what a tokens function returns that is no tensor is handed on.

    A scalar loss is multiplied by what it divided by; every row then has an equal share of its value, and the gradient
    of its own logits.
    """
    reduction: list[str] = []  # found at the first call that needs it

    def run(tokens: Tokens) -> Any:
        if not len(tokens):
            return tokens.logits[:, :0].sum(-1)  # no rows, but a graph
        made = call(fn, params, tokens, Layout())
        if not isinstance(made, Tensor) and kind(fn) == "tokens":
            return made
        _check(made, tokens, name)
        if made.ndim and made.numel() == len(tokens):
            return made.reshape(-1)
        if made.ndim and kind(fn) != "outputs":
            raise InputError(
                f"{name} returned shape {tuple(made.shape)} for {len(tokens)} tokens: it must be () or (N,)"
            )
        if not made.ndim and not reduction:
            reduction.append(find_reduction(fn, params, tokens, name))
        # A Trainer-style loss may leave (B, T) unreduced: then there is nothing to undo.
        count = 1 if made.ndim else REDUCTIONS[reduction[0]](len(tokens), Layout())
        return _shared(made.sum() * count, tokens.logits)

    return run


def _shared(total: Tensor, logits: Tensor) -> Tensor:
    """Rows that add up to ``total``, each with the gradient of its own logits and no other's: so that rows can be weighted."""
    value = (total.detach() / len(logits)).expand(len(logits))
    if not total.requires_grad:
        return value
    (grad,) = torch.autograd.grad(total, logits)
    zero = torch.where(logits.isfinite(), logits - logits.detach(), 0.0)
    return value + (grad * zero).sum(-1)


def call(fn: Callable, params: dict[str, Any], tokens: Tokens, layout: Layout) -> Any:
    """One call of the loss as it wants to be called, on the rows in the given layout."""
    laid = tiled(tokens, layout.copies)
    extra = {name: getattr(laid, name) for name in extra_inputs(fn)}
    if kind(fn) == "tokens":
        return fn(laid, **extra, **params)
    if kind(fn) == "logits":
        return fn(laid.logits.clone(), laid.labels.clone(), **extra, **params)  # a loss may write on what it is given
    from transformers.modeling_outputs import CausalLMOutput

    # One sequence: row i predicts label i + 1; the last position predicts nothing.
    pad = laid.logits[:1].expand(layout.masked + 1, -1)
    logits = torch.cat([laid.logits, pad])[None]
    ignored = laid.labels.new_full((layout.masked + 1,), IGNORE)
    labels = torch.cat([ignored[:1], laid.labels, ignored[1:]])[None]
    wants_count = signature(fn).get("num_items_in_batch")
    if wants_count is not None and wants_count.default is inspect.Parameter.empty:
        extra["num_items_in_batch"] = torch.tensor(len(laid))
    return fn(CausalLMOutput(logits=logits), labels, **extra, **params)


def tiled(tokens: Tokens, copies: int) -> Tokens:
    """Every row ``copies`` times over; copies of a sequence or a pair are sequences and pairs of their own."""
    if copies == 1:
        return tokens
    many = tokens[torch.arange(len(tokens), device=tokens.logits.device).repeat(copies)]
    turn = torch.arange(copies, device=tokens.logits.device).repeat_interleave(len(tokens))
    groups = {name: value for name in ("sequence", "pair") if (value := getattr(many, name)) is not None}
    return many.replace(**{name: value + turn * (value.max() + 1) for name, value in groups.items()})


def find_reduction(fn: Callable, params: dict[str, Any], tokens: Tokens, name: str) -> str:
    """How a scalar loss divides: the one count by which its gradient on the same rows is the same in every layout.

    Raises:
        InputError: no count explains it, or two calls on the same rows differ.
    """
    from qlens.probes import probes

    layouts = [Layout(), Layout(copies=2), Layout(copies=3)]
    if kind(fn) == "outputs":
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
        (grad,) = torch.autograd.grad(made, leaf)
    return grad / layout.copies


def _spread(tokens: Tokens) -> Tokens:
    """A few rows from all over."""
    picked = torch.linspace(0, len(tokens) - 1, min(FOUND_ON, len(tokens)), device=tokens.logits.device)
    return tokens[picked.long()]


def _misfit(grads: list[Tensor]) -> float:
    """How far gradients that should be one are apart, as a share of the first."""
    return max(float((grad - grads[0]).norm() / grads[0].norm()) for grad in grads[1:])


def _check(made: Any, tokens: Tokens, name: str) -> None:
    if not isinstance(made, Tensor) or not made.is_floating_point():
        raise InputError(f"{name} must return a floating-point tensor, () or (N,), but returned {type(made).__name__}")
    if torch.is_grad_enabled() and tokens.logits.requires_grad and not made.requires_grad:
        raise InputError(f"{name} returned a value without a gradient: the logits are detached somewhere inside")


def _name(fn: Callable) -> str:
    return getattr(fn, "__name__", type(fn).__name__)
