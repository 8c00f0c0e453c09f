"""Plots of targets during training, from the records of ``qlens.Watch``."""

from typing import Any, Literal

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch

from qlens.analysis.plots.study_overview import method_keys
from qlens.analysis.plots.style import (
    DOUBLE,
    GREY,
    INK,
    clean,
    current,
    head,
    legend_below,
    look,
    need,
    note,
    panels,
)
from qlens.analysis.plots.target_axes import LABEL_WEIGHT, label_weight_axes, metric_named
from qlens.core.deprecation import without_effect
from qlens.core.deprecation.columns import current_columns
from qlens.core.errors import InputError

COURSES = {
    "drift": "drift of Q, total variation",
    "negative_mass": "negative mass of Q",
    "label_weight": LABEL_WEIGHT,
    "p_y": "label probability $p_y$",
    "reshape": "reshape of the alternatives",
    "entropy": "entropy H(Q), nats",
    "kl": "KL(Q || p), nats",
    "drift_kl": "drift, KL(Q || first Q), nats",
}
"""Choices of ``plot_course``, with the name of the axis."""
SIGNED = ("label_weight",)  # may be negative
WINDOW = (-0.6, 1.6)  # limits of the axis of the label weight


@without_effect("methods")
def plot_motion(
    frame: pd.DataFrame,
    *,
    ax: Axes | None = None,
    window: tuple[float, float] = WINDOW,
    **dot: Any,
) -> Axes:
    """Label weight against p_y of the probe tokens: small and pale at the first record, filled at the last, joined by a line.

    Values beyond the window are drawn at its edge and counted in a note.

    Args:
        frame: ``Watch.frame``: step, variant, token, p_y, label_weight.
        ax: where to draw; by default the current Axes.
        window: limits of the axis of the label weight.
        dot: keywords for ``Axes.plot`` of the last record.

    Raises:
        InputError: columns are missing, or there are no records.
    """
    frame = _checked(frame, "token", "p_y", "label_weight")
    ax, (low, high) = current(ax), window
    first, last = frame["step"].min(), frame["step"].max()
    edge, beyond = (high - low) / 40, 0
    chosen = look(frame, "variant")
    for name, rows in frame.groupby("variant", sort=False):
        style = chosen[str(name)]
        ends = [rows[rows["step"] == step].set_index("token") for step in (first, last)]
        x = [each["p_y"].to_numpy() for each in ends]
        y = [each["label_weight"].clip(low + edge, high - edge).to_numpy() for each in ends]
        beyond += int((~ends[1]["label_weight"].between(low, high)).sum())
        ax.plot(x, y, color=style.color, lw=0.6, alpha=0.35, zorder=2)
        mark = {"ls": "", "marker": style.marker, "color": style.color, "zorder": 3}
        ax.plot(x[0], y[0], **mark | {"markersize": 2.6, "alpha": 0.45, "label": "_", "markeredgewidth": 0})
        options = mark | {"markersize": 4.4, "markeredgecolor": "white", "markeredgewidth": 0.4, "label": name}
        ax.plot(x[1], y[1], **options | dot)
    if beyond:
        note(ax, f"{beyond} beyond the axis", y=0.98, va="top")
    return label_weight_axes(ax, window)


@without_effect("methods")
def plot_course(
    frame: pd.DataFrame,
    *,
    ax: Axes | None = None,
    show: Literal["drift", "negative_mass", "label_weight", "p_y", "reshape", "entropy", "kl", "drift_kl"] = "drift",
    **line: Any,
) -> Axes:
    """One metric of the targets by step: mean over the probe tokens, with their quartiles as a band.

    Args:
        frame: ``Watch.frame``: step, variant and the metric. Tokens where it is not defined are counted in a note.
        ax: where to draw; by default the current Axes.
        show: one of ``COURSES``.
        line: keywords for ``Axes.plot``.

    Raises:
        InputError: columns are missing, there are no records, or an unknown metric.
    """
    metric = metric_named(show, COURSES, level=6)
    frame = _checked(frame, metric)
    ax, chosen = current(ax), look(frame, "variant")
    if metric in ("negative_mass", "label_weight"):
        ax.axhline(0, color=INK, lw=0.8, zorder=1)
    for name, rows in frame.groupby("variant", sort=False):
        by_step, style = rows.groupby("step")[metric], chosen[str(name)]
        low, mean, high = by_step.quantile(0.25), by_step.mean(), by_step.quantile(0.75)
        ax.fill_between(mean.index, low, high, color=style.color, alpha=0.12, lw=0, zorder=2)
        options = {"color": style.color, "marker": style.marker, "markersize": 4.0, "lw": 1.3, "zorder": 3}
        options |= {"markeredgecolor": "white", "markeredgewidth": 0.4, "label": name}
        ax.plot(mean.index, mean, **options | {"markevery": max(1, len(mean) // 10)} | line)
    if unknown := int(frame[metric].isna().sum()):
        note(ax, f"{unknown} of {len(frame)} not defined", y=0.98, va="top")
    if metric not in SIGNED:
        top = max(ax.get_ylim()[1], 0.01)  # an all-zero metric lies at the bottom
        ax.set_ylim(-0.04 * top, top)
    ax.set(xlabel="training step", ylabel=COURSES[metric])
    return clean(ax)


def figure_watch(frame: pd.DataFrame, width: float = DOUBLE) -> Figure:
    """Targets during training: label weight against p_y at first and last record; negative mass and drift of Q by step.

    Args:
        frame: ``Watch.frame``.
        width: inches.

    Raises:
        InputError: columns are missing, or there are no records.
    """
    frame = _checked(frame, "token", "p_y", "label_weight", "negative_mass", "drift")
    names = list(dict.fromkeys(frame["variant"]))
    figure, (motion, mass, drift) = panels(width, 3, 3)
    plot_motion(frame, ax=motion)
    plot_course(frame, ax=mass, show="negative_mass")
    plot_course(frame, ax=drift, show="drift")
    head(motion, f"step {frame['step'].min()} (small) to {frame['step'].max()}")
    for ax, show in ((mass, "negative_mass"), (drift, "drift")):
        head(ax, COURSES[show])
        ax.set_ylabel("")
    ink: dict[str, Any] = {"color": GREY, "lw": 0.9}
    references = [
        Line2D([], [], label="1 (sft)", **ink),
        Line2D([], [], ls="--", label="$p_y$ (dft)", **ink),
        Patch(facecolor=GREY, alpha=0.3, label=f"quartiles of {frame['token'].nunique()} tokens"),
    ]
    legend_below(figure, [*method_keys(names), *references])
    return figure


def _checked(frame: pd.DataFrame, *columns: str) -> pd.DataFrame:
    """The frame with current column names; InputError if it lacks one, or has no records."""
    frame = current_columns(frame)
    if not len(frame):
        raise InputError("frame has no records: train first, with the Watch among the trainer's callbacks")
    need(frame, "step", "variant", *columns)
    return frame
