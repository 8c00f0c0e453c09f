"""Plots of a comparison: artists and their data."""

import numpy as np
import pandas as pd
import pytest
from matplotlib.colors import same_color
from matplotlib.figure import Figure
from numpy.testing import assert_allclose

from qlens import InputError
from qlens.analysis import plots

METHODS = ["base", "sft", "mine"]
TABLE = pd.DataFrame(
    {"method": METHODS, "mean": [0.5, 0.6, 0.9], "low": [0.4, 0.5, np.nan], "high": [0.6, 0.8, np.nan]}
).assign(setting="one", kl_start=[0, 0.1, 0.2])
GAPS = pd.DataFrame(
    {"method": ["base", "mine", "kd"], "mean": [-0.1, 0.3, 0.2], "low": [-0.3, np.nan, 0.1], "high": [0.1, np.nan, 0.3]}
).assign(setting="one", against="sft", p_holm=[0.4, 0.01, np.nan])
CURVES = pd.DataFrame(
    {"method": ["base", "sft", "sft", "mine", "mine"], "step": [0, 10, 0, 0, 10], "mean": [0.5, 0.7, 0.5, 0.5, 0.2]}
).assign(setting="one", low=lambda x: x["mean"] - 0.1, high=lambda x: x["mean"] + 0.1)
RELIABILITY = pd.DataFrame(
    {"method": ["sft", "mine", "mine", "mine"], "trust": [1.0, 0.9, 0.1, 3.0], "good": [0.8, 0.95, 0.4, 1.0]}
).assign(setting="one", n=[100, 64, 16, 20], auroc=[np.nan, 0.87, 0.87, 0.87])


@pytest.fixture
def ax():
    return Figure(layout="constrained").subplots()


def points(ax):
    """Centre and ends of every error bar, by method."""
    bars = {}
    for bar in ax.containers:
        line, _, ranges = bar.lines
        segments = [segment for each in ranges for segment in each.get_segments()]
        bars[bar.get_label()] = (line, line.get_xydata()[0], segments)
    return bars


def test_the_frontier_is_score_against_distance(ax):
    plots.plot_frontier(TABLE, ax=ax, label="avg@8")
    bars = points(ax)
    assert_allclose(bars["sft"][1], [0.1, 0.6])
    assert_allclose(bars["sft"][2][0], [[0.1, 0.5], [0.1, 0.8]])
    assert bars["mine"][2] == [], "no interval, no bar"
    (across,) = [line for line in ax.lines if len(line.get_ydata()) == 2]
    assert_allclose(across.get_ydata(), [0.5, 0.5])
    assert across.is_dashed() and same_color(across.get_color(), bars["base"][0].get_color())
    assert bars["base"][0].get_marker() == "X"
    assert ax.get_ylabel() == "avg@8" and "nats" in ax.get_xlabel()


def test_distances_far_apart_are_drawn_with_the_start_still_visible():
    for far, scale in ((0.5, "linear"), (0.51, "symlog")):
        ax = plots.plot_frontier(TABLE.assign(kl_start=[0, 0.01, far]), ax=Figure().subplots())
        assert ax.get_xscale() == scale
        assert ax.get_xlim()[0] < 0


def test_significant_differences_are_filled(ax):
    plots.plot_differences(GAPS, ax=ax, label="avg@8")
    bars = points(ax)
    assert_allclose(bars["base"][1], [-0.1, 0])
    assert_allclose(bars["base"][2][0], [[-0.3, 0], [0.1, 0]])
    assert_allclose(bars["mine"][1], [0.3, 1])
    assert bars["mine"][2] == [], "no interval, no bar"
    look = plots.styles(["base", "mine", "kd"])
    assert same_color(bars["mine"][0].get_markerfacecolor(), look["mine"].color)
    for unsure in ("base", "kd"):
        assert same_color(bars[unsure][0].get_markerfacecolor(), "white")
        assert same_color(bars[unsure][0].get_markeredgecolor(), look[unsure].color), "hollow, but seen"
    assert [text.get_text() for text in ax.get_yticklabels()] == ["base", "mine", "kd"]
    assert ax.get_xlabel().replace("\n", " ") == "difference in avg@8 against sft, 95 % interval"
    assert any(set(line.get_xdata()) == {0} for line in ax.lines), "the zero line"
    with pytest.raises(InputError, match="one against"):
        plots.plot_differences(GAPS.assign(against=["sft", "dft", "sft"]), ax=ax)


def test_curves_go_from_the_start_with_bands(ax):
    plots.plot_curves(CURVES, ax=ax, label="avg@8")
    lines = {line.get_label(): line for line in ax.lines}
    assert_allclose(lines["sft"].get_xydata(), [[0, 0.5], [10, 0.7]])
    assert_allclose(lines["base"].get_ydata(), [0.5, 0.5])
    assert lines["base"].is_dashed() and not lines["sft"].is_dashed()
    for method, look in plots.styles(["sft", "mine"]).items():
        assert same_color(lines[method].get_color(), look.color) and lines[method].get_marker() == look.marker
    bands = [band.get_paths()[0].vertices[:, 1] for band in ax.collections]
    assert len(bands) == 2 and all(band.get_alpha() < 0.3 for band in ax.collections)
    assert_allclose((bands[0].min(), bands[0].max()), (0.4, 0.8))
    low, high = ax.get_ylim()
    assert low < 0.1 and high > 0.8, "the bands are seen"
    assert (ax.get_xlabel(), ax.get_ylabel()) == ("training step", "avg@8")


def test_wide_bands_do_not_flatten_the_curves():
    for wide in (50, np.nan):
        ax = plots.plot_curves(CURVES.assign(low=-wide, high=wide), ax=Figure().subplots())
        low, high = ax.get_ylim()
        assert -0.2 < low < 0.2 and 0.7 < high < 1.1


def test_calibration_counts_labels_beyond_the_axis(ax):
    plots.plot_calibration(RELIABILITY, ax=ax)
    clouds = {cloud.get_label(): cloud for cloud in ax.collections}
    assert set(clouds) == {"sft", "mine, .87"}
    assert_allclose(clouds["mine, .87"].get_offsets(), [[0.1, 0.4], [0.9, 0.95]])
    sizes = clouds["mine, .87"].get_sizes()
    assert sizes[1] > sizes[0] > 0
    assert [text.get_text() for text in ax.texts] == ["20 labels beyond the axis"]
    assert any(np.array_equal(line.get_xdata(), line.get_ydata()) for line in ax.lines), "the diagonal"
    assert ax.get_xlim() == ax.get_ylim() == (-0.05, 1.05)
    assert (ax.get_xlabel(), ax.get_ylabel()) == ("trust in the label", "share of correct labels")
    assert not plots.plot_calibration(RELIABILITY[RELIABILITY["trust"] <= 1], ax=Figure().subplots()).texts, (
        "nothing is beyond"
    )


def test_the_legend_of_calibration_shows_markers_and_aurocs(ax):
    plots.plot_calibration(RELIABILITY, ax=ax)
    legend, look = ax.get_legend(), plots.styles(["sft", "mine"])
    assert [text.get_text() for text in legend.get_texts()] == ["sft", "mine, .87"]
    assert legend.get_title().get_text() == "method, AUROC"
    for key, style, cloud in zip(legend.legend_handles, look.values(), ax.collections, strict=True):
        assert key.get_marker() == style.marker and same_color(key.get_markeredgecolor(), style.color)
        assert same_color(cloud.get_edgecolor()[0], style.color)
        assert_allclose(cloud.get_facecolor()[0, 3], 0.3, err_msg="what lies below is seen")
    perfect = plots.plot_calibration(RELIABILITY.assign(auroc=1.0), ax=Figure().subplots())
    assert perfect.get_legend().get_texts()[0].get_text() == "sft, 1.00"
