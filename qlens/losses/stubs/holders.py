"""Losses that are classes or objects: their instances, and calls with another model in place of the one they hold."""

import functools
import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from qlens.core.errors import InputError
from qlens.losses.layout.names import ROLE
from qlens.losses.layout.signature import name_of
from qlens.losses.user_code import first_line, user_errors

WAITING = (inspect.iscoroutinefunction, inspect.isasyncgenfunction)
STEPS = ("batch_idx", "batch_index", "batch_nb", "step", "global_step", "dataloader_idx")
"""Parameters of a training step that count batches; they are passed 0."""


def entry_of(thing: Any) -> Callable:
    """The function that computes the loss: compute_loss or training_step of an object that has one, else the object."""
    if inspect.isroutine(thing):
        return thing
    return getattr(thing, "compute_loss", None) or getattr(thing, "training_step", None) or thing


def with_model(entry: Callable) -> Callable:
    """The same function, or f(model, ...) if it runs a model that its object holds, which is replaced at every call.

    Raises:
        InputError: it is a coroutine or a generator; or it takes a batch alone, as a training step, and its object holds no
            model by a name of the field.
    """
    if any(is_kind(entry) for is_kind in (*WAITING, inspect.isgeneratorfunction)):
        raise InputError(
            f"{name_of(entry)} returns no loss when it is called: write def and return loss, with no async or yield"
        )
    owner = getattr(entry, "__self__", entry)
    if inspect.isfunction(owner) or inspect.isclass(owner) or inspect.isbuiltin(owner):
        return entry
    run = entry.forward if isinstance(entry, nn.Module) else entry
    try:
        params = list(inspect.signature(run).parameters.values())
    except (TypeError, ValueError):
        return entry
    roles = [ROLE.get(p.name.lower()) for p in params if p.default is p.empty]
    step = getattr(entry, "__name__", "") == "training_step"
    attributes = _student_attributes(owner, step)
    if {"model", "logits", "outputs", "log probs", "tokens"} & set(roles) or not (step or "batch" in roles):
        return entry
    if not attributes:
        if not step:
            return entry
        raise InputError(
            f"{type(owner).__name__}.training_step runs a model that qlens does not find: keep it as self.model, or write "
            "def loss(model, batch): ... with the same lines"
        )
    return _on_model(entry, owner, attributes, params)


def _student_attributes(owner: Any, step: bool) -> list[str]:
    """The names of the attributes that hold the student.

    The model of a training step may be None until training, or the only causal model under an unknown name.
    """
    own = {**getattr(owner, "__dict__", {}), **getattr(owner, "_modules", {})}
    students = {name: value for name, value in own.items() if ROLE.get(name.lower()) == "model"}
    known_names = [name for name, value in students.items() if isinstance(value, nn.Module) or (step and value is None)]
    unnamed = {name: value for name, value in own.items() if name.lower() not in ROLE}
    causal = [name for name, value in unnamed.items() if isinstance(value, nn.Module) and hasattr(value, "lm_head")]
    return known_names or (causal if step and len(causal) == 1 else [])


def _on_model(entry: Callable, owner: Any, attributes: list[str], params: list[inspect.Parameter]) -> Callable:
    steps = [p.name for p in params if p.name in STEPS and p.default is p.empty]
    first = inspect.Parameter("model", inspect.Parameter.POSITIONAL_OR_KEYWORD)
    parameters = [first, *(p for p in params if p.name not in steps)]

    @functools.wraps(entry.forward if isinstance(entry, nn.Module) else entry)
    def run(model: Any, *args: Any, **kwargs: Any) -> Any:
        before = {name: getattr(owner, name) for name in attributes}
        try:
            for name in attributes:
                setattr(owner, name, model)
            arguments = {p.name: value for p, value in zip(parameters[1:], args, strict=False)} | kwargs
            return entry(**arguments, **dict.fromkeys(steps, 0))
        finally:
            for name, value in before.items():
                setattr(owner, name, value)

    run.__signature__ = inspect.Signature(parameters)  # pyright: ignore[reportFunctionMemberAccess]
    run.__name__ = f"{type(owner).__name__}.{name_of(entry)}" if inspect.ismethod(entry) else type(owner).__name__
    return run


def _model_arguments(loss: type) -> dict[str, Any]:
    """A stub model for every parameter of a class that takes a model."""
    try:
        params = inspect.signature(loss).parameters.values()
    except (TypeError, ValueError):
        return {}
    model_names = [p.name for p in params if ROLE.get(p.name.lower()) == "model" and p.default in (p.empty, None)]
    if not model_names:
        return {}
    from qlens.losses.stubs.stub_model import StubModel

    return {name: StubModel(torch.zeros(1, 2, 4)) for name in model_names}


def is_trainer(loss: type) -> bool:
    """Whether a class is a Trainer of transformers."""
    return any(base.__name__ == "Trainer" and base.__module__.startswith("transformers") for base in loss.__mro__)


def built(loss: type) -> Callable:
    """An instance of a loss class, with None for the arguments without a default.

    Raises:
        InputError: it cannot be built so, or an instance cannot be called.
    """
    try:
        required = [p.name for p in inspect.signature(loss).parameters.values() if _bare(p)]
    except (ValueError, TypeError):
        required = []
    line = f"{loss.__name__}({', '.join(f'{name}=...' for name in required)})"
    with user_errors(loss.__name__):
        try:
            instance = loss(**dict.fromkeys(required) | _model_arguments(loss))
        except Exception as error:
            raise InputError(
                f"{loss.__name__} cannot be built without arguments ({type(error).__name__}: {first_line(error)}): give an "
                f"instance, {line}; in a file: loss = {line}, then FILE.py:loss"
            ) from error
    if not callable(entry_of(instance)):
        raise InputError(f"{loss.__name__} has no __call__: a loss class is called with logits and labels")
    return instance


def _bare(p: inspect.Parameter) -> bool:
    return p.default is p.empty and p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)
