"""Ranking: hand-computed scores, ties, short rows, rows without a rank, and exports."""

import json

import numpy as np
import pandas as pd
import pytest
from numpy.testing import assert_allclose

from qlens import InputError
from qlens.analysis.ranking import Ranking
from qlens.analysis.ranking.row_texts import RowTexts
from qlens.analysis.ranking.scores import Scores

# row, p_y, 1 - Q_y of two methods, negative margin
TOKENS = [
    (1, 0.9, 0.0, 0.1, -2.0),
    (1, 0.1, 0.0, 0.8, 3.0),
    (2, 0.5, 0.0, 0.5, 0.0),
    (4, 0.2, 0.0, 1.1, 6.0),
    (4, 0.2, 0.0, 0.8, 1.0),
    (4, 1.0, 0.0, 0.0, -9.0),
    (7, 0.99999, 0.0, 0.3, -5.0),
]


def make_ranking(tokens=TOKENS, notes=()):
    rows, p_y, *q_other, margin = (np.array(column) for column in zip(*tokens, strict=True))
    models = {"p_y": p_y, "p_other": 1 - p_y, "negative_margin": margin, "p_runner_up": 1 - p_y}
    methods = {
        name: pd.DataFrame(
            {
                "q_y": 1 - each,
                "q_other": each,
                "label_gradient": 1 - p_y - each,
                "label_weight": np.divide(1 - p_y - each, 1 - p_y, where=p_y < 1, out=np.full(len(p_y), np.nan)),
            }
        )
        for name, each in zip(("sft", "mine"), q_other, strict=True)
    }
    n = len(tokens)
    models |= {"row": rows, "position": np.arange(1, n + 1), "label": np.arange(n), "runner_up": np.arange(n)}
    pieces = [f"w{number}" for number in range(n)] + ["\u202ebefore", "row\n"]
    ids = {row: [n] * n + [n + 1, row] for row in rows}
    texts = RowTexts(pieces, ids, dict.fromkeys(rows, n))
    return Ranking.of(Scores(pd.DataFrame(models), methods), texts, notes)


def of(frame, by):
    return frame[frame["by"] == by]


def test_rows_are_ordered_by_their_label_weight():
    rows = of(make_ranking().rows, "mine").set_index("row")
    assert rows.index.tolist() == [4, 2, 1, 7]
    assert_allclose(rows.loc[1, "label_weight"], (0.0 + 0.1) / (0.1 + 0.9), atol=1e-6)
    assert_allclose(rows.loc[4, "label_weight"], (-0.3 + 0.0 + 0.0) / 1.6, atol=1e-6)
    assert_allclose(
        rows.loc[4, ["p_other", "q_other", "negative_margin", "negative_margin_max"]].astype(float),
        [1.6, 1.9 / 3, 7 / 3, 6],
    )
    assert rows["tokens"].tolist() == [3, 1, 2, 1]
    assert rows.loc[[4, 2, 1], "rank"].tolist() == [1, 2, 3]
    assert np.isnan(rows.loc[7, "rank"]), "no rank where even SFT has hardly a gradient"


def test_tokens_are_ordered_by_q_of_the_label():
    tokens = of(make_ranking().tokens, "mine")
    assert tokens["label"].tolist() == ["w3", "w1", "w4", "w2", "w6", "w0", "w5"], "ties by negative margin"
    assert tokens["rank"].tolist() == [1, 2, 2, 4, 5, 6, 7]
    assert_allclose(tokens["score"], [-0.1, 0.2, 0.2, 0.5, 0.7, 0.9, 1.0], atol=1e-9)


def test_the_margin_has_an_order_of_its_own():
    ranking = make_ranking()
    assert ranking.orders == ["sft", "mine", "negative_margin"]
    assert of(ranking.rows, "negative_margin")["row"].tolist() == [4, 1, 2, 7]
    assert of(ranking.rows, "negative_margin")["rank"].tolist() == [1, 2, 3, 3], "no negative margin: a tie"
    assert of(ranking.tokens, "negative_margin")["label"].tolist() == ["w3", "w1", "w4", "w2", "w0", "w6", "w5"]


def test_a_method_with_tied_labels_gives_no_order():
    ranking = make_ranking()
    assert ranking.alike("sft") and not ranking.alike("mine") and not ranking.alike("negative_margin")
    assert set(of(ranking.tokens, "sft")["rank"]) == {1}
    assert "sft: all labels tie (label weight 1.000 in every row)" in str(ranking)
    assert ranking.first(1) == {4}, "an order of ties chooses no row"
    assert ranking.first(2) == {1, 2, 4}, "rows 4 and 2, and one of the first tokens is in row 1"
    only = make_ranking([(row, p, 0.0, 0.0, 0.0) for row, p, *_ in TOKENS])
    assert only.first(2) == {1, 2}


def test_rounding_makes_ties_and_nan_comes_last():
    tokens = [(1, 0.5, 0.0, 0.3, 1.0), (1, 0.5, 0.0, 0.3 + 1e-9, np.inf), (2, 0.5, 0.0, np.nan, 1.0)]
    ranking = make_ranking(tokens)
    user_rows = of(ranking.tokens, "mine")
    tiny = of(make_ranking([(1, 0.5, 0.0, 1 - q, 1.0) for q in (3e-7, 2e-7, 1e-9, -1e-9)]).tokens, "mine")
    assert tiny["label"].tolist() == ["w2", "w3", "w1", "w0"] and tiny["rank"].tolist() == [1, 1, 3, 4]
    assert user_rows["rank"].tolist()[:2] == [1, 1] and np.isnan(user_rows["rank"].iloc[2])
    assert user_rows["label"].iloc[0] == "w1", "infinite margins are ordered"
    assert np.isnan(of(ranking.rows, "mine").set_index("row").loc[2, "rank"])
    assert of(ranking.rows, "negative_margin")["row"].tolist() == [1, 2]
    assert "mine: 1 tokens have no rank, their score is NaN" in ranking.notes


def test_special_rows_are_noted():
    text = str(make_ranking(notes=["left out, no supervised token: row 3"]))
    assert "left out, no supervised token: row 3" in text
    assert "2 rows have a single supervised token: their score is that token's" in text
    assert "1 rows have a sum of 1 - p_y below 0.01: methods do not rank them" in text
    assert "'row\\nw4'" in text and "\u202e" not in text, "nothing in a text acts on a terminal"


def test_json_lines_are_the_tables():
    ranking = make_ranking()
    lines = [json.loads(line) for line in ranking.to_jsonl().splitlines()]
    assert len(lines) == len(ranking.rows) + len(ranking.tokens)
    first = next(line for line in lines if line["kind"] == "row" and line["by"] == "mine")
    assert first["row"] == 4 and first["rank"] == 1 and first["text"] == "row\nw4"
    assert [line["rank"] for line in lines if line["kind"] == "row" and line["by"] == "mine"][-1] is None
    few = [json.loads(line) for line in ranking.to_jsonl(1).splitlines()]
    assert [(line["kind"], line["by"]) for line in few] == [
        (kind, by) for kind in ("row", "token") for by in ("sft", "mine", "negative_margin")
    ]
    assert ranking.to_jsonl().isascii()
    with pytest.raises(InputError, match="by='dft' is no order of this ranking: it has sft, mine, negative_margin"):
        ranking.alike("dft")


def test_every_export_has_the_first_rows():
    ranking = make_ranking()
    assert repr(ranking) == "<Ranking of 4 rows by sft, mine, negative_margin>"
    assert ranking.to_frame() is ranking.rows and len(ranking._repr_html_()) < 10_000
    record = json.loads(json.dumps(ranking.to_dict(1)))
    assert [row["by"] for row in record["rows"]] == ranking.orders and record["rows"][1]["row"] == 4
    assert record["rows"][1]["trust"] == record["rows"][1]["label_weight"], "old keys stay beside the new ones"
    source = ranking.to_latex(["by", "row", "label_weight"], "Rows.", top=1)
    assert source.count("\\\\\n") == 4 and "Rows." in source and "mine & 4 & -0.1875" in source
    user_axes, margin = ranking.plot(2).axes
    assert user_axes.lines[0].get_xdata().tolist() == of(ranking.rows, "mine")["score"].tolist()[:2]
    assert [tick.get_text().partition(":")[0] for tick in margin.get_yticklabels()] == ["4", "1"]
    with pytest.warns(DeprecationWarning, match="label_weight"):
        assert ranking.rows["trust"].equals(ranking.rows["label_weight"])
    with pytest.warns(DeprecationWarning, match=r"Ranking.text\(\)"):
        assert ranking.table(3) == ranking.text(3)
