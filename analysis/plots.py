"""Plots: those on one Axes (from ``axes``), and figures of several panels: a study, and what one loss teaches."""

from collections.abc import Sequence
from math import ceil
from typing import Any

import pandas as pd
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import FixedFormatter, FixedLocator, NullLocator

from qlens.analysis.axes import (
    FAINT,
    GREY,
    INK,
    SPARE,
    STYLES,
    Style,
    clean,
    plot_scores,
    plot_target,
    plot_trust,
    short,
    styles,
)
from qlens.analysis.flow import plot_destination
from qlens.analysis.outcomes import plot_curves, plot_differences, plot_frontier, plot_truth

__all__ = [
    "GLANCE",
    "PANELS",
    "SPARE",
    "STYLES",
    "Style",
    "figure_explain",
    "figure_study",
    "panel_data",
    "plot_curves",
    "plot_differences",
    "plot_frontier",
    "plot_scores",
    "plot_target",
    "plot_trust",
    "plot_truth",
    "styles",
]

CROWD = 200  # more tokens than this are drawn as fine dust
PANELS = {
    "scores": "result ({better} is better)",
    "differences": "paired differences",
    "frontier": "result against distance from the start",
    "curves": "learning curves, on {validated}",
    "truth": "trust against truth, at the start",
    "trust": "trust in the label, at the start",
    "target": "targets at one token, at the start",
}
"""The panels of a study's figures, with their titles."""
GLANCE = ("scores", "trust", "target")
WIDTHS = {"scores": 4.8, "differences": 4.8, "frontier": 5.2, "curves": 4.8, "truth": 5.0, "trust": 4.2, "target": 5.6}
OWN_LABELS = ("scores", "differences", "truth")  # panels on which the methods' names stand
TICKS = {
    1e-6: "$10^{-6}$",
    1e-3: "$10^{-3}$",
    0.1: "0.1",
    0.5: "0.5",
    0.9: "0.9",
    1 - 1e-3: "0.999",
    1 - 1e-6: "$1-10^{-6}$",
}
LINES = {  # of the shapes of the alternatives; a wide pale line stays visible where a thin dark one covers it
    "flat": {"color": "#E69F00", "marker": "s", "lw": 3.2, "markersize": 6.0, "alpha": 0.75, "zorder": 2},
    "graded": {"color": "#009E73", "marker": "D", "lw": 2.2, "markersize": 4.4, "alpha": 0.85, "zorder": 2.5},
    "peaked": {"color": "#0072B2", "marker": "o", "lw": 1.4, "markersize": 3.6, "zorder": 3},
    "text": {"color": "#0072B2", "marker": "o", "lw": 0.0, "markersize": 3.6, "zorder": 3},
}
SHAPES = {
    "flat": "alternatives alike",
    "graded": "rivals falling by .8",
    "peaked": "one strong rival",
    "text": "the text's tokens",
}


def figure_study(study: Any, panels: Sequence[str] = GLANCE) -> Figure:
    """A study at a glance: scores, trust against p_y, and the targets at one token; a row per setting.

    A single panel is drawn for all settings, up to three side by side.

    Args:
        study: has ``table()``, ``trust``, ``target`` and ``config``.
        panels: which of ``PANELS``.
    """
    data = {panel: panel_data(study, panel) for panel in panels}
    settings = [name for name in study.settings if any((frame["setting"] == name).any() for frame in data.values())]
    single, methods = len(panels) == 1, study.methods
    places = [(setting, panel) for setting in settings for panel in panels]
    columns = min(len(settings), 2 + (len(settings) == 3)) if single else len(panels)
    rows = ceil(len(places) / columns)
    widths = [WIDTHS[panel] for panel in (list(panels) * columns if single else panels)]
    figure = _figure(sum(widths), 0.55 + rows * (1.9 + 0.22 * len(methods)))
    grid = figure.subplots(rows, columns, squeeze=False, gridspec_kw={"width_ratios": widths})
    for spare in grid.flat[len(places) :]:
        spare.set_visible(False)
    words = study.config["metric"] | {
        "validated": "held-out rows" if "data" in _first(study) else "validation problems"
    }
    for ax, (setting, panel) in zip(grid.flat, places, strict=False):
        _panel(study, data[panel][data[panel]["setting"] == setting], panel, methods, ax)
        ax.set_title(f"{setting}: {PANELS[panel]}".format(**words), fontsize=10, loc="left", color=INK)
    if not set(panels) <= set(OWN_LABELS):
        drawn = (
            methods if set(panels) & {"scores", "frontier", "curves"} else [name for name in methods if name != "base"]
        )
        _legend(figure, styles(methods), drawn, pale="target" in panels)
    return figure


def panel_data(study: Any, panel: str) -> pd.DataFrame:
    """What a panel shows, as a frame with a column ``setting``; empty where there is nothing to draw."""
    if panel in ("scores", "frontier"):
        return study.table()
    if panel == "differences":
        return study.differences()
    if panel == "curves":
        return study.curve()
    if panel == "truth":
        noisy = study.truths().query("noisy > 0")[["setting", "method", "trust"]].rename(columns={"trust": "auroc"})
        return study.calibration.merge(noisy, on=["setting", "method"])
    return getattr(study, panel)


def _first(study: Any) -> dict[str, Any]:
    return next(iter(study.config["settings"].values()))


def _legend(figure: Figure, look: dict[str, Style], methods: Sequence[str], pale: bool) -> None:
    keys: list[Artist] = [
        Line2D([], [], ls="", markersize=6, label=short(name), color=look[name].color, marker=look[name].marker)
        for name in methods
    ]
    keys += [Patch(color=FAINT, label="starting model, p")] if pale else []
    inches = sum(0.5 + 0.075 * len(str(key.get_label())) for key in keys)
    rows = ceil(inches / figure.get_figwidth())
    figure.legend(handles=keys, loc="outside lower center", ncols=ceil(len(keys) / rows), frameon=False, fontsize=9)


def _panel(study: Any, data: pd.DataFrame, panel: str, methods: list[str], ax: Axes) -> None:
    label = study.config["metric"]["name"]
    if panel == "target":
        observed = next(iter(data.loc[data["label"].astype(bool), "token"]), None)
        plot_target(data, ax=ax, methods=methods, label=observed)
    elif panel in ("trust", "truth"):
        {"trust": plot_trust, "truth": plot_truth}[panel](data, ax=ax, methods=methods)
    else:
        draw = {
            "scores": plot_scores,
            "differences": plot_differences,
            "frontier": plot_frontier,
            "curves": plot_curves,
        }
        draw[panel](data, ax=ax, label=label, methods=methods)


def figure_explain(explanation: Any) -> Figure:
    """What one loss teaches, against p_y: the pull on label and strongest rival, the target, the trust; and where it ends.

    Args:
        explanation: has ``spec``, ``law``, ``destination`` and ``table`` with p_y, shape, label_grad, other_grad, q_label,
            q_rest and trust.
    """
    ends = None if isinstance(explanation.destination, str) else explanation.destination
    table, figure = explanation.table, _figure(11.5 if ends is None else 15.2, 3.9)
    pull, target, trust, *last = figure.subplots(1, 3 if ends is None else 4)
    kinds = [kind for kind in LINES if (table["shape"] == kind).any()]
    for kind in kinds:
        rows, solid = table[table["shape"] == kind].sort_values("p_y"), LINES[kind]
        crowded = len(rows) > CROWD
        solid = solid | {"markersize": 1.8, "alpha": 0.4, "markeredgewidth": 0.4} if crowded else solid
        dashed = solid | {"ls": "--", "markerfacecolor": "none" if crowded else "white"}
        for ax, of_label, of_rival in ((pull, "label_grad", "other_grad"), (target, "q_label", "q_rest")):
            ax.plot(rows["p_y"], rows[of_rival], **dashed)
            ax.plot(rows["p_y"], rows[of_label], **solid)
        trust.plot(rows["p_y"], rows["trust"], **solid)
    _references(target, trust, sorted(table["p_y"]))
    if table["trust"].abs().max() > 20:  # a few tokens with p_y near 1 would flatten all others
        trust.set_yscale("symlog", linthresh=1.0)
    known = explanation.law.formula.partition(",")[0] if explanation.law else ""  # what follows explains it in words
    law = f": {known}" if known and explanation.residual == "the student" else ""
    titles = {
        pull: r"pull  $\partial L/\partial z = p - Q$",
        target: r"target  $Q$",
        trust: short("effective trust in the label" + law, 52),
    }
    for ax, title in titles.items():
        ax.axhline(0, color=INK, lw=0.8, zorder=1)
        ax.set_title(title, fontsize=10, loc="left", color=INK)
        ax.set_xlabel(r"label probability $p_y$")
        _sweep(ax, table["p_y"])
        clean(ax)
    keys = [Line2D([], [], **LINES[kind], label=SHAPES[kind]) for kind in kinds]
    ink = {"color": INK, "lw": 1.4, "marker": "o", "markersize": 3.6}
    keys += [Line2D([], [], **ink, label="label")]
    keys += [Line2D([], [], **ink, ls="--", markerfacecolor="white", label="strongest rival")]
    keys += [handle for ax in (target, trust) for handle in ax.get_legend_handles_labels()[0]]
    for ax in last:
        keys += plot_destination(ends, ax=ax)
        ax.set_title("where training on labels 55/45 ends", fontsize=10, loc="left", color=INK)
    columns = len(keys) if not last else (len(keys) + 1) // 2
    figure.legend(handles=keys, loc="outside lower center", ncols=columns, frameon=False, fontsize=9)
    figure.suptitle(short(explanation.spec, 80), x=0.01, ha="left", fontsize=11, fontweight="bold", color=INK)
    return figure


def _references(target: Axes, trust: Axes, p_y: list[float]) -> None:
    """What everybody knows, in grey: full trust, and trust by p_y."""
    target.plot(p_y, p_y, color=GREY, lw=0.9, ls=":", zorder=1, label=r"$Q_y = p_y$")
    trust.plot(p_y, [1.0] * len(p_y), color=GREY, lw=0.9, zorder=1, label="trust 1 (sft)")
    trust.plot(p_y, p_y, color=GREY, lw=0.9, ls="--", zorder=1, label=r"trust $p_y$ (dft)")


def _sweep(ax: Axes, p_y: pd.Series) -> None:
    """A logit axis where p_y comes near 0 and 1: both ends matter, and both are crowded on a linear one."""
    if p_y.min() < 1e-3 and 0 < p_y.min() and p_y.max() < 1:
        ax.set_xscale("logit")
        ax.xaxis.set_major_locator(FixedLocator(list(TICKS)))
        ax.xaxis.set_major_formatter(FixedFormatter(list(TICKS.values())))
        ax.xaxis.set_minor_locator(NullLocator())
        ax.tick_params(axis="x", labelsize=8)


def _figure(width: float, height: float) -> Figure:
    """A figure that no window knows of: nothing is shown, nothing stays open."""
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure
