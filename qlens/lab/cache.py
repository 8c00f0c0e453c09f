"""Cache of the lab: folders that are complete or absent, built once however many processes ask."""

import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock

from qlens.core.errors import InputError

SEAL = "seal.json"


def root() -> Path:
    """The cache folder: $QLENS_CACHE; else $XDG_CACHE_HOME/qlens or ~/.cache/qlens, whichever exists first."""
    if chosen := os.environ.get("QLENS_CACHE"):
        return Path(chosen).expanduser()
    xdg = Path(os.environ.get("XDG_CACHE_HOME", ""))
    folders = [*([xdg / "qlens"] if xdg.is_absolute() else []), Path("~/.cache/qlens").expanduser()]
    return next((folder for folder in folders if folder.is_dir()), folders[0])


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold an exclusive lock on a folder, released when the process ends; unfinished parts are removed.

    Raises:
        InputError: the folder cannot be created or written.
    """
    lock = FileLock(folder / "lock")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock.acquire()
    except OSError as error:
        raise InputError(f"cache folder {str(root())!r} cannot be used ({error}): set QLENS_CACHE to another") from None
    try:
        for partial in folder.glob("*.partial"):
            discard(partial)
        yield
    finally:
        lock.release()


def whole(folder: Path) -> bool:
    """Whether a part has exactly the files that it was sealed with, byte by byte."""
    try:
        seal = json.loads((folder / SEAL).read_text(encoding="utf-8"))
        return seal == _digests(folder)
    except (OSError, ValueError):  # missing, unreadable or no JSON
        return False


@contextmanager
def sealed(folder: Path) -> Iterator[Path]:
    """A folder to fill, renamed to its place when it is complete."""
    partial = folder.with_name(folder.name + ".partial")
    partial.mkdir()
    yield partial
    (partial / SEAL).write_text(json.dumps(_digests(partial)), encoding="utf-8")
    partial.rename(folder)


def discard(folder: Path) -> None:
    """Remove a folder if it exists; its seal first, so that a half-removed folder is never used."""
    (folder / SEAL).unlink(missing_ok=True)
    if folder.exists():
        shutil.rmtree(folder)


def _digests(folder: Path) -> dict[str, str]:
    files = sorted(path for path in folder.iterdir() if path.name != SEAL)
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in files}
