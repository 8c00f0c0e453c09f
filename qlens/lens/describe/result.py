"""Result: what the results of qlens have in common, a short repr, a table and its exports."""

from html import escape
from typing import Any

import pandas as pd


class Result:
    """A result that prints, shows itself in a notebook and exports a table.

    A subclass has ``to_frame`` and ``to_dict``; ``__repr__`` is one line, ``__str__`` the text for reading.
    """

    def to_frame(self) -> pd.DataFrame:
        """The result as a table."""
        raise NotImplementedError

    def to_dict(self) -> dict[str, Any]:
        """The result as plain values, for JSON."""
        raise NotImplementedError

    def to_latex(self, caption: str | None = None, label: str | None = None) -> str:
        """The table in LaTeX (booktabs).

        Args:
            caption: of the table.
            label: of the table, for references.
        """
        table = self.to_frame()
        return table.to_latex(index=False, float_format="%.4g", escape=True, caption=caption, label=label)

    def _repr_html_(self) -> str:
        return f"<pre>{escape(str(self))}</pre>"


def heading(text: str) -> str:
    """A paragraph of HTML."""
    return f"<p>{escape(text)}</p>"
