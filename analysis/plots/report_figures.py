"""Figures of single results: tokens, the shares of a mixture, the rules of a conformance report, and a ranking."""

from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

from qlens.analysis.plots.style import (
    DOUBLE,
    FAINT,
    GREY,
    HATCH,
    INK,
    SMALL,
    STYLES,
    TEXT,
    clean,
    current,
    head,
    legend_below,
    name_ticks,
    need,
    new_figure,
    panels,
    short,
    shown,
    sized,
    styles,
)

COLOURS = {"passed": "#2a9d4e", "remark": "#d98e04", "failed": "#c0392b", "not applicable": GREY}
HEIGHT, WIDTH = 0.22, 7.0  # inches of a row and of the figure
LETTERS = 14  # of a row's text
OF_MODELS = {
    "p_y": "sft",
    "p_y_teacher": "kd",
    "p_y_reference": "asft_anchored",
    "p_y_old": "dft",
    "p_y_second": "target_sft",
}
OF_PARTS = {"the label": "sft", "the teacher": "kd", "the reference": "asft_anchored", "uniform": "label_smoothing"}
OTHERS = ("dft", "target_sft", "kd_hybrid", "target_sft_shuffled_teacher")  # whose colours further parts have
ROUNDING = 1e-6  # shares above minus this count as positive


def plot_label_probs(data: pd.DataFrame, *, ax: Axes | None = None, **line: Any) -> Axes:
    """The probability of every label, token by token: dots of the student, and of every other model.

    Args:
        data: p_y, and p_y_teacher, p_y_reference, p_y_old, p_y_second as far as they are known, of ``Tokens.to_frame``.
        ax: where to draw; by default the current Axes.
        line: keywords for ``Axes.plot``.

    Raises:
        InputError: the data has no p_y.
    """
    need(data, "p_y")
    ax = current(ax)
    for column in (name for name in OF_MODELS if name in data):
        look = STYLES[OF_MODELS[column]]
        name = "student" if column == "p_y" else column.removeprefix("p_y_")
        options = {"ls": "", "marker": look.marker, "color": look.color, "markersize": 3.5, "label": name} | line
        ax.plot(range(len(data)), data[column], **options)
    ax.set(ylim=(-0.02, 1.02), xlabel="token", ylabel=r"label probability $p_y$")
    ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    if len(ax.lines) > 1:
        ax.legend(frameon=False, fontsize=SMALL)
    return clean(ax)


def plot_mixture(data: pd.DataFrame, *, ax: Axes | None = None, **patch: Any) -> Axes:
    """The shares of named distributions in Q, stacked for every token.

    Negative shares reach below zero and are hatched; tokens whose shares are not identifiable are pale.

    Args:
        data: token, identifiable, and a column per distribution, of ``Mixture.to_frame``.
        ax: where to draw; by default the current Axes.
        patch: keywords for ``Axes.stairs``.

    Raises:
        InputError: columns are missing.
    """
    need(data, "token", "identifiable")
    ax, edges = current(ax), np.arange(len(data) + 1) - 0.5
    above, below = np.zeros(len(data)), np.zeros(len(data))
    shares, others = data.drop(columns=["token", "identifiable"]), iter(OTHERS)
    for name in shares:
        style = OF_PARTS.get(str(name)) or (None if name == "the student" else next(others, "base"))
        color = FAINT if style is None else STYLES[style].color
        share = shares[name].to_numpy(dtype=float)
        top, bottom = above + share.clip(min=0), below + np.where(share < -ROUNDING, share, 0.0)
        ax.stairs(top, edges, **{"baseline": above, "fill": True, "color": color, "label": str(name)} | patch)
        if (bottom < below).any():
            signed = {"facecolor": "white", "edgecolor": color, "hatch": HATCH, "lw": 0.0}
            ax.stairs(bottom, edges, **{"baseline": below, "fill": True, "label": "_", **signed} | patch)
        above, below = top, bottom
    known = data["identifiable"].to_numpy(dtype=bool)
    if known.any():
        ax.set_ylim(1.04 * below[known].min(), 1.04 * above[known].max())
    for at in np.flatnonzero(~known):
        ax.axvspan(at - 0.5, at + 0.5, color="white", alpha=0.65, lw=0)
    ax.axhline(0, color=INK, lw=0.8)
    numbers = data["token"].tolist()
    ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    ax.xaxis.set_major_formatter(FuncFormatter(lambda x, _: str(numbers[int(x)]) if 0 <= x < len(numbers) else ""))
    ax.set(xlim=(-0.5, max(len(data), 1) - 0.5), xlabel="token", ylabel=r"share of $Q$")
    return clean(ax, grid="none")


def figure_mixture(mixture: Any, width: float = DOUBLE) -> Figure:
    """The shares of every token's Q, stacked, with a legend of the distributions.

    Args:
        mixture: of ``Explanation.mixture``.
        width: inches.
    """
    figure = new_figure(width, 2.6)
    ax = plot_mixture(mixture.to_frame(), ax=figure.subplots())
    head(ax, repr(mixture))
    keys = [key for key in ax.patches if not str(key.get_label()).startswith("_")]
    legend_below(figure, keys)
    return figure


def figure_check(report: Any) -> Figure:
    """A row per rule: a mark in the colour of its state, its name and the state.

    Args:
        report: has ``spec`` and ``items`` with id and state.
    """
    figure = Figure(figsize=(WIDTH, HEIGHT * (len(report.items) + 2)), layout="constrained")
    ax = figure.subplots()
    for row, item in enumerate(report.items):
        ax.plot(0, -row, "s", color=COLOURS[item.state], markersize=6)
        ax.text(0.04, -row, f"{item.id.replace('_', ' ')}: {item.state}", va="center", fontsize=TEXT, color=INK)
    ax.set(xlim=(-0.05, 1), ylim=(-len(report.items), 1))
    ax.set_axis_off()
    ax.set_title(report.spec, loc="left", fontsize=TEXT + 1, color=INK)
    return figure


def figure_ranking(ranking: Any, top: int = 15, width: float = DOUBLE) -> Figure:
    """Scores of the first rows of every order that is not all ties.

    Args:
        ranking: of ``TokenView.rank()``.
        top: rows per order.
        width: inches.
    """
    orders = [by for by in ranking.orders if not ranking.alike(by)] or ranking.orders[:1]
    style = styles(orders)
    figure, axes = panels(
        width, len(orders), min(3, len(orders)), tall=0.75 + 0.14 * min(top, ranking.rows["row"].nunique())
    )
    for by, ax in zip(orders, axes, strict=True):
        rows = ranking.rows[ranking.rows["by"] == by].head(top)
        look = style[by]
        ax.plot(
            rows["score"], range(len(rows)), ls="", marker=look.marker, color=look.color, ms=sized(look.marker, 4.5)
        )
        ax.axvline(0, color=INK, lw=0.8, zorder=1)
        name_ticks(
            ax.yaxis, [f"{row}: {shown(text, LETTERS)}" for row, text in zip(rows["row"], rows["text"], strict=True)]
        )
        ax.set_ylim(max(len(rows), 1) - 0.5, -0.5)
        ax.set_xlabel("negative margin, nats" if by == "negative_margin" else "label weight of the row")
        head(ax, short(by, 24))
        clean(ax, grid="x")
    return figure
