"""Frames as tables for a terminal and in Markdown; in LaTeX and HTML see ``qlens.core.display``."""

import pandas as pd

from qlens.core.errors import one_line


def text_table(frame: pd.DataFrame) -> str:
    """A frame as aligned lines: the first column to the left, the others to the right; every cell on one line."""
    cells = frame.map(one_line).rename(columns=one_line)
    first = cells.columns[0]
    return cells.set_index(first).rename_axis(index=None, columns=first).to_string()


def markdown_table(frame: pd.DataFrame) -> str:
    """A frame as a Markdown table; bars in cells are escaped."""
    rows = [frame.columns, ["---"] * len(frame.columns), *frame.itertuples(index=False)]
    return "\n".join("| " + " | ".join(str(cell).replace("|", r"\|") for cell in row) + " |" for row in rows)
