"""Figures of targets with several panels: one loss explained, variants along p_y, one token, a text, all methods."""

from collections.abc import Sequence
from math import ceil
from typing import Any

import pandas as pd
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch

from qlens.analysis.plots.flow_figure import plot_destination
from qlens.analysis.plots.method_map import plot_atlas, plot_plane
from qlens.analysis.plots.study_overview import method_keys
from qlens.analysis.plots.style import (
    COLUMN,
    DOUBLE,
    FAINT,
    GREY,
    HATCH,
    INK,
    SMALL,
    TEXT,
    head,
    legend_below,
    look,
    need,
    new_figure,
    of_figure,
    panels,
    short,
)
from qlens.analysis.plots.target_axes import (
    LINES,
    METRICS,
    OLD_METRICS,
    SHAPES,
    color_limits,
    plot_sequence,
    plot_sweep,
    plot_update,
)
from qlens.core.deprecation import renamed_value, without_effect
from qlens.core.deprecation.columns import current_columns

LABEL: dict[str, Any] = {"color": INK, "lw": 1.2, "marker": "o", "markersize": 3.0}
RUNNER_UP: dict[str, Any] = LABEL | {"ls": "--", "markerfacecolor": "white"}
ACROSS = 5  # methods side by side
TOKEN_WIDTH = DOUBLE / 48  # inches per token of a text
SIGNED = Patch(fill=False, hatch=HATCH, edgecolor=INK, linewidth=0.0, label="negative mass")


def figure_explain(explanation: Any, width: float = DOUBLE) -> Figure:
    """One loss against p_y: gradient on label and runner-up, target, label weight; and the end of its gradient flow.

    Args:
        explanation: of ``qlens.explain``.
        width: inches.
    """
    ends = None if isinstance(explanation.destination, str) else explanation.destination
    table = explanation.table
    tall = 1.6 if width < COLUMN else 2.1
    figure, (gradient, target, weight, *last) = panels(width, 3 if ends is None else 4, 3 if ends is None else 2, tall)
    for ax, show in ((gradient, "gradient"), (target, "target"), (weight, "label_weight")):
        plot_sweep(table, ax=ax, show=show)
        ax.set_ylabel("")
    formula = explanation.law.formula.partition(",")[0] if explanation.law else ""  # without the explanation after it
    law = f": {formula}" if formula and explanation.residual == "the student" else ""
    head(gradient, r"gradient  $\partial L/\partial z = p - Q$")
    head(target, r"target  $Q$")
    head(weight, short("label weight" + law, 52))
    keys = [Line2D([], [], **LINES[kind], label=SHAPES[kind]) for kind in LINES if (table["shape"] == kind).any()]
    keys += [Line2D([], [], **LABEL, label="label"), Line2D([], [], **RUNNER_UP, label="runner-up")]
    keys += [line for ax in (target, weight) for line in ax.lines if line.get_color() == GREY]
    for ax in last:
        keys += plot_destination(ends, ax=ax)
        head(ax, "gradient flow on labels 55/45")
    legend_below(figure, keys)
    figure.suptitle(short(explanation.spec, 80), x=0.01, ha="left", fontsize=TEXT + 1, fontweight="bold", color=INK)
    return figure


def explain_data(explanation: Any) -> dict[str, pd.DataFrame]:
    """The data of ``figure_explain`` as ``save_figure`` takes them."""
    ends = explanation.destination
    return {"": explanation.table} | ({} if isinstance(ends, str) else {"destination": ends.table})


def figure_sweep(data: pd.DataFrame, width: float = DOUBLE) -> Figure:
    """Gradient and target against p_y, of the label and of the runner-up, a line per method.

    Args:
        data: of ``sweep_frame``.
        width: inches.

    Source: the chart of Xie et al. 2026 (arXiv 2606.11189), for any variants.

    Example:
        >>> from qlens.analysis.plots import sweep_frame
        >>> len(figure_sweep(sweep_frame(["sft", "dft"])).axes)
        2
    """
    figure, axes = panels(width, 2, 2, tall=1.5 if width < COLUMN else 2.3, narrow=2)
    for ax, show in zip(axes, ("gradient", "target"), strict=True):
        plot_sweep(data, ax=ax, show=show)
        head(ax, ax.get_ylabel())
        ax.set_ylabel("")
    keys = method_keys(dict.fromkeys(data["method"]))
    keys += [Line2D([], [], **LABEL, label="label"), Line2D([], [], **RUNNER_UP, label="runner-up")]
    keys += [Line2D([], [], color=GREY, lw=0.9, ls=":", label=r"$Q_y = p_y$")]
    legend_below(figure, keys)
    return figure


@without_effect("across")
def figure_token(data: pd.DataFrame, width: float = DOUBLE) -> Figure:
    """One token under several methods, side by side: p, the update of its logits, and Q, over the same entries.

    Args:
        data: of ``token_frame``.
        width: inches.
    """
    need(data, "method", "token", "p", "q")
    names = list(dict.fromkeys(data["method"]))
    across = ACROSS if width > COLUMN else ACROSS // 2
    rows, tokens = ceil(len(names) / across), data["token"].nunique()
    columns = ceil(len(names) / rows)
    figure = new_figure(width, 0.25 + rows * (0.3 + 0.18 * tokens))
    axes = figure.subplots(rows, columns, squeeze=False, sharex=True)
    low, high = min(0.0, data["q"].min()), data[["p", "q"]].max().max()
    for place, ax in enumerate(axes.flat):
        if place >= len(names):
            ax.set_visible(False)
            continue
        plot_update(of_figure(data[data["method"] == names[place]], names), ax=ax)
        head(ax, short(names[place], 20))
        ax.set_xlim(low * 1.06, high * 1.06)
        ax.tick_params(axis="y", labelleft=place % columns == 0)
        below = place + columns >= len(names)
        ax.tick_params(axis="x", labelbottom=below)
        ax.set_xlabel("probability" if below else "")
    color = look(data)[names[0]].color if len(names) == 1 else INK
    keys = [Patch(color=FAINT, label="model, p"), Patch(color=color, label="target, Q")]
    keys += [Line2D([], [], color=INK, lw=0.9, marker=">", markersize=3.5, label="update of the logit, Q \u2212 p")]
    legend_below(figure, [*keys, *[SIGNED] * bool((data["q"] < 0).any())])
    return figure


@without_effect("per_line")
def figure_sequence(
    data: pd.DataFrame,
    show: Sequence[str] = ("label_weight", "entropy", "kl", "negative_mass"),
    width: float = DOUBLE,
) -> Figure:
    """A text as heat maps, one below the other: label weight, entropy, KL(Q || p) and negative mass of every target.

    Long texts wrap; colours mean the same in all lines.

    Args:
        data: of ``text_frame``.
        show: names of ``METRICS``.
        width: inches.
    """
    data, show = current_columns(data), [renamed_value("show", metric, OLD_METRICS, level=5) for metric in show]
    need(data, "method", "position", "token", "negative_mass", *show)
    methods, last = data["method"].nunique(), int(data["position"].max())
    per_line = round(width / TOKEN_WIDTH)
    lines = ceil((last + 1) / per_line)
    labels = 0.12 + 0.055 * min(16, max(data["token"].str.len().max(), 3))  # height of the upright tokens
    height = (0.12 + 0.13 * methods + 0.24) * len(show)
    figure = new_figure(width, 0.1 + lines * (height + labels))
    axes = figure.subplots(lines * len(show), 1, squeeze=False)[:, 0]
    for place, ax in enumerate(axes):
        line, metric = place // len(show), show[place % len(show)]
        mine = data[data["position"].between(line * per_line, (line + 1) * per_line - 1)]
        plot_sequence(mine, ax=ax, show=metric, limits=color_limits(data, metric))
        ax.set_xlim(-0.5, min(per_line, last + 1) - 0.5)  # same column width in a short last line
        if methods == 1:
            ax.set_yticks([])
        if metric != show[-1]:
            ax.tick_params(axis="x", labelbottom=False)
        head(ax, METRICS[metric])
        bar = figure.colorbar(ax.images[0], ax=ax, fraction=0.025, pad=0.01, aspect=6)
        bar.ax.tick_params(labelsize=SMALL - 1, length=2)
        bar.ax.locator_params(nbins=2)
        bar.outline.set_visible(False)
        bar.ax.set_visible(line == 0)  # one for all lines
    if (data["negative_mass"] > 0).any():
        legend_below(figure, [SIGNED])
    return figure


def figure_plane(data: pd.DataFrame, width: float = DOUBLE) -> Figure:
    """Methods by label weight and reshape, with their names.

    Args:
        data: of ``plane_frame``.
        width: inches.
    """
    figure = new_figure(width, width * (0.62 if width > 4 else 0.85))
    plot_plane(data, ax=figure.subplots())
    return figure


def figure_atlas(angles: pd.DataFrame, width: float = DOUBLE) -> Figure:
    """Methods as a tree by the angles between their gradients.

    Args:
        angles: of ``qlens.lens.equivalences.distances().angles()``.
        width: inches.
    """
    figure = new_figure(width, 0.5 + 0.145 * len(angles))
    plot_atlas(angles, ax=figure.subplots())
    return figure
