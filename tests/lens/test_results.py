"""Results show themselves: a short repr, HTML, a table and its exports; old names keep working."""

import json

import pytest
from cases import case
from explained import explained

import qlens
from qlens.testing import random_tokens


class Tokenizer:
    """A tokenizer of letters."""

    def decode(self, ids):
        return "".join("abcdefghi"[i] for i in ids)


def test_results_show_themselves_shortly_and_export_their_table():
    e = explained("dft")
    for result in (e, e.mixture, qlens.check("sft"), qlens.destination("dft"), qlens.distances(random_tokens(12, 8))):
        with case(type(result).__name__):
            assert len(repr(result)) < 120 and "tensor(" not in repr(result) + str(result)
            assert repr(result).startswith(f"{type(result).__name__}(") and result._repr_html_().startswith("<p")
            assert len(result.to_frame()) and "tabular" in result.to_latex(caption="A caption")
            assert json.loads(json.dumps(result.to_dict()))


def test_tokens_are_printed_by_a_tokenizer_or_a_function():
    tokens = random_tokens(6, 9)
    letters = ["abcdefghi"[int(y)] for y in tokens.labels]
    assert qlens.explain("sft", tokens, token_text=Tokenizer()).table["label"].tolist() == [repr(c) for c in letters]
    with pytest.warns(DeprecationWarning, match="token_text"):
        assert qlens.explain("sft", tokens, pieces="abcdefghi".__getitem__).table["label"].tolist() == letters
    with pytest.raises(qlens.InputError, match="write token_text=tokenizer"):
        qlens.explain("sft", tokens, token_text=3)


def test_old_names_of_an_explanation_warn_and_answer():
    e = explained("dft")
    for old, new in (("leak", e.shift_variance), ("nearly", e.near_match), ("label_weights", e.class_weights)):
        with case(old), pytest.warns(DeprecationWarning, match="Explanation"):
            assert getattr(e, old) is new
    with pytest.warns(DeprecationWarning, match="label_weight"):
        assert e.table["trust"].equals(e.table["label_weight"])
    rows = e.to_dict()["table"]
    assert rows[0]["trust"] == rows[0]["label_weight"] and rows[0]["q_rest"] == rows[0]["q_runner_up"]
    with pytest.warns(DeprecationWarning, match="loss="):
        assert "identity" in qlens.check_variant(thing="sft")
