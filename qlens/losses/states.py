"""The state that a user's function keeps between calls, read and restored so that further calls change nothing."""

import functools
import random
import sys
import types
from collections import deque
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from qlens.core.errors import InputError

COPIED = 2**20  # entries of a tensor or array that are copied; a larger tensor must not be changed in place
LONGEST = 10_000  # entries of a container that is looked into
LIBRARIES = {"torch", "numpy", "transformers", "qlens", "scipy", "peft", "trl", *sys.stdlib_module_names}
GENERATORS = (torch.Generator, np.random.Generator, np.random.RandomState, random.Random)
Snapshot = list[list[Any]]  # of every kind of holder


class State:
    """The state of some functions: attributes, buffers, closures, globals that they name, containers, random generators.

    Objects of libraries and models of transformers count as constant. To restore a tensor, its holder gets a copy, so that no
    tensor of a graph is written on; tensors that require a gradient are not copied.

    Args:
        functions: functions, modules, methods or partials.
    """

    def __init__(self, functions: Iterable[Callable]):
        self._dicts: list[tuple[dict[str, Any], tuple[str, ...] | None]] = []
        self._lists: list[Any] = []
        self._cells: list[types.CellType] = []
        self._generators: list[Any] = []
        self._tensors: list[Tensor] = []
        self._objects: dict[int, Any] = {}  # objects by id, kept so that no id is given twice
        for function in functions:
            self._reach(function)

    def read(self) -> Snapshot:
        """A snapshot of the state, by reference; of generators their state."""
        dicts = [{k: d[k] for k in (d if keys is None else keys) if k in d} for d, keys in self._dicts]
        cells = [_content(cell) for cell in self._cells]
        return [dicts, [list(each) for each in self._lists], cells, [_state(each) for each in self._generators]]

    def write(self, snapshot: Snapshot) -> None:
        """Restore a snapshot."""
        dicts, lists, contents, states = snapshot
        for (d, keys), values in zip(self._dicts, dicts, strict=True):
            for name in [name for name in (list(d) if keys is None else keys) if name in d and name not in values]:
                del d[name]
            d.update({name: value for name, value in values.items() if d.get(name, d) is not value})
        for each, values in zip(self._lists, lists, strict=True):
            if len(each) != len(values) or any(one is not other for one, other in zip(each, values, strict=True)):
                each.clear()
                (each.update if isinstance(each, set) else each.extend)(values)
        for cell, content in zip(self._cells, contents, strict=True):
            if content is not cell and _content(cell) is not content:
                cell.cell_contents = content
        for generator, state in zip(self._generators, states, strict=True):
            _set_state(generator, state)

    def fixed(self) -> list[tuple[Tensor, int]]:
        """The tensors that can be neither copied nor replaced, with their version counters."""
        return [(tensor, tensor._version) for tensor in self._tensors if not tensor.is_inference()]

    def generator_states(self) -> list[Any]:
        """The states of the random generators, as comparable values."""
        states = [_state(each) for each in self._generators]
        return [each.numpy().tobytes() if isinstance(each, Tensor) else repr(each) for each in states]

    def shapes(self) -> list[tuple[int, ...]]:
        """The shapes of all tensors and arrays, and the lengths of lists and tuples."""
        tensors = [tuple(each.shape) for each in self._objects.values() if isinstance(each, Tensor | np.ndarray)]
        return tensors + [(len(each),) for each in self._objects.values() if isinstance(each, list | tuple)]

    def _reach(self, value: Any, replaced: bool = False) -> None:
        """Add a value and all that it holds; ``replaced``: whether its holder can hold a copy instead."""
        if id(value) in self._objects or value is None:
            return
        self._objects[id(value)] = value
        if isinstance(value, Tensor):
            if not replaced or value.numel() > COPIED:
                self._tensors.append(value)
        elif isinstance(value, GENERATORS):
            self._generators.append(value)
        elif isinstance(value, functools.partial):
            self._each([value.func, *value.args, *value.keywords.values()])
        elif isinstance(value, types.MethodType):
            self._each([value.__self__, value.__func__])
        elif isinstance(value, types.FunctionType):
            self._function(value)
        elif type(value) in (list, deque, set, dict, tuple):
            if len(value) <= LONGEST:
                self._container(value)
        elif isinstance(value, nn.Module):
            if not _of_library(value, {"transformers"}):
                self._dict(value._buffers)
                self._dict(
                    value.__dict__, [k for k in value.__dict__ if k not in ("_buffers", "_modules", "_parameters")]
                )
                self._each(value._modules.values())
        elif hasattr(value, "__dict__") and not isinstance(value, type | types.ModuleType) and not _of_library(value):
            self._dict(value.__dict__)

    def _container(self, value: Any) -> None:
        if isinstance(value, dict):
            self._dict(value)
        elif isinstance(value, tuple):
            self._each(value)
        else:
            self._lists.append(value)
            self._each(value, replaced=True)

    def _function(self, function: types.FunctionType) -> None:
        if _of_library(function):
            return
        self._dict(function.__dict__)
        self._each([*(function.__defaults__ or ()), *(function.__kwdefaults__ or {}).values()])
        for cell in function.__closure__ or ():
            if id(cell) not in self._objects:
                self._objects[id(cell)] = cell
                self._cells.append(cell)
                self._reach(_content(cell) if _content(cell) is not cell else None, replaced=True)
        names = tuple(name for name in names_in(function.__code__) if name in function.__globals__)
        variables = tuple(name for name in names if not isinstance(function.__globals__[name], types.ModuleType | type))
        self._dict(function.__globals__, variables)

    def _dict(self, d: dict[str, Any], keys: Iterable[str] | None = None) -> None:
        self._dicts.append((d, None if keys is None else tuple(keys)))
        self._each([d[k] for k in (d if keys is None else keys)], replaced=True)

    def _each(self, values: Iterable[Any], replaced: bool = False) -> None:
        for value in list(values):
            self._reach(value, replaced)


def copied(snapshot: Snapshot) -> Snapshot:
    """A snapshot with copies of its tensors and arrays, each copied once, and all else by reference."""
    copies: dict[int, Any] = {}

    def copy(value: Any) -> Any:
        if isinstance(value, Tensor | np.ndarray) and id(value) not in copies:
            copies[id(value)] = _copy(value)
        return copies.get(id(value), value)

    dicts, lists, contents, states = snapshot
    return [
        [{k: copy(v) for k, v in each.items()} if isinstance(each, dict) else each for each in dicts],
        [[copy(v) for v in each] for each in lists],
        [copy(content) for content in contents],
        states,
    ]


def _copy(value: Tensor | np.ndarray) -> Any:
    if isinstance(value, np.ndarray):
        return value.copy() if value.size <= COPIED else value
    return value.detach().clone() if not value.requires_grad and value.numel() <= COPIED else value


def check_unchanged(versions: list[tuple[Tensor, int]]) -> None:
    """Check that tensors have their former versions.

    Raises:
        InputError: one was changed in place; its shape is named.
    """
    for tensor, version in versions:
        if tensor._version != version:
            raise InputError(
                f"the loss changes a tensor of shape {tuple(tensor.shape)} in place that it keeps from call to call, and qlens "
                f"has to call it once more to look at it: keep it as an attribute, self.x, of at most {COPIED} numbers, or set a "
                "new tensor instead of writing on it"
            )


def _content(cell: types.CellType) -> Any:
    """The content of a closure's cell; the cell itself if it is empty."""
    try:
        return cell.cell_contents
    except ValueError:
        return cell


@functools.lru_cache(maxsize=256)
def names_in(code: types.CodeType) -> tuple[str, ...]:
    """The global names that a function's code, and that of its inner functions, uses."""
    inner = [name for const in code.co_consts if isinstance(const, types.CodeType) for name in names_in(const)]
    return tuple(dict.fromkeys([*code.co_names, *inner]))


def module_of(value: Any) -> str:
    """The top-level module that a function, or the class of a value, is from."""
    owner = value if isinstance(value, types.FunctionType) else type(value)
    return str(getattr(owner, "__module__", "")).partition(".")[0]


def _of_library(value: Any, libraries: set[str] | None = None) -> bool:
    return module_of(value) in (libraries or LIBRARIES)


def _state(generator: Any) -> Any:
    if isinstance(generator, torch.Generator | np.random.RandomState):
        return generator.get_state()
    return generator.getstate() if isinstance(generator, random.Random) else generator.bit_generator.state


def _set_state(generator: Any, state: Any) -> None:
    if isinstance(generator, torch.Generator | np.random.RandomState):
        generator.set_state(state)
    elif isinstance(generator, random.Random):
        generator.setstate(state)
    else:
        generator.bit_generator.state = state
