"""Result: what the results of qlens share, a text in notebooks and a LaTeX table."""

from html import escape
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import pandas as pd


class Result:
    """A result that shows its printed text in a notebook."""

    def _repr_html_(self) -> str:
        return f"<pre>{escape(str(self))}</pre>"


def latex(table: "pd.DataFrame", caption: str | None = None, label: str | None = None) -> str:
    """A table in LaTeX (booktabs), numbers in four digits."""
    return table.to_latex(index=False, float_format="%.4g", escape=True, caption=caption, label=label)


def heading(text: str) -> str:
    """A paragraph of HTML."""
    return f"<p>{escape(text)}</p>"
