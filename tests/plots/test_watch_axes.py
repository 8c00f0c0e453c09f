"""Plots of targets during training: from the first record to the last, and the mean over tokens by step."""

import pytest
from matplotlib.figure import Figure
from numpy.testing import assert_allclose
from test_target_axes import RECORDS

from qlens import InputError
from qlens.analysis import plots
from qlens.analysis.plots.style import new_figure


@pytest.fixture
def ax():
    return new_figure(3.3, 2.5).subplots()


def test_plot_motion_goes_from_the_first_record_to_the_last(ax):
    plots.plot_motion(RECORDS, ax=ax)
    dots = {line.get_label(): line for line in ax.lines if line.get_label() in ("dft", "gem")}
    assert_allclose(dots["dft"].get_xdata(), [0.2, 0.4, 0.6])
    paths = [line for line in ax.lines if len(line.get_xdata()) == 2 and line.get_linewidth() == 0.6]
    assert len(paths) == 6
    assert_allclose(paths[0].get_xdata(), [0.1, 0.2])
    assert any("6 beyond" in text.get_text() for text in ax.texts), (
        "at label weights 2.2 and 11, drawn at the edge and counted"
    )
    assert ax.get_ylim()[0] < max(dots["gem"].get_ydata()) < ax.get_ylim()[1]


def test_plot_course_draws_means_over_tokens(ax):
    plots.plot_course(RECORDS, ax=ax, show="label_weight")
    lines = {line.get_label(): line for line in ax.lines}
    assert_allclose(lines["dft"].get_xdata(), [0, 5, 10])
    assert_allclose(lines["dft"].get_ydata(), [0.2, 1.2, 2.2])
    assert len(ax.collections) == 2, "a band per method"
    with pytest.raises(InputError, match="show must be one of drift"):
        plots.plot_course(RECORDS, ax=ax, show="loss")
    with pytest.raises(InputError, match="no records"):
        plots.plot_course(RECORDS[:0], ax=ax)
    unknown = plots.plot_course(RECORDS, ax=Figure().subplots(), show="kl")
    assert any("18 of 18 not defined" in text.get_text() for text in unknown.texts)
