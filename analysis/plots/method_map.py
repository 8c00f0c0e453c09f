"""Plots of all methods on one Axes each: by label weight and reshape, and as a tree of gradient angles."""

from itertools import product
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from scipy.cluster.hierarchy import dendrogram, linkage
from scipy.spatial.distance import squareform

from qlens.analysis.plots.style import (
    GREY,
    INK,
    SMALL,
    SOFT,
    clean,
    current,
    look,
    need,
    note,
    short,
    sized,
    styles,
)
from qlens.core.deprecation import without_effect
from qlens.core.deprecation.columns import current_columns
from qlens.core.errors import InputError

FEW = 12  # methods, up to which quartiles over tokens are drawn
FLAT = 0.01  # of the largest reshape; below, a method counts as one without reshape
SIGNED = 1e-6  # a mean negative mass above rounding


@without_effect("methods")
def plot_plane(
    data: pd.DataFrame,
    *,
    ax: Axes | None = None,
    window: tuple[float, float] = (-0.6, 1.6),
    **dot: Any,
) -> Axes:
    """Methods by label weight and reshape on real tokens, in unit scale, each with its name.

    Hollow markers: targets with negative mass. Up to a dozen methods have crosses of their quartiles over tokens. A label
    weight beyond the window is drawn at its edge and written out. The names of methods without reshape stand below the line
    at 0, in the order of their label weight.

    Args:
        data: of ``plane_frame``: method, label_weight, reshape, negative_mass, tokens and the quartiles.
        ax: where to draw; by default the current Axes.
        window: widest limits of the axis of the label weight.
        dot: keywords for ``Axes.plot``.

    Raises:
        InputError: columns are missing.
    """
    data = current_columns(data)
    quartiles = ["label_weight_low", "label_weight_high", "reshape_low", "reshape_high"]
    need(data, "method", "label_weight", "reshape", "negative_mass", "tokens", *quartiles)
    ax, chosen = current(ax), look(data)
    for x, label in ((0, "no label weight"), (1, "label weight of sft")):
        ax.axvline(x, color=GREY, lw=0.9, ls="-" if x else "--", zorder=1, label=label)
    places, crosses = data.assign(label_weight=data["label_weight"].clip(*window)), []
    for _, row in places.iterrows():
        style, signed = chosen[row["method"]], row["negative_mass"] > SIGNED
        if len(data) <= FEW:
            faint = {"color": style.color, "lw": 1.0, "alpha": 0.35, "zorder": 2}
            across = np.clip([row["label_weight_low"], row["label_weight_high"]], *window), [row["reshape"]] * 2
            up = [row["label_weight"]] * 2, [row["reshape_low"], row["reshape_high"]]
            for line in (across, up):
                ax.plot(*line, **faint)
                crosses.append(np.transpose(line))
        options = {"ls": "", "marker": style.marker, "color": style.color, "markersize": sized(style.marker, 5.5)}
        options |= {"markerfacecolor": "white" if signed else style.color, "markeredgewidth": 1.0, "zorder": 3}
        ax.plot(row["label_weight"], row["reshape"], **options | {"label": row["method"]} | dot)
    names = {row["method"]: _label(row, window) for _, row in data.iterrows()}
    ax.margins(0.1, 0.12)
    ax.autoscale_view()  # fixes the limits before names are placed
    ax.set(xlabel=r"label weight  $\Sigma(-g_y) / \Sigma(1 - p_y)$", ylabel="reshape of the alternatives")
    clean(ax)
    at, flat = places, places["reshape"] < FLAT * max(places["reshape"].max(), SIGNED)
    if flat.sum() > 3:
        _name_below(ax, places[flat], names)
        places = places[~flat]
    crosses += [np.column_stack([[x, x], ax.get_ylim()]) for x in (0, 1)]
    _name_beside(ax, places, names, at, crosses)
    note(ax, f"{data['tokens'].max()} tokens; hollow: negative mass", 0.98, 0.97, ha="right", va="top")
    return ax


def _label(row: pd.Series, window: tuple[float, float]) -> str:
    beyond = not window[0] <= row["label_weight"] <= window[1]
    return short(row["method"], 22) + (
        f" ({row['label_weight']:,.{0 if abs(row['label_weight']) >= 10 else 1}f})" if beyond else ""
    )


def _points(ax: Axes) -> np.ndarray:
    """Size of the Axes in points, before the layout."""
    return np.array(ax.bbox.size) * 72 / ax.figure.dpi


def _name_below(ax: Axes, flat: pd.DataFrame, names: dict[str, str]) -> None:
    """Write names upright below the line of no reshape, as near to their points as they fit."""
    flat, size = flat.sort_values("label_weight", kind="stable"), _points(ax)
    top, gap = ax.get_ylim()[1], (SMALL + 1.5) / size[0]
    deep = (max(len(names[name]) for name in flat["method"]) * 0.52 * SMALL + 16) / size[1]  # of the axes
    ax.set_ylim(-top * deep / (1 - deep), top)
    ax.axhline(0, color=INK, lw=0.8, zorder=1)
    ax.set_yticks([tick for tick in ax.get_yticks() if 0 <= tick <= top])
    at = ax.transLimits.transform(flat[["label_weight", "reshape"]].to_numpy())[:, 0]
    spots = at.copy()
    for _ in range(200):  # push neighbours apart until none overlap
        for i in range(len(spots) - 1):
            if (close := gap - (spots[i + 1] - spots[i])) > 0:
                spots[i], spots[i + 1] = spots[i] - close / 2, spots[i + 1] + close / 2
        spots += max(0.0, gap / 2 - spots[0]) - max(0.0, spots[-1] - 1 + gap / 2)
    line = {"arrowstyle": "-", "color": GREY, "lw": 0.5, "shrinkA": 0, "shrinkB": 3, "relpos": (0.5, 1)}
    options = {
        "textcoords": "axes fraction",
        "fontsize": SMALL,
        "color": INK,
        "rotation": 90,
        "ha": "center",
        "va": "top",
    }
    for spot, (_, row) in zip(spots, flat.iterrows(), strict=True):
        height = deep - 10 / size[1]
        ax.annotate(
            names[row["method"]], (row["label_weight"], row["reshape"]), (spot, height), arrowprops=line, **options
        )


def _name_beside(
    ax: Axes, places: pd.DataFrame, names: dict[str, str], points: pd.DataFrame, lines: list[np.ndarray]
) -> None:
    """Write each name beside its point where it covers least; with a line to the point where it is further off."""
    size, xy = _points(ax), ["label_weight", "reshape"]

    def spots(pairs: pd.DataFrame | np.ndarray) -> np.ndarray:
        return ax.transLimits.transform(np.asarray(pairs)) * size

    at, zero = spots(places[xy]), spots(np.zeros((1, 2)))[0, 1]
    taken = [(x - 3, y - 3, x + 3, y + 3) for x, y in spots(points[xy])]
    taken += [(*(ends.min(0) - 1), *(ends.max(0) + 1)) for ends in map(spots, lines)]
    taken += [(0.0, 0.0, size[0], zero + 1)] * (len(places) < len(points))  # the names below the line
    sides = ((1, 0), (-1, 0), (0, 1), (0, -1), (1, 1), (-1, 1), (1, -1), (-1, -1))
    for (x, y), (_, row) in zip(at, places.iterrows(), strict=True):
        words = names[row["method"]]
        wide, tall = 0.56 * SMALL * len(words), SMALL + 1.0
        boxes = [
            (x + side * r if side > 0 else x - r - wide if side < 0 else x - wide / 2, y + lift * r - tall / 2)
            for r, (side, lift) in product((6, 12, 20, 30, 42, 56, 72), sides)
        ]
        costs = [_overlap((left, low, left + wide, low + tall), taken, size) for left, low in boxes]
        left, low = boxes[int(np.argmin(costs))]
        taken.append((left - 4, low, left + wide + 4, low + tall))
        off = np.hypot(left + wide / 2 - x, low + tall / 2 - y) - wide / 2
        line = {"arrowstyle": "-", "color": GREY, "lw": 0.5, "shrinkA": 0, "shrinkB": 3} if off > 10 else None
        options = {"textcoords": "offset points", "fontsize": SMALL, "color": INK, "va": "center", "ha": "left"}
        ax.annotate(
            words, (row["label_weight"], row["reshape"]), (left - x, low + tall / 2 - y), arrowprops=line, **options
        )


def _overlap(box: tuple[float, ...], taken: list[tuple[float, ...]], size: np.ndarray) -> float:
    """The covered or outer area of a box in square points."""
    left, low, right, high = box
    shared = ((min(right, r) - max(left, x), min(high, h) - max(low, y)) for x, y, r, h in taken)
    covered = sum(wide * tall for wide, tall in shared if wide > 0 and tall > 0)
    outside = max(0.0, -left) + max(0.0, right - size[0]), max(0.0, -low) + max(0.0, high - size[1])
    return covered + outside[0] * (high - low) * 2 + outside[1] * (right - left) * 2


@without_effect("linkage_by")
def plot_atlas(angles: pd.DataFrame, *, ax: Axes | None = None, **line: Any) -> Axes:
    """Methods as a tree by average linkage: those with parallel gradients meet at a small angle.

    Args:
        angles: methods by methods, in degrees, of ``qlens.lens.equivalences.distances().angles()``.
        ax: where to draw; by default the current Axes.
        line: keywords for ``LineCollection.set`` of the tree.

    Raises:
        InputError: the angles are not symmetric with a zero diagonal, or of fewer than two methods.
    """
    square = angles.to_numpy(dtype=float)
    same = square.shape == square.T.shape and list(angles.index) == list(angles.columns)
    if not same or len(square) < 2 or not np.allclose(square, square.T) or np.abs(np.diag(square)).max() > 1e-6:
        raise InputError(
            f"angles must be symmetric, 2 or more methods by the same, 0 on the diagonal; got {square.shape}"
        )
    ax = current(ax)
    tree = linkage(squareform(square, checks=False), "average", optimal_ordering=True)
    drawn = dendrogram(tree, ax=ax, orientation="right", no_labels=True, color_threshold=0, above_threshold_color=SOFT)
    for branches in ax.collections:
        branches.set(**{"linewidth": 0.9, "zorder": 2} | line)
    names = [str(angles.index[leaf]) for leaf in drawn["leaves"]]
    chosen = styles(names)
    for place, name in enumerate(names):
        style = chosen[name]
        mark = {"marker": style.marker, "color": style.color, "markeredgecolor": "white", "markeredgewidth": 0.4}
        ax.plot(
            [0],
            [10 * place + 5],
            ls="",
            markersize=sized(style.marker, 4.6),
            clip_on=False,
            zorder=3,
            label=name,
            **mark,
        )
    ax.set_yticks([10 * place + 5 for place in range(len(names))], [short(name) for name in names])
    clean(ax, grid="x")
    ax.tick_params(axis="y", length=0, pad=5)
    ax.spines["left"].set_visible(False)
    ax.set(xlabel="angle between gradients, degrees", xlim=(0, max(tree[:, 2].max(), 1e-3) * 1.03))
    return ax
