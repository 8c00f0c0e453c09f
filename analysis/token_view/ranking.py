"""Ranking of labels and of rows by the target of a method, and by the margin of the models themselves."""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from jaxtyping import Float

from qlens.analysis.token_view.summary import Summary
from qlens.core.deprecation import renamed_value, warn
from qlens.core.deprecation.columns import old_columns, renamed_columns
from qlens.core.display import Result, frame_html, latex_table
from qlens.core.errors import InputError

NEGATIVE_MARGIN = "negative_margin"
SMALLEST_P_OTHER = 0.01  # sum of 1 - p_y of a row, below which even SFT has hardly a gradient
DIGITS = 6  # scores that agree to these are ties
ZERO_WEIGHT, ZERO_MASS = 1e-6, 1e-8  # a label weight, and a Q_y, below which a value is rounding
ROW_COLUMNS = ["by", "rank", "row", "tokens", "score", "p_other", "label_weight", "q_other", NEGATIVE_MARGIN]
ROW_COLUMNS += ["negative_margin_max", "text"]
TOKEN_COLUMNS = ["by", "rank", "row", "position", "score", "label", "runner_up", "p_y", "p_runner_up", "q_y"]
TOKEN_COLUMNS += ["label_weight", NEGATIVE_MARGIN, "context"]
OF_METHODS = ["q_y", "label_weight", "q_other", "label_gradient"]
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
        tokens: by, rank, row, position (from 1), score, label, runner_up, p_y, p_runner_up, q_y, label_weight,
            negative_margin, context (the text before).
        notes: remarks on rows and tokens without a rank.

    Source: Q = p - g of Xie et al. 2026 (arXiv 2606.11189).
    """

    rows: pd.DataFrame
    tokens: pd.DataFrame
    notes: tuple[str, ...] = ()

    @property
    def orders(self) -> list[str]:
        """What tokens and rows are ordered by: the methods' specs and "negative_margin"."""
        return list(dict.fromkeys(self.rows["by"]))

    def alike(self, by: str) -> bool:
        """Whether all rows and all labels tie in an order."""
        by = renamed_value("by", by, {"suspicion": NEGATIVE_MARGIN})
        rows, tokens = self._of(self.rows, by), self._of(self.tokens, by)
        return bool(len(tokens) > 1 and tokens["rank"].max() == 1 and not (rows["rank"] > 1).any())

    def first(self, top: int) -> set[int]:
        """The rows among the first ``top`` of any order, or with one of its first ``top`` tokens."""
        orders = [by for by in self.orders if not self.alike(by)]
        frames = [
            self._of(frame, by).head(top).dropna(subset="rank") for by in orders for frame in (self.rows, self.tokens)
        ]
        return {int(row) for frame in frames for row in frame["row"]} or set(map(int, self.rows["row"][:top]))

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
        rows, tokens = (records(_head(frame, top)) for frame in (self.rows, self.tokens))
        return {"rows": rows, "tokens": tokens, "notes": list(self.notes)}

    def to_jsonl(self, top: int | None = None) -> str:
        """JSON Lines: an object per row and per token (``kind``) of every order, or of its first ``top``."""
        frames = {"row": self.rows, "token": self.tokens}
        lines = (jsonl(_head(frame, top).assign(kind=kind)) for kind, frame in frames.items())
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

    def _of(self, frame: pd.DataFrame, by: str) -> pd.DataFrame:
        if by not in self.orders:
            raise InputError(f"by={by!r} is no order of this ranking: it has {', '.join(self.orders)}")
        return frame[frame["by"] == by]

    def _block(self, by: str, top: int) -> str:
        rows, tokens = self._of(self.rows, by), self._of(self.tokens, by)
        of_models = by == NEGATIVE_MARGIN
        if self.alike(by):
            weight = "" if of_models else f" (label weight {rows['label_weight'].iloc[0]:.3f} in every row)"
            return f"{by}: all labels tie{weight}"
        head = "largest first" if of_models else "smallest label weight first"
        skip = ["by", "score"] + (["label_weight", "q_other", "q_y"] if of_models else ["negative_margin_max"])
        frames = [frame.head(top).drop(columns=[c for c in skip if c in frame]) for frame in (rows, tokens)]
        counts = f"rows (of {len(rows)}):", f"tokens (of {len(tokens)}):"
        texts = [_text(frame) for frame in frames]
        return "\n".join([f"{by}: {head}", *(line for pair in zip(counts, texts, strict=True) for line in pair)])


def rank(
    summary: Summary,
    rows: Sequence[int],
    positions: Sequence[int],
    labels: Sequence[str],
    contexts: Sequence[str],
    texts: dict[int, str],
    runners_up: Sequence[str],
    notes: Sequence[str] = (),
) -> Ranking:
    """Rank N summarised tokens; see ``Ranking`` for the scores.

    Args:
        summary: of the N tokens.
        rows, positions: of every token, the number of its row and its position in it.
        labels, contexts, runners_up: of every token, the texts of its label, of what precedes it, and of its runner-up.
        texts: the text shown of a row, by its number.
        notes: further remarks.
    """
    base = summary.models.assign(row=np.asarray(rows), position=np.asarray(positions), context=list(contexts))
    base = base.assign(label=list(labels), runner_up=list(runners_up))
    row_frames, token_frames, remarks = [], [], list(notes)
    for by, frame in {**summary.methods, NEGATIVE_MARGIN: None}.items():
        tokens = base.assign(by=by, **dict.fromkeys(OF_METHODS, np.nan))
        if frame is not None:
            tokens[OF_METHODS] = frame[OF_METHODS].to_numpy()
        tokens["score"] = tokens[NEGATIVE_MARGIN if frame is None else "q_y"]
        token_frames.append(_ordered(tokens, frame is not None, ZERO_MASS)[TOKEN_COLUMNS])
        table = _row_table(tokens, by)
        table = table.assign(text=table["row"].map(texts))
        row_frames.append(_ordered(table, frame is not None, ZERO_WEIGHT)[ROW_COLUMNS])
        if unranked := int(token_frames[-1]["rank"].isna().sum()):
            remarks.append(f"{by}: {unranked} tokens have no rank, their score is NaN")
    first = row_frames[0]
    if learned := int((first["p_other"] < SMALLEST_P_OTHER).sum()):
        remarks.append(f"{learned} rows have a sum of 1 - p_y below {SMALLEST_P_OTHER}: methods do not rank them")
    if single := int((first["tokens"] == 1).sum()):
        remarks.append(f"{single} rows have a single supervised token: their score is that token's")
    joined = (pd.concat(frames, ignore_index=True) for frames in (row_frames, token_frames))
    return Ranking(*map(renamed_columns, joined), tuple(remarks))


def _row_table(tokens: pd.DataFrame, by: str) -> pd.DataFrame:
    """A line per row, with its score."""
    tokens = tokens.assign(
        **{NEGATIVE_MARGIN: tokens[NEGATIVE_MARGIN].clip(lower=0), "largest": tokens[NEGATIVE_MARGIN]}
    )
    tokens[["p_other", "label_gradient"]] = tokens[["p_other", "label_gradient"]].astype(float)
    groups = tokens.groupby("row", sort=True)
    table = groups.agg(
        tokens=("label", "size"),
        p_other=("p_other", "sum"),
        negative_margin_max=("largest", "max"),
        q_other=("q_other", "mean"),
        negative_margin=(NEGATIVE_MARGIN, "mean"),
    )
    gradient = groups["label_gradient"].apply(lambda values: values.sum(skipna=False))
    table["label_weight"] = np.where(table["p_other"] > 0, gradient / table["p_other"], np.nan)
    ranked = table["label_weight"].where(table["p_other"] >= SMALLEST_P_OTHER)
    table["score"] = table[NEGATIVE_MARGIN] if by == NEGATIVE_MARGIN else ranked
    return table.reset_index().assign(by=by)


def _ordered(frame: pd.DataFrame, ascending: bool, zero: float) -> pd.DataFrame:
    """By the rounded score, ties by negative margin, then in the order of the data; NaN last, without a rank."""
    rounded = pd.Series(_rounded(frame["score"].to_numpy(dtype=float), zero), index=frame.index)
    weight = _rounded(frame["label_weight"], ZERO_WEIGHT)
    frame = frame.assign(rank=rounded.rank(method="min", ascending=ascending), label_weight=weight)
    frame = frame.sort_values(NEGATIVE_MARGIN, kind="stable", ascending=False)
    return frame.sort_values("rank", kind="stable", na_position="last", ignore_index=True)


def _rounded(values: Float[np.ndarray, " N"], zero: float) -> Float[np.ndarray, " N"]:
    """Values at ``DIGITS`` binary-scaled digits; those below ``zero`` as zero."""
    mantissa, exponent = np.frexp(values)
    return np.where(np.abs(values) < zero, 0.0, np.ldexp(mantissa.round(DIGITS), exponent))


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
