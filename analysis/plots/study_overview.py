"""Plots of all settings of a study: scores on one axis, and a forest plot of paired differences."""

from collections.abc import Iterable
from math import ceil
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from qlens.analysis.plots.comparison_axes import ALPHA, plot_differences
from qlens.analysis.plots.style import (
    COLUMN,
    DOUBLE,
    FAINT,
    INK,
    SMALL,
    TEXT,
    clean,
    current,
    head,
    legend_below,
    look,
    name_ticks,
    need,
    new_figure,
    of_figure,
    short,
    sized,
    styles,
)
from qlens.core.deprecation import without_effect

ACROSS = 3  # settings side by side in the forest
MARKS = {"markersize": 5.0, "markeredgewidth": 0.9, "elinewidth": 1.1}


@without_effect("methods")
def plot_settings(
    table: pd.DataFrame,
    *,
    ax: Axes | None = None,
    label: str = "score",
    **errorbar: Any,
) -> Axes:
    """Means with their intervals, methods side by side in each setting.

    Args:
        table: ``Study.table()``: setting, method, mean, low, high.
        ax: where to draw; by default the current Axes.
        label: name of the score.
        errorbar: keywords for ``Axes.errorbar``.

    Raises:
        InputError: columns are missing.
    """
    need(table, "setting", "method", "mean", "low", "high")
    ax = current(ax)
    chosen, settings = look(table), list(dict.fromkeys(table["setting"]))
    step = 0.8 / max(len(chosen), 1)
    for place in range(1, len(settings)):
        ax.axvline(place - 0.5, color=FAINT, lw=0.8, zorder=0)
    for turn, (method, style) in enumerate(chosen.items()):
        rows = table[table["method"] == method]
        at = [settings.index(setting) - 0.4 + (turn + 0.5) * step for setting in rows["setting"]]
        known = rows["low"].notna() & rows["high"].notna()
        ends = np.where(known, [rows["mean"] - rows["low"], rows["high"] - rows["mean"]], 0.0)
        options = {"fmt": style.marker, "color": style.color, "capsize": 0, "elinewidth": 1.1}
        options |= {"markersize": sized(style.marker, 4.6)}
        options |= {"markeredgecolor": "white", "markeredgewidth": 0.4, "zorder": 3, "label": method} | errorbar
        ax.errorbar(at, rows["mean"], yerr=ends, **options)
    name_ticks(ax.xaxis, settings, **({"rotation": 25, "ha": "right"} if crowded(ax, settings) else {}))
    ax.set(xlim=(-0.5, len(settings) - 0.5), ylabel=f"{label}, 95 % interval")
    return clean(ax, grid="y")


def figure_settings(study: Any, width: float = DOUBLE) -> Figure:
    """Scores of all settings on one axis, with a legend of methods.

    Args:
        study: of ``qlens.compare``.
        width: inches.
    """
    figure = new_figure(width, 2.2)
    plot_settings(study.table(), ax=figure.subplots(), label=study.config["metric"]["name"])
    legend_below(figure, method_keys(study.methods))
    return figure


def figure_forest(study: Any, width: float = DOUBLE) -> Figure:
    """Forest plot: paired differences from one method, a panel per setting.

    Args:
        study: of ``qlens.compare``.
        width: inches.
    """
    table, label = study.differences(), study.config["metric"]["name"]
    settings = [name for name in study.settings if (table["setting"] == name).any()]
    methods = list(dict.fromkeys(table["method"]))
    columns = min(len(settings), ACROSS if width > COLUMN else ACROSS - 1)
    rows = ceil(len(settings) / columns)
    figure = new_figure(width, 0.75 + rows * (0.5 + 0.17 * len(methods)))
    axes = figure.subplots(rows, columns, squeeze=False, sharex=True)
    for spare in axes.flat[len(settings) :]:
        spare.set_visible(False)
    for place, (ax, setting) in enumerate(zip(axes.flat, settings, strict=False)):
        mine = table[table["setting"] == setting].set_index("method").reindex(methods).reset_index()
        mine = of_figure(mine.assign(setting=setting, against=table["against"].iloc[0]), study.methods)
        plot_differences(mine, ax=ax, label=label, key=False, **MARKS)
        head(ax, setting)
        ax.set_xlabel("")
        ax.tick_params(axis="x", labelbottom=place + columns >= len(settings))
        if place % columns:
            ax.tick_params(axis="y", labelleft=False)
    against = short(str(table["against"].iloc[0]))
    words = f"difference in {label} against {against}, 95 % interval", f"filled: p < {ALPHA:g} (Holm)"
    figure.supxlabel(("; " if columns == ACROSS else "\n").join(words), fontsize=TEXT, color=INK)
    return figure


def crowded(ax: Axes, names: list[str]) -> bool:
    """Whether names at the ticks of the x axis would overlap."""
    inches = ax.bbox.width / ax.figure.dpi / max(len(names), 1)
    return max(map(len, names), default=0) * 0.6 * SMALL / 72 > inches


def method_keys(methods: Iterable[str]) -> list[Line2D]:
    """Legend handles of methods."""
    keys = []
    for name, style in styles(methods).items():
        mark: dict[str, Any] = {"marker": style.marker, "markersize": sized(style.marker, 5), "color": style.color}
        keys.append(Line2D([], [], ls="", markeredgecolor="white", markeredgewidth=0.4, label=short(name), **mark))
    return keys
