"""Sources of rows: files, folders, data sets of the ``datasets`` library, the Hugging Face hub, and lists."""

import bisect
import re
from collections.abc import Iterable, Mapping, Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any

from qlens.core.errors import InputError, brief
from qlens.core.files import shown_path, user_path
from qlens.data.rows import json_files, tables
from qlens.data.rows.bad_rows import BadRow
from qlens.data.rows.shapes import Columns

ENDINGS = (".jsonl", ".json", ".csv", ".tsv", ".parquet", ".jsonl.gz", ".json.gz")
METADATA = ("dataset_info.json", "dataset_infos.json", "state.json", "dataset_dict.json")
SPLITS = re.compile(r"(?:^|[-_./])(train|test|validation|valid|val|dev|eval)(?=[-_./0-9]|$)")
ON_BAD = ("error", "drop")
COUNTED = range(1, 2**62)
"""Numbers of rows that are numbered from 1 on."""
HUB_NAME = re.compile(r"[\w.-]+(/[\w.-]+)?")


class Rows(Sequence):
    """Rows of data that know their places, so that messages can name file and line.

    Args:
        parts: for every file the rows, the number of each, and its description, such as ("data.jsonl", "line").
        columns: that the user named for prompt and completion.
        on_bad: what becomes of rows that cannot be used, "error" or "drop".
        order: the numbers of the rows that there are; by default all.
    """

    def __init__(
        self,
        parts: Sequence[tuple[Sequence[Any], Sequence[int], tuple[str, str]]],
        columns: Columns = Columns(),  # noqa: B008  immutable
        on_bad: str = "error",
        order: Sequence[int] | None = None,
    ):
        self._parts, self.columns, self.on_bad = parts, columns, on_bad
        self._ends = list(accumulate(len(rows) for rows, _, _ in parts))
        self._order = range(self._ends[-1] if self._ends else 0) if order is None else order

    def __len__(self) -> int:
        return len(self._order)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return Rows(self._parts, self.columns, self.on_bad, self._order[index])
        part, at = self._find(index)
        try:
            return self._parts[part][0][at]
        except BadRow as error:
            raise error.at(self.where(index)) from None

    def select(self, indices: Iterable[int]) -> "Rows":
        """The rows of these numbers, in this order."""
        return Rows(self._parts, self.columns, self.on_bad, [self._order[at] for at in indices])

    def where(self, index: int, short: bool = False) -> str:
        """The place of a row, for messages: "data.jsonl, line 3"; ``short``: without the file where there is but one."""
        part, at = self._find(index)
        _, numbers, (name, unit) = self._parts[part]
        return (
            f"{name}, {unit} {numbers[at]}"
            if name and not (short and len(self._parts) == 1)
            else f"{unit} {numbers[at]}"
        )

    def _find(self, index: int) -> tuple[int, int]:
        """The part of a row, and the row's number in it."""
        if not -len(self) <= index < len(self):
            raise IndexError(f"row {index} of {len(self)}")
        row = self._order[index]
        part = bisect.bisect_right(self._ends, row)
        return part, row - (self._ends[part - 1] if part else 0)

    def __eq__(self, other: Any) -> bool:
        return isinstance(other, Sequence) and list(self) == list(other)

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        names = ", ".join(dict.fromkeys(name for _, _, (name, _) in self._parts if name))
        return f"<Rows: {len(self)} of {names or 'a list'}>"


def load_rows(
    source: Any,
    split: str | None = None,
    prompt_column: str | None = None,
    completion_column: str | tuple[str, str] | None = None,
    on_bad: str | None = None,
) -> Rows:
    """Rows of data from a file, a folder, a data set or a list, as they are; ``encode`` says which shapes it reads.

    Nothing is copied: JSON Lines and Parquet are read where they are, CSV cells stay text. Only "NAME:SPLIT" (or
    "NAME:CONFIGURATION:SPLIT"), or ``split`` with a name, asks the Hugging Face hub, through the cache of ``datasets``.

    Args:
        source: a file (.jsonl, .json, .csv, .tsv, .parquet; .gz of the first two), a folder of such files or of
            ``datasets.save_to_disk``, a name on the hub, a ``datasets.Dataset``, or an iterable of rows.
        split: of a folder, a ``DatasetDict`` or a name on the hub; "FOLDER:SPLIT" says the same.
        prompt_column, completion_column, on_bad: as in ``encode``; the rows remember them.

    Returns:
        The rows; ``rows.where(i)`` names the place of one.

    Raises:
        InputError: no such source, one that cannot be read, or one of several splits without ``split``.

    Example:
        >>> load_rows([{"prompt": "2 + 2 =", "completion": "4"}])[0]["completion"]
        '4'
        >>> rows = load_rows("data.parquet")  # doctest: +SKIP
    """
    columns = Columns.of(prompt_column, completion_column)
    if on_bad not in (None, *ON_BAD):
        raise InputError(f"on_bad must be 'error' or 'drop', got {brief(on_bad)}")
    if isinstance(source, Rows):
        if split is not None:
            raise InputError(f"split={split!r} goes with a folder or a name: the rows are loaded")
        own = source.columns if columns == Columns() else columns
        return Rows(source._parts, own, on_bad or source.on_bad, source._order)
    rows = _rows(source, split)
    rows.columns, rows.on_bad = columns, on_bad or "error"
    return rows


def _rows(source: Any, split: str | None) -> Rows:
    if isinstance(source, str | Path):
        return _of_path(source, split)
    if hasattr(source, "column_names") and isinstance(source, Mapping):  # a DatasetDict
        return _of_dataset(source[_chosen(split, list(source), "the data set")], "")
    if split is not None:
        raise InputError(f"split={split!r} goes with a folder or a name, not with {type(source).__name__}")
    if hasattr(source, "with_format") and hasattr(source, "__len__"):
        return _of_dataset(source, "")
    if isinstance(source, Mapping):
        source = [source]
    if not isinstance(source, Iterable):
        raise InputError(f"data must be a path, a data set or a list of rows, got {brief(source)}")
    rows = source if isinstance(source, Sequence) else list(source)
    return Rows([(rows, COUNTED, ("", "row"))])


def local_files(source: str | Path) -> list[Path]:
    """The files that ``load_rows`` may read of a path, with or without a split; none of a name on the hub.

    Raises:
        InputError: no path.
    """
    path = user_path(source, "data file")
    if not path.exists():
        path = user_path(str(source).rpartition(":")[0] or ".", "data file")
        path = path if str(source).count(":") and path.exists() else None
    if path is None or path.is_file():
        return [] if path is None else [path]
    return sorted(file for file in path.rglob("*") if file.is_file() and not file.name.startswith("."))


def _of_dataset(dataset: Any, name: str) -> Rows:
    return Rows([(tables.of_dataset(dataset), COUNTED, (name, "row"))])


def _of_path(source: str | Path, split: str | None) -> Rows:
    path = user_path(source, "data file")
    name, sign, rest = str(source).rpartition(":")
    if not path.exists() and sign and split is None and rest and name:
        inner = user_path(name, "data file")
        if inner.exists():
            return _of_path(name, rest)
        return _of_hub(name, rest)
    if not path.exists() and split is not None and HUB_NAME.fullmatch(str(source)):
        return _of_hub(str(source), split)
    if path.is_dir():
        return _of_folder(path, split)
    if not path.is_file():
        raise InputError(
            f"data file {brief(str(shown_path(path)))} is not there, or is no file; a data set of the Hugging Face hub is "
            "written NAME:SPLIT"
        )
    if split is not None:
        raise InputError(f"split={split!r} goes with a folder or a name on the hub: {shown_path(path)} is one file")
    rows = Rows([_of_file(path)])
    if not len(rows):
        raise InputError(f"data file {str(shown_path(path))!r} is empty: it needs at least one row")
    _check_readable(rows)
    return rows


def _check_readable(rows: Rows) -> None:
    """Check that one of the first rows can be read, or else raise the error of the first."""
    errors = []
    for at in range(min(len(rows), 10)):
        try:
            rows[at]
            return
        except BadRow as error:
            errors.append(error)
    raise errors[0]


def _of_file(path: Path) -> tuple[Sequence[Any], Sequence[int], tuple[str, str]]:
    """Rows, numbers and description of a file."""
    name, ending = str(shown_path(path)), path.name.lower().removesuffix(".gz")
    if ending.endswith(".parquet"):
        return tables.parquet(path), COUNTED, (name, "row")
    if ending.endswith((".csv", ".tsv")):
        return tables.csv(path), COUNTED, (name, "row")
    read = json_files.json_file if ending.endswith(".json") else json_files.json_lines
    rows, numbers, unit = read(path)
    return rows, numbers, (name, unit)


def _of_folder(path: Path, split: str | None) -> Rows:
    shown = str(shown_path(path))
    saved = (path / "dataset_dict.json").is_file() or (path / "state.json").is_file()
    if saved:
        import datasets

        try:
            loaded = datasets.load_from_disk(str(path))
        except (OSError, ValueError, KeyError) as error:
            raise InputError(f"data folder {brief(shown)} cannot be loaded by datasets: {error}") from error
        if isinstance(loaded, datasets.DatasetDict):
            loaded = loaded[_chosen(split, list(loaded), f"data folder {brief(shown)}")]
        elif split is not None:
            raise InputError(f"split={split!r}: data folder {brief(shown)} has no splits")
        return _of_dataset(loaded, shown)
    files = sorted(
        file
        for file in path.rglob("*")
        if file.name.lower().endswith(ENDINGS) and file.name not in METADATA and file.is_file()
    )
    if not files:
        raise InputError(f"data folder {brief(shown)} has no data file ({', '.join(ENDINGS)})")
    by_split: dict[str, list[Path]] = {}
    for file in files:
        match = SPLITS.search(str(file.relative_to(path)).lower())
        by_split.setdefault(match[1] if match else "", []).append(file)
    if split is not None or len(by_split) > 1:
        files = by_split[_chosen(split, list(by_split), f"data folder {brief(shown)}")]
    return Rows([_of_file(file) for file in files])


def _chosen(split: str | None, splits: list[str], name: str) -> str:
    """The split that is asked for, or the only one."""
    if split is None and len(splits) == 1:
        return splits[0]
    if split not in splits:
        there = ", ".join(repr(each) for each in splits) if any(splits) else "none"
        asked = "" if split is None else f"no split {split!r}, "
        raise InputError(
            f"{name} has {asked}the splits {there}: write split=NAME, on the command line --data PLACE:SPLIT"
        )
    return split


def _of_hub(name: str, split: str) -> Rows:
    """Rows of a data set on the Hugging Face hub; ``name`` may end in a configuration, after a colon."""
    import datasets

    name, _, configuration = name.partition(":")
    if not HUB_NAME.fullmatch(name):
        raise InputError(f"data {brief(name)} is no file, and no name of a data set on the Hugging Face hub")
    try:
        dataset = datasets.load_dataset(name, configuration or None, split=split)
    except Exception as error:  # of the network, the hub, the format: datasets documents no common type
        raise InputError(f"data set {name!r}, split {split!r}, cannot be loaded from the hub: {error}") from error
    return _of_dataset(dataset, f"{name}:{split}")
