"""The run folder belongs to one configuration: found again by the same call, refused to any other."""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from qlens.errors import InputError
from qlens.files import write_json


def default_folder(kind: str, config: Mapping[str, Any]) -> Path:
    """Where a comparison goes without ``out``: a name from its configuration, so that the same call finds it again."""
    return Path("runs") / f"{kind}-{hashlib.sha256(json.dumps(config).encode()).hexdigest()[:10]}"


def claim(folder: Path, config: Mapping[str, Any]) -> None:
    """Take a run folder for this configuration.

    Raises:
        InputError: it belongs to another configuration or version (the first differing key is named), or is none.
    """
    path = folder / "config.json"
    if folder.is_file():
        raise InputError(f"out: {folder} is a file, not a folder")
    if path.is_file():
        try:
            before = json.loads(path.read_text(encoding="utf-8"))
        except ValueError:
            raise InputError(f"out: {path} is not readable JSON; give another folder") from None
        before.pop("noted", None)
        if difference := _difference(before, config):
            raise InputError(f"out: {folder} is of another configuration: {difference}; give another folder")
        return
    if folder.is_dir() and any(folder.iterdir()):
        raise InputError(f"out: {folder} holds files but no config.json, so it is no run folder; give another folder")
    folder.mkdir(parents=True, exist_ok=True)
    write_json(path, config)


def _difference(before: Any, now: Any, key: str = "") -> str:
    """The first key at which two configurations differ, with both values."""
    if isinstance(before, dict) and isinstance(now, dict):
        for name in dict.fromkeys([*now, *before]):
            inner = f"{key}.{name}" if key else name
            absent = "not there"
            if found := _difference(before.get(name, absent), now.get(name, absent), inner):
                return found
        return ""
    return "" if before == now else f"{key} was {_brief(before)}, now {_brief(now)}"


def _brief(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else text[:57] + "..."
