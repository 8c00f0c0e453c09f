"""Style of all figures: one colour and marker per method, sizes for print, and token text that any font can show."""

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
    """Colour and marker of a method."""

    color: str
    marker: str


# Okabe and Ito's colours and two of Tol's, distinct for colour-blind readers; the markers are distinct in grey.
STYLES = {
    "base": Style("#666666", "X"),
    "sft": Style("#0072B2", "o"),
    "dft": Style("#E69F00", "s"),
    "kd": Style("#009E73", "^"),
    "kd_hybrid": Style("#117733", "<"),
    "label_smoothing": Style("#56B4E9", "v"),
    "asft_anchored": Style("#CC79A7", "P"),
    "target_sft": Style("#D55E00", "D"),
    # controls, near their parent in colour
    "target_sft_base_teacher": Style("#8C4A1B", ">"),
    "target_sft_shuffled_teacher": Style("#882255", "d"),
    "target_sft_constant_trust": Style("#F0806A", "p"),
    "kd_hybrid_tuned": Style("#117733", "h"),
    "sft_equal_compute": Style("#004488", "*"),
}
_COLORS = ("#332288", "#225555", "#999933", "#44AA99", "#AA4499", "#6699CC")
_MARKERS = "ph>*d8ovs^<DP"  # filled ones alone: their edge is white
# 6 and 13 have no common divisor, so that every pair comes once
SPARE = [Style(_COLORS[i % 6], _MARKERS[i % 13]) for i in range(78)]
INK, GREY, FAINT, SOFT = "#222222", "#9a9a9a", "#d9d9d9", "#6b6b70"
HATCH = "/////"
"""Of negative mass, and of metrics that are not defined because of it."""
SINGLE, DOUBLE = 3.3, 6.8
"""Width in inches of one column of a paper, and of two."""
COLUMN = 4.5  # a figure narrower than this is laid out for one column
TEXT, SMALL = 8, 7
"""Points of axis labels and titles, and of ticks, legends and notes, at the size of print."""
OPEN_BOX = "\u2423"  # a visible space


def styles(methods: Iterable[str]) -> dict[str, Style]:
    """Colour and marker by method: fixed for built-in methods; user methods of one figure get distinct ones.

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
    """Styles of the built-in methods that ``STYLES`` does not list."""
    builtin = (name for name, method in registered().items() if method.fn.__module__.startswith("qlens.variants"))
    return dict(zip(sorted(set(builtin) - set(STYLES)), SPARE, strict=False))


def sized(marker: str, size: float) -> float:
    """Marker size with the apparent size of a circle."""
    return size * {"*": 1.5, "P": 1.15, "X": 1.1, "d": 1.2, "D": 0.9, "p": 1.1}.get(marker, 1.0)


def short(method: str, letters: int = 28) -> str:
    """A method's name for a figure: without folders, shortened in the middle, dollar signs escaped."""
    name = re.sub(r"^[^(]*/", "", method)
    name = name if len(name) <= letters else f"{name[: letters - 8]}...{name[-5:]}"
    return name.replace("$", r"\$")


def shown(token: str, letters: int = 16) -> str:
    r"""A token's text for a figure: spaces as open boxes, invisible letters and those the font lacks as escapes.

    Idempotent: backslashes are not escaped.

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
    """Set names as ticks at 0, 1, 2, ..., without parsing formulas."""
    axis.set_ticks(range(len(names)), names)
    for tick in axis.get_ticklabels():
        tick.set_parse_math(False)
        tick.set(fontweight="bold" if tick.get_text() == bold else "normal", **text)
    axis.set_tick_params(length=0)


def current(ax: Axes | None) -> Axes:
    """``ax``, or pyplot's current Axes."""
    if ax is None:
        from matplotlib import pyplot  # choosing a backend is needed here only

        return pyplot.gca()
    return ax


def clean(ax: Axes, grid: str = "both") -> Axes:
    """Apply the common style: no box, a pale grid, few ticks, small text."""
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
    """Set a panel's title, left-aligned."""
    ax.set_title(title, fontsize=TEXT, loc="left", color=INK)


def note(ax: Axes, text: str, x: float = 0.02, y: float = 0.02, **options: Any) -> None:
    """Write a note at (x, y) in fractions of the Axes."""
    paper = {"facecolor": "white", "edgecolor": "none", "pad": 1}
    options = {"fontsize": SMALL, "color": SOFT, "zorder": 4, "bbox": paper} | options
    ax.annotate(text, (x, y), xycoords="axes fraction", **options)


def look(data: pd.DataFrame, column: str = "method") -> dict[str, Style]:
    """Styles of the methods in a frame, chosen among all methods of its figure (``attrs["methods"]``)."""
    names = list(dict.fromkeys(data[column]))
    among = styles([*data.attrs.get("methods", ()), *names])
    return {name: among[name] for name in names}


def of_figure(data: pd.DataFrame, methods: Iterable[str]) -> pd.DataFrame:
    """A copy of the data that shares its styles with all ``methods`` of a figure."""
    data = data.copy()
    data.attrs["methods"] = list(methods)
    return data


def need(data: pd.DataFrame, *columns: str) -> None:
    """Raise InputError if data lacks one of the columns."""
    missing = [name for name in columns if name not in data]
    if missing:
        raise InputError(f"data lacks {', '.join(missing)}; it has {', '.join(map(str, data.columns))}")


def new_figure(width: float, height: float) -> Figure:
    """A figure of this size in inches, outside pyplot."""
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def panels(width: float, number: int, across: int, tall: float = 2.1, narrow: int = 1) -> tuple[Figure, list[Axes]]:
    """A figure of ``number`` panels, ``across`` side by side (``narrow`` below ``COLUMN``), each ``tall`` inches high."""
    columns = narrow if width < COLUMN else across
    rows = ceil(number / columns)
    figure = new_figure(width, rows * tall)
    axes = list(figure.subplots(rows, columns, squeeze=False).flat)
    for spare in axes[number:]:
        spare.set_visible(False)
    return figure, axes[:number]


def legend_below(figure: Figure, keys: Sequence[Any], size: float = SMALL) -> None:
    """Add one legend below all panels, in as many columns as fit; the figure grows by its height."""
    wide = [0.45 + size / 72 * 0.52 * len(str(key.get_label())) for key in keys]  # inches, with the handle

    def needed(columns: int) -> float:
        return sum(max(part) for part in np.array_split(wide, columns))

    fitting = [columns for columns in range(1, len(keys) + 1) if needed(columns) <= figure.get_figwidth()]
    columns = max(fitting, default=1)
    options = {"frameon": False, "fontsize": size, "columnspacing": 1.2, "handletextpad": 0.4}
    figure.legend(handles=keys, loc="outside lower center", ncols=columns, **options)
    figure.set_figheight(figure.get_figheight() + 0.08 + ceil(len(keys) / columns) * size * 1.6 / 72)
