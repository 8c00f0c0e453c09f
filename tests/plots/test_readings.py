"""Readings: what plots of targets are made of, and the strings that tokens are shown by."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.testing import assert_allclose

import qlens
from qlens import InputError, Tokens
from qlens.analysis import plots
from qlens.analysis.plots import along, candidates, plane, shown, sweep, swept


@settings(max_examples=30, deadline=None)
@given(st.text())
def test_whatever_is_shown_can_be_seen_and_showing_twice_changes_nothing(text):
    once = shown(text, letters=10_000)
    assert once and once.isprintable() and not any(letter.isspace() for letter in once)
    assert shown(once, letters=10_000) == once


def test_the_label_and_all_that_matters_are_among_the_candidates_and_the_rest_is_added_up():
    torch.manual_seed(0)
    tokens = Tokens(logits=4 * torch.randn(1, 32_000, dtype=torch.float64), labels=torch.tensor([31_999]))
    data = candidates(["sft", "gem"], tokens, 0, top=5)
    assert len(data) == 12 and data.groupby("method")[["p", "q"]].sum().to_numpy() == pytest.approx(1.0)
    assert data[data["label"]]["token"].tolist() == ["31999"] * 2
    q = qlens.get("gem").target(tokens).q[0]
    assert (
        data[(data["method"] == "gem") & (data["token"] == str(int(q.abs().argmax())))]["q"].item()
        == q[q.abs().argmax()]
    )
    plots.figure_token(data).draw_without_rendering()
    smallest = Tokens(logits=torch.zeros(1, 2), labels=torch.tensor([1]))
    assert "(rest)" not in set(candidates(["sft"], smallest, 0)["token"])
    for figure in (
        plots.figure_token(candidates(["sft"], smallest, 0)),
        plots.figure_sequence(along(["sft"], smallest)),
    ):
        figure.draw_without_rendering()
    with pytest.raises(InputError, match="at must be a row of the 1 tokens, got 1"):
        candidates(["sft"], smallest, 1)


def test_readings_agree_with_the_targets():
    tokens = qlens.probes()
    target = qlens.get("gem").target(tokens)
    row = plane(["gem"], tokens).iloc[0]
    assert row["trust"] == pytest.approx(float(target.pull.sum() / target.room.sum()))
    assert row["reshape"] == pytest.approx(float(target.reshape.mean())) and row["tokens"] == len(tokens)
    text = along(["gem"], tokens)
    assert_allclose(text["negative_mass"], target.negative_mass)
    assert text["kl"].isna().tolist() == (~target.in_simplex).tolist()
    lines = sweep({"mine": lambda logits, labels: torch.nn.functional.cross_entropy(logits, labels)}, tokens)
    assert lines["method"].unique().tolist() == ["mine"] and np.allclose(lines["q_label"], 1)
    for wrong, said in ((["dft", "dft"], "'dft' twice"), ([], "losses is empty"), ("cft(", "cft")):
        with pytest.raises(InputError, match=said):
            sweep(wrong)
    with pytest.raises(InputError, match="p_y must lie between 0 and 1, got"):
        swept([0.5, 1.0])
