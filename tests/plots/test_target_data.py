"""Frames behind the target plots, token text in figures, and one call per picture."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from matplotlib import pyplot as plt
from numpy.testing import assert_allclose
from tiny_models import letters

import qlens
from qlens import InputError, Tokens
from qlens.analysis import plots
from qlens.analysis.plots import plane_frame, shown, sweep_frame, sweep_tokens, text_frame, token_frame
from qlens.analysis.token_view.token_text import TokenText


@settings(max_examples=30, deadline=None)
@given(st.text())
def test_token_text_is_visible_and_idempotent(text):
    once = shown(text, letters=10_000)
    assert once and once.isprintable() and not any(letter.isspace() for letter in once)
    assert shown(once, letters=10_000) == once


def test_candidates_hold_the_label_and_the_largest_entries():
    torch.manual_seed(0)
    tokens = Tokens(logits=4 * torch.randn(1, 32_000, dtype=torch.float64), labels=torch.tensor([31_999]))
    data = token_frame(["sft", "gem"], tokens, 0, top=5)
    assert len(data) == 12 and data.groupby("method")[["p", "q"]].sum().to_numpy() == pytest.approx(1.0)
    assert data[data["label"]]["token"].tolist() == ["31999"] * 2
    q = qlens.get("gem").target(tokens).q[0]
    assert (
        data[(data["method"] == "gem") & (data["token"] == str(int(q.abs().argmax())))]["q"].item()
        == q[q.abs().argmax()]
    )
    plots.figure_token(data).draw_without_rendering()
    smallest = Tokens(logits=torch.zeros(1, 2), labels=torch.tensor([1]))
    assert "(rest)" not in set(token_frame(["sft"], smallest, 0)["token"])
    for figure in (
        plots.figure_token(token_frame(["sft"], smallest, 0)),
        plots.figure_sequence(text_frame(["sft"], smallest)),
    ):
        figure.draw_without_rendering()
    with pytest.raises(InputError, match="i must be a row of the 1 tokens, got 1"):
        token_frame(["sft"], smallest, 1)


def test_frames_agree_with_the_targets():
    tokens = qlens.probes()
    target = qlens.get("gem").target(tokens)
    row = plane_frame(["gem"], tokens).iloc[0]
    assert row["label_weight"] == pytest.approx(float(target.pull.sum() / target.room.sum()))
    assert row["reshape"] == pytest.approx(float(target.reshape.mean())) and row["tokens"] == len(tokens)
    text = text_frame(["gem"], tokens)
    assert_allclose(text["negative_mass"], target.negative_mass)
    assert text["kl"].isna().tolist() == (~target.in_simplex).tolist()
    lines = sweep_frame({"mine": lambda logits, labels: torch.nn.functional.cross_entropy(logits, labels)}, tokens)
    assert lines["method"].unique().tolist() == ["mine"] and np.allclose(lines["q_label"], 1)
    for wrong, message in ((["dft", "dft"], "'dft' twice"), ([], "variants is empty"), ("cft(", "cft")):
        with pytest.raises(InputError, match=message):
            sweep_frame(wrong)
    with pytest.raises(InputError, match="p_y must lie between 0 and 1, got"):
        sweep_tokens([0.5, 1.0])


def test_one_call_draws_a_token_a_text_and_the_plane():
    tokens, tokenizer = qlens.probes()[:12], letters()
    figure = qlens.plot_token(["sft", "gem"], tokens, 3, token_text=tokenizer, top=4)
    assert [ax.get_title(loc="left") for ax in figure.axes] == ["sft", "gem"]
    names = [name.get_text() for name in figure.axes[0].get_yticklabels()]
    expected = token_frame(["sft"], tokens, 3, token_text=tokenizer, top=4)["token"]
    assert names == [shown(name) for name in expected] and names[-1] == "(rest)"
    figure = qlens.plot_text({"plain": "sft"}, tokens, token_text=tokenizer, show=["kl"])
    text = [tick.get_text() for tick in figure.axes[0].get_xticklabels()]
    assert text == [shown(TokenText(tokenizer)[int(label)]) for label in tokens.labels]
    figure = qlens.plot_plane(["sft", "dft"], tokens)
    assert {"sft", "dft"} <= {line.get_label() for line in figure.axes[0].lines}
    assert not plt.get_fignums()
