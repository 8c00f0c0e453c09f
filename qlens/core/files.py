"""Files: paths from users, and atomic writes."""

import errno
import json
import os
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import Any

from qlens.core.errors import InputError, brief

ADVICE = {
    errno.ENOSPC: "the disk is full: free some space or name a place on another disk",
    errno.EDQUOT: "the quota is used up: free some space or name a place on another disk",
    errno.EFBIG: "the file would be larger than files may be here: name a place on another disk",
    errno.EROFS: "the file system is read-only: name another place",
    errno.EACCES: "there is no permission: name a place that you may use",
    errno.EPERM: "there is no permission: name a place that you may use",
    errno.ENAMETOOLONG: "the name is too long: give a shorter one",
    errno.ENOTDIR: "a part of the path is a file, not a folder: name another place",
    errno.EISDIR: "it is a folder, not a file: name a file",
    errno.EEXIST: "it is a file, not a folder: name another place",
    errno.ENOENT: "a folder of the path is missing and cannot be made: name another place",
    errno.ELOOP: "its links go in a circle: name another place",
}

_HERE: ContextVar[Path | None] = ContextVar("_HERE", default=None)  # what relative paths begin at, where that is fixed


@contextmanager
def from_here(folder: str | Path | None = None) -> Iterator[None]:
    """Resolve relative paths against a fixed folder, even if user code changes the working one; also a decorator.

    Args:
        folder: by default that of the enclosing block, or else the working folder.
    """
    token = _HERE.set(here() if folder is None else Path(folder))
    try:
        yield
    finally:
        _HERE.reset(token)


def here() -> Path:
    """The folder that relative paths are resolved against: that of ``from_here``, or else the working folder."""
    try:
        return _HERE.get() or Path.cwd()
    except OSError as error:
        raise InputError(f"the working folder is gone ({error.strerror}): change to another one") from error


def shown_path(path: Path) -> Path:
    """A path for a message, relative to ``here()`` if it lies below."""
    return path.relative_to(here()) if path.is_relative_to(here()) else path


def refusal(name: str, path: str | Path, error: OSError, what: str = "written") -> InputError:
    """The error for a path that cannot be used, with advice."""
    advice = ADVICE.get(error.errno or 0, error.strerror or str(error))
    return InputError(f"{name} {brief(str(shown_path(Path(path))))} cannot be {what}: {advice}")


def user_path(value: str | Path, name: str) -> Path:
    """A path from a user, absolute and with ``~`` expanded.

    Args:
        value: the path; a relative one is resolved against ``here()``.
        name: of the argument, for messages.

    Raises:
        InputError: it is empty, holds a NUL or characters that no file name has, or cannot be looked up at all.
    """
    if not isinstance(value, str | os.PathLike) or not str(value).strip():
        raise InputError(f"{name} must be a path, got {brief(value)}")
    text = str(value)
    if "\0" in text:
        raise InputError(f"{name} {brief(text)} holds a NUL character: no path has one")
    try:
        path = here() / Path(text).expanduser()
    except (RuntimeError, ValueError) as error:  # no such home
        raise InputError(f"{name} {brief(text)} is no path: {error}") from error
    try:
        path.lstat()
    except (FileNotFoundError, NotADirectoryError):  # the caller knows whether it must exist
        return path
    except OSError as error:
        raise refusal(name, text, error, "used") from error
    except ValueError as error:  # a surrogate in a name
        raise InputError(f"{name} {brief(text)} is no path: {error}") from error
    return path


def output_file(value: str | Path, name: str) -> Path:
    """A path to write a file to, whose folder exists and which is no folder or device itself.

    Raises:
        InputError: no such folder, a place that cannot be written to, a name too long, or a folder or device.
    """
    path = user_path(value, name)
    if not path.parent.is_dir():
        raise InputError(f"{name} {brief(str(shown_path(path)))}: there is no folder {shown_path(path.parent)}")
    if path.exists() and not path.is_file():
        raise InputError(f"{name} {brief(str(shown_path(path)))} is a folder or a device, not a file: name a file")
    if not os.access(path.parent, os.W_OK):
        raise refusal(name, path, PermissionError(errno.EACCES, ""))
    return path


def make_folder(path: Path, name: str = "out") -> Path:
    """The folder, created if it is missing.

    Raises:
        InputError: it cannot be made; the argument and the reason are named.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise refusal(name, path, error, "made a folder") from error
    return path


@contextmanager
def written(path: Path) -> Iterator[Path]:
    """A temporary path beside ``path``, renamed to it at the end of the block and removed after an error.

    The temporary name is unique, so that several processes or machines may write the same ``path``; the last one wins.

    Raises:
        InputError: the disk is full, the name too long, the folder read-only: any ``OSError``, with what to do about it.

    Example:
        >>> with written(Path("table.md")) as partial:  # doctest: +SKIP
        ...     partial.write_text("...")
    """
    stem = path.name.encode("utf-8", "backslashreplace")[:100].decode("utf-8", "ignore")  # names have 255 bytes at most
    partial = path.with_name(f".{stem}.{uuid.uuid4().hex}.partial")
    try:
        yield partial
        partial.replace(path)
    except OSError as error:
        raise refusal("file", path, error) from error
    finally:
        if os.path.lexists(partial):
            partial.unlink()


def write_text(path: Path, text: str) -> None:
    """Write a text file atomically; lone surrogates are written as escapes."""
    with written(path) as partial:
        partial.write_text(text, encoding="utf-8", errors="backslashreplace")


def write_json(path: Path, value: Any) -> None:
    """Write a JSON file atomically."""
    write_text(path, json.dumps(value, indent=1) + "\n")


def read_json(path: Path) -> Any:
    """The content of a JSON file.

    Raises:
        InputError: the file cannot be read or is no JSON.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise refusal("file", path, error, "read") from error
    except (ValueError, RecursionError) as error:  # UnicodeDecodeError and JSONDecodeError are ValueErrors
        raise InputError(f"{path} is damaged: it is no readable JSON ({type(error).__name__}: {error})") from error
