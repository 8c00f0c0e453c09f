"""Report: what of the data was ignored, dropped, truncated or written otherwise, and where."""

import html
from collections import Counter
from typing import TYPE_CHECKING, Any

from qlens.core.display import Result, frame_html

if TYPE_CHECKING:
    import pandas as pd

DROPPED, TRUNCATED, NOTED = "dropped", "truncated", "noted"
PLACES = 10  # that are kept of every reason


class Report(Result):
    """What happened to the rows of data on their way to examples.

    Attributes:
        rows: the number of rows.
        examples: the number of examples.
        shapes, ways: rows by shape, and by the way in which what is learned was found.
        ignored: columns that are not used.
        counts: rows by (what, reason); what is "dropped", "truncated" or "noted".
        places: of the first rows of every (what, reason).
    """

    def __init__(self) -> None:
        self.rows = self.examples = 0
        self.shapes, self.ways = Counter[str](), Counter[str]()
        self.ignored: list[str] = []
        self.counts = Counter[tuple[str, str]]()
        self.places: dict[tuple[str, str], list[str]] = {}

    def add(self, what: str, reason: str, place: str) -> None:
        """Count a row, and keep its place if it is among the first."""
        self.counts[what, reason] += 1
        places = self.places.setdefault((what, reason), [])
        if len(places) < PLACES:
            places.append(place)

    def count(self, what: str) -> int:
        """The number of rows that were dropped, truncated or noted."""
        return sum(count for (each, _), count in self.counts.items() if each == what)

    def line(self) -> str:
        """One line: examples of rows, and what was left out."""
        parts = [f"{self.examples} examples of {self.rows} rows of {', '.join(self.shapes) or 'no shape'}"]
        if self.ignored:
            parts.append(f"ignored: {', '.join(self.ignored)}")
        parts += [f"{what} {count}: {self.reason(what, reason)}" for (what, reason), count in self._counted()]
        return "; ".join(parts)

    def reason(self, what: str, reason: str) -> str:
        """A reason with its first places."""
        places, count = self.places[what, reason], self.counts[what, reason]
        first = ", ".join(places[:3]) + (", ..." if count > min(len(places), 3) else "")
        return f"{reason} ({first})"

    def _counted(self) -> list[tuple[tuple[str, str], int]]:
        order = (DROPPED, TRUNCATED, NOTED)
        return sorted(self.counts.items(), key=lambda item: (order.index(item[0][0]), -item[1]))

    def __str__(self) -> str:
        lines = [f"{self.examples} examples of {self.rows} rows"]
        lines += [f"  shape: {name} ({count} rows)" for name, count in self.shapes.most_common()]
        lines += [f"  learned part by: {way} ({count})" for way, count in self.ways.most_common()]
        if self.ignored:
            lines.append(f"  ignored columns: {', '.join(self.ignored)}")
        lines += [f"  {what}, {count} rows: {self.reason(what, reason)}" for (what, reason), count in self._counted()]
        return "\n".join(lines)

    __repr__ = __str__

    def to_frame(self) -> "pd.DataFrame":
        """A row per reason: what, reason, rows, and the first places."""
        import pandas as pd

        rows = [
            {"what": what, "reason": reason, "rows": count, "first": ", ".join(self.places[what, reason])}
            for (what, reason), count in self._counted()
        ]
        return pd.DataFrame(rows, columns=["what", "reason", "rows", "first"])

    def _repr_html_(self) -> str:
        head = f"<p>{html.escape(self.line())}</p>"
        return head + (frame_html(self.to_frame()) if self.counts else "")

    def to_dict(self) -> dict[str, Any]:
        """Everything, for JSON."""
        return {
            "rows": self.rows, "examples": self.examples, "shapes": dict(self.shapes), "ways": dict(self.ways),
            "ignored": self.ignored, "counts": super().to_dict(),
        }  # fmt: skip
