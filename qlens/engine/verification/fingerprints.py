"""Fingerprints of what a function's result may depend on beside its arguments."""

import enum
import functools
import inspect
import types
from collections import deque
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from qlens.losses.states import LIBRARIES, LONGEST, module_of, names_in

PLAIN = (bool, int, float, complex, str, bytes, type(None), torch.dtype, torch.device, enum.Enum)
SMALL = 4096  # entries of a tensor or array that are compared by value; of a larger one, its version
DEEPEST = 8  # attributes, entries and calls followed, one in the other


def fingerprint(functions: Iterable[Callable]) -> tuple[Any, ...]:
    """A value that changes with anything that users' functions read beside their arguments.

    It covers closures, defaults, attributes, containers, and the globals that a function names, with the user's functions
    that it calls; of modules, classes and libraries' objects, such as a Trainer, the attributes whose names are in the
    function's code. Random generators are left out: a draw does not change the method.

    Example:
        >>> class Warmup:
        ...     on = False
        ...
        ...     def __call__(self, logits, labels):
        ...         return logits.sum() if self.on else logits.mean()
        >>> Warmup.__module__ = Warmup.__call__.__module__ = "my_losses"
        >>> loss = Warmup()
        >>> before = fingerprint([loss])
        >>> loss.on = True
        >>> fingerprint([loss]) == before
        False
    """
    reader = _Reader()
    for function in functions:
        reader.read(function, frozenset(), 0)
    return tuple(reader.values)


class _Reader:
    def __init__(self):
        self.values: list[Any] = []
        self.visited: dict[tuple[int, frozenset[str]], Any] = {}  # by id; the values are stored so that no id is reused

    def read(self, value: Any, names: frozenset[str], depth: int) -> None:
        """Add a value and its contents; ``names`` are the attributes that the functions read so far name."""
        if isinstance(value, PLAIN):
            self.values.append(value if value == value else "nan")
            return
        if depth > DEEPEST or (id(value), names) in self.visited:
            return
        self.visited[id(value), names] = value
        if isinstance(value, Tensor):
            self.values.append(_tensor(value))
        elif isinstance(value, np.ndarray):
            self.values.append(value.tobytes() if value.size <= SMALL else id(value))
        elif isinstance(value, functools.partial):
            self._each([value.func, *value.args, *value.keywords.values()], names, depth)
        elif isinstance(value, types.MethodType):
            own = names | _named(value.__func__)
            self._each([value.__func__, value.__self__], own, depth)
        elif isinstance(value, types.FunctionType):
            self._function(value, names, depth)
        elif isinstance(value, list | tuple | set | frozenset | deque | dict):
            self.values.append(len(value))
            if len(value) <= LONGEST:
                parts = [*value, *value.values()] if isinstance(value, dict) else value
                self._each(parts, names, depth)
        else:
            self._object(value, names, depth)

    def _each(self, values: Iterable[Any], names: frozenset[str], depth: int) -> None:
        for value in list(values):
            self.read(value, names, depth + 1)

    def _function(self, function: types.FunctionType, names: frozenset[str], depth: int) -> None:
        if module_of(function) in LIBRARIES:
            return
        names = names | _named(function)
        self.values.append(id(function.__code__))
        self._each([*(function.__defaults__ or ()), *(function.__kwdefaults__ or {}).values()], names, depth)
        self._each([vars(function)], names, depth)
        for cell in function.__closure__ or ():
            try:
                self.read(cell.cell_contents, names, depth + 1)
            except ValueError:  # an empty cell
                self.values.append(None)
        self._each([function.__globals__[name] for name in sorted(names & function.__globals__.keys())], names, depth)

    def _object(self, value: Any, names: frozenset[str], depth: int) -> None:
        """An object's attributes: all of a user's object, the named ones of a library's."""
        whole = not isinstance(value, type | types.ModuleType) and module_of(value) not in LIBRARIES
        if isinstance(value, types.ModuleType) and value.__name__.partition(".")[0] in LIBRARIES:
            return
        self.values.append(id(value))
        if not isinstance(value, type | types.ModuleType):
            self._class(type(value), names, depth)
        attributes = getattr(value, "__dict__", None)
        if attributes is None:
            return
        read = sorted(name for name in attributes if isinstance(name, str) and (whole or name in names))
        if isinstance(value, nn.Module):
            read = [name for name in read if name not in ("_parameters", "_modules", "_buffers")]
            parts = (dict(value._buffers), dict(value._modules)) if whole else ()
            self._each(parts, names, depth)
        self._each([attributes[name] for name in read], names, depth)

    def _class(self, kind: type, names: frozenset[str], depth: int) -> None:
        """The named attributes of an object's class and its bases, as far as a user wrote them."""
        for each in kind.__mro__:
            if each.__module__.partition(".")[0] not in LIBRARIES | {"builtins"}:
                called = {"forward", "__call__"} if issubclass(each, nn.Module) else {"__call__"}
                members = [vars(each)[name] for name in sorted((names | called) & vars(each).keys())]
                self._each([getattr(m, "__func__", getattr(m, "fget", None) or m) for m in members], names, depth)


def _tensor(value: Tensor) -> Any:
    if value.is_inference() or value.is_meta or value.layout != torch.strided:
        return id(value)
    if value.numel() <= SMALL and not value.requires_grad:
        return str(value.dtype), value.detach().cpu().reshape(-1).view(torch.uint8).numpy().tobytes()
    return id(value), value._version


def _named(function: Any) -> frozenset[str]:
    """The names in the code of a function and of the functions in it."""
    code = getattr(inspect.unwrap(function), "__code__", None)
    return frozenset() if code is None else frozenset(names_in(code))
