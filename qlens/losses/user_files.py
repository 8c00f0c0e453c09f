"""Functions in users' files, FILE.py:FUNCTION."""

import contextlib
import importlib.util
import sys
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

from qlens.core.errors import InputError, UnknownName, brief
from qlens.core.files import user_path


def function(name: str) -> Callable:
    """The function or class FUNCTION of FILE.py, for ``name`` = "FILE.py:FUNCTION".

    Raises:
        UnknownName: no such file, or no such function in it (near names are suggested).
        InputError: the file cannot be run; its exception is named.
    """
    file, _, function_name = name.rpartition(":")
    path = user_path(file, "file")
    if not path.is_file():
        raise UnknownName(f"{brief(name)}: there is no file {brief(file)[1:-1]}")
    module = vars(_load(path.resolve()))
    if not callable(module.get(function_name)):
        own = [k for k, v in module.items() if callable(v) and getattr(v, "__module__", None) == module["__name__"]]
        raise UnknownName.among(f"function in {file}", function_name, own)
    return module[function_name]


def _load(path: Path) -> Any:
    """The module of a user's file, executed once per version of the file."""
    name, version = f"qlens_user_{zlib.crc32(str(path).encode()):08x}", path.stat().st_mtime_ns
    if getattr(sys.modules.get(name), "__version_read__", None) != version:
        module_spec = importlib.util.spec_from_file_location(name, path)
        assert module_spec is not None and module_spec.loader is not None
        module = importlib.util.module_from_spec(module_spec)
        sys.modules[name] = module
        try:
            with contextlib.redirect_stdout(sys.stderr):  # standard output holds the answer alone
                module_spec.loader.exec_module(module)
        except KeyboardInterrupt:
            raise
        except BaseException as error:  # SystemExit too: a script that ends itself has not been checked
            sys.modules.pop(name, None)
            if isinstance(error, SystemExit):
                reason = (
                    f"it ends the program (SystemExit: {error.code}); put what it runs under if __name__ == '__main__'"
                )
            else:
                reason = f"{type(error).__name__}: {error}"
            raise InputError(f"{path.name} could not be run: {reason}") from error
        module.__dict__["__version_read__"] = version
    return sys.modules[name]
