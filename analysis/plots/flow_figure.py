"""Figure of the gradient flow of a loss: probabilities against time."""

from typing import Any

from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from qlens.analysis.plots.style import GREY, INK, STYLES, clean, short

COLORS = [STYLES[name].color for name in ("sft", "target_sft", "kd", "asft_anchored", "dft", "label_smoothing")]
NEVER = "never a label"


def figure_destination(destination: Any) -> Figure:
    """The probability of every entry against time, from the start to the end of the gradient flow.

    Args:
        destination: of ``qlens.destination``.
    """
    figure = Figure(figsize=(6.4, 3.9), layout="constrained")
    ax = figure.subplots()
    keys = plot_destination(destination, ax=ax)
    figure.legend(handles=keys, loc="outside lower center", ncols=3, frameon=False, fontsize=9)
    figure.suptitle(short(destination.spec, 80), fontsize=11, fontweight="bold", x=0.01, ha="left", color=INK)
    ax.set_title(destination.sentence, fontsize=9, loc="left", color=INK, wrap=True)
    return figure


def plot_destination(destination: Any, ax: Axes) -> list[Artist]:
    """Draw the gradient flow on ``ax``; returns the legend handles.

    Entries that are labels are coloured, with their frequency as a dashed line; all others are grey. The probabilities of
    the teacher, or else of the reference, are triangles at the right edge.
    """
    times, seen = destination.times, destination.frequencies > 0
    name, other = next(
        ((name, probs) for name in ("teacher", "reference") if (probs := getattr(destination, name)) is not None),
        ("", None),
    )
    named: dict[str, Line2D] = {}
    # labels last and ever thinner, so that covered lines stay visible
    for entry in sorted(range(len(seen)), key=lambda entry: seen[entry]):
        rank = int(seen[:entry].sum())
        color = COLORS[rank % len(COLORS)] if seen[entry] else GREY
        share = f"entry {entry}, {destination.frequencies[entry]:.3g} of the labels" if seen[entry] else NEVER
        (line,) = ax.plot(times, destination.probs[:, entry], color=color, lw=max(1.4, 3 - 0.8 * rank), label=share)
        named.setdefault(share, line)
        if seen[entry]:
            ax.axhline(destination.frequencies[entry], color=color, lw=0.9, ls=(0, (4, 3)), zorder=1)
        if other is not None:
            mark = {"marker": "<", "ls": "", "markersize": 6, "markeredgecolor": "white", "clip_on": False, "zorder": 4}
            ax.plot(times[-1:], other[entry : entry + 1], color=color, **mark)
    keys: list[Artist] = sorted(named.values(), key=lambda line: line.get_label() == NEVER)
    keys.append(Line2D([], [], color=INK, lw=0.9, ls=(0, (4, 3)), label="label frequency"))
    if other is not None:
        keys.append(Line2D([], [], color=INK, marker="<", ls="", markersize=6, label=name))
    ax.set_xscale("log")
    ax.set(xlim=(times[0], times[-1]), ylim=(-0.02, 1.02), ylabel="probability")
    ax.set_xlabel("time, in steps of gradient descent at rate 1")
    clean(ax)
    return keys
