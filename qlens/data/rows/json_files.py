"""JSON files as rows: JSON Lines, parsed line by line when they are read, and arrays of objects."""

import gzip
import json
import mmap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from qlens.core.errors import InputError, brief
from qlens.core.files import refusal, shown_path
from qlens.data.rows.bad_rows import BadRow

BOM = b"\xef\xbb\xbf"


class JsonLines(Sequence):
    """The objects of a JSON Lines file; a line is parsed each time it is read, blank ones are skipped.

    Args:
        content: of the file.

    Attributes:
        numbers: of the lines, from 1.
    """

    def __init__(self, content: Any):
        self._content, self._starts, self.numbers = content, list[tuple[int, int]](), list[int]()
        start, number, length = 0, 0, len(content)
        while start < length:
            end = content.find(b"\n", start)
            end = length if end < 0 else end
            number += 1
            if content[start:end].strip() not in (b"", BOM):
                self._starts.append((start, end))
                self.numbers.append(number)
            start = end + 1

    def __len__(self) -> int:
        return len(self._starts)

    def __getitem__(self, index: Any) -> Any:
        start, end = self._starts[index]
        return parsed(self._content[start:end])


def parsed(text: bytes) -> Any:
    """A JSON value of a row.

    Raises:
        BadRow: malformed or too deep JSON, a key that occurs twice, or bytes that are not UTF-8.
    """
    try:
        return json.loads(text.decode("utf-8-sig"), object_pairs_hook=_distinct_keys)
    except UnicodeDecodeError as error:
        raise BadRow("invalid UTF-8", f"not JSON: {error}") from None
    except (ValueError, RecursionError) as error:
        raise BadRow("malformed JSON", f"not JSON: {error}") from None


def _distinct_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object, refused where a key occurs twice."""
    values = dict(pairs)
    if len(values) < len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for at, key in enumerate(keys) if key in keys[:at])
        raise ValueError(f"the key {brief(twice)} is there twice")
    return values


def json_lines(path: Path) -> tuple[Sequence[Any], list[int], str]:
    """The rows of a JSON Lines file, their numbers, and what is numbered."""
    lines = JsonLines(_content(path))
    return lines, lines.numbers, "line"


def json_file(path: Path) -> tuple[Sequence[Any], list[int], str]:
    """The rows of a JSON file: an array of objects, one object, or JSON Lines under another name.

    Raises:
        InputError: an array that is malformed.
    """
    content = _content(path)
    first = content[: len(BOM) + 4096].removeprefix(BOM).lstrip()[:1]
    if first != b"[":
        rows, numbers, unit = json_lines(path)
        try:
            if len(rows) > 1 and not isinstance(rows[0], dict):
                return rows, numbers, unit
        except BadRow:
            return _whole(path, content)  # an object of many lines
        return rows, numbers, unit
    return _whole(path, content)


def _whole(path: Path, content: Any) -> tuple[Sequence[Any], list[int], str]:
    try:
        value = parsed(content[:])
    except BadRow as error:
        raise InputError(f"{shown_path(path)}: {error}") from None
    rows = value if isinstance(value, list) else [value]
    return rows, list(range(1, len(rows) + 1)), "row"


def _content(path: Path) -> Any:
    """The bytes of a file, mapped rather than read where it is not compressed."""
    try:
        if path.suffix == ".gz":
            return gzip.decompress(path.read_bytes())
        with path.open("rb") as file:
            if not path.stat().st_size:
                return b""
            return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    except OSError as error:
        raise refusal("data file", path, error, "read") from error
    except EOFError as error:
        raise InputError(f"data file {brief(str(shown_path(path)))} is cut off: {error}") from error
