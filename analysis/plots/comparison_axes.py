"""Plots of a comparison on one Axes each: scores against distance, differences, learning curves, calibration."""

from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.lines import Line2D

from qlens.analysis.plots.style import GREY, INK, Style, clean, current, look, need, note, short
from qlens.core.deprecation import without_effect
from qlens.core.errors import InputError

ALPHA = 0.05
WINDOW = (-0.05, 1.05)  # limits of the axis of trust
DASHES = {"lw": 0.8, "ls": (0, (4, 3)), "zorder": 1}
POINTS = {"capsize": 0, "elinewidth": 1.5, "markersize": 6.5, "markeredgecolor": "white", "markeredgewidth": 0.6}


@without_effect("methods")
def plot_frontier(
    table: pd.DataFrame,
    *,
    ax: Axes | None = None,
    label: str = "score",
    **errorbar: Any,
) -> Axes:
    """Scores against KL(start || trained); the starting model as a line.

    Args:
        table: ``Study.table()`` of one setting: method, mean, low, high, kl_start (nats).
        ax: where to draw; by default the current Axes.
        label: name of the score.
        errorbar: keywords for ``Axes.errorbar``.

    Raises:
        InputError: columns are missing, or there is more than one setting.
    """
    ax, chosen = _begin(ax, table, "mean", "low", "high", "kl_start")
    for _, row in table.iterrows():
        style = chosen[row["method"]]
        if row["method"] == "base":
            ax.axhline(row["mean"], color=style.color, **DASHES)
        options = POINTS | {"color": style.color, "fmt": style.marker, "zorder": 3} | errorbar
        ax.errorbar(row["kl_start"], row["mean"], yerr=_ends(row), label=row["method"], **options)
    distances = table.loc[table["kl_start"] > 0, "kl_start"]
    if len(distances) and distances.max() > 50 * distances.min():  # keeps the start at 0 visible
        ax.set_xscale("symlog", linthresh=distances.min())
    ax.margins(x=0.08, y=0.1)
    ax.set(xlabel="KL(start || trained) per token, nats", ylabel=label)
    return clean(ax)


@without_effect("methods")
def plot_differences(
    table: pd.DataFrame,
    *,
    ax: Axes | None = None,
    label: str = "score",
    key: bool = True,
    **errorbar: Any,
) -> Axes:
    """Differences from one method with their intervals, a row each; filled where the corrected p is below .05.

    Args:
        table: ``Study.differences()`` of one setting: method, against, mean, low, high, p_holm.
        ax: where to draw; by default the current Axes.
        label: name of the score.
        key: whether to explain filled and hollow markers in a note.
        errorbar: keywords for ``Axes.errorbar``.

    Raises:
        InputError: columns are missing, or there is more than one setting or reference.
    """
    ax, chosen = _begin(ax, table, "against", "mean", "low", "high", "p_holm")
    ax.axvline(0, color=INK, lw=0.8, zorder=1)
    for at, (_, row) in enumerate(table.iterrows()):
        style, significant = chosen[row["method"]], row["p_holm"] < ALPHA
        options = POINTS | {"color": style.color, "fmt": style.marker, "zorder": 3, "markeredgecolor": style.color}
        options |= {"markerfacecolor": style.color if significant else "white", "markeredgewidth": 1.2} | errorbar
        ax.errorbar(row["mean"], at, xerr=_ends(row), label=row["method"], **options)
    ax.set_yticks(range(len(table)), [short(method) for method in table["method"]])
    ax.set_ylim(len(table) - (-0.2 if key else 0.5), -0.5)  # one more row for the note
    ax.tick_params(axis="y", length=0)
    if key:
        note(ax, f"filled: p < {ALPHA:g} (Holm), hollow: not")
    ax.set_xlabel(f"difference in {label}\nagainst {short(next(iter(table['against']), ''))}, 95 % interval")
    return clean(ax, grid="x")


@without_effect("methods")
def plot_curves(
    data: pd.DataFrame,
    *,
    ax: Axes | None = None,
    label: str = "score",
    **line: Any,
) -> Axes:
    """Scores during training with their intervals as bands; the starting model, ``base``, as a horizontal line.

    Args:
        data: ``Study.curve()`` of one setting: method, step, mean, low, high.
        ax: where to draw; by default the current Axes.
        label: name of the score.
        line: keywords for ``Axes.plot``.

    Raises:
        InputError: columns are missing, or there is more than one setting.
    """
    ax, chosen = _begin(ax, data, "step", "mean", "low", "high")
    for method, rows in data.groupby("method", sort=False):
        style, rows = chosen[str(method)], rows.sort_values("step")
        if method == "base":
            ax.axhline(rows["mean"].iloc[0], color=style.color, label=method, **DASHES)
            continue
        ax.fill_between(rows["step"], rows["low"], rows["high"], color=style.color, alpha=0.1, lw=0, zorder=2)
        options = {"color": style.color, "marker": style.marker, "markersize": 5.5, "lw": 1.3, "zorder": 3}
        options |= {"markeredgecolor": "white", "markeredgewidth": 0.5, "label": method} | line
        ax.plot(rows["step"], rows["mean"], **options)
    low, high = data["mean"].min(), data["mean"].max()
    if (span := high - low) > 0:  # bands of few seeds can be far wider than the range of the means
        bottom, top = np.fmin(data["low"].min(), low), np.fmax(data["high"].max(), high)
        ax.set_ylim(max(bottom, low - span / 2) - span / 20, min(top, high + span / 2) + span / 20)
    ax.set(xlabel="training step", ylabel=label)
    return clean(ax)


@without_effect("methods")
@without_effect("methods")
def plot_calibration(data: pd.DataFrame, *, ax: Axes | None = None, **line: Any) -> Axes:
    """Reliability diagram: share of correct labels against trust; on the diagonal trust is the probability of correctness.

    Markers grow with the number of labels. A method with the same trust in all labels is a single point. Labels with trust
    beyond the axis are counted in a note.

    Args:
        data: of one setting: method, trust, good, n, and auroc for the legend.
        ax: where to draw; by default the current Axes.
        line: keywords for ``Axes.plot``.

    Raises:
        InputError: columns are missing, or there is more than one setting.
    """
    ax, chosen = _begin(ax, data, "trust", "good", "n", "auroc")
    ax.plot([0, 1], [0, 1], color=GREY, lw=0.9, zorder=1)
    largest, keys = data["n"].max(), []
    for method, rows in data.groupby("method", sort=False):
        style, auroc = chosen[str(method)], rows["auroc"].iloc[0]
        pale = (style.color, 0.3)
        name = short(str(method)) + ("" if np.isnan(auroc) else f", {auroc:.2f}".replace(" 0.", " ."))
        rows = rows[rows["trust"].between(*WINDOW)].sort_values("trust")
        ax.plot(rows["trust"], rows["good"], **{"color": style.color, "lw": 1.0, "zorder": 2} | line)
        dots = {
            "s": 12 + 90 * rows["n"] / largest,
            "marker": style.marker,
            "label": name,
            "zorder": 3,
            "linewidths": 1.1,
        }
        ax.scatter(rows["trust"], rows["good"], facecolors=[pale], edgecolors=[style.color], **dots)
        keys.append(Line2D([], [], ls="", marker=style.marker, label=name, ms=6, mew=1.1, mec=style.color, mfc=pale))
    if beyond := int(data.loc[~data["trust"].between(*WINDOW), "n"].sum()):
        note(ax, f"{beyond} labels beyond the axis", 0.98, ha="right")
    ax.set(xlim=WINDOW, ylim=WINDOW, xlabel="trust in the label", ylabel="share of correct labels")
    if keys:
        beside = {"loc": "center left", "bbox_to_anchor": (1, 0.5), "frameon": False, "handletextpad": 0.2}
        ax.legend(handles=keys, title="method, AUROC", alignment="left", fontsize=7.5, title_fontsize=7.5, **beside)
    return clean(ax)


def _begin(ax: Axes | None, data: pd.DataFrame, *columns: str) -> tuple[Axes, dict[str, Style]]:
    """Axes and styles, after a check of the data."""
    need(data, "method", *columns)
    for column in ("setting", "against"):
        if column in data and data[column].nunique() > 1:
            raise InputError(f"one {column} can be drawn at a time, got {sorted(data[column].unique())}: select one")
    return current(ax), look(data)


def _ends(row: pd.Series) -> list[list[float]] | None:
    """Error bars for matplotlib; None without an interval."""
    ends = [[row["mean"] - row["low"]], [row["high"] - row["mean"]]]
    return None if np.isnan(ends).any() else ends
