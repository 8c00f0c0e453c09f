"""Export: the ranked data as JSON Lines, with a weight per row or without the least trusted rows."""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from qlens.analysis.ranking.orders import NEGATIVE_MARGIN
from qlens.core.errors import InputError, brief
from qlens.core.files import output_file, shown_path, write_text
from qlens.data.rows import row_of

if TYPE_CHECKING:
    from qlens.analysis.ranking.ranking import Ranking

WEIGHT = "weight"
RULES = {
    True: "exp(-negative margin), the geometric mean of p_y / p_runner-up, at most 1",
    False: "the row's label weight by {by}",
}  # whether the order is that of the models' margin
USE = "QTrainer multiplies losses by it, TRL ignores it"


@dataclass(frozen=True)
class Export:
    """A written file; printed, it says in a line what was written and left out, and why.

    Args:
        path: of the file.
        by: the order, a method's spec or "negative_margin".
        rows: the numbers of the rows written.
        dropped: the numbers of the rows left out, the least trusted first.
        weights: by row number; None where rows were left out instead.
        remarks: on rows without a rank or weight of their own.
    """

    path: Path
    by: str
    rows: tuple[int, ...]
    dropped: tuple[int, ...]
    weights: pd.Series | None
    remarks: tuple[str, ...]

    def __str__(self) -> str:
        number = len(self.rows) + len(self.dropped)
        if self.weights is None:
            parts = [f"{len(self.rows)} of {number} rows; the first {len(self.dropped)} by {self.by} are left out"]
        else:
            w = self.weights
            parts = [f"{number} rows; weight is {RULES[self.by == NEGATIVE_MARGIN].format(by=self.by)}"]
            parts += [f"from {w.min():.3f} to {w.max():.3f}, mean {w.mean():.3f}", USE]
        return f"{shown_path(self.path)}: {'; '.join([*parts, *self.remarks])}"


def order_of(ranking: "Ranking", by: str | None) -> str:
    """The order to export by: by default the first one that is not all ties.

    Raises:
        InputError: no such order, or its rows all tie.
    """
    if by is None:
        by = next((each for each in ranking.orders if not ranking.alike(each)), ranking.orders[-1])
    if ranking.alike(by):
        others = [each for each in ranking.orders if not ranking.alike(each)]
        advice = f"choose {' or '.join(map(repr, others))}" if others else "rank by a method such as 'dft'"
        raise InputError(f"by={by!r}: all rows tie, so that none is trusted less than another; {advice}")
    return by


def weights(ranking: "Ranking", by: str) -> tuple[pd.Series, list[str]]:
    """The weight of every row of the data, and remarks on those without one of their own."""
    rows = ranking.rows[ranking.rows["by"] == by].set_index("row")
    values = np.exp(-rows[NEGATIVE_MARGIN]) if by == NEGATIVE_MARGIN else rows["label_weight"]
    values = values.astype(float).replace([np.inf, -np.inf], np.nan)
    remarks = []
    if negative := int((values < 0).sum()):
        remarks.append(f"{negative} rows have a negative label weight, written as 0")
    values = values.clip(lower=0.0).reindex(range(1, len(rows_of(ranking)) + 1))
    if absent := int(values.isna().sum()):
        remarks.append(f"{absent} rows have none of their own (left out of the ranking, or NaN) and get the mean")
    values = values.fillna(values.mean()).map(lambda value: float(f"{value:.6g}"))
    return values.rename(WEIGHT), remarks


def export(ranking: "Ranking", path: str | Path, by: str | None, drop_least: float | None) -> Export:
    """Write the data of a ranking; see ``Ranking.export``."""
    file, data, by = output_file(path, "path"), rows_of(ranking), order_of(ranking, by)
    if file.suffix != ".jsonl":
        raise InputError(f"path {brief(str(path))} must end in .jsonl: the data are written as JSON Lines")
    rows, values, dropped = [dict(_row(row, number)) for number, row in enumerate(data, 1)], None, []
    if drop_least is None:
        if taken := next((number for number, row in enumerate(rows, 1) if WEIGHT in row), None):
            raise InputError(
                f"row {taken} has a {WEIGHT} already, which an export would replace: rename that key, or leave rows out "
                "by drop_least=, on the command line --drop-least"
            )
        values, remarks = weights(ranking, by)
        rows = [{**row, WEIGHT: value} for row, value in zip(rows, values, strict=True)]
    else:
        dropped, remarks = _least(ranking, by, drop_least)
    if any("question" in row for row in rows):
        remarks.append("TRL takes prompt and completion: there, rename the columns question and answer")
    kept = [number for number in range(1, len(rows) + 1) if number not in set(dropped)]
    write_text(file, "".join(_line(rows[number - 1], number) for number in kept))
    return Export(file, by, tuple(kept), tuple(dropped), values, tuple(remarks))


def _least(ranking: "Ranking", by: str, share: float) -> tuple[list[int], list[str]]:
    """The numbers of the least trusted rows, and a remark on those without a rank."""
    if isinstance(share, bool) or not isinstance(share, int | float) or not 0 < share < 1:
        raise InputError(f"drop_least must be a share between 0 and 1, such as 0.1 for a tenth, got {brief(share)}")
    ranked = ranking.rows[ranking.rows["by"] == by].dropna(subset="rank")
    count = math.floor(share * len(ranked) + 1e-9)
    unranked = len(rows_of(ranking)) - len(ranked)
    remarks = [f"{unranked} rows without a rank are kept"] if unranked else []
    return [int(row) for row in ranked["row"][:count]], remarks


def rows_of(ranking: "Ranking") -> Sequence[Any]:
    """The data of a ranking.

    Raises:
        InputError: it is of a view.
    """
    if ranking.data is None:
        raise InputError("this ranking is of a view, which does not keep its rows: rank them by qlens.rank(...)")
    return ranking.data


def _row(row: Any, number: int) -> Mapping[str, Any]:
    row = row_of(row)
    if not isinstance(row, Mapping):
        raise InputError(f"row {number} is {brief(row)}, no row of data")
    return row


def _line(row: Mapping[str, Any], number: int) -> str:
    try:
        return json.dumps(row, ensure_ascii=False) + "\n"
    except (TypeError, ValueError) as error:
        raise InputError(f"row {number} cannot be written as JSON: {error}") from None
