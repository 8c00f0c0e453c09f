"""Ranking of labels and of rows by the target of a method, and by the margin of the models themselves."""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from qlens.analysis.ranking.export import Export, export, order_of, rows_of, weights
from qlens.analysis.ranking.orders import (
    NEGATIVE_MARGIN,
    ROW_COLUMNS,
    SMALLEST_P_OTHER,
    ZERO_WEIGHT,
    Order,
    rounded,
    row_table,
    token_order,
)
from qlens.analysis.ranking.row_texts import RowTexts
from qlens.analysis.ranking.scores import Scores
from qlens.core.deprecation import renamed_value, warn
from qlens.core.deprecation.columns import old_columns, renamed_columns
from qlens.core.display import Result, frame_html, latex_table
from qlens.core.errors import InputError

TOKEN_COLUMNS = ["by", "rank", "row", "position", "score", "label", "runner_up", "p_y", "p_runner_up", "q_y"]
TOKEN_COLUMNS += ["label_weight", NEGATIVE_MARGIN, "context"]
LEGEND = {
    "label_weight": "gradient on the labels as a share of SFT's, sum(-g_y) / sum(1 - p_y), unit scale",
    "q_y": "the target's probability of the label; q_other: the mean of 1 - Q_y, p_other: the sum of 1 - p_y",
    NEGATIVE_MARGIN: "max over k != y of log p_k - log p_y, nats; with a teacher the smaller of student's and teacher's",
}


@dataclass(frozen=True, eq=False, repr=False)
class Ranking(Result):
    r"""Tokens and rows in order, for every method and by the models' margin: ``print`` it, or read ``rows`` and ``tokens``.

    For a method (``by`` is its spec), with the logit gradient g in unit scale, Q = p - g:

    .. math::
        \mathrm{tokens:}\ \ Q_y = p_y - g_y \ \uparrow \qquad
        \mathrm{rows:}\ \ \mathrm{label\ weight} = \frac{\sum -g_y}{\sum (1 - p_y)} \ \uparrow

    A row's label weight is the gradient on its labels as a share of SFT's: 1 is SFT, below 0 labels are pushed down. By
    the models' margin (``by`` is "negative_margin"), whatever the method:

    .. math::
        \mathrm{tokens:}\ \ s = \min_{m}\big(\max_{k \ne y} \log m_k - \log m_y\big) \ \downarrow \qquad
        \mathrm{rows:}\ \ \tfrac1n \sum \max(0, s) \ \downarrow

    over the student m = p and, if given, the teacher: the nats by which both prefer another token to the label.

    Equal scores (to six digits) share the first of their ranks and are listed by negative margin, then in the order of the
    data. Short rows vary more and are more frequent at both ends: see ``tokens``. Rows with a sum of 1 - p_y below 0.01, and
    scores that are NaN, have no rank and come last. ``notes`` gives their numbers.

    Args:
        rows: by, rank, row (number in the data), tokens (supervised), score, p_other (sum of 1 - p_y), label_weight, q_other
            (mean of 1 - Q_y), negative_margin (mean of max(0, s)), negative_margin_max, text.
        scores: of all tokens, in the order of the data.
        texts: of rows and tokens.
        notes: remarks on rows and tokens without a rank, and the rate.
        data: the rows as they were given, for ``export``; None for those of a view.
        skipped: the reason by number of each row that was left out.

    Source: Q = p - g of Xie et al. 2026 (arXiv 2606.11189).
    """

    rows: pd.DataFrame
    scores: Scores
    texts: RowTexts
    notes: tuple[str, ...] = ()
    data: Sequence[Any] | None = None
    skipped: Mapping[int, str] = field(default_factory=dict)

    @classmethod
    def of(cls, scores: Scores, texts: RowTexts, notes: Sequence[str] = (), **others: Any) -> "Ranking":
        """Rank tokens and their rows by these scores; ``notes`` are further remarks, ``others`` further fields."""
        frames, remarks = [], list(notes)
        for by in (*scores.methods, NEGATIVE_MARGIN):
            table = row_table(scores, by)
            frames.append(table.assign(text=table["row"].map(texts.text))[ROW_COLUMNS])
            values = scores.models[NEGATIVE_MARGIN] if by == NEGATIVE_MARGIN else scores.methods[by]["q_y"]
            if unranked := int(values.isna().sum()):
                remarks.append(f"{by}: {unranked} tokens have no rank, their score is NaN")
        if learned := int((frames[0]["p_other"] < SMALLEST_P_OTHER).sum()):
            remarks.append(f"{learned} rows have a sum of 1 - p_y below {SMALLEST_P_OTHER}: methods do not rank them")
        if single := int((frames[0]["tokens"] == 1).sum()):
            remarks.append(f"{single} rows have a single supervised token: their score is that token's")
        rows = renamed_columns(pd.concat(frames, ignore_index=True))
        return cls(rows, scores, texts, tuple(remarks), **others)

    @property
    def orders(self) -> list[str]:
        """What tokens and rows are ordered by: the methods' specs and "negative_margin"."""
        return [*self.scores.methods, NEGATIVE_MARGIN]

    @cached_property
    def tokens(self) -> pd.DataFrame:
        """All tokens in every order, with their texts; ``first_tokens`` has those of the first alone.

        Columns: by, rank, row, position (from 1), score, label, runner_up, p_y, p_runner_up, q_y, label_weight,
        negative_margin, context (the text before).
        """
        return self.first_tokens(None)

    def first_tokens(self, top: int | None) -> pd.DataFrame:
        """The lines of ``tokens`` of the first ``top`` tokens of every order; None: of all."""
        return renamed_columns(pd.concat([self._tokens(by, top) for by in self.orders], ignore_index=True))

    @cached_property
    def _orders(self) -> Mapping[str, Order]:
        return {by: token_order(self.scores, by) for by in self.orders}

    def alike(self, by: str) -> bool:
        """Whether all rows and all labels tie in an order."""
        by = renamed_value("by", by, {"suspicion": NEGATIVE_MARGIN})
        rows, ranks = self._rows(by), self._orders[by].ranks
        return bool(len(ranks) > 1 and np.nanmax(ranks, initial=0) == 1 and not (rows["rank"] > 1).any())

    def first(self, top: int) -> set[int]:
        """The rows among the first ``top`` of any order, or with one of its first ``top`` tokens."""
        orders = [by for by in self.orders if not self.alike(by)]
        frames = [
            frame.head(top).dropna(subset="rank")
            for by in orders
            for frame in (self._rows(by), self._tokens(by, top, texts=False))
        ]
        return {int(row) for frame in frames for row in frame["row"]} or set(map(int, self.rows["row"][:top]))

    def row(self, number: int) -> Any:
        """A row of the data by its number.

        Raises:
            InputError: the ranking is of a view, which does not keep its rows.
        """
        return rows_of(self)[number - 1]

    def text(self, top: int = 10) -> str:
        """The first ``top`` rows and tokens of every order as text."""
        parts = [self._block(by, top) for by in self.orders]
        notes = [f"- {note}" for note in self.notes]
        legend = [f"{name}: {words}." for name, words in LEGEND.items()]
        return "\n\n".join([*parts, "\n".join([*legend, *notes])])

    def table(self, top: int = 10) -> str:
        """The old name of ``text``."""
        warn("Ranking.table()", "Ranking.text()")
        return self.text(top)

    def to_frame(self) -> pd.DataFrame:
        """The rows of every order; ``tokens`` is the frame of tokens."""
        return self.rows

    def to_dict(self, top: int | None = None) -> dict[str, Any]:
        """As JSON: rows, tokens (a dict each; the first ``top`` of every order) and notes; NaN as None."""
        rows, tokens = records(_head(self.rows, top)), records(self.first_tokens(top))
        return {"rows": rows, "tokens": tokens, "notes": list(self.notes)}

    def to_jsonl(self, top: int | None = None) -> str:
        """JSON Lines: an object per row and per token (``kind``) of every order, or of its first ``top``."""
        frames = {"row": _head(self.rows, top), "token": self.first_tokens(top)}
        lines = (jsonl(frame.assign(kind=kind)) for kind, frame in frames.items())
        return "\n".join(filter(None, lines))

    def to_latex(
        self,
        columns: Sequence[str] | None = None,
        caption: str | None = None,
        label: str | None = None,
        top: int = 10,
        **options: Any,
    ) -> str:
        """The first ``top`` rows of every order in LaTeX (booktabs).

        Args:
            columns: columns of ``rows``; by default by, rank, row, tokens, label_weight, q_other and negative_margin.
            caption, label, options: as of ``qlens.core.display.latex_table``.
            top: rows per order.

        Raises:
            InputError: an unknown column.
        """
        default = ["by", "rank", "row", "tokens", "label_weight", "q_other", NEGATIVE_MARGIN]
        return latex_table(_head(self.rows, top), columns or default, caption, label, **options)

    def weights(self, by: str | None = None) -> pd.Series:
        """A weight for every row of the data, by its number: how far an order trusts it.

        By a method, its label weight, 0 where that is negative: cross-entropy with these weights has, on every row and at the
        ranked model, the method's sum of label gradients. By "negative_margin", exp(-negative_margin), the geometric mean over
        the row's tokens of p_y / p_runner-up, at most 1. Rows without one (left out of the ranking, or NaN) get the mean.

        Args:
            by: the order; by default the first in which not all rows tie.

        Raises:
            InputError: no such order, its rows all tie, or a ranking of a view, which does not keep its rows.
        """
        return weights(self, order_of(self, by))[0]

    def export(self, path: str | Path, by: str | None = None, drop_least: float | None = None) -> Export:
        """Write the data as JSON Lines: every row with its keys and a ``weight``, or without the least trusted rows.

        ``QTrainer`` multiplies losses by the column ``weight`` and still divides by the number of supervised tokens, so that
        a mean weight of 0.5 halves the step. TRL's SFTTrainer reads the file (question and answer renamed to prompt and
        completion) and ignores the column: for it leave rows out.

        Args:
            path: of the file, ending in .jsonl.
            by: the order; by default the first in which not all rows tie.
            drop_least: leave out this share of the ranked rows, the first of the order, instead of writing weights.

        Returns:
            an ``Export``, which prints what was written and left out.

        Raises:
            InputError: as ``weights``; rows that have a weight already, another ending, or a share that is none.

        Example:
            >>> print(ranking.export("kept.jsonl", by="dft", drop_least=0.1))  # doctest: +SKIP
        """
        return export(self, path, by, drop_least)

    def plot(self, top: int = 15) -> Any:
        """A matplotlib figure: the scores of the first ``top`` rows, a panel per order."""
        from qlens.analysis.plots.report_figures import figure_ranking

        return figure_ranking(self, top)

    def __str__(self) -> str:
        return self.text()

    def __repr__(self) -> str:
        return f"<Ranking of {self.rows['row'].nunique()} rows by {', '.join(self.orders)}>"

    def _repr_html_(self) -> str:
        return frame_html(_head(self.rows, 5), float_format="{:.3f}".format)

    def _rows(self, by: str) -> pd.DataFrame:
        """The rows in an order."""
        if by not in self.orders:
            raise InputError(f"by={by!r} is no order of this ranking: it has {', '.join(self.orders)}")
        return self.rows[self.rows["by"] == by]

    def _tokens(self, by: str, top: int | None = None, texts: bool = True) -> pd.DataFrame:
        """The first tokens of an order; without ``texts`` label and runner_up are ids, and there is no context."""
        index, ranks = self._orders[by].items[:top], self._orders[by].ranks[:top]
        frame = self.scores.models.iloc[index].reset_index(drop=True)
        of_method = self.scores.methods.get(by)
        for name in ("q_y", "label_weight"):
            frame[name] = np.nan if of_method is None else of_method[name].to_numpy()[index]
        score = frame[NEGATIVE_MARGIN if of_method is None else "q_y"]
        frame = frame.assign(by=by, rank=ranks, score=score, label_weight=rounded(frame["label_weight"], ZERO_WEIGHT))
        if not texts:
            return frame
        for name in ("label", "runner_up"):
            frame[name] = frame[name].map(self.texts.token)
        places = zip(frame["row"], frame["position"], strict=True)
        return frame.assign(context=[self.texts.context(row, position) for row, position in places])[TOKEN_COLUMNS]

    def _block(self, by: str, top: int) -> str:
        rows, tokens = self._rows(by), self._tokens(by, top)
        of_models = by == NEGATIVE_MARGIN
        if self.alike(by):
            weight = "" if of_models else f" (label weight {rows['label_weight'].iloc[0]:.3f} in every row)"
            return f"{by}: all labels tie{weight}"
        head = "largest first" if of_models else "smallest label weight first"
        skip = ["by", "score"] + (["label_weight", "q_other", "q_y"] if of_models else ["negative_margin_max"])
        frames = [frame.head(top).drop(columns=[c for c in skip if c in frame]) for frame in (rows, tokens)]
        counts = f"rows (of {len(rows)}):", f"tokens (of {len(self.scores.models)}):"
        texts = [_text(frame) for frame in frames]
        return "\n".join([f"{by}: {head}", *(line for pair in zip(counts, texts, strict=True) for line in pair)])


def _head(frame: pd.DataFrame, top: int | None) -> pd.DataFrame:
    """The first ``top`` lines of every order."""
    return frame.groupby("by", sort=False).head(top or len(frame))


def records(frame: pd.DataFrame) -> list[dict[str, Any]]:
    """A frame as JSON objects; NaN and infinity as None, and the columns' old names beside the new ones."""
    plain = [
        {key: None if isinstance(value, float) and not math.isfinite(value) else value for key, value in row.items()}
        for row in frame.to_dict("records")
    ]
    old = old_columns(frame)
    return [row | {name: row[new] for name, new in old.items()} for row in plain]


def jsonl(frame: pd.DataFrame) -> str:
    """JSON Lines of a frame, in plain ASCII."""
    return "\n".join(json.dumps(row) for row in records(frame))


def _text(frame: pd.DataFrame) -> str:
    """A frame for a terminal: ranks as whole numbers, texts as literals, so that no control character acts."""
    cells = frame.assign(rank=frame["rank"].map(lambda rank: "-" if pd.isna(rank) else f"{rank:.0f}"))
    for name in cells.columns.intersection(["text", "context", "label", "runner_up"]):
        cells[name] = cells[name].map(repr)
    return cells.to_string(
        index=False, float_format=lambda x: f"{x:.3g}" if abs(x) < 0.01 and x else f"{x:.3f}", na_rep="-"
    )
