"""Plots of what a comparison found, on one Axes each: scores against distance, differences, learning curves, calibration."""

from collections.abc import Iterable
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.lines import Line2D

from qlens.analysis.plots.style import GREY, INK, Style, clean, current, need, note, short, styles
from qlens.core.errors import InputError

ALPHA = 0.05
WINDOW = (-0.05, 1.05)  # of trust
DASHES = {"lw": 0.8, "ls": (0, (4, 3)), "zorder": 1}
POINTS = {"capsize": 0, "elinewidth": 1.5, "markersize": 6.5, "markeredgecolor": "white", "markeredgewidth": 0.6}


def plot_frontier(
    table: pd.DataFrame,
    *,
    ax: Axes | None = None,
    label: str = "score",
    methods: Iterable[str] | None = None,
    **errorbar: Any,
) -> Axes:
    """Scores against KL(start || trained), what a result costs in distance; the start as a line.

    Args:
        table: of one setting, as ``Study.table()`` gives it: method, mean, low, high, kl_start (nats).
        ax: where to draw; the current Axes by default.
        label: of the score's axis.
        methods: which share the colours, if more than in the table.
        errorbar: to ``Axes.errorbar``.

    Raises:
        InputError: columns are missing, or there is more than one setting.
    """
    ax, look = _begin(ax, table, methods, "mean", "low", "high", "kl_start")
    for _, row in table.iterrows():
        style = look[row["method"]]
        if row["method"] == "base":
            ax.axhline(row["mean"], color=style.color, **DASHES)
        options = POINTS | {"color": style.color, "fmt": style.marker, "zorder": 3} | errorbar
        ax.errorbar(row["kl_start"], row["mean"], yerr=_ends(row), label=row["method"], **options)
    distances = table.loc[table["kl_start"] > 0, "kl_start"]
    if len(distances) and distances.max() > 50 * distances.min():  # with the start at 0 still in sight
        ax.set_xscale("symlog", linthresh=distances.min())
    ax.margins(x=0.08, y=0.1)
    ax.set(xlabel="KL(start || trained) per token, nats", ylabel=label)
    return clean(ax)


def plot_differences(
    table: pd.DataFrame,
    *,
    ax: Axes | None = None,
    label: str = "score",
    methods: Iterable[str] | None = None,
    key: bool = True,
    **errorbar: Any,
) -> Axes:
    """Differences against one method, a row each, with their intervals; filled where the corrected p is below .05.

    Args:
        table: of one setting, as ``Study.differences()`` gives it: method, against, mean, low, high, p_holm.
        ax: where to draw; the current Axes by default.
        label: what is different.
        methods: which share the colours, if more than in the table.
        key: whether a note says what filled and hollow mean.
        errorbar: to ``Axes.errorbar``.

    Raises:
        InputError: columns are missing, or there is more than one setting or reference.
    """
    ax, look = _begin(ax, table, methods, "against", "mean", "low", "high", "p_holm")
    ax.axvline(0, color=INK, lw=0.8, zorder=1)
    for at, (_, row) in enumerate(table.iterrows()):
        style, sure = look[row["method"]], row["p_holm"] < ALPHA
        options = POINTS | {"color": style.color, "fmt": style.marker, "zorder": 3, "markeredgecolor": style.color}
        options |= {"markerfacecolor": style.color if sure else "white", "markeredgewidth": 1.2} | errorbar
        ax.errorbar(row["mean"], at, xerr=_ends(row), label=row["method"], **options)
    ax.set_yticks(range(len(table)), [short(method) for method in table["method"]])
    ax.set_ylim(len(table) - (-0.2 if key else 0.5), -0.5)  # the last row is the note's
    ax.tick_params(axis="y", length=0)
    if key:
        note(ax, f"filled: p < {ALPHA:g} (Holm), hollow: not")
    ax.set_xlabel(f"difference in {label}\nagainst {short(next(iter(table['against']), ''))}, 95 % interval")
    return clean(ax, grid="x")


def plot_curves(
    data: pd.DataFrame,
    *,
    ax: Axes | None = None,
    label: str = "score",
    methods: Iterable[str] | None = None,
    **line: Any,
) -> Axes:
    """Scores in the course of training, with their intervals as bands; the start, ``base``, as a line across.

    Args:
        data: of one setting, as ``Study.curve()`` gives it: method, step, mean, low, high.
        ax: where to draw; the current Axes by default.
        label: of the score's axis.
        methods: which share the colours, if more than in the data.
        line: to ``Axes.plot``.

    Raises:
        InputError: columns are missing, or there is more than one setting.
    """
    ax, look = _begin(ax, data, methods, "step", "mean", "low", "high")
    for method, rows in data.groupby("method", sort=False):
        style, rows = look[str(method)], rows.sort_values("step")
        if method == "base":
            ax.axhline(rows["mean"].iloc[0], color=style.color, label=method, **DASHES)
            continue
        ax.fill_between(rows["step"], rows["low"], rows["high"], color=style.color, alpha=0.1, lw=0, zorder=2)
        options = {"color": style.color, "marker": style.marker, "markersize": 5.5, "lw": 1.3, "zorder": 3}
        options |= {"markeredgecolor": "white", "markeredgewidth": 0.5, "label": method} | line
        ax.plot(rows["step"], rows["mean"], **options)
    low, high = data["mean"].min(), data["mean"].max()
    if (span := high - low) > 0:  # a few seeds' bands can be many times as wide as all that happens
        bottom, top = np.fmin(data["low"].min(), low), np.fmax(data["high"].max(), high)
        ax.set_ylim(max(bottom, low - span / 2) - span / 20, min(top, high + span / 2) + span / 20)
    ax.set(xlabel="training step", ylabel=label)
    return clean(ax)


def plot_truth(
    data: pd.DataFrame, *, ax: Axes | None = None, methods: Iterable[str] | None = None, **line: Any
) -> Axes:
    """The share of good labels among those trusted alike; on the diagonal, trust is the chance that a label is good.

    Points grow with the number of labels behind them; a method that trusts all labels alike is a single point. Trust
    beyond the axis is counted, not drawn.

    Args:
        data: of one setting: method, trust, good, n and auroc, which stands in the legend.
        ax: where to draw; the current Axes by default.
        methods: which share the colours, if more than in the data.
        line: to ``Axes.plot``.

    Raises:
        InputError: columns are missing, or there is more than one setting.
    """
    ax, look = _begin(ax, data, methods, "trust", "good", "n", "auroc")
    ax.plot([0, 1], [0, 1], color=GREY, lw=0.9, zorder=1)
    most, keys = data["n"].max(), []
    for method, rows in data.groupby("method", sort=False):
        style, auroc = look[str(method)], rows["auroc"].iloc[0]
        pale = (style.color, 0.3)  # what lies below is seen
        name = short(str(method)) + ("" if np.isnan(auroc) else f", {auroc:.2f}".replace(" 0.", " ."))
        rows = rows[rows["trust"].between(*WINDOW)].sort_values("trust")
        ax.plot(rows["trust"], rows["good"], **{"color": style.color, "lw": 1.0, "zorder": 2} | line)
        dots = {"s": 12 + 90 * rows["n"] / most, "marker": style.marker, "label": name, "zorder": 3, "linewidths": 1.1}
        ax.scatter(rows["trust"], rows["good"], facecolors=[pale], edgecolors=[style.color], **dots)
        keys.append(Line2D([], [], ls="", marker=style.marker, label=name, ms=6, mew=1.1, mec=style.color, mfc=pale))
    if beyond := int(data.loc[~data["trust"].between(*WINDOW), "n"].sum()):
        note(ax, f"{beyond} labels beyond the axis", 0.98, ha="right")
    ax.set(xlim=WINDOW, ylim=WINDOW, xlabel="trust in the label", ylabel="share of good labels")
    if keys:
        beside = {"loc": "center left", "bbox_to_anchor": (1, 0.5), "frameon": False, "handletextpad": 0.2}
        ax.legend(handles=keys, title="method, AUROC", alignment="left", fontsize=7.5, title_fontsize=7.5, **beside)
    return clean(ax)


def _begin(
    ax: Axes | None, data: pd.DataFrame, methods: Iterable[str] | None, *columns: str
) -> tuple[Axes, dict[str, Style]]:
    """Where to draw and how the methods look, once the data are as they must be."""
    need(data, "method", *columns)
    for column in ("setting", "against"):
        if column in data and data[column].nunique() > 1:
            raise InputError(f"one {column} can be drawn at a time, got {sorted(data[column].unique())}: select one")
    return current(ax), styles([*(() if methods is None else methods), *data["method"]])


def _ends(row: pd.Series) -> list[list[float]] | None:
    """Error bars as matplotlib wants them; none where there is no interval."""
    ends = [[row["mean"] - row["low"]], [row["high"] - row["mean"]]]
    return None if np.isnan(ends).any() else ends
