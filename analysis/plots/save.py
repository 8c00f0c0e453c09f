"""Saving: a figure as a file, and beside it what it shows as CSV; each whole or not there."""

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
LONGEST = 200  # bytes of a figure's name, so that those of its data, beside it, fit too
# no date and no program: the same bytes for the same figure
BARE = {
    "png": {"Software": None},
    "pdf": {"CreationDate": None, "Producer": None, "Creator": None},
    "svg": {"Date": None, "Creator": None},
}


def save_figure(
    figure: Figure, path: str | Path, data: pd.DataFrame | Mapping[str, pd.DataFrame], dpi: int = DPI
) -> bytes:
    """Write a figure, and its data as CSV beside it; returns the bytes of the picture.

    Args:
        figure: what to save.
        path: ends in .png, .pdf or .svg; its folder must be there.
        data: what the figure shows: NAME.csv; or several frames by name, NAME-KEY.csv each (the key "" is NAME.csv).
        dpi: pixels per inch, of a PNG.

    Raises:
        InputError: no such folder, or another ending.

    Example:
        >>> save_figure(explanation.plot(), "dft.pdf", explanation.table)  # doctest: +SKIP
    """
    path = check_path(path)
    frames = data if isinstance(data, Mapping) else {"": data}
    made = image(figure, path.suffix[1:], dpi)
    contents = {path: made}
    for key, frame in frames.items():
        csv = frame.to_csv(index=False).encode("utf-8", "backslashreplace")
        contents[path.with_name(f"{path.stem}{'-' if key else ''}{key}.csv")] = csv
    with ExitStack() as all_or_none:
        for place, content in contents.items():
            all_or_none.enter_context(written(place)).write_bytes(content)
    return made


def check_path(path: str | Path, name: str = "path") -> Path:
    """The path, if a figure can go there.

    Raises:
        InputError: no such folder, a place that cannot be written to, or an ending that is no figure's.
    """
    found = output_file(path, name)
    if len(os.fsencode(found.name)) > LONGEST:
        raise InputError(f"{name} {brief(str(path))} has a name of over {LONGEST} bytes: give a shorter one")
    if found.suffix not in KINDS:
        raise InputError(f"{name} {brief(str(path))}: a figure ends in one of {', '.join(KINDS)}")
    return found


def image(figure: Figure, kind: str = "png", dpi: int = DPI) -> bytes:
    """A figure as the bytes of a file; the same for a figure made and drawn alike."""
    stream = io.BytesIO()
    with matplotlib.rc_context({"svg.hashsalt": "qlens"}):
        figure.savefig(stream, format=kind, dpi=dpi, metadata=BARE[kind])
    return stream.getvalue()
