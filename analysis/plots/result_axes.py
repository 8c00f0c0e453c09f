"""Plots on one Axes each, from the tables that ``compare`` and ``explain`` return; nothing is computed, shown or saved here."""

from collections.abc import Iterable
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes

from qlens.analysis.plots.style import (
    FAINT,
    GREY,
    HATCH,
    INK,
    clean,
    current,
    name_ticks,
    need,
    note,
    short,
    shown,
    styles,
)
from qlens.core.errors import InputError


def plot_scores(
    table: pd.DataFrame,
    *,
    ax: Axes | None = None,
    label: str = "score",
    methods: Iterable[str] | None = None,
    **errorbar: Any,
) -> Axes:
    """Means with their intervals, a row per method; the start, ``base``, also as a line across.

    Args:
        table: of one setting, as ``Study.table()`` gives it: method, mean, low, high, n.
        ax: where to draw; the current Axes by default.
        label: of the score's axis.
        methods: which share the colours, if more than in the table.
        errorbar: to ``Axes.errorbar``.

    Raises:
        InputError: columns are missing, or there is more than one setting.
    """
    ax = current(ax)
    need(table, "method", "mean", "low", "high")
    if "setting" in table and table["setting"].nunique() > 1:
        raise InputError(f"plot_scores draws one setting, got {sorted(table['setting'].unique())}: select one")
    look = styles(methods or table["method"])
    for row, (_, line) in enumerate(table.iterrows()):
        style, ends = look[line["method"]], [[line["mean"] - line["low"]], [line["high"] - line["mean"]]]
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


def plot_trust(
    data: pd.DataFrame,
    *,
    ax: Axes | None = None,
    methods: Iterable[str] | None = None,
    window: tuple[float, float] = (-0.6, 1.6),
    **line: Any,
) -> Axes:
    """Effective trust in the label against p_y, token by token; full trust (sft) and p_y (dft) as grey lines.

    Where a target does not end at the label, its effective trust grows without bound as p_y nears 1: what lies beyond
    the window is drawn at its edge, hollow, and counted.

    Args:
        data: method, p_y, trust.
        ax: where to draw; the current Axes by default.
        methods: which share the colours, if more than in the data.
        window: the ends of the axis of trust.
        line: to ``Axes.plot``.

    Raises:
        InputError: columns are missing.
    """
    ax = current(ax)
    need(data, "method", "p_y", "trust")
    ax.plot([0, 1], [1, 1], color=GREY, lw=0.9, ls="-", zorder=1)
    ax.plot([0, 1], [0, 1], color=GREY, lw=0.9, ls="--", zorder=1)
    low, high = window
    edge = (high - low) / 40
    outside = ~data["trust"].between(low, high)
    for method, style in styles(methods or data["method"]).items():
        mine = data["method"] == method
        if not mine.any():
            continue
        rows, beyond = data[mine & ~outside].sort_values("p_y"), data[mine & outside]
        options = {"ls": "", "marker": style.marker, "color": style.color, "markersize": 4.6, "markeredgewidth": 0.4}
        options |= {"markeredgecolor": "white", "alpha": 0.85, "zorder": 3, "label": method} | line
        ax.plot(rows["p_y"], rows["trust"], **options)
        hollow = options | {
            "markerfacecolor": "white",
            "markeredgecolor": style.color,
            "markeredgewidth": 0.9,
            "label": "_",
        }
        ax.plot(beyond["p_y"], beyond["trust"].clip(low + edge, high - edge), **hollow)
    if outside.any():
        note(ax, f"hollow: {int(outside.sum())} beyond the axis", y=0.93)
    ax.set(xlim=(-0.02, 1.02), ylim=window, xlabel=r"label probability $p_y$", ylabel="effective trust in the label")
    return clean(ax)


def plot_target(
    data: pd.DataFrame,
    *,
    ax: Axes | None = None,
    methods: Iterable[str] | None = None,
    label: str | None = None,
    **bar: Any,
) -> Axes:
    """Targets at one token: what the model gives each candidate (pale), and what every method wants it to have.

    Negative entries of Q reach below the zero line and are hatched.

    Args:
        data: token, p, q, method; a row per candidate and method.
        ax: where to draw; the current Axes by default.
        methods: which share the colours, if more than in the data.
        label: the observed token, set in bold.
        bar: to ``Axes.bar`` of the methods.

    Raises:
        InputError: columns are missing.
    """
    ax = current(ax)
    need(data, "token", "p", "q", "method")
    look = {name: style for name, style in styles(methods or data["method"]).items() if name in set(data["method"])}
    tokens = list(dict.fromkeys(data["token"]))
    place = {token: at for at, token in enumerate(tokens)}
    p = data.drop_duplicates("token")
    ax.bar([place[t] for t in p["token"]], p["p"], width=0.9, color=FAINT, zorder=1, label="model, p")
    width = 0.8 / max(len(look), 1)
    for number, (method, style) in enumerate(look.items()):
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
