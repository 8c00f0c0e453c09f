"""Figures of reports: the rules of a conformance report, and the first rows of a ranking."""

from typing import Any

from matplotlib.figure import Figure

from qlens.analysis.plots.style import (
    DOUBLE,
    GREY,
    INK,
    TEXT,
    clean,
    head,
    name_ticks,
    panels,
    short,
    shown,
    sized,
    styles,
)

COLOURS = {"passed": "#2a9d4e", "remark": "#d98e04", "failed": "#c0392b", "not applicable": GREY}
HEIGHT, WIDTH = 0.22, 7.0  # inches of a row and of the figure
LETTERS = 14  # of a row's text


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
