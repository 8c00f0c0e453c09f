"""Check figure: the outcome of every rule of a conformance report."""

from typing import Any

from matplotlib.figure import Figure

from qlens.analysis.plots.style import GREY, INK, TEXT

COLOURS = {"passed": "#2a9d4e", "remark": "#d98e04", "failed": "#c0392b", "not applicable": GREY}
HEIGHT, WIDTH = 0.22, 7.0  # inches of a row and of the figure


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
