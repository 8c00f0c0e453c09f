"""What every plot on one Axes has in common: where it draws, what it leaves alone, and what it refuses."""

import numpy as np
import pandas as pd
import pytest
from matplotlib import pyplot as plt
from matplotlib.figure import Figure
from numpy.testing import assert_allclose
from test_comparison_axes import CURVES, GAPS, RELIABILITY, TABLE
from test_result_axes import LABEL_PROBS, SCORES, SHARES, TARGET, WEIGHTS
from test_target_axes import ANGLES, PLANE, RECORDS, SETTINGS, SWEEP, TEXT, TOKEN

from qlens import InputError
from qlens.analysis import plots

DRAWN = {
    plots.plot_scores: (SCORES, ("method", "mean", "low", "high")),
    plots.plot_label_weight: (WEIGHTS, ("method", "p_y", "label_weight")),
    plots.plot_target: (TARGET, ("method", "token", "p", "q")),
    plots.plot_frontier: (TABLE, ("method", "mean", "low", "high", "kl_start")),
    plots.plot_differences: (GAPS, ("method", "against", "mean", "low", "high", "p_holm")),
    plots.plot_curves: (CURVES, ("method", "step", "mean", "low", "high")),
    plots.plot_calibration: (RELIABILITY, ("method", "trust", "good", "n", "auroc")),
    plots.plot_sweep: (SWEEP, ("p_y", "q_label", "q_runner_up", "method")),
    plots.plot_update: (TOKEN, ("method", "token", "label", "p", "q")),
    plots.plot_sequence: (TEXT, ("method", "position", "token", "negative_mass", "label_weight")),
    plots.plot_plane: (PLANE, ("method", "label_weight", "reshape", "negative_mass", "tokens", "label_weight_low")),
    plots.plot_settings: (SETTINGS, ("setting", "method", "mean", "low", "high")),
    plots.plot_motion: (RECORDS, ("step", "variant", "token", "p_y", "label_weight")),
    plots.plot_course: (RECORDS, ("step", "variant", "drift")),
    plots.plot_atlas: (ANGLES, ()),
    plots.plot_label_probs: (LABEL_PROBS, ("p_y",)),
    plots.plot_mixture: (SHARES, ("token", "identifiable")),
}
ONE_SETTING = (
    plots.plot_scores,
    plots.plot_frontier,
    plots.plot_differences,
    plots.plot_curves,
    plots.plot_calibration,
)


@pytest.mark.parametrize("draw", DRAWN, ids=lambda draw: draw.__name__)
def test_a_plot_draws_where_it_is_told_and_names_missing_columns(draw):
    data, columns = DRAWN[draw]
    before, ax = data.copy(deep=True), Figure(layout="constrained").subplots()
    for column in columns:
        with pytest.raises(InputError, match=f"lacks .*{column}"):
            draw(data.drop(columns=column), ax=ax)
    assert not ax.has_data(), "nothing is drawn of refused data"
    assert draw(data, ax=ax) is ax and ax.has_data()
    assert not plt.get_fignums(), "no figure of pyplot may appear"
    pd.testing.assert_frame_equal(data, before)
    ax.figure.draw_without_rendering()
    current = plt.figure().add_subplot()
    try:
        assert draw(data) is current, "without ax, the current Axes"
    finally:
        plt.close("all")


def test_two_settings_are_refused_and_an_empty_frame_is_drawn_empty():
    for draw in ONE_SETTING:
        data = DRAWN[draw][0].assign(setting="one")
        with pytest.raises(InputError, match=r"one setting.*\['one', 'two'\]"):
            draw(pd.concat([data, data.assign(setting="two")]), ax=Figure().subplots())
        if draw is not plots.plot_scores:
            empty = draw(data.iloc[:0], ax=Figure().subplots())
            empty.figure.draw_without_rendering()
            assert not empty.containers and not empty.get_legend()


def test_keywords_reach_matplotlib_and_the_index_of_a_frame_does_not_matter():
    for draw in ONE_SETTING:
        data = DRAWN[draw][0]
        ax = draw(data, ax=Figure().subplots(), alpha=0.123)
        assert any(line.get_alpha() == 0.123 for line in ax.lines), draw
        parts = [rows.reset_index(drop=True) for _, rows in data.groupby("method", sort=False)]
        drawn = [draw(frame, ax=Figure().subplots()) for frame in (data, pd.concat(parts))]
        for one, other in zip(*(ax.lines for ax in drawn), strict=True):
            assert_allclose(one.get_xydata(), other.get_xydata())
        for one, other in zip(*(ax.collections for ax in drawn), strict=True):
            assert_allclose(one.get_offsets(), other.get_offsets())


def test_arguments_and_names_of_earlier_versions_warn():
    for draw, argument in ((plots.plot_scores, "methods"), (plots.plot_atlas, "linkage_by")):
        with pytest.warns(DeprecationWarning, match=f"{argument}=. has no effect"):
            draw(DRAWN[draw][0], ax=Figure().subplots(), **{argument: ["sft"]})
    with pytest.warns(DeprecationWarning, match="across=. has no effect"):
        plots.figure_token(TOKEN, across=2)
    for old, new in (("plot_truth", "plot_calibration"), ("along", "text_frame"), ("swept", "sweep_tokens")):
        with pytest.warns(DeprecationWarning, match=new):
            assert getattr(plots, old) is getattr(plots, new)
    with pytest.warns(DeprecationWarning, match="variants="):
        frame = plots.sweep_frame(losses=["dft"], tokens=plots.sweep_tokens([0.5]))
    with pytest.warns(DeprecationWarning, match="label_weight"):
        assert frame["trust"].tolist() == [0.5]
    with pytest.warns(DeprecationWarning, match="label_weight"):
        drawn = plots.plot_sweep(SWEEP, ax=Figure().subplots(), show="trust")
    old = plots.plot_sweep(
        pd.DataFrame(SWEEP).rename(columns={"label_weight": "trust"}), ax=Figure().subplots(), show="label_weight"
    )
    for one, other in zip(drawn.lines, old.lines, strict=True):
        np.testing.assert_array_equal(one.get_xydata(), other.get_xydata())
