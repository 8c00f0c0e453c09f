"""Plots of targets on one Axes each: along p_y, at one token, and along a text; from the frames of ``target_data``."""

from collections.abc import Collection, Iterable
from typing import Any, Literal

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.colors import PowerNorm
from matplotlib.patches import Rectangle
from matplotlib.ticker import FixedFormatter, FixedLocator, NullLocator

from qlens.analysis.plots.style import (
    FAINT,
    GREY,
    HATCH,
    INK,
    SMALL,
    clean,
    current,
    look,
    name_ticks,
    need,
    short,
    shown,
    sized,
)
from qlens.core.deprecation import renamed_value, without_effect
from qlens.core.deprecation.columns import current_columns
from qlens.core.errors import InputError

MANY = 200  # tokens, above which markers are small and pale
LINES = {  # by shape of the alternatives; wide pale lines stay visible below thin dark ones
    "flat": {"color": "#E69F00", "marker": "s", "lw": 3.0, "markersize": 5.0, "alpha": 0.75, "zorder": 2},
    "graded": {"color": "#009E73", "marker": "D", "lw": 2.0, "markersize": 3.6, "alpha": 0.85, "zorder": 2.5},
    "peaked": {"color": "#0072B2", "marker": "o", "lw": 1.2, "markersize": 3.0, "zorder": 3},
    "text": {"color": "#0072B2", "marker": "o", "lw": 0.0, "markersize": 3.0, "zorder": 3},
}
SHAPES = {
    "flat": "equal alternatives",
    "graded": "alternatives falling by .8",
    "peaked": "one strong alternative",
    "text": "tokens of the text",
}
LABEL_WEIGHT = r"label weight  $-g_y / (1 - p_y)$"
SHOWN = {
    "gradient": (("label_grad", "runner_up_grad"), r"gradient  $\partial L/\partial z = p - Q$"),
    "target": (("q_label", "q_runner_up"), r"target  $Q$"),
    "label_weight": (("label_weight",), LABEL_WEIGHT),
}
"""Choices of ``plot_sweep``: the columns of label and runner-up, and the name of the axis."""
TICKS = {
    1e-6: "$10^{-6}$",
    1e-3: "$10^{-3}$",
    0.1: "0.1",
    0.5: "0.5",
    0.9: "0.9",
    1 - 1e-3: "0.999",
    1 - 1e-6: "$1-10^{-6}$",
}
METRICS = {
    "label_weight": "label weight",
    "entropy": "entropy H(Q), nats",
    "kl": "KL(Q || p), nats",
    "negative_mass": "negative mass",
    "reshape": "reshape",
}
"""Choices of ``plot_sequence``, with their units."""
OLD_METRICS = {"trust": "label_weight"}
"""Values of ``show`` in earlier versions, with the new ones."""
COLORS = "Blues"  # from light to dark in grey too
ROUNDING = 1e-6  # metrics that are zero up to this get no colour scale of their own
SHORT_MOVE = 0.02  # of the axis: drawn as a dot instead of an arrow


@without_effect("methods")
def plot_sweep(
    data: pd.DataFrame,
    *,
    ax: Axes | None = None,
    show: Literal["gradient", "target", "label_weight"] = "target",
    **line: Any,
) -> Axes:
    """Gradient, target or label weight against p_y: the label solid and filled, the runner-up dashed and hollow.

    Args:
        data: p_y and the columns of ``SHOWN[show]``, of ``sweep_frame`` or ``Explanation.table``; a line per method, or
            else per ``shape`` of the alternatives.
        ax: where to draw; by default the current Axes.
        show: "gradient" (g, unit scale), "target" (Q) or "label_weight" (-g_y / (1 - p_y)).
        line: keywords for ``Axes.plot``.

    Raises:
        InputError: columns are missing, or an unknown ``show``.
    """
    metric = metric_named(show, SHOWN, level=6)
    data, (columns, name) = current_columns(data), SHOWN[metric]
    need(data, "p_y", *columns)
    need(data, "method" if "shape" not in data else "shape")
    ax = current(ax)
    ax.axhline(0, color=INK, lw=0.8, zorder=1)
    _references(ax, metric, data["p_y"])
    for key, rows, style in _lines(data):
        solid = style | line
        dashed = solid | {"ls": "--", "markerfacecolor": "none" if len(rows) > MANY else "white", "label": "_"}
        for column, options in zip(columns[::-1], (solid, dashed)[len(columns) - 1 :: -1], strict=True):
            ax.plot(rows["p_y"], rows[column], **{"label": key} | options)
    if (
        metric == "label_weight" and data[metric].abs().max() > 20
    ):  # a few tokens with p_y near 1 would flatten all others
        ax.set_yscale("symlog", linthresh=1.0)
    _p_y_axis(ax, data["p_y"])
    ax.set(xlabel=r"label probability $p_y$", ylabel=name)
    return clean(ax)


def metric_named(show: str, known: Collection[str], level: int) -> str:
    """The metric to show, its old name replaced with a warning.

    Args:
        show: its name.
        known: the metrics that can be shown.
        level: of the warning, 5 at the call of the function that asks, 6 at that of a decorated one.

    Raises:
        InputError: an unknown metric.
    """
    metric = renamed_value("show", show, OLD_METRICS, level)
    if metric not in known:
        raise InputError(f"show must be one of {', '.join(known)}, got {show!r}")
    return metric


def label_weight_axes(ax: Axes, window: tuple[float, float]) -> Axes:
    """Set axes of the label weight against p_y, with grey lines of sft, 1, and of dft, p_y."""
    ax.plot([0, 1], [1, 1], color=GREY, lw=0.9, ls="-", zorder=1)
    ax.plot([0, 1], [0, 1], color=GREY, lw=0.9, ls="--", zorder=1)
    ax.set(xlim=(-0.02, 1.02), ylim=window, xlabel=r"label probability $p_y$", ylabel=LABEL_WEIGHT)
    return clean(ax)


def _lines(data: pd.DataFrame) -> Iterable[tuple[str, pd.DataFrame, dict[str, Any]]]:
    """Name, rows and style of every line."""
    if "method" in data:
        chosen = look(data)
        for turn, (key, rows) in enumerate(data.groupby("method", sort=False)):
            rows, style = rows.sort_values("p_y"), chosen[str(key)]
            every = max(1, len(rows) // 7)
            marks = {
                "marker": style.marker,
                "markersize": sized(style.marker, 3.8),
                "markevery": (turn * every // 4 % every, every),
            }
            yield str(key), rows, marks | {"color": style.color, "lw": 1.3, "zorder": 3}
    else:
        for key in (kind for kind in LINES if (data["shape"] == kind).any()):
            rows = data[data["shape"] == key].sort_values("p_y")
            small = {"markersize": 1.6, "alpha": 0.4, "markeredgewidth": 0.4} if len(rows) > MANY else {}
            yield SHAPES[key], rows, LINES[key] | small


def _references(ax: Axes, show: str, p_y: pd.Series) -> None:
    """Draw reference lines in grey: Q = p, label weight 1 and label weight p_y."""
    p = sorted(p_y)
    options = {"color": GREY, "lw": 0.9, "zorder": 1}
    if show == "target":
        ax.plot(p, p, ls=":", label=r"$Q_y = p_y$", **options)
    elif show == "label_weight":
        ax.plot(p, [1.0] * len(p), label="1 (sft)", **options)
        ax.plot(p, p, ls="--", label=r"$p_y$ (dft)", **options)


def _p_y_axis(ax: Axes, p_y: pd.Series) -> None:
    """Set a logit axis where p_y comes near 0 and 1, which a linear one would crowd."""
    if p_y.min() < 1e-3 and 0 < p_y.min() and p_y.max() < 1:
        ax.set_xscale("logit")
        ax.xaxis.set_major_locator(FixedLocator(list(TICKS)))
        ax.xaxis.set_major_formatter(FixedFormatter(list(TICKS.values())))
        ax.xaxis.set_minor_locator(NullLocator())
    elif p_y.max() - p_y.min() > 0.5:
        ax.set_xlim(-0.02, 1.02)


@without_effect("methods")
def plot_update(data: pd.DataFrame, *, ax: Axes | None = None, **bar: Any) -> Axes:
    """One token: p (pale), the update of its logits -g = Q - p (arrow, unit scale) and Q, a row per entry.

    Negative entries of Q reach to the left of zero and are hatched; the label is in bold.

    Args:
        data: of one method, of ``token_frame``: method, token, label, p, q.
        ax: where to draw; by default the current Axes.
        bar: keywords for ``Axes.barh`` of Q.

    Raises:
        InputError: columns are missing, or there is more than one method.
    """
    need(data, "method", "token", "label", "p", "q")
    if len(names := data["method"].unique()) != 1:
        raise InputError(f"plot_update draws one method, got {', '.join(names) or 'none'}: select one")
    ax, style = current(ax), look(data)[names[0]]
    at = np.arange(len(data))
    ax.barh(at, data["p"], height=0.84, color=FAINT, zorder=1, label="model, p")
    options = {"height": 0.34, "color": style.color, "zorder": 2, "label": "target, Q"} | bar
    for patch, q in zip(ax.barh(at + 0.22, data["q"], **options), data["q"], strict=True):
        if q < 0:
            patch.set(hatch=HATCH, facecolor="white", edgecolor=style.color, linewidth=0.6)
    low, high = min(0.0, data["q"].min()), max(data["p"].max(), data["q"].max())
    tip = "-|>,head_length=0.3,head_width=0.15"
    arrow = {"arrowstyle": tip, "color": INK, "lw": 0.9, "shrinkA": 0, "shrinkB": 0, "mutation_scale": 7}
    for row, (p, q) in enumerate(zip(data["p"], data["q"], strict=True)):
        if abs(q - p) > SHORT_MOVE * (high - low):
            ax.annotate("", (q, row - 0.22), (p, row - 0.22), arrowprops=arrow, zorder=3)
        else:
            ax.plot([q], [row - 0.22], ".", color=INK, markersize=2.5, zorder=3)
    ax.axvline(0, color=INK, lw=0.8, zorder=4)
    observed = next((shown(token) for token in data.loc[data["label"].astype(bool), "token"]), None)
    name_ticks(ax.yaxis, [shown(token) for token in data["token"]], bold=observed)
    ax.set(ylim=(len(data) - 0.5, -0.5), xlim=(low * 1.06, high * 1.06), xlabel="probability")
    return clean(ax, grid="x")


def plot_sequence(
    data: pd.DataFrame,
    *,
    ax: Axes | None = None,
    show: str = "label_weight",
    limits: tuple[float, float] | None = None,
    **image: Any,
) -> Axes:
    """A text as a heat map of one metric, a column per token and a row per method.

    Targets with negative mass are hatched, on white where the metric is not defined. Values beyond the limits of the
    colours are marked + (above) or - (below). KL is coloured by its square root.

    Args:
        data: of ``text_frame``: method, position, token, negative_mass and the metric.
        ax: where to draw; by default the current Axes.
        show: one of ``METRICS``.
        limits: of the colours; by default 0 to 1 for the label weight, 0 to the largest value for others.
        image: keywords for ``Axes.imshow``.

    Raises:
        InputError: columns are missing, or an unknown metric.
    """
    show = metric_named(show, METRICS, level=5)
    data = current_columns(data)
    need(data, "method", "position", "token", "negative_mass", show)
    ax, names = current(ax), list(dict.fromkeys(data["method"]))
    low, high = color_limits(data, show) if limits is None else limits
    tokens = data.drop_duplicates("position").sort_values("position")
    table = {
        key: data.pivot(index="method", columns="position", values=key).loc[names] for key in {show, "negative_mass"}
    }
    values, signed = table[show].to_numpy(), (table["negative_mass"] > 0).to_numpy()
    norm = PowerNorm(0.5 if show == "kl" else 1.0, low, high)
    options = {"cmap": COLORS, "norm": norm, "aspect": "auto", "interpolation": "nearest"} | image
    ax.imshow(np.ma.masked_invalid(values), **options)
    for row, column in zip(*np.nonzero(signed | np.isnan(values)), strict=True):
        ink = "white" if norm(values[row, column]) > 0.5 else INK
        cell = {"fill": False, "hatch": HATCH, "edgecolor": ink, "linewidth": 0.0}
        ax.add_patch(Rectangle((column - 0.5, row - 0.5), 1, 1, **cell))
    slack = (high - low) / 200
    for beyond, sign, color in ((values > high + slack, "+", "white"), (values < low - slack, "\u2212", INK)):
        for row, column in zip(*np.nonzero(beyond), strict=True):
            box = {"facecolor": "#08306b" if sign == "+" else "white", "edgecolor": "none", "pad": 0.4}
            ax.text(column, row, sign, ha="center", va="center", fontsize=SMALL, color=color, bbox=box)
    clean(ax, grid="none")
    ax.spines[:].set_visible(False)
    name_ticks(ax.xaxis, [shown(token) for token in tokens["token"]], rotation=90)
    ax.set_yticks(range(len(names)), [short(name, 18) for name in names])
    ax.tick_params(axis="y", length=0)
    return ax


def color_limits(data: pd.DataFrame, show: str) -> tuple[float, float]:
    """Values of the lightest and the darkest colour."""
    if show == "label_weight":
        return 0.0, 1.0
    largest = data[show][np.isfinite(data[show])].max()
    return 0.0, float(largest) if largest > ROUNDING else 1.0
