"""Plots of what a comparison found: what is drawn (artists, not pixels), and what is refused."""

import numpy as np
import pandas as pd
import pytest
from matplotlib import pyplot as plt
from matplotlib.colors import same_color
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from numpy.testing import assert_allclose

from qlens import InputError
from qlens.analysis import plots
from qlens.analysis.compare.recipes import CONTROLS, DEFAULT

ALL = [*DEFAULT, *CONTROLS]
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
TRUTH = pd.DataFrame(
    {"method": ["sft", "mine", "mine", "mine"], "trust": [1.0, 0.9, 0.1, 3.0], "good": [0.8, 0.95, 0.4, 1.0]}
).assign(setting="one", n=[100, 64, 16, 20], auroc=[np.nan, 0.87, 0.87, 0.87])
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


@every
def test_missing_columns_and_a_second_setting_are_refused(draw, ax):
    for column in DRAWN[draw].columns.drop(["setting"]):
        with pytest.raises(InputError, match=f"lacks {column}"):
            draw(DRAWN[draw].drop(columns=column), ax=ax)
    both = pd.concat([DRAWN[draw], DRAWN[draw].assign(setting="two")])
    with pytest.raises(InputError, match=r"one setting can be drawn at a time, got \['one', 'two'\]"):
        draw(both, ax=ax)
    assert not ax.has_data(), "nothing is drawn of what is refused"


@every
def test_options_go_to_matplotlib_and_nothing_is_needed_but_data(draw, ax):
    draw(DRAWN[draw], ax=ax, methods=["sft"], alpha=0.123)
    assert any(line.get_alpha() == 0.123 for line in ax.lines)
    empty = draw(DRAWN[draw].iloc[:0], ax=Figure().subplots())
    empty.figure.draw_without_rendering()
    assert not empty.containers and not empty.get_legend()
    current = plt.figure().add_subplot()
    try:
        assert draw(DRAWN[draw]) is current
    finally:
        plt.close("all")


@every
def test_a_frame_put_together_from_parts_is_drawn_the_same(draw):
    pieces = [rows.reset_index(drop=True) for _, rows in DRAWN[draw].groupby("method", sort=False)]
    drawn = [draw(data, ax=Figure().subplots()) for data in (DRAWN[draw], pd.concat(pieces))]
    for one, other in zip(*(ax.lines for ax in drawn), strict=True):
        assert_allclose(one.get_xydata(), other.get_xydata())
    for one, other in zip(*(ax.collections for ax in drawn), strict=True):
        assert_allclose(one.get_offsets(), other.get_offsets())


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
    (across,) = [line for line in ax.lines if len(line.get_ydata()) == 2]
    assert_allclose(across.get_ydata(), [0.5, 0.5])
    assert across.is_dashed() and same_color(across.get_color(), found["base"][0].get_color())
    assert found["base"][0].get_marker() == "X"
    assert ax.get_ylabel() == "avg@8" and "nats" in ax.get_xlabel()


@pytest.mark.parametrize("far, scale", [(0.5, "linear"), (0.51, "symlog")])
def test_distances_far_apart_are_drawn_with_the_start_still_in_sight(ax, far, scale):
    plots.plot_frontier(TABLE.assign(kl_start=[0, 0.01, far]), ax=ax)
    assert ax.get_xscale() == scale
    assert ax.get_xlim()[0] < 0


def test_differences_are_filled_where_they_are_sure(ax):
    plots.plot_differences(GAPS, ax=ax, label="avg@8")
    found = points(ax)
    assert_allclose(found["base"][1], [-0.1, 0])
    assert_allclose(found["base"][2][0], [[-0.3, 0], [0.1, 0]])
    assert_allclose(found["mine"][1], [0.3, 1])
    assert found["mine"][2] == [], "no interval, no bar"
    look = plots.styles(["base", "mine", "kd"])
    assert same_color(found["mine"][0].get_markerfacecolor(), look["mine"].color)
    for unsure in ("base", "kd"):
        assert same_color(found[unsure][0].get_markerfacecolor(), "white")
        assert same_color(found[unsure][0].get_markeredgecolor(), look[unsure].color), "hollow, but seen"
    assert [text.get_text() for text in ax.get_yticklabels()] == ["base", "mine", "kd"]
    assert ax.get_xlabel().replace("\n", " ") == "difference in avg@8 against sft, 95 % interval"
    assert any(set(line.get_xdata()) == {0} for line in ax.lines), "the zero line"
    with pytest.raises(InputError, match="one against"):
        plots.plot_differences(GAPS.assign(against=["sft", "dft", "sft"]), ax=ax)


def test_the_note_on_what_is_filled_stands_below_the_last_row(ax):
    plots.plot_differences(GAPS, ax=ax)
    assert ax.get_ylim()[0] > len(GAPS) > 0 > ax.get_ylim()[1], "the first row is on top"
    ax.figure.set_size_inches(4.5, 3.2)
    ax.figure.draw_without_rendering()
    (note,) = ax.texts
    assert "filled: p < 0.05 (Holm)" in note.get_text()
    last = ax.transData.transform((0, len(GAPS) - 1))[1]
    assert note.get_window_extent().y1 < last and ax.bbox.y0 < note.get_window_extent().y0


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


@pytest.mark.parametrize("wide", [50, np.nan])
def test_bands_far_wider_than_all_that_happens_do_not_flatten_the_curves(ax, wide):
    plots.plot_curves(CURVES.assign(low=-wide, high=wide), ax=ax)
    low, high = ax.get_ylim()
    assert -0.2 < low < 0.2 and 0.7 < high < 1.1


def test_truth_counts_what_is_beyond_and_says_the_auroc(ax):
    plots.plot_truth(TRUTH, ax=ax)
    drawn = {cloud.get_label(): cloud for cloud in ax.collections}
    assert set(drawn) == {"sft", "mine, .87"}
    assert_allclose(drawn["mine, .87"].get_offsets(), [[0.1, 0.4], [0.9, 0.95]])
    sizes = drawn["mine, .87"].get_sizes()
    assert sizes[1] > sizes[0] > 0
    assert [text.get_text() for text in ax.texts] == ["20 labels beyond the axis"]
    assert any(np.array_equal(line.get_xdata(), line.get_ydata()) for line in ax.lines), "the diagonal"
    assert ax.get_xlim() == ax.get_ylim() == (-0.05, 1.05)
    assert (ax.get_xlabel(), ax.get_ylabel()) == ("trust in the label", "share of good labels")
    assert not plots.plot_truth(TRUTH[TRUTH["trust"] <= 1], ax=Figure().subplots()).texts, "nothing is beyond"


def test_the_legend_of_truth_shows_every_method_as_it_is_drawn(ax):
    plots.plot_truth(TRUTH, ax=ax)
    legend, look = ax.get_legend(), plots.styles(["sft", "mine"])
    assert [text.get_text() for text in legend.get_texts()] == ["sft", "mine, .87"]
    assert legend.get_title().get_text() == "method, AUROC"
    for key, style, cloud in zip(legend.legend_handles, look.values(), ax.collections, strict=True):
        assert key.get_marker() == style.marker and same_color(key.get_markeredgecolor(), style.color)
        assert same_color(cloud.get_edgecolor()[0], style.color)
        assert_allclose(cloud.get_facecolor()[0, 3], 0.3, err_msg="what lies below is seen")
    perfect = plots.plot_truth(TRUTH.assign(auroc=1.0), ax=Figure().subplots())
    assert perfect.get_legend().get_texts()[0].get_text() == "sft, 1.00"


def test_all_methods_and_controls_have_a_look_of_their_own():
    assert set(ALL) <= set(plots.STYLES)
    assert len(set(plots.styles(ALL).values())) == len(ALL)
    assert len({style.marker for style in plots.styles(ALL).values()}) == len(ALL), "colour is not all"


def test_every_marker_is_filled_for_its_edge_is_white():
    looks = [*plots.STYLES.values(), *plots.SPARE]
    assert {style.marker for style in looks} <= set(Line2D.filled_markers)
    assert not {style.color for style in plots.SPARE} & {style.color for style in plots.STYLES.values()}
