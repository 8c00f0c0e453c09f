"""Plots of what a comparison found: what is drawn (artists, not pixels), and what is refused."""

import numpy as np
import pandas as pd
import pytest
from matplotlib import pyplot as plt
from matplotlib.colors import same_color
from matplotlib.figure import Figure
from numpy.testing import assert_allclose

from qlens import InputError
from qlens.analysis import plots
from qlens.analysis.recipes import CONTROLS, DEFAULT

METHODS = ["base", "sft", "mine"]
TABLE = pd.DataFrame(
    {
        "method": METHODS,
        "mean": [0.5, 0.6, 0.9],
        "low": [0.4, 0.5, np.nan],
        "high": [0.6, 0.8, np.nan],
        "kl_start": [0, 0.1, 0.2],
    }
).assign(setting="one")
GAPS = pd.DataFrame(
    {
        "method": ["base", "mine"],
        "mean": [-0.1, 0.3],
        "low": [-0.3, np.nan],
        "high": [0.1, np.nan],
        "p_holm": [0.4, 0.01],
    }
).assign(setting="one", against="sft")
CURVES = pd.DataFrame(
    {"method": ["base", "sft", "sft", "mine", "mine"], "step": [0, 10, 0, 0, 10], "mean": [0.5, 0.7, 0.5, 0.5, 0.2]}
).assign(setting="one", low=lambda x: x["mean"] - 0.1, high=lambda x: x["mean"] + 0.1)
TRUTH = pd.DataFrame(
    {
        "method": ["sft", "mine", "mine", "mine"],
        "trust": [1.0, 0.9, 0.1, 3.0],
        "good": [0.8, 0.95, 0.4, 1.0],
        "n": [100, 64, 16, 20],
    }
).assign(setting="one", auroc=[np.nan, 0.87, 0.87, 0.87])
DRAWN = {plots.plot_frontier: TABLE, plots.plot_differences: GAPS, plots.plot_curves: CURVES, plots.plot_truth: TRUTH}
every = pytest.mark.parametrize("draw", DRAWN, ids=lambda draw: draw.__name__)


@pytest.fixture
def ax():
    return Figure(layout="constrained").subplots()


@every
def test_a_plot_draws_on_the_axes_it_is_given_and_leaves_its_data_alone(draw, ax):
    data = DRAWN[draw].copy(deep=True)
    assert draw(data, ax=ax) is ax and ax.has_data()
    assert not plt.get_fignums(), "no figure of pyplot's may appear"
    pd.testing.assert_frame_equal(data, DRAWN[draw])
    ax.figure.draw_without_rendering()
    assert ax.get_xlabel() and (ax.get_ylabel() or draw is plots.plot_differences)


@every
def test_missing_columns_and_a_second_setting_are_refused(draw, ax):
    for column in DRAWN[draw].columns.drop(["setting"]):
        with pytest.raises(InputError, match=f"lacks {column}"):
            draw(DRAWN[draw].drop(columns=column), ax=ax)
    both = pd.concat([DRAWN[draw], DRAWN[draw].assign(setting="two")])
    with pytest.raises(InputError, match=r"one setting can be drawn at a time, got \['one', 'two'\]"):
        draw(both, ax=ax)


def points(ax):
    """Centre and ends of every error bar, by method."""
    found = {}
    for bar in ax.containers:
        line, _, ranges = bar.lines
        segments = [segment for each in ranges for segment in each.get_segments()]
        found[bar.get_label()] = (line, line.get_xydata()[0], segments)
    return found


def test_the_frontier_is_score_against_distance(ax):
    plots.plot_frontier(TABLE, ax=ax, label="avg@8")
    found = points(ax)
    assert_allclose(found["sft"][1], [0.1, 0.6])
    assert_allclose(found["sft"][2][0], [[0.1, 0.5], [0.1, 0.8]])
    assert found["mine"][2] == [], "no interval, no bar"
    assert any(line.get_ydata()[0] == line.get_ydata()[1] == 0.5 for line in ax.lines if len(line.get_ydata()) == 2)
    assert ax.get_ylabel() == "avg@8" and ax.get_xscale() == "linear"
    far = TABLE.assign(kl_start=[0, 0.01, 5])
    assert plots.plot_frontier(far, ax=Figure().subplots()).get_xscale() == "symlog"


def test_differences_are_filled_where_they_are_sure(ax):
    plots.plot_differences(GAPS, ax=ax, label="avg@8")
    found = points(ax)
    assert_allclose(found["base"][1], [-0.1, 0])
    assert_allclose(found["base"][2][0], [[-0.3, 0], [0.1, 0]])
    assert same_color(found["base"][0].get_markerfacecolor(), "white")
    assert same_color(found["mine"][0].get_markerfacecolor(), plots.styles(["base", "mine"])["mine"].color)
    assert [text.get_text() for text in ax.get_yticklabels()] == ["base", "mine"]
    assert "avg@8 minus that of sft" in ax.get_xlabel()
    assert ax.get_ylim()[0] > ax.get_ylim()[1], "the first row is on top"
    with pytest.raises(InputError, match="one against"):
        plots.plot_differences(GAPS.assign(against=["sft", "dft"]), ax=ax)


def test_curves_go_from_the_start_with_bands(ax):
    plots.plot_curves(CURVES, ax=ax, label="avg@8")
    lines = {line.get_label(): line for line in ax.lines}
    assert_allclose(lines["sft"].get_xydata(), [[0, 0.5], [10, 0.7]])
    assert_allclose(lines["base"].get_ydata(), [0.5, 0.5])
    bands = [band.get_paths()[0].vertices[:, 1] for band in ax.collections]
    assert len(bands) == 2
    assert_allclose((bands[0].min(), bands[0].max()), (0.4, 0.8))
    low, high = ax.get_ylim()
    assert low < 0.2 and high > 0.7


def test_truth_counts_what_is_beyond_and_says_the_auroc(ax):
    plots.plot_truth(TRUTH, ax=ax)
    drawn = {cloud.get_label(): cloud for cloud in ax.collections}
    assert set(drawn) == {"sft", "mine, 0.87"}
    assert_allclose(drawn["mine, 0.87"].get_offsets(), [[0.1, 0.4], [0.9, 0.95]])
    sizes = drawn["mine, 0.87"].get_sizes()
    assert sizes[1] > sizes[0] > 0
    assert [text.get_text() for text in ax.texts] == ["20 labels beyond the axis"]
    assert any(np.array_equal(line.get_xdata(), line.get_ydata()) for line in ax.lines), "the diagonal"
    assert {text.get_text() for text in ax.get_legend().get_texts()} == set(drawn)


def test_all_methods_and_controls_have_a_look_of_their_own():
    names = [*DEFAULT, *CONTROLS]
    assert set(names) <= set(plots.STYLES)
    assert len(set(plots.styles(names).values())) == len(names)
