"""Display: results as HTML for notebooks and as LaTeX tables, and what all results share."""

import html
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from qlens.core.errors import InputError, brief, one_line

if TYPE_CHECKING:
    import pandas as pd


class Result:
    """A result with a table: it shows itself in notebooks, and gives the table as a frame, in LaTeX and as plain values."""

    to_frame: Callable[..., "pd.DataFrame"]  # the table, which every result defines

    def to_dict(self) -> dict[str, Any]:
        """The columns of ``to_frame`` as lists, for JSON."""
        return self.to_frame().to_dict(orient="list")

    def to_latex(
        self, columns: Sequence[str] | None = None, caption: str | None = None, label: str | None = None, **options: Any
    ) -> str:
        """The table of ``to_frame`` in LaTeX (booktabs); arguments as of ``latex_table``."""
        return latex_table(self.to_frame(), columns, caption, label, **options)

    def _repr_html_(self) -> str:
        return f"<pre>{html.escape(str(self))}</pre>"


def latex_table(
    frame: "pd.DataFrame",
    columns: Sequence[str] | None = None,
    caption: str | None = None,
    label: str | None = None,
    **options: Any,
) -> str:
    r"""A frame as a LaTeX table (booktabs), numbers with four significant digits, NaN as "-".

    Args:
        frame: what to print.
        columns: which columns, in this order; by default all.
        caption, label: of the table environment; without both a plain tabular.
        options: of ``pandas.DataFrame.to_latex``, for example position="t" or float_format="%.2f".

    Raises:
        InputError: columns that are no list of names, or one that the frame does not have.

    Example:
        >>> import pandas as pd
        >>> print(latex_table(pd.DataFrame({"method": ["sft"], "p_y": [0.5]}), ["p_y"]))
        \begin{tabular}{r}
        \toprule
        p\_y \\
        \midrule
        0.5 \\
        \bottomrule
        \end{tabular}
        <BLANKLINE>
    """
    if isinstance(columns, str):
        raise InputError(
            f"columns must be a list of names, got {brief(columns)}: write columns=[...]; for a caption, caption="
        )
    if columns is not None:
        if unknown := [name for name in columns if name not in frame]:
            raise InputError(f"columns: no column {unknown[0]!r}; there are {', '.join(map(str, frame.columns))}")
        frame = frame.loc[:, list(columns)]
    cells = frame.map(lambda cell: one_line(cell) if isinstance(cell, str) else cell)
    usual = {"index": False, "escape": True, "na_rep": "-", "float_format": "%.4g"}
    source = cells.to_latex(**{**usual, "caption": caption, "label": label, **options})
    return source.replace("<", r"\textless{}").replace(">", r"\textgreater{}")


def table_html(title: str, fields: Mapping[str, Any]) -> str:
    """A titled HTML table of names and values, everything escaped.

    Example:
        >>> table_html("dft", {"trust": "p_y"})
        '<table><caption>dft</caption><tr><th>trust</th><td>p_y</td></tr></table>'
    """
    rows = "".join(f"<tr><th>{_cell(name)}</th><td>{_cell(value)}</td></tr>" for name, value in fields.items())
    return f"<table><caption>{_cell(title)}</caption>{rows}</table>"


def frame_html(frame: "pd.DataFrame", title: str = "", float_format: Callable[[float], str] | None = None) -> str:
    """A frame as an HTML table below its title, everything escaped.

    Args:
        frame: what to show, without its index.
        title: in bold; "" for none.
        float_format: text of a number, by default of four significant digits.

    Example:
        >>> import pandas as pd
        >>> frame_html(pd.DataFrame({"p_y": [0.5]}), "Target").startswith("<p><b>Target</b></p><table")
        True
    """
    head = f"<p><b>{html.escape(title)}</b></p>" if title else ""
    return head + frame.to_html(index=False, border=0, float_format=float_format or number)


def number(value: float) -> str:
    """A number with four significant digits.

    Example:
        >>> number(0.123456), number(float("nan"))
        ('0.1235', 'nan')
    """
    return f"{value:.4g}"


def _cell(value: Any) -> str:
    return html.escape(number(value) if isinstance(value, float) else str(value))


def enumeration(words: Sequence[str]) -> str:
    """Words joined by commas and an "and".

    Example:
        >>> enumeration(["the label", "uniform", "the teacher"])
        'the label, uniform and the teacher'
    """
    return " and ".join([", ".join(words[:-1]), words[-1]] if len(words) > 1 else words)
