"""Save a figure as PNG, PDF or SVG with its data as CSV beside it, atomically."""

import io
import os
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path

import matplotlib
import pandas as pd
from matplotlib.figure import Figure

from qlens.core.errors import InputError, brief
from qlens.core.files import output_file, written

KINDS = (".png", ".pdf", ".svg")
DPI = 200
LONGEST = 200  # bytes of a file name, with room for the keys of the data files
# without date and program, so that the same figure gives the same bytes
METADATA = {
    "png": {"Software": None},
    "pdf": {"CreationDate": None, "Producer": None, "Creator": None},
    "svg": {"Date": None, "Creator": None},
}


def save_figure(
    figure: Figure, path: str | Path, data: pd.DataFrame | Mapping[str, pd.DataFrame], dpi: int = DPI
) -> bytes:
    """Write a figure, and its data as CSV beside it.

    Args:
        figure: what to save.
        path: NAME.png, NAME.pdf or NAME.svg in an existing folder.
        data: the frame behind the figure, for NAME.csv; or several by key, for NAME-KEY.csv (key "": NAME.csv).
        dpi: pixels per inch of a PNG.

    Returns:
        the bytes of the picture.

    Raises:
        InputError: the folder does not exist, or the file has another ending.

    Example:
        >>> save_figure(explanation.plot(), "dft.pdf", explanation.table)  # doctest: +SKIP
    """
    path = check_path(path)
    frames = data if isinstance(data, Mapping) else {"": data}
    picture = image(figure, path.suffix[1:], dpi)
    contents = {path: picture}
    for key, frame in frames.items():
        csv = frame.to_csv(index=False).encode("utf-8", "backslashreplace")
        contents[path.with_name(f"{path.stem}{'-' if key else ''}{key}.csv")] = csv
    with ExitStack() as all_or_none:
        for place, content in contents.items():
            all_or_none.enter_context(written(place)).write_bytes(content)
    return picture


def check_path(path: str | Path, name: str = "path") -> Path:
    """The path, checked as one that a figure can be written to.

    Raises:
        InputError: the folder does not exist or is not writable, or the ending is not one of ``KINDS``.
    """
    file = output_file(path, name)
    if len(os.fsencode(file.name)) > LONGEST:
        raise InputError(f"{name} {brief(str(path))} has a name of over {LONGEST} bytes: give a shorter one")
    if file.suffix not in KINDS:
        raise InputError(f"{name} {brief(str(path))}: a figure ends in one of {', '.join(KINDS)}")
    return file


def image(figure: Figure, kind: str = "png", dpi: int = DPI) -> bytes:
    """A figure as the bytes of a file; deterministic."""
    stream = io.BytesIO()
    with matplotlib.rc_context({"svg.hashsalt": "qlens"}):
        figure.savefig(stream, format=kind, dpi=dpi, metadata=METADATA[kind])
    return stream.getvalue()
