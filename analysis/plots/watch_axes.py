"""Plots of how targets move during training, from the records of ``qlens.Watch``."""

from collections.abc import Iterable
from typing import Any, Literal

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch

from qlens.analysis.plots.study_overview import method_keys
from qlens.analysis.plots.style import DOUBLE, GREY, INK, clean, current, head, legend_below, need, note, panels, styles
from qlens.core.errors import InputError

COURSES = {
    "drift": "drift of Q, total variation",
    "negative_mass": "negative mass of Q",
    "trust": "effective trust in the label",
    "p_y": "label probability $p_y$",
    "reshape": "reshape of the alternatives",
    "entropy": "entropy H(Q), nats",
    "kl": "KL(Q || p), nats",
    "drift_kl": "drift, KL(Q || first Q), nats",
}
"""What ``plot_course`` can show, with the name of its axis."""
SIGNED = ("trust",)  # the only ones that may be below zero
WINDOW = (-0.6, 1.6)  # of trust


def plot_motion(
    frame: pd.DataFrame,
    *,
    ax: Axes | None = None,
    methods: Iterable[str] | None = None,
    window: tuple[float, float] = WINDOW,
    **dot: Any,
) -> Axes:
    """Trust against p_y on the probe tokens: small and pale at the first record, filled at the last, joined by a line.

    What lies beyond the window is drawn at its edge, and counted.

    Args:
        frame: of ``Watch.frame``: step, variant, token, p_y, trust.
        ax: where to draw; the current Axes by default.
        methods: which share the colours, if more than in the frame.
        window: the ends of the axis of trust.
        dot: to ``Axes.plot`` of the last record.

    Raises:
        InputError: columns are missing, or there are no records.
    """
    _check(frame, "token", "p_y", "trust")
    ax, (low, high) = current(ax), window
    ax.plot([0, 1], [1, 1], color=GREY, lw=0.9, zorder=1)
    ax.plot([0, 1], [0, 1], color=GREY, lw=0.9, ls="--", zorder=1)
    first, last = frame["step"].min(), frame["step"].max()
    edge, beyond = (high - low) / 40, 0
    look = styles([*(methods or ()), *frame["variant"]])
    for name, rows in frame.groupby("variant", sort=False):
        style = look[str(name)]
        ends = [rows[rows["step"] == step].set_index("token") for step in (first, last)]
        x = [each["p_y"].to_numpy() for each in ends]
        y = [each["trust"].clip(low + edge, high - edge).to_numpy() for each in ends]
        beyond += int((~ends[1]["trust"].between(low, high)).sum())
        ax.plot(x, y, color=style.color, lw=0.6, alpha=0.35, zorder=2)
        mark = {"ls": "", "marker": style.marker, "color": style.color, "zorder": 3}
        ax.plot(x[0], y[0], **mark | {"markersize": 2.6, "alpha": 0.45, "label": "_", "markeredgewidth": 0})
        options = mark | {"markersize": 4.4, "markeredgecolor": "white", "markeredgewidth": 0.4, "label": name}
        ax.plot(x[1], y[1], **options | dot)
    if beyond:
        note(ax, f"{beyond} beyond the axis", y=0.98, va="top")
    ax.set(xlim=(-0.02, 1.02), ylim=window, xlabel=r"label probability $p_y$", ylabel=COURSES["trust"])
    return clean(ax)


def plot_course(
    frame: pd.DataFrame,
    *,
    ax: Axes | None = None,
    show: Literal["drift", "negative_mass", "trust", "p_y", "reshape", "entropy", "kl", "drift_kl"] = "drift",
    methods: Iterable[str] | None = None,
    **line: Any,
) -> Axes:
    """One measure of the targets by step: the mean over the probe tokens, and their middle half as a band.

    Args:
        frame: of ``Watch.frame``: step, variant and the measure; tokens where it is not defined are left out, and counted.
        ax: where to draw; the current Axes by default.
        show: which of ``COURSES``.
        methods: which share the colours, if more than in the frame.
        line: to ``Axes.plot``.

    Raises:
        InputError: columns are missing, there are no records, or an unknown measure.
    """
    if show not in COURSES:
        raise InputError(f"show must be one of {', '.join(COURSES)}, got {show!r}")
    _check(frame, show)
    ax, look = current(ax), styles([*(methods or ()), *frame["variant"]])
    if show in ("negative_mass", "trust"):
        ax.axhline(0, color=INK, lw=0.8, zorder=1)
    for name, rows in frame.groupby("variant", sort=False):
        by_step, style = rows.groupby("step")[show], look[str(name)]
        low, mean, high = by_step.quantile(0.25), by_step.mean(), by_step.quantile(0.75)
        ax.fill_between(mean.index, low, high, color=style.color, alpha=0.12, lw=0, zorder=2)
        options = {"color": style.color, "marker": style.marker, "markersize": 4.0, "lw": 1.3, "zorder": 3}
        options |= {"markeredgecolor": "white", "markeredgewidth": 0.4, "label": name}
        ax.plot(mean.index, mean, **options | {"markevery": max(1, len(mean) // 10)} | line)
    if unknown := int(frame[show].isna().sum()):
        note(ax, f"{unknown} of {len(frame)} not defined", y=0.98, va="top")
    if show not in SIGNED:
        top = max(ax.get_ylim()[1], 0.01)  # what is zero throughout lies on the floor, not in the middle
        ax.set_ylim(-0.04 * top, top)
    ax.set(xlabel="training step", ylabel=COURSES[show])
    return clean(ax)


def figure_watch(frame: pd.DataFrame, width: float = DOUBLE) -> Figure:
    """How targets move during training: trust against p_y at both ends, negative mass and drift of Q by step.

    Args:
        frame: of ``Watch.frame``.
        width: inches.

    Raises:
        InputError: columns are missing, or there are no records.
    """
    _check(frame, "token", "p_y", "trust", "negative_mass", "drift")
    names = list(dict.fromkeys(frame["variant"]))
    figure, (motion, mass, drift) = panels(width, 3, 3)
    plot_motion(frame, ax=motion, methods=names)
    plot_course(frame, ax=mass, show="negative_mass", methods=names)
    plot_course(frame, ax=drift, show="drift", methods=names)
    head(motion, f"step {frame['step'].min()} (small) to {frame['step'].max()}")
    for ax, show in ((mass, "negative_mass"), (drift, "drift")):
        head(ax, COURSES[show])  # at the head it is not squeezed between two panels
        ax.set_ylabel("")
    ink: dict[str, Any] = {"color": GREY, "lw": 0.9}
    references = [
        Line2D([], [], label="trust 1 (sft)", **ink),
        Line2D([], [], ls="--", label="trust $p_y$ (dft)", **ink),
        Patch(facecolor=GREY, alpha=0.3, label=f"middle half of {frame['token'].nunique()} tokens"),
    ]
    legend_below(figure, [*method_keys(names), *references])
    return figure


def _check(frame: pd.DataFrame, *columns: str) -> None:
    if not len(frame):
        raise InputError("frame has no records: train first, with the Watch among the trainer's callbacks")
    need(frame, "step", "variant", *columns)
