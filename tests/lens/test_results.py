"""Results show themselves: a short repr, HTML, a table and its exports; old names keep working."""

import json

import matplotlib.pyplot as plt
import pandas as pd
import pytest
import torch
from cases import case
from example_study import example_study
from example_view import made as example_view
from explained import explained

import qlens
from qlens.testing import random_tokens


class Tokenizer:
    """A tokenizer of letters."""

    def decode(self, ids):
        return "".join("abcdefghi"[i] for i in ids)


def results():
    """One result of every class that has a table, with two of the columns that its LaTeX may have."""
    e, tokens = explained("dft"), random_tokens(12, 8)
    view = example_view()
    return {
        e: ("label", "p_y"),
        e.mixture: ("token", "the label"),
        qlens.check("sft"): ("id", "state"),
        qlens.destination("dft"): ("time", "p_0"),
        qlens.distances(tokens): ("left", "angle"),
        tokens: ("label", "p_y_teacher"),
        qlens.get("gem").target(tokens): ("p_y", "label_weight"),
        example_study(): ("method", "avg@8"),
        view: ("position", "label"),
        view.rank(): ("row", "label_weight"),
    }


def test_all_results_have_the_same_exports_a_plot_and_a_short_form():
    for result, columns in results().items():
        with case(type(result).__name__):
            assert len(repr(result)) < 200 and "tensor(" not in repr(result) + str(result) + result._repr_html_()
            assert repr(result).lstrip("<").startswith(type(result).__name__)
            assert any(tag in result._repr_html_() for tag in ("<table", "<pre", "<iframe"))
            frame = result.to_frame()
            assert isinstance(frame, pd.DataFrame) and len(frame) and json.loads(json.dumps(result.to_dict()))
            source = result.to_latex(columns, "A caption", "tab:one")
            heads = " & ".join(columns).replace("_", r"\_")
            assert (
                heads + r" \\" in source and r"\caption{A caption}" in source and source.count(r"\label{tab:one}") == 1
            )
            assert result.to_latex().startswith((r"\begin{tabular}", "% "))
            assert r"\begin{table}[t]" in result.to_latex(columns=columns, caption="A caption", position="t")
            with pytest.raises(qlens.InputError, match="no column 'nothing'"):
                result.to_latex(["nothing"])
            drawn = result.plot()
            assert drawn.get_figure().axes
    plt.close("all")


def test_distances_print_the_nearest_of_every_method_or_the_pairs_of_some():
    distances = qlens.distances(random_tokens(12, 8))
    nearest = distances.to_latex(["left", "right"])
    for name, [(other, _, _)] in distances.neighbours(1).items():
        assert f"{name} & {other} ".replace("_", r"\_") in nearest
    some = distances.to_frame(["sft", "dft", "kd"])
    assert {frozenset(pair) for pair in some[["left", "right"]].to_numpy()} == {
        frozenset(pair) for pair in (("sft", "dft"), ("sft", "kd"), ("dft", "kd"))
    }
    assert distances.to_latex(methods=["sft", "dft", "kd"]).count(r"\\") == 1 + 3
    with pytest.raises(qlens.InputError, match="methods must be a list of names among .*, got .*'nothing'"):
        distances.to_latex(methods=["sft", "nothing"])


def test_the_shares_of_a_mixture_sum_to_one():
    frame = explained("kd_hybrid").mixture.to_frame()
    assert list(frame) == ["token", "identifiable", "the label", "the teacher", "the student"]
    assert frame.iloc[:, 2:].sum(axis=1).to_list() == pytest.approx([1.0] * len(frame))


def test_the_frame_of_tokens_holds_all_that_they_hold():
    tokens = random_tokens(6, 9)
    frame = tokens.to_frame()
    assert frame["p_y"].to_list() == pytest.approx(tokens.label_probs.tolist())
    assert frame["p_y_teacher"].to_list() == pytest.approx(tokens.replace(logits=tokens.teacher).label_probs.tolist())
    best = tokens.probs.scatter(1, tokens.labels[:, None], 0).max(1)
    assert frame["runner_up"].to_list() == best.indices.tolist()
    assert frame["p_runner_up"].to_list() == pytest.approx(best.values.tolist())
    assert frame["entropy"].to_list() == pytest.approx(torch.distributions.Categorical(tokens.probs).entropy().tolist())
    assert frame["advantage"].to_list() == tokens.advantage.tolist()
    assert frame["negatives"].to_list() == tokens.negatives.sum(1).tolist()
    impossible = qlens.Tokens(logits=torch.tensor([[0.0, -torch.inf]]), labels=torch.tensor([0]))
    assert impossible.to_frame()[["p_y", "p_runner_up", "entropy"]].to_numpy().tolist() == [[1.0, 0.0, 0.0]]


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
