"""The look of every figure: one colour and marker per method, sizes for paper, and text that any font can show."""

import re
import unicodedata
from collections.abc import Iterable, Sequence
from functools import lru_cache
from math import ceil
from typing import Any, NamedTuple
from zlib import crc32

import numpy as np
import pandas as pd
from matplotlib import font_manager
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from qlens.core.errors import InputError
from qlens.registry import methods as registered


class Style(NamedTuple):
    """How a method is drawn, everywhere."""

    color: str
    marker: str


# Okabe and Ito's colours and two of Tol's: told apart by colour-blind readers; markers tell them apart in grey.
STYLES = {
    "base": Style("#666666", "X"),
    "sft": Style("#0072B2", "o"),
    "dft": Style("#E69F00", "s"),
    "kd": Style("#009E73", "^"),
    "kd_hybrid": Style("#117733", "<"),
    "label_smoothing": Style("#56B4E9", "v"),
    "asft_anchored": Style("#CC79A7", "P"),
    "target_sft": Style("#D55E00", "D"),
    # the controls: near their parent in colour
    "target_sft_base_teacher": Style("#8C4A1B", ">"),
    "target_sft_shuffled_teacher": Style("#882255", "d"),
    "target_sft_constant_trust": Style("#F0806A", "p"),
    "kd_hybrid_tuned": Style("#117733", "h"),
    "sft_equal_compute": Style("#004488", "*"),
}
_COLORS = ("#332288", "#225555", "#999933", "#44AA99", "#AA4499", "#6699CC")
_MARKERS = "ph>*d8ovs^<DP"  # filled ones alone: their edge is white
# neighbours differ in both; 6 and 13 have no common divisor, so that every pair comes once
SPARE = [Style(_COLORS[i % 6], _MARKERS[i % 13]) for i in range(78)]
INK, GREY, FAINT, SOFT = "#222222", "#9a9a9a", "#d9d9d9", "#6b6b70"
HATCH = "/////"
"""Of everything that a distribution cannot have: negative mass, and what is not defined because of it."""
SINGLE, DOUBLE = 3.3, 6.8
"""Inches: the width of a column of a paper, and of both."""
COLUMN = 4.5  # a figure less wide than this is for one column
TEXT, SMALL = 8, 7
"""Points: of axis labels and titles, and of ticks, legends and notes; the figures are made to be printed at their size."""
OPEN_BOX = "\u2423"  # a visible space


def styles(methods: Iterable[str]) -> dict[str, Style]:
    """A colour and a marker per method: the same in every figure for those of qlens, clashes avoided for your own.

    Example:
        >>> styles(["dft"])["dft"].marker
        's'
    """
    methods = list(dict.fromkeys(methods))
    known = STYLES | _built_in()
    chosen = {name: known[name] for name in methods if name in known}
    for name in sorted(set(methods) - set(chosen)):
        start = crc32(name.encode())
        turns = [SPARE[(start + step) % len(SPARE)] for step in range(len(SPARE))]
        free = [style for style in turns if style not in chosen.values()] or turns
        markers = {style.marker for style in chosen.values()}
        chosen[name] = next((style for style in free if style.marker not in markers), free[0])
    return {name: chosen[name] for name in methods}


def _built_in() -> dict[str, Style]:
    """The registered methods of qlens that ``STYLES`` does not name, in the order of their names."""
    ours = (name for name, method in registered().items() if method.fn.__module__.startswith("qlens.variants"))
    return dict(zip(sorted(set(ours) - set(STYLES)), SPARE, strict=False))


def sized(marker: str, size: float) -> float:
    """The size at which a marker looks as large as a circle of this size."""
    return size * {"*": 1.5, "P": 1.15, "X": 1.1, "d": 1.2, "D": 0.9, "p": 1.1}.get(marker, 1.0)


def short(method: str, letters: int = 28) -> str:
    """A method's name as it fits into a figure: a file without its folders, the middle of a long spec left out.

    A dollar sign is escaped, so that it begins no formula.
    """
    name = re.sub(r"^[^(]*/", "", method)
    name = name if len(name) <= letters else f"{name[: letters - 8]}...{name[-5:]}"
    return name.replace("$", r"\$")


def shown(token: str, letters: int = 16) -> str:
    r"""A token as a figure can show it: spaces as open boxes, what cannot be seen or the font lacks as escapes.

    Backslashes stay, so that showing twice changes nothing.

    Example:
        >>> print(shown("two\n"), shown("\u202e$_"))
        two\n \u202e$_
    """
    text = "".join(_visible(letter) for letter in token) or '""'
    return text if len(text) <= letters else f"{text[: letters - 6]}...{text[-3:]}"


def _visible(letter: str) -> str:
    if letter == " ":
        return OPEN_BOX if _has(OPEN_BOX) else "_"
    if unicodedata.category(letter)[0] not in "CZ" and _has(letter):
        return letter
    return letter.encode("unicode_escape").decode()


def _has(letter: str) -> bool:
    return _glyph(font_manager.findfont(font_manager.FontProperties()), letter)


@lru_cache(maxsize=4096)
def _glyph(font: str, letter: str) -> bool:
    return font_manager.get_font(font).get_char_index(ord(letter)) != 0


def name_ticks(axis: Axis, names: Sequence[str], bold: str | None = None, **text: Any) -> None:
    """Names at 0, 1, 2, ... of an axis, as they are: a dollar sign begins no formula."""
    axis.set_ticks(range(len(names)), names)
    for tick in axis.get_ticklabels():
        tick.set_parse_math(False)
        tick.set(fontweight="bold" if tick.get_text() == bold else "normal", **text)
    axis.set_tick_params(length=0)


def current(ax: Axes | None) -> Axes:
    """The Axes given, or pyplot's current ones."""
    if ax is None:
        from matplotlib import pyplot  # only here: with ``ax`` given, no backend is chosen and no window can open

        return pyplot.gca()
    return ax


def clean(ax: Axes, grid: str = "both") -> Axes:
    """The house's look: no box, a pale grid behind, few ticks, text to be read at the size it is printed in."""
    ax.spines[["top", "right"]].set_visible(False)
    if grid != "none":
        ax.grid(True, axis=grid, color="#ececec", lw=0.7, zorder=0)
    ax.set_axisbelow(True)
    ax.tick_params(labelsize=SMALL)
    for label in (ax.xaxis.label, ax.yaxis.label):
        label.set_size(TEXT)
    if grid != "x" and ax.get_yscale() == "linear":
        ax.yaxis.set_major_locator(MaxNLocator(6))
    return ax


def head(ax: Axes, title: str) -> None:
    """A panel's title: to the left, in ink, as it is."""
    ax.set_title(title, fontsize=TEXT, loc="left", color=INK)


def note(ax: Axes, text: str, x: float = 0.02, y: float = 0.02, **options: Any) -> None:
    """A remark within the axes, in fractions of them."""
    paper = {"facecolor": "white", "edgecolor": "none", "pad": 1}
    options = {"fontsize": SMALL, "color": SOFT, "zorder": 4, "bbox": paper} | options
    ax.annotate(text, (x, y), xycoords="axes fraction", **options)


def need(data: pd.DataFrame, *columns: str) -> None:
    """Raise InputError if data lacks one of the columns."""
    missing = [name for name in columns if name not in data]
    if missing:
        raise InputError(f"data lacks {', '.join(missing)}; it has {', '.join(map(str, data.columns))}")


def new_figure(width: float, height: float) -> Figure:
    """A figure that no window knows of, in inches: nothing is shown, nothing stays open."""
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def panels(width: float, number: int, across: int, tall: float = 2.1, narrow: int = 1) -> tuple[Figure, list[Axes]]:
    """A figure of so many panels, ``across`` side by side, in one column of a paper ``narrow``; each ``tall`` inches."""
    columns = narrow if width < COLUMN else across
    rows = ceil(number / columns)
    figure = new_figure(width, rows * tall)
    axes = list(figure.subplots(rows, columns, squeeze=False).flat)
    for spare in axes[number:]:
        spare.set_visible(False)
    return figure, axes[:number]


def legend_below(figure: Figure, keys: Sequence[Any], size: float = SMALL) -> None:
    """One legend for all panels, below them, in as many columns as fit; the figure grows by as much."""
    wide = [0.45 + size / 72 * 0.52 * len(str(key.get_label())) for key in keys]  # inches, the handle's among them

    def needed(columns: int) -> float:
        return sum(max(part) for part in np.array_split(wide, columns))

    fitting = [columns for columns in range(1, len(keys) + 1) if needed(columns) <= figure.get_figwidth()]
    columns = max(fitting, default=1)
    options = {"frameon": False, "fontsize": size, "columnspacing": 1.2, "handletextpad": 0.4}
    figure.legend(handles=keys, loc="outside lower center", ncols=columns, **options)
    figure.set_figheight(figure.get_figheight() + 0.08 + ceil(len(keys) / columns) * size * 1.6 / 72)
