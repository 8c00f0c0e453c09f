"""Adapters: any loss as somebody writes it, as rows of an unreduced loss; its reduction found and undone."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from qlens import graphs
from qlens.calling import Layout, call, kind, name_of, written
from qlens.draws import Replay
from qlens.errors import InputError
from qlens.layouts import Style, counts
from qlens.reductions import FOUND_ON, Division, find_division, pairwise
from qlens.results import loss_of
from qlens.styles import style_of
from qlens.target import Target
from qlens.tokens import Tokens, spread
from qlens.trying import value_of


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
    division: list[Division] = []  # found at the first call that learns from a row
    safe: list[bool] = []  # whether it leaves its inputs alone: seen on a few rows, so that the others need no copy

    def run(tokens: Tokens) -> Any:
        if not len(tokens):
            return tokens.logits[:, :0].sum(-1)  # no rows, but a graph
        if not safe:
            with Replay(tokens.logits.device).again():  # what is tried first must not change what a loss draws
                safe.append(_leaves_alone(fn, params, tokens))
                style_of(fn, params, tokens)  # remembered
        style = style_of(fn, params, tokens)
        made = call(fn, params, tokens, Layout(), safe[0], style)
        if not isinstance(made, Tensor | Target) and not tokens.logits.requires_grad:
            made = value_of(fn, params, tokens, style)  # which part is the loss shows in the graphs alone
        if kind(fn) == "tokens" and isinstance(made, Target):
            return made
        if kind(fn) == "tokens" and isinstance(made, int | float):  # a method of tokens has a value for each
            raise InputError(f"{name} must return a floating-point tensor (N,), it returns {type(made).__name__}")
        made = graphs.checked(
            loss_of(made, name), name, lambda: call(fn, params, tokens, Layout(), style=style), tokens.logits
        ).value
        if made.ndim and made.numel() == len(tokens) and not style.laid_out:
            return made.reshape(-1)
        if made.ndim and not style.laid_out and not (pairwise(fn) or made.ndim == 1):
            raise InputError(
                f"{name} returned shape {tuple(made.shape)} for {len(tokens)} tokens: it must be () or (N,)"
            )
        if made.ndim:  # what is unreduced over texts, pairs or positions leaves nothing to undo
            return made.sum()
        if not division:
            with Replay(tokens.logits.device).again():
                found = find_division(fn, params, tokens, name)
            if found is None:  # no row taught it anything
                return made
            division.append(found)
        divisor = division[0].divisor(counts(tokens, Layout(), style, pairwise(fn)))
        return _times(fn, params, tokens, safe[0], style, divisor) if isinstance(divisor, Tensor) else made * divisor

    return run


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
        return not written(fn, params, tokens[spread(len(tokens), FOUND_ON).to(tokens.logits.device)])
    except InputError:  # it may be made for all of these very rows; a true mistake is raised again by the call itself
        return False


def _shared(total: Tensor, logits: Tensor) -> Tensor:
    """Rows that add up to ``total``, each with the gradient of its own logits and no other's: so that rows can be weighted."""
    value = (total.detach() / len(logits)).expand(len(logits))
    if not total.requires_grad:
        return value
    (grad,) = torch.autograd.grad(total, logits, allow_unused=True)
    if grad is None:
        return value
    zero = torch.where(logits.isfinite(), logits - logits.detach(), 0.0)
    return value + (grad * zero).sum(-1)
