"""Tables as rows: Parquet and Arrow read in blocks, CSV as text without guessed types."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from qlens.core.errors import InputError, brief
from qlens.core.files import refusal, shown_path
from qlens.data.collator import COLUMNS

BLOCK = 512  # rows that are converted at a time


class Blocks(Sequence):
    """Rows of a table, converted to dicts a block at a time; the last block is kept.

    Args:
        length: the number of rows.
        read: a function of start and stop that returns the rows between.
    """

    def __init__(self, length: int, read: Callable[[int, int], list[Any]]):
        self._length, self._read = length, read
        self._start, self._block = 0, list[Any]()

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, index: Any) -> Any:
        if not 0 <= index < self._length:
            raise IndexError(index)
        if not 0 <= index - self._start < len(self._block):
            self._start = index - index % BLOCK
            self._block = self._read(self._start, min(self._start + BLOCK, self._length))
        return self._block[index - self._start]


def of_dataset(dataset: Any) -> Blocks:
    """The rows of a ``datasets.Dataset``, through its own transform where it has one."""
    if dataset.format["type"] == "custom":
        return Blocks(len(dataset), lambda start, stop: [dataset[at] for at in range(start, stop)])
    arrow = dataset.with_format("arrow")
    return Blocks(len(dataset), lambda start, stop: [_filled(row) for row in arrow[start:stop].to_pylist()])


def parquet(path: Path) -> Blocks:
    """The rows of a Parquet file; a row group is in memory at a time.

    Raises:
        InputError: the file cannot be read.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        file = pq.ParquetFile(path)
    except OSError as error:
        raise refusal("data file", path, error, "read") from error
    except (pa.ArrowException, ValueError) as error:
        raise InputError(f"data file {brief(str(shown_path(path)))} is no Parquet: {error}") from error
    sizes = [file.metadata.row_group(group).num_rows for group in range(file.num_row_groups)]
    starts = [sum(sizes[:group]) for group in range(len(sizes))]
    cached: dict[int, Any] = {}

    def read(start: int, stop: int) -> list[Any]:
        rows: list[Any] = []
        for group, (first, size) in enumerate(zip(starts, sizes, strict=True)):
            if first < stop and start < first + size:
                if group not in cached:
                    cached.clear()
                    cached[group] = file.read_row_group(group)
                inside = max(start - first, 0)
                rows += cached[group].slice(inside, min(stop - first, size) - inside).to_pylist()
        return [_filled(row) for row in rows]

    return Blocks(sum(sizes), read)


def _filled(value: Any) -> Any:
    """A value of Arrow without the keys that only other rows have, which Arrow fills with None."""
    if isinstance(value, dict):
        return {key: _filled(each) for key, each in value.items() if each is not None}
    return [_filled(each) for each in value] if isinstance(value, list) else value


def csv(path: Path) -> list[dict[str, Any]]:
    """The rows of a CSV file (.tsv: tabs): text as it stands, but for turns and tools in JSON and the columns of ``COLUMNS``.

    Raises:
        InputError: the file cannot be read, or a column is there twice.
    """
    import pandas as pd

    options: dict[str, Any] = dict(
        sep="\t" if path.suffix == ".tsv" else ",", dtype=str, keep_default_na=False, header=None
    )
    try:
        frame = pd.read_csv(path, encoding="utf-8-sig", **options)
    except OSError as error:
        raise refusal("data file", path, error, "read") from error
    except pd.errors.EmptyDataError:
        return []
    except (ValueError, pd.errors.ParserError) as error:  # not UTF-8, or lines of other lengths
        raise InputError(f"data file {brief(str(shown_path(path)))} is no CSV in UTF-8: {error}".strip()) from error
    names = list(frame.iloc[0])
    if twice := [name for at, name in enumerate(names) if name in names[:at]]:
        raise InputError(f"data file {brief(str(shown_path(path)))}: the column {brief(twice[0])} is there twice")
    return [
        {name: value for name, text in zip(names, line, strict=True) if (value := _cell(name, text)) is not None}
        for line in frame.iloc[1:].itertuples(index=False)
    ]


def _cell(name: str, text: str) -> Any:
    """The value of a cell: None where a column of ``COLUMNS`` is empty."""
    if name in COLUMNS and not text.startswith("[{"):
        try:
            return json.loads(text.lower()) if text else None
        except ValueError:
            return text
    if text.startswith(("[{", "{")):
        try:
            value = json.loads(text)
        except (ValueError, RecursionError):
            return text
        return value if isinstance(value, list) else text
    return text
