"""Display: results as short HTML tables for notebooks."""

import html
from collections.abc import Mapping, Sequence
from typing import Any


def table_html(title: str, fields: Mapping[str, Any]) -> str:
    """A titled HTML table of names and values, everything escaped.

    Example:
        >>> table_html("dft", {"trust": "p_y"})
        '<table><caption>dft</caption><tr><th>trust</th><td>p_y</td></tr></table>'
    """
    rows = "".join(f"<tr><th>{_cell(name)}</th><td>{_cell(value)}</td></tr>" for name, value in fields.items())
    return f"<table><caption>{_cell(title)}</caption>{rows}</table>"


def rows_html(title: str, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """A titled HTML table with a header line, everything escaped.

    Example:
        >>> rows_html("Target", ["trust"], [[0.5]])
        '<table><caption>Target</caption><tr><th>trust</th></tr><tr><td>0.5</td></tr></table>'
    """
    head = "".join(f"<th>{_cell(name)}</th>" for name in columns)
    body = "".join("<tr>" + "".join(f"<td>{_cell(value)}</td>" for value in row) + "</tr>" for row in rows)
    return f"<table><caption>{_cell(title)}</caption><tr>{head}</tr>{body}</table>"


def number(value: float) -> str:
    """A number with four significant digits.

    Example:
        >>> number(0.123456), number(float("nan"))
        ('0.1235', 'nan')
    """
    return f"{value:.4g}"


def _cell(value: Any) -> str:
    return html.escape(number(value) if isinstance(value, float) else str(value))
