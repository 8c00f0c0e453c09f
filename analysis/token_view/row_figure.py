"""Figure of a row: its running text with every supervised token coloured by a metric, a block per method, for print."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from matplotlib import font_manager
from matplotlib.axes import Axes
from matplotlib.colorbar import Colorbar
from matplotlib.colors import LinearSegmentedColormap, LogNorm, Normalize
from matplotlib.figure import Figure
from matplotlib.ft2font import LoadFlags
from matplotlib.patches import Rectangle
from matplotlib.ticker import NullLocator

from qlens.analysis.plots.style import DOUBLE, GREY, HATCH, INK, SMALL, SOFT, TEXT, new_figure, short, shown

HIGH, LOW = "#3f9ad3", "#e98a4a"  # colours of the page, for light paper
SIZE, LEADING = 7.5, 1.55  # points of the text, and lines per point
INDENT = 6  # points at both sides of a block
HEAD, BAR = 16, 26  # points of the line above a block, and of the colour bar


class Word(NamedTuple):
    """A token in its place: its text, where it lies in points from the upper left corner, and its width."""

    token: int
    text: str
    x: float
    line: int
    width: float


def laid_out(strings: Sequence[str], width: float) -> list[Word]:
    """Tokens in lines of at most ``width`` points; a newline begins a line, and a token that does not fit the next one."""
    words, x, line = [], 0.0, 0
    for token, string in enumerate(strings):
        text = "".join(
            letter if letter == " " else shown(letter)
            for letter in string.replace("\n", "\N{DOWNWARDS ARROW WITH CORNER LEFTWARDS}")
        )
        size = sum(map(_advance, text))
        if x and x + size > width:
            x, line = 0.0, line + 1
        words.append(Word(token, text, x, line, size))
        x += size
        if string.endswith("\n"):
            x, line = 0.0, line + 1
    return words


def figure_row(
    strings: Sequence[str],
    places: Sequence[int],
    values: dict[str, np.ndarray],
    name: str,
    high: float,
    signed: bool,
    log: bool,
    width: float = DOUBLE,
) -> Figure:
    """A row as running text, a block per method.

    Args:
        strings: the text of every token.
        places: positions of the supervised tokens, from 0.
        values: a metric's value at each of these, by the block's title; NaN where it is not defined.
        name: of the metric.
        high: the value of the strongest colour.
        signed, log: whether values may be negative, and whether colours follow the logarithm.
        width: inches.
    """
    inner = 72 * width - 2 * INDENT
    words = laid_out(strings, inner)
    lines = max(word.line for word in words) + 1
    block = HEAD + lines * SIZE * LEADING
    height = len(values) * block + BAR
    figure = new_figure(width, height / 72)
    figure.set_layout_engine("none")
    colors, norm = _scale(high, signed, log)
    for number, (title, of_block) in enumerate(values.items()):
        top = 1 - number * block / height
        ax = figure.add_axes((INDENT / (72 * width), top - block / height, inner / (72 * width), block / height))
        ax.set(xlim=(0, inner), ylim=(block, 0))
        ax.axis("off")
        ax.text(0, HEAD - 5, short(title, 90), fontsize=TEXT, fontweight="bold", color=INK, parse_math=False)
        _write(ax, words, dict(zip(places, of_block, strict=True)), colors, norm)
    bar = figure.add_axes((INDENT / (72 * width), 14 / height, 110 / (72 * width), 7 / height))
    key = Colorbar(bar, cmap=colors, norm=norm, orientation="horizontal")
    key.set_ticks([1, high] if log else [-high, 0, high] if signed else [0, high])
    key.set_ticklabels([f"{x:.3g}" for x in key.get_ticks()])
    key.ax.xaxis.set_minor_locator(NullLocator())
    key.ax.tick_params(labelsize=SMALL - 1, length=2)
    key.outline.set_visible(False)
    undefined = any(np.isnan(each).any() for each in values.values())
    note = f"{name}; grey text is context, not trained on{'; hatched: not defined' if undefined else ''}"
    figure.text((INDENT + 125) / (72 * width), 16 / height, note, fontsize=SMALL, color=SOFT, parse_math=False)
    return figure


def _write(
    ax: Axes, words: Sequence[Word], values: dict[int, float], colors: LinearSegmentedColormap, norm: Normalize
) -> None:
    """Write the words of a block on their colours."""
    for word in words:
        y = HEAD + (word.line + 0.5) * SIZE * LEADING
        value = values.get(word.token)
        if value is not None:
            undefined = bool(np.isnan(value))
            face = {"facecolor": "white", "hatch": HATCH, "edgecolor": GREY} if undefined else {}
            face = face or {"facecolor": colors(norm(value)), "edgecolor": "#d9d9d9"}
            box = (word.x, y - SIZE * LEADING / 2 + 0.6), word.width, SIZE * LEADING - 1.2
            ax.add_patch(Rectangle(*box, linewidth=0.4, **face))
        text_color = INK if value is not None else SOFT
        ax.text(word.x, y, word.text, fontsize=SIZE, color=text_color, va="center_baseline", parse_math=False)


def _scale(high: float, signed: bool, log: bool) -> tuple[LinearSegmentedColormap, Normalize]:
    """The colour map of a metric and the values at its ends."""
    ends = [LOW, "white", HIGH] if signed else ["white", HIGH]
    colors = LinearSegmentedColormap.from_list("token_view", ends)
    if log:
        return colors, LogNorm(1, high, clip=True)
    return colors, Normalize(-high if signed else 0.0, high, clip=True)


def _advance(letter: str) -> float:
    """The width of a letter in points."""
    font = font_manager.get_font(font_manager.findfont(font_manager.FontProperties()))
    font.set_size(SIZE, 72)
    return font.load_char(ord(letter), flags=LoadFlags.NO_HINTING).linearHoriAdvance / 65536
