"""Wrappers of a loss function that change or watch its arguments."""

import functools
import inspect
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from qlens.core.tokens import Tokens

Around = Callable[[Callable], Callable]
"""A wrapper of the loss function."""


def as_it_is(fn: Callable) -> Callable:
    """The function itself."""
    return fn


def changing(change: Callable[[Tensor], Tensor]) -> Around:
    """A wrapper: every tensor that the function is given goes through ``change`` first."""

    def wrap(fn: Callable) -> Callable:
        @functools.wraps(fn.forward if isinstance(fn, nn.Module) else fn)  # its signature tells how to call it
        def run(*args: Any, **kwargs: Any) -> Any:
            return fn(
                *(each_tensor(arg, change) for arg in args), **{k: each_tensor(v, change) for k, v in kwargs.items()}
            )

        return run

    return wrap


def altering(change: Callable[[dict[str, Any]], Any]) -> Around:
    """A wrapper: ``change`` may put other values into the arguments, by name."""

    def wrap(fn: Callable) -> Callable:
        @functools.wraps(fn.forward if isinstance(fn, nn.Module) else fn)
        def run(*args: Any, **kwargs: Any) -> Any:
            bound = inspect.signature(run).bind(*args, **kwargs)
            change(bound.arguments)
            return fn(*bound.args, **bound.kwargs)

        return run

    return wrap


def watching(written: list[str]) -> Around:
    """A wrapper that notes what the function writes on: its arguments, by name, and the logits that its model gives it."""

    def wrap(fn: Callable) -> Callable:
        @functools.wraps(fn.forward if isinstance(fn, nn.Module) else fn)
        def run(*args: Any, **kwargs: Any) -> Any:
            copies: list[tuple[str, Tensor, Tensor]] = []

            def note(name: str, thing: Any) -> None:
                each_tensor(thing, lambda tensor: copies.append((name, tensor, tensor.detach().clone())) or tensor)
                if isinstance(thing, nn.Module):
                    thing.register_forward_hook(lambda module, args, outputs: note("the model's outputs", outputs))

            for name, thing in inspect.signature(run).bind(*args, **kwargs).arguments.items():
                note(name, thing)
            try:
                return fn(*args, **kwargs)
            finally:
                written.extend(n for n, now, old in copies if not torch.equal(now.nan_to_num(), old.nan_to_num()))

        return run

    return wrap


def each_tensor(thing: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """The same tensor, Tokens, mapping or list with every tensor changed; anything else as it is."""
    if isinstance(thing, Tensor):
        return change(thing)
    if isinstance(thing, Tokens):
        return thing.replace(**{name: change(value) for name, value in thing.fields().items()})
    if isinstance(thing, Mapping):
        return type(thing)(**{name: each_tensor(value, change) for name, value in thing.items()})
    if type(thing) in (list, tuple):
        return type(thing)(each_tensor(value, change) for value in thing)
    return thing
