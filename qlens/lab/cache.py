"""The lab's cache: folders that are either whole or not there, made once however many processes ask."""

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
    """The cache folder: $QLENS_CACHE, else ~/.cache/qlens."""
    return Path(os.environ.get("QLENS_CACHE") or "~/.cache/qlens").expanduser()


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Alone with a folder among all processes; a process that dies lets go. Leftovers of such processes are removed.

    Raises:
        InputError: the folder cannot be made or written.
    """
    lock = FileLock(folder / "lock")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock.acquire()
    except OSError as error:
        raise InputError(f"cache folder {str(root())!r} cannot be used ({error}): set QLENS_CACHE to another") from None
    try:
        for leftover in folder.glob("*.partial"):
            discard(leftover)
        yield
    finally:
        lock.release()


def whole(folder: Path) -> bool:
    """Whether a part is there exactly as it was sealed: the same files, every byte."""
    try:
        seal = json.loads((folder / SEAL).read_text(encoding="utf-8"))
        return seal == _digests(folder)
    except (OSError, ValueError):  # not there, unreadable, or no JSON: not whole, so it is made again
        return False


@contextmanager
def sealed(folder: Path) -> Iterator[Path]:
    """A folder to fill, which takes its name, in one step, only when it is full."""
    partial = folder.with_name(folder.name + ".partial")
    partial.mkdir()
    yield partial
    (partial / SEAL).write_text(json.dumps(_digests(partial)), encoding="utf-8")
    partial.rename(folder)


def discard(folder: Path) -> None:
    """Remove a folder, if it is there: first its seal, so that it is never taken for whole again."""
    (folder / SEAL).unlink(missing_ok=True)
    if folder.exists():
        shutil.rmtree(folder)


def _digests(folder: Path) -> dict[str, str]:
    files = sorted(path for path in folder.iterdir() if path.name != SEAL)
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in files}
