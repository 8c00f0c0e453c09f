"""Run folders: one configuration each, and one process at a time."""

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
    """A digest of the code of qlens, so that a run folder never mixes two versions."""
    roots = {Path(place) for package in (qlens, variants, analysis) for place in package.__path__}
    files = {file.resolve() for root in roots for file in root.rglob("*.py")}
    digest = hashlib.sha256()
    for file in sorted(files, key=lambda file: (file.parent.name, file.name)):
        digest.update(file.name.encode() + file.read_bytes())
    return digest.hexdigest()[:16]


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that results depend on."""
    return {"python": platform.python_version()} | {name: version(name) for name in PACKAGES}


def default_folder(kind: str, config: Mapping[str, Any]) -> Path:
    """The run folder without ``out``: its name follows from the configuration, so that the same call resumes."""
    return user_path("runs", "out") / f"{kind}-{hashlib.sha256(json.dumps(config).encode()).hexdigest()[:10]}"


@contextmanager
def locked(folder: Path, config: Mapping[str, Any], name: str = "out") -> Iterator[None]:
    """Hold an exclusive lock on a run folder of this configuration; it is released when the process ends.

    ``name`` is that of the argument in messages.

    Raises:
        InputError: the folder belongs to another configuration or version (the first differing key is named), is no
            run folder, or is in use by another process.
    """
    check(folder, config, name)  # before anything is written
    make_folder(folder, name)
    lock = FileLock(folder / LOCK)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise InputError(f"{name}: another process is using {folder}; wait for it, or give another folder") from None
    except OSError as error:
        raise refusal(name, folder, error) from error
    try:
        check(folder, config, name)  # again, for another process may have written it in between
        if not (folder / "config.json").is_file():
            write_json(folder / "config.json", config)
        for partial in folder.rglob(".*.partial"):  # of a process that was killed while writing
            if partial.is_file():
                partial.unlink()
        yield
    finally:
        lock.release()


def check(folder: Path, config: Mapping[str, Any], name: str = "out") -> None:
    """Check that a folder is new, or a run folder of this configuration.

    Raises:
        InputError: it belongs to another configuration or version (the first differing key is named), or is no run folder.
    """
    path = folder / "config.json"
    if folder.exists() and not folder.is_dir():
        raise InputError(f"{name}: {folder} is a file, not a folder")
    if path.is_file():
        before = read_config(path)
        if difference := _difference({k: v for k, v in before.items() if k != "noted"}, config):
            raise InputError(f"{name}: {folder} is of another configuration: {difference}; give another folder")
    elif folder.is_dir() and any(each.name != LOCK and not each.name.endswith(".partial") for each in folder.iterdir()):
        raise InputError(
            f"{name}: {folder} holds files but no config.json, so it is no run folder; give another folder"
        )


def read_config(path: Path, keys: Sequence[str] = ()) -> dict[str, Any]:
    """The configuration of a run folder; each of ``keys`` must hold a non-empty object.

    Raises:
        InputError: the file is damaged.
    """
    config = read_json(path)
    if not isinstance(config, dict):
        raise InputError(f"{path} is damaged: it holds {brief(config)}; give another folder, or remove this one")
    if wrong := [key for key in keys if not isinstance(config.get(key), dict) or not config[key]]:
        raise InputError(f"{path} is damaged: {wrong[0]} is {brief(config.get(wrong[0]))}")
    return config


def _difference(before: Any, now: Any, key: str = "") -> str:
    """The first key at which two configurations differ, with both values; for files, the changed one."""
    if isinstance(before, dict) and isinstance(now, dict):
        if key == "files":
            return _changed(before, now)
        for name in dict.fromkeys([*now, *before]):
            inner = f"{key}.{name}" if key else name
            absent: Any = {} if name == "files" else "missing"
            if difference := _difference(before.get(name, absent), now.get(name, absent), inner):
                return difference
        return ""
    if before == now:
        return ""
    if key == "code":
        return f"it was made by another version of qlens' code (code was {_brief(before)}, now {_brief(now)})"
    return f"{key} was {_brief(before)}, now {_brief(now)}"


def _changed(before: dict[str, Any], now: dict[str, Any]) -> str:
    """The first file whose content has changed, or that only one side has."""
    for name in dict.fromkeys([*now, *before]):
        if before.get(name) != now.get(name):
            how = "is new" if name not in before else "is gone" if name not in now else "has changed since"
            return f"the file {name} {how}"
    return ""


def _brief(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else text[:57] + "..."
