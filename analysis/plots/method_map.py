"""Plots of how methods relate, on one Axes each: the plane of trust and reshape, and the tree of gradient angles."""

from collections.abc import Iterable
from itertools import product
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from scipy.cluster.hierarchy import dendrogram, linkage
from scipy.spatial.distance import squareform

from qlens.analysis.plots.style import GREY, INK, SMALL, SOFT, clean, current, need, note, short, sized, styles
from qlens.core.errors import InputError

FEW = 12  # methods, up to which the spread over tokens is drawn
FLAT = 0.01  # of the largest reshape: less than this leaves the alternatives alone
SIGNED = 1e-6  # a mean negative mass above rounding


def plot_plane(
    data: pd.DataFrame,
    *,
    ax: Axes | None = None,
    methods: Iterable[str] | None = None,
    window: tuple[float, float] = (-0.6, 1.6),
    **dot: Any,
) -> Axes:
    """Methods on the plane of effective trust against reshape, on real tokens, in unit scale, each with its name.

    A hollow marker stands for targets with negative mass. Up to a dozen methods carry the middle half of their tokens. Trust
    beyond the window is drawn at its edge, and written out. Where many methods leave the alternatives alone, their names
    stand below the line of no reshape, in the order of trust.

    Args:
        data: method, trust, reshape, negative_mass, tokens and the quartiles, as ``readings.plane`` gives them.
        ax: where to draw; the current Axes by default.
        methods: which share the colours, if more than in the data.
        window: the widest that the axis of trust may be.
        dot: to ``Axes.plot``.

    Raises:
        InputError: columns are missing.
    """
    spread = ["trust_low", "trust_high", "reshape_low", "reshape_high"]
    need(data, "method", "trust", "reshape", "negative_mass", "tokens", *spread)
    ax, look = current(ax), styles([*(methods or ()), *data["method"]])
    for x, label in ((0, "not trusted"), (1, "trusted as by sft")):
        ax.axvline(x, color=GREY, lw=0.9, ls="-" if x else "--", zorder=1, label=label)
    places, crosses = data.assign(trust=data["trust"].clip(*window)), []
    for _, row in places.iterrows():
        style, signed = look[row["method"]], row["negative_mass"] > SIGNED
        if len(data) <= FEW:
            faint = {"color": style.color, "lw": 1.0, "alpha": 0.35, "zorder": 2}
            across = np.clip([row["trust_low"], row["trust_high"]], *window), [row["reshape"]] * 2
            up = [row["trust"]] * 2, [row["reshape_low"], row["reshape_high"]]
            for line in (across, up):
                ax.plot(*line, **faint)
                crosses.append(np.transpose(line))
        options = {"ls": "", "marker": style.marker, "color": style.color, "markersize": sized(style.marker, 5.5)}
        options |= {"markerfacecolor": "white" if signed else style.color, "markeredgewidth": 1.0, "zorder": 3}
        ax.plot(row["trust"], row["reshape"], **options | {"label": row["method"]} | dot)
    names = {row["method"]: _named(row, window) for _, row in data.iterrows()}
    ax.margins(0.1, 0.12)
    ax.autoscale_view()  # the limits must stand before anything is measured by them
    ax.set(xlabel="effective trust in the label", ylabel="reshape of the alternatives")
    clean(ax)
    at, flat = places, places["reshape"] < FLAT * max(places["reshape"].max(), SIGNED)
    if flat.sum() > 3:
        _name_below(ax, places[flat], names)
        places = places[~flat]
    crosses += [np.column_stack([[x, x], ax.get_ylim()]) for x in (0, 1)]
    _name_beside(ax, places, names, at, crosses)
    note(ax, f"{data['tokens'].max()} tokens; hollow: negative mass", 0.98, 0.97, ha="right", va="top")
    return ax


def _named(row: pd.Series, window: tuple[float, float]) -> str:
    beyond = not window[0] <= row["trust"] <= window[1]
    return short(row["method"], 22) + (f" ({row['trust']:,.{0 if abs(row['trust']) >= 10 else 1}f})" if beyond else "")


def _points(ax: Axes) -> np.ndarray:
    """The size of the axes in points, before the layout."""
    return np.array(ax.bbox.size) * 72 / ax.figure.dpi


def _name_below(ax: Axes, flat: pd.DataFrame, names: dict[str, str]) -> None:
    """Names upright below the line of no reshape, as near to their points as their width allows."""
    flat, size = flat.sort_values("trust", kind="stable"), _points(ax)
    top, gap = ax.get_ylim()[1], (SMALL + 1.5) / size[0]
    deep = (max(len(names[name]) for name in flat["method"]) * 0.52 * SMALL + 16) / size[1]  # of the axes
    ax.set_ylim(-top * deep / (1 - deep), top)
    ax.axhline(0, color=INK, lw=0.8, zorder=1)
    ax.set_yticks([tick for tick in ax.get_yticks() if 0 <= tick <= top])
    at = ax.transLimits.transform(flat[["trust", "reshape"]].to_numpy())[:, 0]
    spots = at.copy()
    for _ in range(200):  # push neighbours apart until none touch
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
        ax.annotate(names[row["method"]], (row["trust"], row["reshape"]), (spot, height), arrowprops=line, **options)


def _name_beside(
    ax: Axes, places: pd.DataFrame, names: dict[str, str], points: pd.DataFrame, lines: list[np.ndarray]
) -> None:
    """Each point's name beside it, where it covers no other and no line; further off, with a line to it, where it must."""
    size, xy = _points(ax), ["trust", "reshape"]

    def spots(pairs: pd.DataFrame | np.ndarray) -> np.ndarray:
        return ax.transLimits.transform(np.asarray(pairs)) * size

    at, zero = spots(places[xy]), spots(np.zeros((1, 2)))[0, 1]
    taken = [(x - 3, y - 3, x + 3, y + 3) for x, y in spots(points[xy])]
    taken += [(*(ends.min(0) - 1), *(ends.max(0) + 1)) for ends in map(spots, lines)]
    taken += [(0.0, 0.0, size[0], zero + 1)] * (len(places) < len(points))  # there stand the names below
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
        ax.annotate(words, (row["trust"], row["reshape"]), (left - x, low + tall / 2 - y), arrowprops=line, **options)


def _overlap(box: tuple[float, ...], taken: list[tuple[float, ...]], size: np.ndarray) -> float:
    """How much of a box is covered already, or lies outside, in square points."""
    left, low, right, high = box
    shared = ((min(right, r) - max(left, x), min(high, h) - max(low, y)) for x, y, r, h in taken)
    covered = sum(wide * tall for wide, tall in shared if wide > 0 and tall > 0)
    outside = max(0.0, -left) + max(0.0, right - size[0]), max(0.0, -low) + max(0.0, high - size[1])
    return covered + outside[0] * (high - low) * 2 + outside[1] * (right - left) * 2


def plot_atlas(angles: pd.DataFrame, *, ax: Axes | None = None, linkage_by: str = "average", **line: Any) -> Axes:
    """The methods as a tree: those whose gradients point the same way meet at a small angle.

    Args:
        angles: methods by methods, in degrees, as ``qlens.lens.equivalences.distances().angles()`` gives them.
        ax: where to draw; the current Axes by default.
        linkage_by: how groups are measured, as in ``scipy.cluster.hierarchy.linkage``.
        line: to the tree's ``LineCollection.set``.

    Raises:
        InputError: the angles are no square of at least two methods with zeros on its diagonal.
    """
    square = angles.to_numpy(dtype=float)
    same = square.shape == square.T.shape and list(angles.index) == list(angles.columns)
    if not same or len(square) < 2 or not np.allclose(square, square.T) or np.abs(np.diag(square)).max() > 1e-6:
        raise InputError(
            f"angles must be symmetric, 2 or more methods by the same, 0 on the diagonal; got {square.shape}"
        )
    ax = current(ax)
    tree = linkage(squareform(square, checks=False), linkage_by, optimal_ordering=True)
    made = dendrogram(tree, ax=ax, orientation="right", no_labels=True, color_threshold=0, above_threshold_color=SOFT)
    for branches in ax.collections:
        branches.set(**{"linewidth": 0.9, "zorder": 2} | line)
    names = [str(angles.index[leaf]) for leaf in made["leaves"]]
    look = styles(names)
    for place, name in enumerate(names):
        style = look[name]
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
