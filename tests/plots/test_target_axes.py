"""Plots of targets, of all methods, of whole studies and of training: artists and their data."""

from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
from matplotlib.colors import same_color
from matplotlib.text import Annotation
from numpy.testing import assert_allclose

import qlens
from qlens import InputError, Tokens
from qlens.analysis import plots
from qlens.analysis.plots import plane_frame, shown, styles, sweep_frame, sweep_tokens, text_frame, token_frame
from qlens.analysis.plots.style import SMALL, new_figure
from qlens.analysis.plots.target_axes import SHOWN
from qlens.lens.equivalences import distances

ODD = [
    "$x_1$",
    "_a",
    "\n",
    " ",
    "\t\x00",
    "\U0001f9ff\U0001fae8",
    "\u202eabc",
    "\udcc3",
    "<b>&",
    "",
    "\\frac",
    "a" * 300,
]
METHODS = ("sft", "dft", "gem", "target_sft")
SWEEP = sweep_frame(METHODS, sweep_tokens(np.linspace(0.05, 0.95, 19)))
TOKEN = token_frame(["gem"], sweep_tokens([0.1]), 0, token_text=ODD.__getitem__)
TEXT = text_frame(METHODS, sweep_tokens(np.linspace(0.05, 0.95, 12)), token_text=lambda token: "$tok_")
PLANE = plane_frame(METHODS, sweep_tokens())
ANGLES = pd.DataFrame(
    [[0.0, 10, 80], [10, 0, 60], [80, 60, 0]], index=["sft", "kd", "dft"], columns=["sft", "kd", "dft"]
)
SETTINGS = pd.DataFrame(
    {"setting": ["one"] * 3 + ["two"] * 2, "method": ["base", "sft", "my$loss$"] + ["base", "sft"]}
).assign(mean=[0.5, 0.6, 0.9, 0.3, 0.2], low=[0.4, 0.5, np.nan, 0.2, 0.1], high=[0.6, 0.8, np.nan, 0.4, 0.3])
RECORDS = pd.DataFrame(
    [
        {
            "step": step,
            "variant": name,
            "token": token,
            "p_y": 0.1 + 0.2 * token + step / 100,
            "label_weight": weight * (step + 1),
        }
        for name, weight in (("dft", 0.2), ("gem", 1.0))
        for step in (0, 5, 10)
        for token in (0, 1, 2)
    ]
).assign(negative_mass=lambda x: (x["variant"] == "gem") * 0.1, drift=lambda x: x["step"] / 20, kl=np.nan)


@pytest.fixture
def ax():
    return new_figure(3.3, 2.5).subplots()


@pytest.fixture(scope="module")
def explained():
    return qlens.explain("dft")


def test_invalid_angles_are_refused(ax):
    for wrong, message in (
        (ANGLES.iloc[:2], "symmetric"),
        (ANGLES + 1, "0 on the diagonal"),
        (ANGLES.iloc[:1, :1], "2 or more"),
    ):
        with pytest.raises(InputError, match=f"angles must be .*{message}"):
            plots.plot_atlas(wrong, ax=ax)
    assert not ax.has_data()


@pytest.mark.parametrize("show", SHOWN)
def test_a_sweep_draws_label_and_runner_up_of_every_method(show, ax):
    plots.plot_sweep(SWEEP, ax=ax, show=show)
    look = styles(METHODS)
    for method in METHODS:
        rows = SWEEP[SWEEP["method"] == method]
        for column in SHOWN[show][0]:
            lines = [line for line in ax.lines if np.array_equal(line.get_ydata(), rows[column])]
            assert any(same_color(line.get_color(), look[method].color) for line in lines), (method, column)
            (line,) = [line for line in lines if same_color(line.get_color(), look[method].color)]
            runner_up = column in ("runner_up_grad", "q_runner_up")
            assert line.get_linestyle() == ("--" if runner_up else "-") and line.get_marker() == look[method].marker
            assert (line.get_markerfacecolor() == "white") == runner_up
            assert line.get_label() == ("_" if runner_up else method)
    assert ax.get_xlim() == (-0.02, 1.02) and ax.get_ylabel() == SHOWN[show][1]


def test_a_sweep_of_the_probes_has_a_logit_axis_and_a_line_per_shape(ax, explained):
    plots.plot_sweep(explained.table, ax=ax, show="target")
    assert ax.get_xscale() == "logit"
    assert {"equal alternatives", "alternatives falling by .8", "one strong alternative"} <= {
        line.get_label() for line in ax.lines
    }
    with pytest.raises(InputError, match="show must be one of gradient, target, label_weight, got 'q'"):
        plots.plot_sweep(SWEEP, ax=ax, show="q")


def test_an_update_goes_from_p_to_q_and_signed_mass_is_hatched(ax):
    plots.plot_update(TOKEN, ax=ax)
    p, q = TOKEN["p"].to_numpy(), TOKEN["q"].to_numpy()
    arrows = [text for text in ax.texts if isinstance(text, Annotation)]
    assert_allclose([(arrow.xyann[0], arrow.xy[0]) for arrow in arrows], np.stack([p, q], 1)[abs(q - p) > 0.03])
    bars = [bar for bar in ax.patches if bar.get_height() == pytest.approx(0.34)]
    assert_allclose([bar.get_width() for bar in bars], q)
    assert [bool(bar.get_hatch()) for bar in bars] == (q < 0).tolist() and (q < 0).any()
    names = ax.get_yticklabels()
    assert [name.get_text() for name in names] == [shown(token) for token in TOKEN["token"]]
    assert not any(name.get_parse_math() for name in names), "a dollar sign begins no formula"
    assert [name.get_fontweight() == "bold" for name in names] == TOKEN["label"].tolist()
    assert ax.get_ylim()[0] > ax.get_ylim()[1] and ax.get_xlim()[0] < q.min()
    with pytest.raises(InputError, match="draws one method, got gem, sft"):
        plots.plot_update(pd.concat([TOKEN, TOKEN.assign(method="sft")]), ax=ax)


@pytest.mark.parametrize("show", ["label_weight", "kl"])
def test_a_text_is_a_column_per_token_a_row_per_method_and_signed_cells_are_hatched(show, ax):
    plots.plot_sequence(TEXT, ax=ax, show=show)
    image = ax.images[0].get_array()
    expected = TEXT.pivot(index="method", columns="position", values=show).loc[list(METHODS)].to_numpy()
    assert_allclose(image.filled(np.nan), expected)
    hatched = {(round(cell.get_y() + 0.5), round(cell.get_x() + 0.5)) for cell in ax.patches if cell.get_hatch()}
    signed = {(METHODS.index(row.method), row.position) for row in TEXT.itertuples() if row.negative_mass > 1e-6}
    assert hatched == signed and signed
    assert [tick.get_text() for tick in ax.get_xticklabels()] == ["$tok_"] * 12
    assert [tick.get_text() for tick in ax.get_yticklabels()] == list(METHODS)
    if show == "label_weight":
        assert {text.get_text() for text in ax.texts} == {"+"}, "some label weights of gem are beyond the colours"
    with pytest.raises(InputError, match="show must be one of label_weight"):
        plots.plot_sequence(TEXT, ax=ax, show="loss")


def test_a_long_text_wraps_with_one_colour_scale():
    text = text_frame(METHODS, sweep_tokens(np.linspace(0.05, 0.95, 60)))
    figure = plots.figure_sequence(text, show=("label_weight", "kl"))
    maps = [ax for ax in figure.axes if ax.images and ax.get_ylim()[0] > ax.get_ylim()[1]]
    assert [ax.images[0].get_array().shape[1] for ax in maps] == [48, 48, 12, 12]
    assert len({(ax.images[0].norm.vmin, ax.images[0].norm.vmax) for ax in maps[1::2]}) == 1
    assert figure.legends[0].get_texts()[0].get_text() == "negative mass"
    figure.draw_without_rendering()


def test_the_plane_places_every_method_names_it_and_hollows_the_signed(ax):
    far = PLANE.assign(label_weight=[1.0, 0.3, 999.0, 0.4])
    plots.plot_plane(far, ax=ax)
    dots = {line.get_label(): line for line in ax.lines if line.get_label() in METHODS}
    for row in far.itertuples():
        assert (
            dots[row.method].get_xdata()[0] == min(row.label_weight, 1.6)
            and dots[row.method].get_ydata()[0] == row.reshape
        )
    assert [name for name, dot in dots.items() if dot.get_markerfacecolor() == "white"] == ["gem"]
    assert {"sft", "dft", "target_sft", "gem (999)"} <= {text.get_text() for text in ax.texts}
    assert any(f"{len(sweep_tokens())} tokens" in text.get_text() for text in ax.texts)


def test_names_of_methods_without_reshape_stand_below_in_the_order_of_their_label_weight(ax):
    flat = ["sft", "dft", "beyond_log", "focal", "gce", "kd"]
    data = plane_frame(flat, sweep_tokens())
    plots.plot_plane(data, ax=ax)
    below = [text for text in ax.texts if text.get_rotation() == 90]
    order = data[data["method"] != "kd"].sort_values("label_weight", kind="stable")["method"].tolist()
    assert [text.get_text() for text in sorted(below, key=lambda text: text.xyann[0])] == order
    gaps = np.diff(sorted(text.xyann[0] for text in below)) * ax.bbox.width * 72 / ax.figure.dpi
    assert gaps.min() > SMALL, "none touches the next"
    assert min(ax.get_yticks()) >= 0 > ax.get_ylim()[0]


def test_the_tree_joins_the_nearest_methods_first(ax):
    plots.plot_atlas(ANGLES, ax=ax)
    joints = sorted(path.vertices[:, 0].max() for tree in ax.collections for path in tree.get_paths())
    assert_allclose(joints, [10, 70])
    names = [tick.get_text() for tick in ax.get_yticklabels()]
    assert set(names) == set(ANGLES.index) and abs(names.index("sft") - names.index("kd")) == 1
    look = styles(names)
    leaves = {line.get_label(): line for line in ax.lines}
    for place, name in enumerate(names):
        assert leaves[name].get_ydata()[0] == 10 * place + 5 == ax.get_yticks()[place]
        assert leaves[name].get_marker() == look[name].marker and same_color(leaves[name].get_color(), look[name].color)


def test_the_atlas_of_all_methods_has_a_leaf_for_each():
    figure = distances().plot()
    leaves = [tick.get_text() for tick in figure.axes[0].get_yticklabels()]
    assert {"sft", "dft", "target_sft", "gem"} <= set(leaves) <= set(qlens.names())
    figure.draw_without_rendering()


def test_settings_stand_on_one_axis_and_methods_side_by_side(ax):
    plots.plot_settings(SETTINGS, ax=ax, label="avg@8")
    assert [tick.get_text() for tick in ax.get_xticklabels()] == ["one", "two"]
    dots = {bars.get_label(): bars.lines[0] for bars in ax.containers}
    assert list(dots["sft"].get_ydata()) == [0.6, 0.2] and [round(x) for x in dots["sft"].get_xdata()] == [0, 1]
    assert dots["base"].get_xdata()[0] < dots["sft"].get_xdata()[0] < dots["my$loss$"].get_xdata()[0]
    ends = ax.containers[1].lines[2][0].get_segments()[0][:, 1]
    assert_allclose(ends, [0.5, 0.8])
    assert ax.get_ylabel() == "avg@8, 95 % interval"


def test_the_forest_has_a_column_per_setting_and_says_every_name_once_in_a_row():
    gaps = SETTINGS[SETTINGS["method"] != "sft"].assign(against="sft", p_holm=[0.01, 0.2, 0.3])
    config = {"metric": {"name": "avg@8", "better": "higher"}, "settings": {"one": {}, "two": {}}}
    study = SimpleNamespace(differences=lambda: gaps, settings=["one", "two"], methods=list(SETTINGS["method"][:3]))
    study.config, study.table = config, lambda: SETTINGS
    for figure in (plots.figure_forest(study), plots.figure_study(study, ("differences",))):
        one, two = figure.axes
        assert [ax.get_title(loc="left") for ax in figure.axes] == ["one", "two"]
        assert len(one.containers) == len(two.containers) == 2, "a row for every method in every column"
        assert one.yaxis.get_tick_params()["labelleft"] and not two.yaxis.get_tick_params()["labelleft"]
        assert one.get_xlim() == two.get_xlim()
        assert "avg@8 against sft" in figure.get_supxlabel() and "filled: p < 0.05" in figure.get_supxlabel()
        figure.draw_without_rendering()
    summary = plots.figure_study(study, ("settings",))
    assert [text.get_text() for text in summary.legends[0].get_texts()] == ["base", "sft", r"my\$loss\$"]


@pytest.mark.parametrize("width", [plots.SINGLE, plots.DOUBLE])
def test_figures_fit_a_column_of_a_paper(width, explained):
    """Nothing collapses, no glyph is missing (both would warn), and no text leaves the figure."""
    figures = [
        plots.figure_sweep(SWEEP, width),
        plots.figure_token(token_frame(METHODS, sweep_tokens([0.1]), 0, token_text=ODD.__getitem__), width),
        plots.figure_sequence(TEXT, width=width),
        plots.figure_plane(PLANE, width),
        plots.figure_atlas(ANGLES, width),
        plots.figure_watch(RECORDS, width),
        plots.figure_explain(explained, width),
    ]
    for figure in figures:
        figure.draw_without_rendering()
        assert figure.get_figwidth() == width
        box, paper = figure.get_tightbbox(), figure.bbox_inches
        assert box.x0 > -0.05 and box.x1 < paper.x1 + 0.05 and box.y0 > -0.05 and box.y1 < paper.y1 + 0.05, figure.axes


def test_odd_tokens_are_drawn_without_a_warning(ax):
    tokens = Tokens(logits=torch.linspace(2, 0, len(ODD))[None].double(), labels=torch.tensor([0]))
    data = token_frame(["sft"], tokens, 0, token_text=ODD.__getitem__, top=len(ODD))
    plots.plot_update(data, ax=ax)
    ax.figure.draw_without_rendering()
    names = [tick.get_text() for tick in ax.get_yticklabels()]
    assert names[2:5] == ["\\n", "\u2423", "\\t\\x00"] and names[6] == "\\u202eabc" and names[7] == "\\udcc3"
    assert names[0] == "$x_1$" and names[9] == '""' and len(names[-1]) == 16
