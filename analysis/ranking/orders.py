"""Orders: ranks of tokens and of rows by their scores."""

from typing import NamedTuple

import numpy as np
import pandas as pd
from jaxtyping import Float, Int

from qlens.analysis.ranking.scores import Scores

NEGATIVE_MARGIN = "negative_margin"
SMALLEST_P_OTHER = 0.01  # sum of 1 - p_y of a row, below which even SFT has hardly a gradient
DIGITS = 6  # scores that agree to these are ties
ZERO_WEIGHT, ZERO_MASS = 1e-6, 1e-8  # a label weight, and a Q_y, below which a value is rounding
ROW_COLUMNS = ["by", "rank", "row", "tokens", "score", "p_other", "label_weight", "q_other", NEGATIVE_MARGIN]
ROW_COLUMNS += ["negative_margin_max", "text"]


class Order(NamedTuple):
    """An order of N scores: which comes at each place, and the rank of each place; NaN without one, at the end."""

    items: Int[np.ndarray, " N"]
    ranks: Float[np.ndarray, " N"]


def token_order(scores: Scores, by: str) -> Order:
    """The tokens by Q_y of a method, the lowest first, or by the models' margin, the largest first."""
    margin = scores.models[NEGATIVE_MARGIN]
    score = margin if by == NEGATIVE_MARGIN else scores.methods[by]["q_y"]
    return _order(score, margin, by != NEGATIVE_MARGIN, ZERO_MASS)


def row_table(scores: Scores, by: str) -> pd.DataFrame:
    """A line per row in the order of a method's label weight or of the models' margin: ``ROW_COLUMNS`` but for the text."""
    margin = scores.models[NEGATIVE_MARGIN]
    tokens = scores.models[["row"]].assign(
        p_other=scores.models["p_other"].astype(float), largest=margin, negative_margin=margin.clip(lower=0)
    )
    of_method = scores.methods.get(by)
    for name in ("q_other", "label_gradient"):
        tokens[name] = np.nan if of_method is None else of_method[name].to_numpy()
    tokens["label_gradient"] = tokens["label_gradient"].astype(float)
    groups = tokens.groupby("row", sort=True)
    table = groups.agg(
        tokens=("largest", "size"),
        p_other=("p_other", "sum"),
        negative_margin_max=("largest", "max"),
        q_other=("q_other", "mean"),
        negative_margin=(NEGATIVE_MARGIN, "mean"),
    )
    gradient = groups["label_gradient"].apply(lambda values: values.sum(skipna=False))
    weight = np.where(table["p_other"] > 0, gradient / table["p_other"], np.nan)
    ranked = np.where(table["p_other"] >= SMALLEST_P_OTHER, weight, np.nan)
    table["score"] = table[NEGATIVE_MARGIN] if of_method is None else ranked
    order = _order(table["score"], table[NEGATIVE_MARGIN], of_method is not None, ZERO_WEIGHT)
    table = table.reset_index().assign(by=by, label_weight=rounded(weight, ZERO_WEIGHT))
    table = table.iloc[order.items].reset_index(drop=True).assign(rank=order.ranks)
    return table[[name for name in ROW_COLUMNS if name != "text"]]


def _order(scores: pd.Series, margin: pd.Series, ascending: bool, zero: float) -> Order:
    """By the rounded score, ties by negative margin, then in the order of the data; NaN last, without a rank."""
    rank = pd.Series(rounded(scores.to_numpy(dtype=float), zero)).rank(method="min", ascending=ascending)
    frame = pd.DataFrame({"rank": rank, "margin": margin.to_numpy()})
    frame = frame.sort_values("margin", kind="stable", ascending=False)
    frame = frame.sort_values("rank", kind="stable", na_position="last")
    return Order(frame.index.to_numpy().astype(np.int32), frame["rank"].to_numpy())


def rounded(values: Float[np.ndarray, " N"], zero: float) -> Float[np.ndarray, " N"]:
    """Values at ``DIGITS`` binary-scaled digits; those below ``zero`` as zero."""
    mantissa, exponent = np.frexp(values)
    return np.where(np.abs(values) < zero, 0.0, np.ldexp(mantissa.round(DIGITS), exponent))
