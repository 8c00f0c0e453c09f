"""Plots of what a comparison found, on one Axes each: scores against distance, differences, learning curves, calibration."""

from collections.abc import Iterable
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes

from qlens.analysis.axes import clean, current, need, short, styles
from qlens.errors import InputError

QUIET = "#6b6b70"
SPREAD = 50  # from here on, distances are drawn on a symlog axis
ALPHA = 0.05
POINTS = {"capsize": 0, "elinewidth": 1.5, "markersize": 6.5, "markeredgecolor": "white", "markeredgewidth": 0.6}


def plot_frontier(
    table: pd.DataFrame,
    *,
    ax: Axes | None = None,
    label: str = "score",
    methods: Iterable[str] | None = None,
    **errorbar: Any,
) -> Axes:
    """Scores against KL(start || trained): what a result costs in distance; the start as a line across.

    Args:
        table: of one setting, as ``Study.table()`` gives it: method, mean, low, high, kl_start (nats).
        ax: where to draw; the current Axes by default.
        label: of the score's axis.
        methods: which share the colours, if more than in the table.
        errorbar: to ``Axes.errorbar``.

    Raises:
        InputError: columns are missing, or there is more than one setting.
    """
    ax = current(ax)
    need(table, "method", "mean", "low", "high", "kl_start")
    _one(table, "setting")
    look = styles(methods or table["method"])
    for _, row in table.iterrows():
        style = look[row["method"]]
        if row["method"] == "base":
            ax.axhline(row["mean"], color=style.color, lw=0.8, ls=(0, (4, 3)), zorder=1)
        options = POINTS | {"color": style.color, "fmt": style.marker, "zorder": 3} | errorbar
        ax.errorbar(row["kl_start"], row["mean"], yerr=_ends(row), label=row["method"], **options)
    distances = table.loc[table["kl_start"] > 0, "kl_start"]
    if len(distances) and distances.max() > SPREAD * distances.min():
        ax.set_xscale("symlog", linthresh=distances.min())
    ax.margins(x=0.08)
    ax.set(xlabel="KL(start || trained) per token, nats", ylabel=label)
    return clean(ax)


def plot_differences(
    table: pd.DataFrame,
    *,
    ax: Axes | None = None,
    label: str = "score",
    methods: Iterable[str] | None = None,
    **errorbar: Any,
) -> Axes:
    """Differences against one method, a row each, with their intervals; filled where the corrected p is below .05.

    Args:
        table: of one setting, as ``Study.differences()`` gives it: method, against, mean, low, high, p_holm.
        ax: where to draw; the current Axes by default.
        label: what is different.
        methods: which share the colours, if more than in the table.
        errorbar: to ``Axes.errorbar``.

    Raises:
        InputError: columns are missing, or there is more than one setting or reference.
    """
    ax = current(ax)
    need(table, "method", "against", "mean", "low", "high", "p_holm")
    _one(table, "setting")
    _one(table, "against")
    look = styles(methods or table["method"])
    ax.axvline(0, color="#222222", lw=0.8, zorder=1)
    for at, (_, row) in enumerate(table.iterrows()):
        style, sure = look[row["method"]], row["p_holm"] < ALPHA
        options = POINTS | {"color": style.color, "fmt": style.marker, "zorder": 3, "markeredgecolor": style.color}
        options |= {"markerfacecolor": style.color if sure else "white", "markeredgewidth": 1.2} | errorbar
        ax.errorbar(row["mean"], at, xerr=_ends(row), label=row["method"], **options)
    ax.set_yticks(range(len(table)), [short(method) for method in table["method"]])
    ax.set_ylim(len(table) - 0.5, -0.5)
    ax.tick_params(axis="y", length=0)
    ax.set_xlabel(
        f"{label} minus that of {short(table['against'].iloc[0])}, 95 % interval\nfilled: corrected p < {ALPHA:g}"
    )
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
    ax = current(ax)
    need(data, "method", "step", "mean", "low", "high")
    _one(data, "setting")
    look = styles(methods or data["method"])
    low, high = data["mean"].min(), data["mean"].max()
    for method, rows in data.groupby("method", sort=False):
        style, rows = look[str(method)], rows.sort_values("step")
        if method == "base":
            ax.axhline(rows["mean"].iloc[0], color=style.color, lw=0.8, ls=(0, (4, 3)), zorder=1, label=method)
            continue
        ax.fill_between(rows["step"], rows["low"], rows["high"], color=style.color, alpha=0.1, lw=0, zorder=2)
        options = {"color": style.color, "marker": style.marker, "markersize": 4.5, "lw": 1.3, "zorder": 3}
        options |= {"markeredgecolor": "white", "markeredgewidth": 0.5, "label": method} | line
        ax.plot(rows["step"], rows["mean"], **options)
    room = 0.12 * max(high - low, 1e-9)  # bands may reach beyond: the means decide what is seen
    ax.set(xlabel="training step", ylabel=label, ylim=(low - room, high + room))
    return clean(ax)


def plot_truth(
    data: pd.DataFrame, *, ax: Axes | None = None, methods: Iterable[str] | None = None, **line: Any
) -> Axes:
    """The share of right labels among those trusted alike; on the diagonal, trust is the chance that a label is right.

    Points grow with the number of labels behind them; methods that trust all labels alike are single points. Trust beyond
    the axis is counted, not drawn.

    Args:
        data: method, trust, good, n and auroc, which stands in the legend.
        ax: where to draw; the current Axes by default.
        methods: which share the colours, if more than in the data.
        line: to ``Axes.plot``.

    Raises:
        InputError: columns are missing, or there is more than one setting.
    """
    ax = current(ax)
    need(data, "method", "trust", "good", "n", "auroc")
    _one(data, "setting")
    look = styles(methods or data["method"])
    ax.plot([0, 1], [0, 1], color="#9a9a9a", lw=0.9, zorder=1)
    seen = data["trust"].between(-0.05, 1.05)
    for method, rows in data.groupby("method", sort=False):
        style, rows = look[str(method)], rows[seen.loc[rows.index]].sort_values("trust")
        auroc = data.loc[data["method"] == method, "auroc"].iloc[0]
        name = short(str(method), 24) + ("" if np.isnan(auroc) else f", {auroc:.2f}")
        options = {"color": style.color, "lw": 1.0, "zorder": 2} | line
        ax.plot(rows["trust"], rows["good"], **options)
        size = 18 + 90 * np.sqrt(rows["n"] / data["n"].max())
        ax.scatter(
            rows["trust"], rows["good"], s=size, color=style.color, marker=style.marker, alpha=0.85, label=name, zorder=3,
            edgecolors="white", linewidths=0.5,
        )  # fmt: skip
    if beyond := int(data.loc[~seen, "n"].sum()):
        ax.annotate(f"{beyond} labels beyond the axis", (0.02, 0.02), xycoords="axes fraction", fontsize=8, color=QUIET)
    ax.set(xlim=(-0.05, 1.05), ylim=(-0.03, 1.05), xlabel="trust in the label", ylabel="share of right labels")
    legend = {"fontsize": 7, "frameon": False, "title": "method, AUROC", "title_fontsize": 7, "loc": "center left"}
    handles, names = ax.get_legend_handles_labels()
    ax.legend(handles, names, bbox_to_anchor=(1.0, 0.5), labelspacing=0.8, **legend)
    return clean(ax)


def _ends(row: pd.Series) -> list[list[float]] | None:
    """Error bars as matplotlib wants them; none where there is no interval."""
    ends = [[row["mean"] - row["low"]], [row["high"] - row["mean"]]]
    return None if np.isnan(ends).any() else ends


def _one(data: pd.DataFrame, column: str) -> None:
    if column in data and data[column].nunique() > 1:
        raise InputError(f"one {column} can be drawn at a time, got {sorted(data[column].unique())}: select one")
