"""Calling: what a loss wants to be called with, told by the names of its parameters, and one call of it on laid-out rows."""

import inspect
from collections.abc import Callable, Mapping
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from qlens.batching import IGNORE
from qlens.errors import InputError
from qlens.tokens import Tokens

KINDS = ("tokens", "logits", "outputs", "hidden", "model")
LAID_OUT = ("outputs", "model")  # these see (B, T) with labels unshifted and -100 where nothing is predicted
CALLERS = ("num_items_in_batch", "return_outputs")  # what a Trainer fills in, no parameters of the loss

# A kernel that multiplies by the head itself takes hidden states, a head and labels, in some order, by some of these names.
ROLES: dict[str, tuple[str, ...]] = {
    "logits": ("hidden", "hidden_states", "input", "_input", "x", "e", "student_hidden", "student_input"),
    "head": ("head", "weight", "lin_weight", "linear_weight", "lm_head_weight", "c", "student_head", "student_weight"),
    "labels": ("labels", "target", "targets", "true_labels"),
    "teacher": ("teacher_hidden", "teacher_input"),
    "reference": ("reference_hidden", "ref_hidden", "ref_input"),
    "teacher head": ("teacher_head", "teacher_weight"),
    "reference head": ("reference_head", "ref_weight"),
}


class Layout(NamedTuple):
    """How rows are laid out in a call: each ``copies`` times, with ``masked`` further positions labelled -100."""

    copies: int = 1
    masked: int = 0


def opened(loss: Callable) -> Callable:
    """The function inside: a trainer's compute_loss (its class is built around a stub model), a loss module's class built.

    Raises:
        InputError: the class cannot be built without arguments.
    """
    if inspect.isclass(loss) and hasattr(loss, "compute_loss"):
        from qlens.stub import trained_by

        return trained_by(loss)
    if inspect.isclass(loss) and issubclass(loss, nn.Module):
        try:
            return loss()
        except TypeError as error:
            raise InputError(
                f"{loss.__name__} cannot be built without arguments ({error}): give an instance"
            ) from error
    return loss if inspect.isroutine(loss) else getattr(loss, "compute_loss", loss)


@lru_cache(maxsize=1024)
def kind(fn: Callable) -> str:
    """What a loss is called with, told by its parameters' names; torch's own ``input`` is logits, or hidden beside a head.

    Raises:
        InputError: the first parameter has another name, or there is none.
    """
    bare = _bare(fn)
    if {"logits", "head"} <= {_role(name) for name in bare}:
        return "hidden"
    first = next(iter(signature(fn)), "nothing")
    first = "logits" if first == "input" else first
    if first not in KINDS or first == "hidden":
        raise InputError(
            f"{name_of(fn)} takes {first!r} first; a loss is told by its first parameter, one of: tokens, logits (then "
            "labels), outputs (then labels), model (then inputs), hidden (then head and labels)"
        )
    return first


@lru_cache(maxsize=1024)
def signature(fn: Callable) -> Mapping[str, inspect.Parameter]:
    """The parameters of a callable by name; of a module, those of its forward."""
    if isinstance(fn, nn.Module):
        fn = fn.forward
    variadic = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    return {name: p for name, p in inspect.signature(fn).parameters.items() if p.kind not in variadic}


def extra_inputs(fn: Callable) -> tuple[str, ...]:
    """What a loss asks for beyond its first inputs, as fields of Tokens: parameters without a default.

    Raises:
        InputError: one of them is no field of Tokens.
    """
    bare = _bare(fn)
    if kind(fn) == "hidden":
        return tuple(name for name in map(_role, bare) if name in ("teacher", "reference"))
    bare = [name for name in bare[1 if kind(fn) == "tokens" else 2 :] if name not in CALLERS]
    unknown = [name for name in bare if name not in Tokens.__dataclass_fields__]
    if unknown:
        raise InputError(f"{name_of(fn)}: give {unknown[0]!r} a default, or name a field of Tokens")
    return tuple(bare)


def call(fn: Callable, params: Mapping[str, Any], tokens: Tokens, layout: Layout, safe: bool = False) -> Any:
    """One call of the loss as it wants to be called, on the rows in the given layout; on copies, unless it is ``safe``."""
    laid = tiled(tokens, layout.copies)
    extra = {name: getattr(laid, name) for name in extra_inputs(fn)}
    if kind(fn) == "tokens":
        return fn(laid, **extra, **params)
    if kind(fn) == "logits":
        given = (laid.logits, laid.labels) if safe else (laid.logits.clone(), laid.labels.clone())
        return fn(*given, **extra, **params)
    if kind(fn) == "hidden":
        return fn(*_fused(fn, laid), **params)
    logits, labels = one_sequence(laid, layout.masked)
    wants_count = signature(fn).get("num_items_in_batch")
    if wants_count is not None and wants_count.default is inspect.Parameter.empty:
        extra["num_items_in_batch"] = torch.tensor(len(laid))
    return on_batch(fn, logits, labels, **extra, **params)


def on_batch(fn: Callable, logits: Tensor, labels: Tensor, **given: Any) -> Any:
    """One call of an ``outputs`` or ``model`` loss on (B, T, V) logits and (B, T) labels, unshifted, with -100."""
    if kind(fn) == "outputs":
        from transformers.modeling_outputs import CausalLMOutput

        return fn(CausalLMOutput(logits=logits), labels, **given)
    from qlens.stub import StubModel

    padded = labels.clamp(min=0)
    inputs = {"input_ids": padded, "attention_mask": torch.ones_like(padded), "labels": labels}
    made = fn(StubModel(logits), inputs, **given)
    return made[0] if isinstance(made, tuple) else made


def written(fn: Callable, params: Mapping[str, Any], tokens: Tokens) -> tuple[str, ...]:
    """Which of logits and labels a loss on rows changes in place; it is given copies, so that no harm is done."""
    if kind(fn) != "logits":
        return ()
    given = {"logits": tokens.logits.detach().clone(), "labels": tokens.labels.clone()}
    fresh = {name: value._version for name, value in given.items()}
    with torch.no_grad():
        fn(*given.values(), **{name: getattr(tokens, name) for name in extra_inputs(fn)}, **params)
    return tuple(name for name, value in given.items() if value._version != fresh[name])


def one_sequence(tokens: Tokens, masked: int = 0) -> tuple[Tensor, Tensor]:
    """The rows as one sequence: row i predicts label i + 1, the last position nothing; ``masked`` more are labelled -100."""
    pad = tokens.logits[:1].expand(masked + 1, -1)
    ignored = tokens.labels.new_full((masked + 1,), IGNORE)
    return torch.cat([tokens.logits, pad])[None], torch.cat([ignored[:1], tokens.labels, ignored[1:]])[None]


def tiled(tokens: Tokens, copies: int) -> Tokens:
    """Every row ``copies`` times over; copies of a sequence or a pair are sequences and pairs of their own."""
    if copies == 1:
        return tokens
    many = tokens[torch.arange(len(tokens), device=tokens.logits.device).repeat(copies)]
    turn = torch.arange(copies, device=tokens.logits.device).repeat_interleave(len(tokens))
    groups = {name: value for name in ("sequence", "pair") if (value := getattr(many, name)) is not None}
    return many.replace(**{name: value + turn * (value.max() + 1) for name, value in groups.items()})


def _fused(fn: Callable, tokens: Tokens) -> list[Tensor]:
    """Hidden states that are the logits themselves, and heads that are the identity, in the order the kernel asks."""
    head = torch.eye(tokens.logits.shape[1], dtype=tokens.logits.dtype, device=tokens.logits.device)
    made = []
    for name in _bare(fn):
        role = _role(name)
        if role is None:
            raise InputError(
                f"{name_of(fn)}: give {name!r} a default: hidden, head, labels and a teacher's are filled in"
            )
        made.append(head if role.endswith("head") else tokens.require(role).clone())
    return made


def _bare(fn: Callable) -> list[str]:
    return [name for name, p in signature(fn).items() if p.default is p.empty]


def _role(name: str) -> str | None:
    return next((role for role, names in ROLES.items() if name in names), None)


def name_of(fn: Callable) -> str:
    """What a callable is called in messages."""
    return getattr(fn, "__name__", type(fn).__name__)
