"""Tokens and targets as text, HTML, tables and plots."""

import json

import matplotlib.pyplot as plt
import pandas as pd
import pytest
import torch
from numpy.testing import assert_allclose

import qlens
from qlens.core.display import frame_html, latex_table, table_html
from qlens.testing import random_tokens


def test_tokens_and_targets_show_themselves_in_a_line():
    tokens = random_tokens(40, 9).replace(second=None, old=None)
    assert repr(tokens).startswith("Tokens(N=40, V=9, float64, reference, teacher, sequence, ")
    assert "<th>logits</th><td>(40, 9) float64</td>" in tokens._repr_html_()
    target = qlens.get("gem").target(tokens)
    inside = int(target.in_simplex.sum())
    assert repr(target).endswith(f", {inside} of 40 distributions)") and len(repr(target)) < 120
    assert target._repr_html_().count("<tr") == 1 + 10 and "first 10 rows" in target._repr_html_()
    assert target[:3]._repr_html_().count("<tr") == 1 + 3
    for shown in (tokens, target):
        assert "tensor" not in repr(shown) + shown._repr_html_()
    assert repr(qlens.get("sft").target(tokens)) == "Target(N=40, V=9, label weight 1, 40 of 40 distributions)"
    assert repr(target[:0]) == "Target(N=0, V=9, label weight undefined, 0 of 0 distributions)"


def test_the_table_of_a_target_holds_its_figures():
    target = qlens.get("asft_anchored").target(random_tokens(5, 4))
    frame = target.to_frame()
    q_y = target.q.gather(1, target.labels[:, None])[:, 0]
    for name, expected in (
        ("q_y", q_y),
        ("trust", target.trust),
        ("label_weight", target.label_weight),
        ("kl", target.kl),
    ):
        assert_allclose(frame[name], expected, rtol=1e-12, err_msg=name)
    assert frame["label"].tolist() == target.labels.tolist()
    assert json.loads(json.dumps(target.to_dict()))["scale"] == target.scale.tolist()
    latex = target.to_latex(columns=["p_y", "label_weight"], caption="One text", label="tab:one")
    assert r"p_y & label\_weight" in latex.replace(r"p\_y", "p_y") and r"\caption{One text}" in latex
    assert latex.count(r"\\") == 1 + 5


def test_a_target_plots_its_label_weights():
    target = qlens.get("dft").target(random_tokens(30, 9))
    figure, ax = plt.subplots()
    assert target.plot(ax=ax, name="dft") is ax
    (points,) = [line for line in ax.lines if line.get_label() == "dft"]
    x, y = points.get_data()
    assert len(x) == 30
    assert_allclose(y, x)  # the label weight of dft is p_y
    plt.close(figure)


def test_html_is_escaped():
    assert "<i>" not in table_html("<i>", {"<i>": "<i>"}) + frame_html(pd.DataFrame({"<i>": ["<i>"]}), "<i>")


def test_a_latex_table_takes_columns_caption_label_and_the_options_of_pandas():
    frame = pd.DataFrame({"a_b": ["<50 %\n& more"], "c": [1 / 3], "d": [float("nan")]})
    source = latex_table(frame, ["c", "a_b", "d"], "A caption", "tab:one", position="t")
    assert r"c & a\_b & d" in source and r"0.3333 & \textless{}50 \% \& more & -" in source
    assert r"\begin{table}[t]" in source and r"\caption{A caption}" in source and r"\label{tab:one}" in source
    assert latex_table(frame).startswith(r"\begin{tabular}")
    with pytest.raises(qlens.InputError, match="no column 'trust'; there are a_b, c, d"):
        latex_table(frame, ["trust"])
    with pytest.raises(qlens.InputError, match="columns=\\[...\\]"):
        latex_table(frame, "A caption")


def test_effective_trust_is_the_old_name_of_the_label_weight():
    target = qlens.get("dft").target(random_tokens(5, 4))
    with pytest.warns(DeprecationWarning, match="Target.effective_trust is deprecated; write Target.label_weight"):
        assert torch.equal(target.effective_trust, target.label_weight)
