"""Plots of scores, label weights, targets, whole studies and explanations: artists and their data."""

from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
from matplotlib import pyplot as plt
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from matplotlib.patches import StepPatch

import qlens
from qlens.analysis import plots
from qlens.core.deprecation.columns import current_columns

SCORES = pd.DataFrame(
    {"method": ["base", "sft", "mine"], "mean": [0.5, 0.6, 0.9], "low": [0.4, 0.5, np.nan], "high": [0.6, 0.8, np.nan]}
).assign(setting="one", n="3 x 10")
WEIGHTS = pd.DataFrame(
    {"method": ["sft", "sft", "kd", "kd"], "p_y": [0.9, 0.1, 0.2, 0.99], "label_weight": [1, 1, 0.3, -50.0]}
)
TARGET = pd.DataFrame(
    {"token": ["a$", "b$"] * 2, "label": [True, False] * 2, "p": [0.2, 0.8] * 2, "q": [1.3, -0.3, 1.0, 0.0]}
).assign(method=["signed", "signed", "sft", "sft"])

LABEL_PROBS = pd.DataFrame({"p_y": [0.1, 0.7], "p_y_teacher": [0.2, 0.9]})
SHARES = pd.DataFrame({"token": [3, 8, 9], "identifiable": [True, True, False]}).assign(
    **{"the label": [0.5, 1.5, 9.0], "the teacher": [0.2, -0.7, -9.0], "the student": [0.3, 0.2, 1.0]}
)


@pytest.fixture
def ax():
    return Figure(layout="constrained").subplots()


def one_study(settings=("one", "two")):
    """A stand-in for a study of three methods."""
    frames = {"label_weight": WEIGHTS, "target": TARGET}
    many = {name: pd.concat([frame.assign(setting=s) for s in settings]) for name, frame in frames.items()}
    table = pd.concat([SCORES.assign(setting=s) for s in settings])
    config = {"metric": {"name": "avg@8", "better": "higher"}, "settings": {name: {} for name in settings}}
    return SimpleNamespace(
        table=lambda: table, config=config, settings=list(settings), methods=list(SCORES["method"]), **many
    )


def test_label_probabilities_of_every_model_are_dots_with_its_name(ax):
    plots.plot_label_probs(LABEL_PROBS, ax=ax)
    dots = {line.get_label(): line.get_ydata().tolist() for line in ax.lines}
    assert dots == {"student": [0.1, 0.7], "teacher": [0.2, 0.9]}
    assert [text.get_text() for text in ax.get_legend().get_texts()] == ["student", "teacher"]


def test_shares_are_stacked_negative_ones_below_zero(ax):
    plots.plot_mixture(SHARES, ax=ax)
    by_name = {patch.get_label(): patch.get_data() for patch in ax.patches if isinstance(patch, StepPatch)}
    assert list(by_name) == ["the label", "the teacher", "_", "the student"]
    for name, bottom, top in (
        ("the label", [0, 0, 0], [0.5, 1.5, 9]),
        ("the teacher", [0.5, 1.5, 9], [0.7, 1.5, 9]),
        ("_", [0, 0, 0], [0, -0.7, -9]),  # the teacher's negative shares
        ("the student", [0.7, 1.5, 9], [1.0, 1.7, 10]),
    ):
        assert by_name[name].values.tolist() == pytest.approx(top) and by_name[name].baseline.tolist() == bottom
    low, high = ax.get_ylim()
    assert low == pytest.approx(1.04 * -0.7) and high == pytest.approx(1.04 * 1.7), "of identifiable tokens"
    assert ax.xaxis.get_major_formatter()(1, None) == "8"


def test_scores_stand_at_their_means_in_their_order_with_their_intervals(ax):
    plots.plot_scores(SCORES, ax=ax, label="avg@8")
    assert [text.get_text() for text in ax.get_yticklabels()] == ["base", "sft", "mine"]
    dots = [bars.lines[0] for bars in ax.containers]
    assert [(dot.get_xdata()[0], dot.get_ydata()[0]) for dot in dots] == [(0.5, 0), (0.6, 1), (0.9, 2)]
    ends = ax.containers[1].lines[2][0].get_segments()[0][:, 0]
    assert ends.tolist() == pytest.approx([0.5, 0.8])
    assert not ax.containers[2].lines[2], "without an interval there is a dot alone"
    assert ax.get_ylim()[0] > ax.get_ylim()[1] and "3 x 10" in ax.get_xlabel()


def test_label_weights_beyond_the_axis_are_drawn_hollow_at_the_edge_and_counted(ax):
    plots.plot_label_weight(WEIGHTS, ax=ax)
    by_label = {line.get_label(): line for line in ax.lines if line.get_label()[0] != "_"}
    assert by_label["sft"].get_xdata().tolist() == [0.1, 0.9], "sorted by p_y"
    assert by_label["kd"].get_ydata().tolist() == [0.3]
    (hollow,) = [line for line in ax.lines if line.get_markerfacecolor() == "white" and len(line.get_xdata())]
    assert ax.get_ylim()[0] < hollow.get_ydata()[0] < ax.get_ylim()[0] + 0.1
    assert any("1 beyond" in text.get_text() for text in ax.texts)


def test_negative_mass_reaches_below_zero_and_is_hatched(ax):
    plots.plot_target(TARGET, ax=ax, label="a$")
    below = [bar for bar in ax.patches if bar.get_height() < 0]
    assert [bar.get_height() for bar in below] == [-0.3] and below[0].get_hatch()
    assert not any(bar.get_hatch() for bar in ax.patches if bar.get_height() >= 0)
    assert ax.get_ylim()[0] < -0.3
    assert [text.get_fontweight() for text in ax.get_xticklabels()] == ["bold", "normal"]


def test_a_method_has_one_style_everywhere(ax):
    plots.plot_label_weight(WEIGHTS, ax=ax)
    looks = {line.get_label(): (to_hex(line.get_color()), line.get_marker()) for line in ax.lines}
    for method in ("sft", "kd"):
        assert looks[method] == (plots.STYLES[method].color.lower(), plots.STYLES[method].marker)
    assert plots.styles(["mine(x=1)", "sft"])["mine(x=1)"] == plots.styles(["mine(x=1)"])["mine(x=1)"]


def test_a_study_is_a_row_per_setting_or_one_panel_side_by_side():
    figure = plots.figure_study(one_study())
    assert len(figure.axes) == 6
    assert [text.get_text() for text in figure.legends[0].get_texts()][:3] == ["base", "sft", "mine"]
    alone = plots.figure_study(one_study(), ("scores",))
    assert len(alone.axes) == 2 and not alone.legends, "the methods already stand on the axis"
    figure.draw_without_rendering()
    assert not plt.get_fignums()


def test_explain_draws_gradient_target_and_label_weight_against_p_y():
    explanation = qlens.explain("target_sft")
    figure = plots.figure_explain(explanation)
    gradient, target, weight, ends = figure.axes
    table = current_columns(pd.DataFrame(explanation.table))
    table = table[table["shape"] == "peaked"].sort_values("p_y")
    by_column = {
        "label_grad": gradient,
        "runner_up_grad": gradient,
        "q_label": target,
        "q_runner_up": target,
        "label_weight": weight,
    }
    for column, ax in by_column.items():
        assert any(np.array_equal(line.get_ydata(), table[column], equal_nan=True) for line in ax.lines), column
    grey = [line for line in weight.lines if "ft)" in str(line.get_label())]
    assert len(grey) == 2 and np.array_equal(grey[1].get_xdata(), grey[1].get_ydata())
    paths = [line.get_ydata() for line in ends.lines if len(line.get_xdata()) == len(explanation.destination.times)]
    assert all(any(np.array_equal(path, p_k) for path in paths) for p_k in explanation.destination.probs.T)
    figure.draw_without_rendering()


def test_explain_on_text_draws_tokens_without_joining_them():
    table = qlens.explain("dft").table.assign(shape="text")
    figure = plots.figure_explain(SimpleNamespace(spec="dft", table=table, law=None, destination="not known"))
    assert len(figure.axes) == 3
    points = [line for line in figure.axes[2].lines if len(line.get_xdata()) == len(table) and line.get_marker() == "o"]
    assert points and all(line.get_linewidth() == 0 for line in points)
