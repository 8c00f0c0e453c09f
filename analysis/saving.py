"""Saving: a figure as a file, and beside it what it shows as CSV; each whole or not there."""

import io
from collections.abc import Mapping
from pathlib import Path

import matplotlib
import pandas as pd
from matplotlib.figure import Figure

from qlens.errors import InputError
from qlens.files import write_text, written

KINDS = (".png", ".pdf", ".svg")
DPI = 200
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
    path = check_path(Path(path))
    frames = data if isinstance(data, Mapping) else {"": data}
    for key, frame in frames.items():
        write_text(path.with_name(f"{path.stem}{'-' if key else ''}{key}.csv"), frame.to_csv(index=False))
    made = image(figure, path.suffix[1:], dpi)
    with written(path) as partial:
        partial.write_bytes(made)
    return made


def check_path(path: Path, name: str = "path") -> Path:
    """The path, if a figure can go there.

    Raises:
        InputError: no such folder, or an ending that is no figure's.
    """
    if not path.parent.is_dir():
        raise InputError(f"{name} {path}: there is no folder {path.parent}")
    if path.suffix not in KINDS:
        raise InputError(f"{name} {path}: a figure ends in one of {', '.join(KINDS)}")
    return path


def image(figure: Figure, kind: str = "png", dpi: int = DPI) -> bytes:
    """A figure as the bytes of a file; the same for a figure made and drawn alike."""
    stream = io.BytesIO()
    with matplotlib.rc_context({"svg.hashsalt": "qlens"}):
        figure.savefig(stream, format=kind, dpi=dpi, metadata=BARE[kind])
    return stream.getvalue()
