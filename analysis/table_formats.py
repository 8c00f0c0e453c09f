"""Frames as tables for a terminal, in Markdown and in LaTeX."""

from collections.abc import Sequence
from typing import Any

import pandas as pd

from qlens.core.errors import InputError, one_line


def text_table(frame: pd.DataFrame) -> str:
    """A frame as aligned lines: the first column to the left, the others to the right; every cell on one line."""
    cells = frame.map(one_line).rename(columns=one_line)
    first = cells.columns[0]
    return cells.set_index(first).rename_axis(index=None, columns=first).to_string()


def markdown_table(frame: pd.DataFrame) -> str:
    """A frame as a Markdown table; bars in cells are escaped."""
    rows = [frame.columns, ["---"] * len(frame.columns), *frame.itertuples(index=False)]
    return "\n".join("| " + " | ".join(str(cell).replace("|", r"\|") for cell in row) + " |" for row in rows)


def latex_table(frame: pd.DataFrame, columns: Sequence[str] | None = None, caption: str | None = None) -> str:
    """A frame as a LaTeX table (booktabs).

    Args:
        frame: what to print.
        columns: which columns, in this order; by default all.
        caption: of the table environment; without one a plain tabular.

    Raises:
        InputError: a column that the frame does not have.
    """
    if columns is not None:
        if unknown := [name for name in columns if name not in frame]:
            raise InputError(f"columns: no column {unknown[0]!r}; there are {', '.join(map(str, frame.columns))}")
        frame = frame.loc[:, list(columns)]
    options: dict[str, Any] = {
        "index": False,
        "escape": True,
        "caption": caption,
        "na_rep": "-",
        "float_format": "%.4g",
    }
    source = frame.map(lambda cell: one_line(cell) if isinstance(cell, str) else cell).to_latex(**options)
    return source.replace("<", r"\textless{}").replace(">", r"\textgreater{}")
