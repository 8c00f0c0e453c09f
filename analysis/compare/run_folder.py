"""The run folder belongs to one configuration, and to one process at a time: to all others it is refused."""

import hashlib
import json
import platform
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

import qlens
from qlens import analysis, variants
from qlens.core.errors import InputError, brief
from qlens.core.files import make_folder, read_json, refusal, user_path, write_json

LOCK = ".lock"
PACKAGES = ("qlens-sft", "torch", "transformers", "numpy", "scipy")


def code() -> str:
    """A digest of all of qlens' own code: results of one state of it never mix with those of another."""
    roots = {Path(place) for package in (qlens, variants, analysis) for place in package.__path__}
    files = {file.resolve() for root in roots for file in root.rglob("*.py")}
    digest = hashlib.sha256()
    for file in sorted(files, key=lambda file: (file.parent.name, file.name)):
        digest.update(file.name.encode() + file.read_bytes())
    return digest.hexdigest()[:16]


def versions() -> dict[str, str]:
    """Of Python and of the packages that results depend on."""
    return {"python": platform.python_version()} | {name: version(name) for name in PACKAGES}


def default_folder(kind: str, config: Mapping[str, Any]) -> Path:
    """Where a comparison goes without ``out``: a name from its configuration, so that the same call finds it again."""
    return user_path("runs", "out") / f"{kind}-{hashlib.sha256(json.dumps(config).encode()).hexdigest()[:10]}"


@contextmanager
def claimed(folder: Path, config: Mapping[str, Any]) -> Iterator[None]:
    """Alone in a run folder of this configuration; a process that dies lets go.

    Raises:
        InputError: it belongs to another configuration or version (the first differing key is named), is none, or
            another process is at work in it.
    """
    check(folder, config)  # before anything is written into a stranger's folder
    make_folder(folder)
    lock = FileLock(folder / LOCK)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise InputError(f"out: another process is at work in {folder}; wait for it, or give another folder") from None
    except OSError as error:
        raise refusal("out", folder, error) from error
    try:
        check(folder, config)  # again: another process may have claimed it in between
        if not (folder / "config.json").is_file():
            write_json(folder / "config.json", config)
        for leftover in folder.rglob(".*.partial"):  # of a process that was killed while writing
            if leftover.is_file():
                leftover.unlink()
        yield
    finally:
        lock.release()


def check(folder: Path, config: Mapping[str, Any]) -> None:
    """Whether a folder may be used for this configuration.

    Raises:
        InputError: it belongs to another configuration or version (the first differing key is named), or is none.
    """
    path = folder / "config.json"
    if folder.exists() and not folder.is_dir():
        raise InputError(f"out: {folder} is a file, not a folder")
    if path.is_file():
        before = read_config(path)
        if difference := _difference({k: v for k, v in before.items() if k != "noted"}, config):
            raise InputError(f"out: {folder} is of another configuration: {difference}; give another folder")
    elif folder.is_dir() and any(each.name != LOCK and not each.name.endswith(".partial") for each in folder.iterdir()):
        raise InputError(f"out: {folder} holds files but no config.json, so it is no run folder; give another folder")


def read_config(path: Path, keys: Sequence[str] = ()) -> dict[str, Any]:
    """The configuration of a run folder; each of ``keys`` must hold an object that is not empty.

    Raises:
        InputError: the file is damaged.
    """
    found = read_json(path)
    if not isinstance(found, dict):
        raise InputError(f"{path} is damaged: it holds {brief(found)}; give another folder, or remove this one")
    if wrong := [key for key in keys if not isinstance(found.get(key), dict) or not found[key]]:
        raise InputError(f"{path} is damaged: {wrong[0]} is {brief(found.get(wrong[0]))}")
    return found


def _difference(before: Any, now: Any, key: str = "") -> str:
    """The first key at which two configurations differ, with both values; of files, the one that has changed."""
    if isinstance(before, dict) and isinstance(now, dict):
        if key == "files":
            return _changed(before, now)
        for name in dict.fromkeys([*now, *before]):
            inner = f"{key}.{name}" if key else name
            absent: Any = {} if name == "files" else "not there"
            if found := _difference(before.get(name, absent), now.get(name, absent), inner):
                return found
        return ""
    if before == now:
        return ""
    if key == "code":
        return f"it was made by another state of qlens' own code (code was {_brief(before)}, now {_brief(now)})"
    return f"{key} was {_brief(before)}, now {_brief(now)}"


def _changed(before: dict[str, Any], now: dict[str, Any]) -> str:
    """The first file whose content is another, or that is there only on one side."""
    for name in dict.fromkeys([*now, *before]):
        if before.get(name) != now.get(name):
            how = "is new" if name not in before else "is gone" if name not in now else "has changed since"
            return f"the file {name} {how}"
    return ""


def _brief(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else text[:57] + "..."
