"""Ranking: which labels, and which demonstrations, the targets trust least; and which labels the models themselves doubt."""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from jaxtyping import Float

from qlens.analysis.token_view.summary import Summary
from qlens.core.errors import InputError

SUSPICION = "suspicion"
LITTLE = 0.01  # summed 1 - p_y of a row on which even SFT would hardly pull
DIGITS = 6  # what differs beyond these is rounding: a tie
ZERO, NO_MASS = 1e-6, 1e-8  # a trust, and a Q_y, nearer to zero than this is rounding
ROW_COLUMNS = ["by", "rank", "row", "tokens", "score", "room", "trust", "ignored", "suspicion", "worst", "text"]
TOKEN_COLUMNS = [
    "by",
    "rank",
    "row",
    "position",
    "score",
    "label",
    "rival",
    "p_y",
    "p_rival",
    "q_y",
    "trust",
    "suspicion",
    "context",
]
OF_METHODS = ["q_y", "trust", "ignored", "pull"]
SAYS = {
    "trust": "pull toward the labels as a share of SFT's, sum(-g_y) / sum(1 - p_y), unit scale",
    "q_y": "the part of the target that is on the label; ignored: the mean of 1 - Q_y",
    SUSPICION: "nats by which the strongest alternative beats the label (the smaller of student's and teacher's)",
}


@dataclass(frozen=True, eq=False)
class Ranking:
    r"""Tokens and rows in order, for every method and by suspicion: print it, or read ``rows`` and ``tokens``.

    For a method (``by`` is its spec), with the logit gradient g in unit scale, Q = p - g:

    .. math::
        \mathrm{tokens:}\ \ Q_y = p_y - g_y \ \uparrow \qquad
        \mathrm{rows:}\ \ \mathrm{trust} = \frac{\sum -g_y}{\sum (1 - p_y)} \ \uparrow

    The room 1 - p_y is what SFT would pull by. A row's trust is the share of it that the method keeps, so that tokens with
    nothing to learn do not count, and a trust of 1 is SFT's; below 0 labels are pushed down on the whole. What a token's
    target has not on the label, ignored = 1 - Q_y, is what the pull lacks of the room, (1 - p_y) - (-g_y). By suspicion
    (``by`` is "suspicion"), whatever the method:

    .. math::
        \mathrm{tokens:}\ \ s = \min_{m}\big(\max_{k \ne y} \log m_k - \log m_y\big) \ \downarrow \qquad
        \mathrm{rows:}\ \ \tfrac1n \sum \max(0, s) \ \downarrow

    over the student m = p and, where there is one, the teacher: the nats by which the less convinced of the two prefers
    another token to the label. A row's ``worst`` is its largest s.

    Equal scores (to six digits) share the first of their ranks; they are listed by suspicion, then as in the data. A row
    of a single token has that token's figures: short rows are found at both ends more often than long ones, so ``tokens``
    says how many there are. Rows with a room of less than 0.01 in all, on which SFT would hardly pull either, and scores
    that are NaN have no rank and come last; rows without a supervised token are not in the tables. ``notes`` says how many
    of each.

    Args:
        rows: by, rank, row (its number in the data), tokens (supervised), score, room (sum), trust, ignored (mean),
            suspicion (mean of max(0, s)), worst, text.
        tokens: by, rank, row, position (from 1), score, label, rival, p_y, p_rival, q_y, trust, suspicion, context (the text
            before).
        notes: what a reader should know.

    Source: trust and room as ``Target.pull`` and ``Target.room`` have them (Xie et al. 2026, arXiv 2606.11189, Q = p - g).
    """

    rows: pd.DataFrame
    tokens: pd.DataFrame
    notes: tuple[str, ...] = ()

    @property
    def orders(self) -> list[str]:
        """What there is an order by: the methods' specs and "suspicion"."""
        return list(dict.fromkeys(self.rows["by"]))

    def alike(self, by: str) -> bool:
        """Whether a method trusts all rows and all labels alike, so that its order says nothing."""
        rows, tokens = self._of(self.rows, by), self._of(self.tokens, by)
        return bool(len(tokens) > 1 and tokens["rank"].max() == 1 and not (rows["rank"] > 1).any())

    def first(self, top: int) -> set[int]:
        """The rows among the first so many of any order that is one, or with one of its first so many tokens."""
        orders = [by for by in self.orders if not self.alike(by)]
        frames = [
            self._of(frame, by).head(top).dropna(subset="rank") for by in orders for frame in (self.rows, self.tokens)
        ]
        return {int(row) for frame in frames for row in frame["row"]} or set(map(int, self.rows["row"][:top]))

    def to_jsonl(self, top: int | None = None) -> str:
        """JSON Lines: an object per row and per token of every order, ``kind`` says which; ``top``: the first so many only."""
        frames = {"row": self.rows, "token": self.tokens}
        chosen = {kind: frame.groupby("by", sort=False).head(top or len(frame)) for kind, frame in frames.items()}
        return "\n".join(filter(None, (jsonl(frame.assign(kind=kind)) for kind, frame in chosen.items())))

    def table(self, top: int = 10) -> str:
        """The first rows and tokens of every order as text."""
        parts = [self._block(by, top) for by in self.orders]
        notes = [f"- {note}" for note in self.notes]
        legend = [f"{name}: {says}." for name, says in SAYS.items()]
        return "\n\n".join([*parts, "\n".join([*legend, *notes])])

    def __str__(self) -> str:
        return self.table()

    def _of(self, frame: pd.DataFrame, by: str) -> pd.DataFrame:
        if by not in self.orders:
            raise InputError(f"by={by!r} is no order of this ranking: it has {', '.join(self.orders)}")
        return frame[frame["by"] == by]

    def _block(self, by: str, top: int) -> str:
        rows, tokens = self._of(self.rows, by), self._of(self.tokens, by)
        if self.alike(by):
            trust = "" if by == SUSPICION else f" (trust {rows['trust'].iloc[0]:.3f} in every row)"
            return f"{by}: all labels are alike to it{trust}; nothing to order"
        head = "the labels that the models doubt most" if by == SUSPICION else "what it trusts least"
        skip = ["by", "score"] + (["trust", "ignored", "q_y"] if by == SUSPICION else ["worst"])
        shown = [frame.head(top).drop(columns=[c for c in skip if c in frame]) for frame in (rows, tokens)]
        texts = [_text(frame) for frame in shown]
        counts = f"rows (of {len(rows)}):", f"tokens (of {len(tokens)}):"
        return "\n".join([f"{by}: {head}", *(line for pair in zip(counts, texts, strict=True) for line in pair)])


def rank(summary: Summary, rows: Sequence[int], positions: Sequence[int], pieces: Sequence[str], contexts: Sequence[str],
         texts: dict[int, str], rivals: Sequence[str], notes: Sequence[str] = ()) -> Ranking:  # fmt: skip
    """The ranking of N summarised tokens; see ``Ranking`` for the scores.

    Args:
        summary: of N tokens.
        rows, positions, pieces, contexts, rivals: of every token, the number of its row, where it stands in it, its label's
            text, the text before it and the strongest alternative's text.
        texts: what is shown of a row, by its number.
        notes: what is to be said beside.
    """
    base = summary.models.assign(row=np.asarray(rows), position=np.asarray(positions), context=list(contexts))
    base = base.assign(label=list(pieces), rival=list(rivals))
    row_parts, token_parts, said = [], [], list(notes)
    for by, frame in {**summary.methods, SUSPICION: None}.items():
        tokens = base.assign(by=by, **dict.fromkeys(OF_METHODS, np.nan))
        if frame is not None:
            tokens[OF_METHODS] = frame[OF_METHODS].to_numpy()
        tokens["score"] = tokens[SUSPICION if frame is None else "q_y"]
        token_parts.append(_ordered(tokens, frame is not None, NO_MASS)[TOKEN_COLUMNS])
        table = _row_table(tokens, by)
        row_parts.append(_ordered(table.assign(text=table["row"].map(texts)), frame is not None, ZERO)[ROW_COLUMNS])
        if lost := int(token_parts[-1]["rank"].isna().sum()):
            said.append(f"{by}: {lost} tokens have no rank, their score is NaN")
    few = row_parts[0]
    if idle := int((few["room"] < LITTLE).sum()):
        said.append(f"{idle} rows leave even SFT a room of less than {LITTLE}: no method's trust in them is ranked")
    if single := int((few["tokens"] == 1).sum()):
        said.append(f"{single} rows have a single supervised token: their score is that token's")
    return Ranking(pd.concat(row_parts, ignore_index=True), pd.concat(token_parts, ignore_index=True), tuple(said))


def _row_table(tokens: pd.DataFrame, by: str) -> pd.DataFrame:
    """A line per row, with its score."""
    doubted = tokens.assign(**{SUSPICION: tokens[SUSPICION].clip(lower=0), "worst": tokens[SUSPICION]})
    doubted[["room", "pull"]] = doubted[["room", "pull"]].astype(float)
    groups = doubted.groupby("row", sort=True)
    table = groups.agg(
        tokens=("label", "size"), room=("room", "sum"), worst=("worst", "max"), ignored=("ignored", "mean")
    )
    table["suspicion"] = groups[SUSPICION].mean()
    pull = groups["pull"].apply(lambda values: values.sum(skipna=False))
    table["trust"] = np.where(table["room"] > 0, pull / table["room"], np.nan)
    table["score"] = table["suspicion"] if by == SUSPICION else table["trust"].where(table["room"] >= LITTLE)
    return table.reset_index().assign(by=by)


def _ordered(frame: pd.DataFrame, ascending: bool, zero: float) -> pd.DataFrame:
    """By the rounded score, equal ones by suspicion, then as in the data; what has no score comes last, without a rank."""
    rounded = pd.Series(_rounded(frame["score"].to_numpy(dtype=float), zero), index=frame.index)
    frame = frame.assign(rank=rounded.rank(method="min", ascending=ascending), trust=_rounded(frame["trust"], ZERO))
    frame = frame.sort_values(SUSPICION, kind="stable", ascending=False)
    return frame.sort_values("rank", kind="stable", na_position="last", ignore_index=True)


def _rounded(values: Float[np.ndarray, " N"], zero: float) -> Float[np.ndarray, " N"]:
    """To ``DIGITS`` digits; what is nearer to zero than ``zero`` is zero."""
    mantissa, exponent = np.frexp(values)
    return np.where(np.abs(values) < zero, 0.0, np.ldexp(mantissa.round(DIGITS), exponent))


def jsonl(frame: pd.DataFrame) -> str:
    """JSON Lines of a frame, in plain ASCII; what is NaN or infinite is null."""
    return "\n".join(json.dumps({key: _plain(value) for key, value in row.items()}) for row in frame.to_dict("records"))


def _plain(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _text(frame: pd.DataFrame) -> str:
    """As printed: ranks as whole numbers, texts so that nothing in them acts on a terminal."""
    shown = frame.assign(rank=frame["rank"].map(lambda rank: "-" if pd.isna(rank) else f"{rank:.0f}"))
    for name in shown.columns.intersection(["text", "context", "label", "rival"]):
        shown[name] = shown[name].map(repr)
    return shown.to_string(
        index=False, float_format=lambda x: f"{x:.3g}" if abs(x) < 0.01 and x else f"{x:.3f}", na_rep="-"
    )
