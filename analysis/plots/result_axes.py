"""Plots of a comparison on one Axes each: scores, label weight against p_y, and targets at one token."""

from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes

from qlens.analysis.plots.style import (
    FAINT,
    HATCH,
    INK,
    clean,
    current,
    look,
    name_ticks,
    need,
    note,
    short,
    shown,
)
from qlens.analysis.plots.target_axes import label_weight_axes
from qlens.core.deprecation import without_effect
from qlens.core.deprecation.columns import current_columns
from qlens.core.errors import InputError


@without_effect("methods")
def plot_scores(
    table: pd.DataFrame,
    *,
    ax: Axes | None = None,
    label: str = "score",
    **errorbar: Any,
) -> Axes:
    """Means with their intervals, a row per method; the starting model, ``base``, also as a vertical line.

    Args:
        table: ``Study.table()`` of one setting: method, mean, low, high, n.
        ax: where to draw; by default the current Axes.
        label: name of the score.
        errorbar: keywords for ``Axes.errorbar``.

    Raises:
        InputError: columns are missing, or there is more than one setting.
    """
    ax = current(ax)
    need(table, "method", "mean", "low", "high")
    if "setting" in table and table["setting"].nunique() > 1:
        raise InputError(f"plot_scores draws one setting, got {sorted(table['setting'].unique())}: select one")
    chosen = look(table)
    for row, (_, line) in enumerate(table.iterrows()):
        style, ends = chosen[line["method"]], [[line["mean"] - line["low"]], [line["high"] - line["mean"]]]
        if line["method"] == "base":
            ax.axvline(line["mean"], color=style.color, lw=0.8, ls=(0, (4, 3)), zorder=1)
        options = {
            "capsize": 0,
            "elinewidth": 1.8,
            "markersize": 6.5,
            "markeredgecolor": "white",
            "markeredgewidth": 0.6,
        }
        options |= {"color": style.color, "fmt": style.marker, "zorder": 3} | errorbar
        ax.errorbar(line["mean"], row, xerr=None if np.isnan(ends).any() else ends, label=line["method"], **options)
    ax.set_yticks(range(len(table)), [short(method) for method in table["method"]])
    ax.set_ylim(len(table) - 0.5, -0.5)
    n = table["n"].unique() if "n" in table else []
    ax.set_xlabel(f"{label}, 95 % interval" + (f" (n = {n[0]})" if len(n) == 1 else ""))
    ax.tick_params(axis="y", length=0)
    return clean(ax, grid="x")


@without_effect("methods")
def plot_label_weight(
    data: pd.DataFrame,
    *,
    ax: Axes | None = None,
    window: tuple[float, float] = (-0.6, 1.6),
    **line: Any,
) -> Axes:
    """Label weight -g_y / (1 - p_y) against p_y, token by token; 1 (sft) and p_y (dft) as grey lines.

    Where the target of a method is not the label at p_y = 1, its label weight is unbounded: values beyond the window are
    drawn hollow at its edge and counted in a note.

    Args:
        data: method, p_y, label_weight.
        ax: where to draw; by default the current Axes.
        window: limits of the axis of the label weight.
        line: keywords for ``Axes.plot``.

    Raises:
        InputError: columns are missing.
    """
    ax, data = current(ax), current_columns(data)
    need(data, "method", "p_y", "label_weight")
    low, high = window
    edge = (high - low) / 40
    outside = ~data["label_weight"].between(low, high)
    for method, style in look(data).items():
        mine = data["method"] == method
        rows, beyond = data[mine & ~outside].sort_values("p_y"), data[mine & outside]
        options = {"ls": "", "marker": style.marker, "color": style.color, "markersize": 4.6, "markeredgewidth": 0.4}
        options |= {"markeredgecolor": "white", "alpha": 0.85, "zorder": 3, "label": method} | line
        ax.plot(rows["p_y"], rows["label_weight"], **options)
        hollow = options | {
            "markerfacecolor": "white",
            "markeredgecolor": style.color,
            "markeredgewidth": 0.9,
            "label": "_",
        }
        ax.plot(beyond["p_y"], beyond["label_weight"].clip(low + edge, high - edge), **hollow)
    if outside.any():
        note(ax, f"hollow: {int(outside.sum())} beyond the axis", y=0.93)
    return label_weight_axes(ax, window)


@without_effect("methods")
def plot_target(
    data: pd.DataFrame,
    *,
    ax: Axes | None = None,
    label: str | None = None,
    **bar: Any,
) -> Axes:
    """Targets at one token: p of each entry (pale), and Q of every method.

    Negative entries of Q reach below the zero line and are hatched.

    Args:
        data: token, p, q, method; a row per entry and method.
        ax: where to draw; by default the current Axes.
        label: text of the label, set in bold.
        bar: keywords for ``Axes.bar`` of the methods.

    Raises:
        InputError: columns are missing.
    """
    ax = current(ax)
    need(data, "token", "p", "q", "method")
    chosen = look(data)
    tokens = list(dict.fromkeys(data["token"]))
    place = {token: at for at, token in enumerate(tokens)}
    p = data.drop_duplicates("token")
    ax.bar([place[t] for t in p["token"]], p["p"], width=0.9, color=FAINT, zorder=1, label="model, p")
    width = 0.8 / max(len(chosen), 1)
    for number, (method, style) in enumerate(chosen.items()):
        rows = data[data["method"] == method]
        at = [place[t] - 0.4 + (number + 0.5) * width for t in rows["token"]]
        options = {"width": 0.86 * width, "color": style.color, "zorder": 3, "label": method} | bar
        for patch, q in zip(ax.bar(at, rows["q"], **options), rows["q"], strict=True):
            if q < 0:
                patch.set(hatch=HATCH, facecolor="white", edgecolor=style.color, linewidth=0.6)
    ax.axhline(0, color=INK, lw=0.8, zorder=4)
    name_ticks(ax.xaxis, [shown(token) for token in tokens], bold=None if label is None else shown(label))
    ax.set(xlim=(-0.6, len(tokens) - 0.4), ylabel="probability")
    return clean(ax, grid="y")
