"""Deprecation: old names of modules, attributes, arguments and values, with a warning that names the new ones.

``columns`` serves the old names of a frame's columns; it imports pandas.
"""

import functools
import importlib
import importlib.abc
import importlib.util
import sys
import warnings
from collections.abc import Callable, Mapping
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

MODULES = {
    "qlens.distances": "qlens.lens.equivalences",
    "qlens.errors": "qlens.core.errors",
    "qlens.fitting": "qlens.training.fitting",
    "qlens.heads": "qlens.engine.heads",
    "qlens.params": "qlens.registry.params",
    "qlens.sources": "qlens.data.models",
    "qlens.target": "qlens.core.target",
    "qlens.tokens": "qlens.core.tokens",
    "qlens.variant": "qlens.registry",
    "qlens.watch": "qlens.training.watch",
    "qlens.analysis.view": "qlens.analysis.token_view.token_view",
}  # the modules that the README and the notebooks imported from


def warn(old: str, new: str = "", level: int = 3) -> None:
    """Warn at the line that uses it that ``old`` is now called ``new``, or without a new name that it has no effect."""
    advice = f"is deprecated; write {new}" if new else "has no effect any more; leave it out"
    warnings.warn(f"{old} {advice}", DeprecationWarning, stacklevel=level)


def renamed_arguments(**names: str) -> Callable[[Callable], Callable]:
    """Decorator: a function that also takes arguments by their old names.

    Args:
        names: the new name of each old one.

    Returns:
        a decorator. The function that it returns warns for each old name.

    Raises:
        TypeError: on a call with the old and the new name of one argument.

    Example:
        >>> @renamed_arguments(losses="variants")
        ... def draw(variants): return variants
        >>> draw(["sft"])
        ['sft']
    """

    def decorate(fn: Callable) -> Callable:
        @functools.wraps(fn)
        def call(*args: Any, **kwargs: Any) -> Any:
            for old in names.keys() & kwargs.keys():
                new = names[old]
                if new in kwargs:
                    raise TypeError(
                        f"{fn.__name__}() takes {new}= or its old name {old}=, not both; write {new}= alone"
                    )
                warn(f"{fn.__name__}({old}=)", f"{new}=")
                kwargs[new] = kwargs.pop(old)
            return fn(*args, **kwargs)

        return call

    return decorate


def without_effect(*names: str) -> Callable[[Callable], Callable]:
    """Decorator: a function that also takes arguments of earlier versions, and ignores them with a warning.

    Args:
        names: of the arguments.

    Example:
        >>> @without_effect("colors")
        ... def draw(variants): return variants
        >>> draw(["sft"])
        ['sft']
    """

    def decorate(fn: Callable) -> Callable:
        @functools.wraps(fn)
        def call(*args: Any, **kwargs: Any) -> Any:
            for name in [name for name in names if name in kwargs]:
                kwargs.pop(name)
                warn(f"{fn.__name__}({name}=)")
            return fn(*args, **kwargs)

        return call

    return decorate


def renamed_value(argument: str, value: str, names: Mapping[str, str], level: int = 4) -> str:
    """The value of an argument, the new one for an old one with a warning.

    Args:
        argument: its name.
        value: what it was called with.
        names: the new value of each old one.
        level: 4 warns at the call of the function that asks, 5 at that of a decorated one.

    Example:
        >>> renamed_value("show", "kl", {"trust": "label_weight"})
        'kl'
    """
    if value in names:
        warn(f"{argument}={value!r}", f"{argument}={names[value]!r}", level)
    return names.get(value, value)


def renamed_attributes(module: str, names: Mapping[str, str]) -> Callable[[str], Any]:
    """A module's ``__getattr__`` that serves old names.

    Args:
        module: the module's ``__name__``.
        names: the new place of each old name, "module.attribute", or the attribute alone where it is in this module.

    Example:
        >>> serve = renamed_attributes("qlens.core.scales", {"old": "tolerance"})
        >>> __getattr__ = serve  # in the module itself
    """

    def get(name: str) -> Any:
        if name not in names:
            raise AttributeError(f"module {module!r} has no attribute {name!r}")
        place, _, attribute = names[name].rpartition(".")
        warn(f"{module}.{name}", f"{place or module}.{attribute}")
        return getattr(importlib.import_module(place or module), attribute)

    return get


class _OldModule(ModuleType):
    """A module under its old name. ``qlens.distances`` is a function too, which the import of the old module hides."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return getattr(self, self.__name__.rpartition(".")[2])(*args, **kwargs)


class _OldModules(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Imports of modules by their old names."""

    def find_spec(self, fullname: str, path: Any = None, target: ModuleType | None = None) -> ModuleSpec | None:
        """A spec for an old name of ``MODULES``; None for every other name."""
        return importlib.util.spec_from_loader(fullname, self) if fullname in MODULES else None

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        """A module that hands every attribute of the new one on."""
        warn(spec.name, MODULES[spec.name])
        return _OldModule(spec.name, f"The old name of {MODULES[spec.name]}.")

    def exec_module(self, module: ModuleType) -> None:
        """Fill the module with what the new one holds."""
        new = importlib.import_module(MODULES[module.__name__])
        module.__dict__.update({name: value for name, value in vars(new).items() if not name.startswith("__")})
        function = module.__dict__.get(module.__name__.rpartition(".")[2])
        module.__doc__ = getattr(function, "__doc__", None) or module.__doc__


def serve_old_modules() -> None:
    """Let modules be imported by their old names; every other finder is asked first."""
    if not any(isinstance(finder, _OldModules) for finder in sys.meta_path):
        sys.meta_path.append(_OldModules())
