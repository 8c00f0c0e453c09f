"""Figures of several panels: what one loss teaches, losses along p_y, one token, a text, the plane and the atlas."""

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
    need,
    new_figure,
    panels,
    short,
    styles,
)
from qlens.analysis.plots.target_axes import (
    LINES,
    METRICS,
    SHAPES,
    color_limits,
    plot_sequence,
    plot_sweep,
    plot_update,
)

LABEL: dict[str, Any] = {"color": INK, "lw": 1.2, "marker": "o", "markersize": 3.0}
RIVAL: dict[str, Any] = LABEL | {"ls": "--", "markerfacecolor": "white"}
SIGNED = Patch(fill=False, hatch=HATCH, edgecolor=INK, linewidth=0.0, label="negative mass")


def figure_explain(explanation: Any, width: float = DOUBLE) -> Figure:
    """What one loss teaches, against p_y: the pull on label and strongest rival, the target, the trust; and where it ends.

    Args:
        explanation: has ``spec``, ``law``, ``residual``, ``destination`` and ``table`` with p_y, shape, label_grad,
            other_grad, q_label, q_rest and trust.
        width: inches.
    """
    ends = None if isinstance(explanation.destination, str) else explanation.destination
    table = explanation.table
    tall = 1.6 if width < COLUMN else 2.1
    figure, (pull, target, trust, *last) = panels(width, 3 if ends is None else 4, 3 if ends is None else 2, tall)
    for ax, show in ((pull, "gradient"), (target, "target"), (trust, "trust")):
        plot_sweep(table, ax=ax, show=show)
        ax.set_ylabel("")
    known = explanation.law.formula.partition(",")[0] if explanation.law else ""  # what follows explains it in words
    law = f": {known}" if known and explanation.residual == "the student" else ""
    head(pull, r"pull  $\partial L/\partial z = p - Q$")
    head(target, r"target  $Q$")
    head(trust, short("effective trust in the label" + law, 52))
    keys = [Line2D([], [], **LINES[kind], label=SHAPES[kind]) for kind in LINES if (table["shape"] == kind).any()]
    keys += [Line2D([], [], **LABEL, label="label"), Line2D([], [], **RIVAL, label="strongest rival")]
    keys += [line for ax in (target, trust) for line in ax.lines if line.get_color() == GREY]
    for ax in last:
        keys += plot_destination(ends, ax=ax)
        head(ax, "where training on labels 55/45 ends")
    legend_below(figure, keys)
    figure.suptitle(short(explanation.spec, 80), x=0.01, ha="left", fontsize=TEXT + 1, fontweight="bold", color=INK)
    return figure


def explain_data(explanation: Any) -> dict[str, pd.DataFrame]:
    """What ``figure_explain`` shows, by the names that ``save_figure`` takes."""
    ends = explanation.destination
    return {"": explanation.table} | ({} if isinstance(ends, str) else {"destination": ends.table})


def figure_sweep(data: pd.DataFrame, width: float = DOUBLE) -> Figure:
    """The authors' chart for any losses: gradient and target against p_y, of the label and of another token.

    Args:
        data: as ``readings.sweep`` gives it, a method per line.
        width: inches.

    Example:
        >>> from qlens.analysis.plots import sweep
        >>> len(figure_sweep(sweep(["sft", "dft"])).axes)
        2
    """
    figure, axes = panels(width, 2, 2, tall=1.5 if width < COLUMN else 2.3, narrow=2)
    for ax, show in zip(axes, ("gradient", "target"), strict=True):
        plot_sweep(data, ax=ax, show=show)
        head(ax, ax.get_ylabel())
        ax.set_ylabel("")
    keys = method_keys(dict.fromkeys(data["method"]))
    keys += [Line2D([], [], **LABEL, label="observed token"), Line2D([], [], **RIVAL, label="its strongest rival")]
    keys += [Line2D([], [], color=GREY, lw=0.9, ls=":", label=r"$Q_y = p_y$")]
    legend_below(figure, keys)
    return figure


def figure_token(data: pd.DataFrame, width: float = DOUBLE, across: int = 4) -> Figure:
    """One token under several methods, side by side: p, the update of its logits, and Q, over the same candidates.

    Args:
        data: as ``readings.candidates`` gives it.
        width: inches.
        across: methods side by side.
    """
    need(data, "method", "token", "p", "q")
    names = list(dict.fromkeys(data["method"]))
    rows, tokens = ceil(len(names) / across), data["token"].nunique()
    columns = ceil(len(names) / rows)
    figure = new_figure(width, 0.25 + rows * (0.3 + 0.18 * tokens))
    axes = figure.subplots(rows, columns, squeeze=False, sharex=True)
    low, high = min(0.0, data["q"].min()), data[["p", "q"]].max().max()
    for place, ax in enumerate(axes.flat):
        if place >= len(names):
            ax.set_visible(False)
            continue
        plot_update(data[data["method"] == names[place]], ax=ax, methods=names)
        head(ax, short(names[place], 20))
        ax.set_xlim(low * 1.06, high * 1.06)
        ax.tick_params(axis="y", labelleft=place % columns == 0)
        below = place + columns >= len(names)
        ax.tick_params(axis="x", labelbottom=below)
        ax.set_xlabel("probability" if below else "")
    color = styles(names)[names[0]].color if len(names) == 1 else INK
    keys = [Patch(color=FAINT, label="model, p"), Patch(color=color, label="target, Q")]
    keys += [Line2D([], [], color=INK, lw=0.9, marker=">", markersize=3.5, label="update of the logit, Q \u2212 p")]
    legend_below(figure, [*keys, *[SIGNED] * bool((data["q"] < 0).any())])
    return figure


def figure_sequence(
    data: pd.DataFrame,
    show: Sequence[str] = ("trust", "entropy", "kl", "negative_mass"),
    width: float = DOUBLE,
    per_line: int = 48,
) -> Figure:
    """A text as heat maps, one below the other: trust, entropy, KL(Q || p) and negative mass of every token's target.

    A text longer than a line goes on below; colours mean the same in all lines.

    Args:
        data: as ``readings.along`` gives it.
        show: which of ``METRICS``.
        width: inches.
        per_line: tokens in a line.
    """
    need(data, "method", "position", "token", "negative_mass", *show)
    methods, last = data["method"].nunique(), int(data["position"].max())
    lines = ceil((last + 1) / per_line)
    strings = 0.12 + 0.055 * min(16, max(data["token"].str.len().max(), 3))  # upright below each line
    tall = [0.12 + 0.13 * methods] * len(show)
    figure = new_figure(width, 0.1 + lines * (sum(tall) + 0.24 * len(show) + strings))
    axes = figure.subplots(lines * len(show), 1, squeeze=False)[:, 0]
    for place, ax in enumerate(axes):
        line, metric = place // len(show), show[place % len(show)]
        mine = data[data["position"].between(line * per_line, (line + 1) * per_line - 1)]
        plot_sequence(mine, ax=ax, show=metric, limits=color_limits(data, metric))
        ax.set_xlim(-0.5, min(per_line, last + 1) - 0.5)  # a last, short line has columns as wide as the others
        if methods == 1:
            ax.set_yticks([])
        if metric != show[-1]:
            ax.tick_params(axis="x", labelbottom=False)
        head(ax, METRICS[metric])
        bar = figure.colorbar(ax.images[0], ax=ax, fraction=0.025, pad=0.01, aspect=6)
        bar.ax.tick_params(labelsize=SMALL - 1, length=2)
        bar.ax.locator_params(nbins=2)
        bar.outline.set_visible(False)
        bar.ax.set_visible(line == 0)  # what it says holds for all lines
    if (data["negative_mass"] > 0).any():
        legend_below(figure, [SIGNED])
    return figure


def figure_plane(data: pd.DataFrame, width: float = DOUBLE) -> Figure:
    """Methods on the plane of effective trust against reshape, with their names.

    Args:
        data: as ``readings.plane`` gives it.
        width: inches.
    """
    figure = new_figure(width, width * (0.62 if width > 4 else 0.85))
    plot_plane(data, ax=figure.subplots())
    return figure


def figure_atlas(angles: pd.DataFrame, width: float = DOUBLE) -> Figure:
    """The methods as a tree of the angles between their gradients.

    Args:
        angles: as ``qlens.lens.equivalences.distances().angles()`` gives them.
        width: inches.
    """
    figure = new_figure(width, 0.5 + 0.145 * len(angles))
    plot_atlas(angles, ax=figure.subplots())
    return figure
