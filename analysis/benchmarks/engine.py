"""The engine measured: time and peak memory beside bare matrix products, the plain path and other ways to save memory.

Each case runs in a process of its own; those of one method take turns, so that a slow minute of the machine is everybody's.
"""

import contextlib
import importlib.util
import json
import statistics
import subprocess
import sys
from typing import Any

import pandas as pd
import torch
from matplotlib.figure import Figure
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from qlens.analysis.benchmarks.baselines import METHODS, ONLY, WAYS
from qlens.analysis.plots.style import DOUBLE, INK, clean, legend_below, panels

N, H, V = 2048, 512, 65_536
BARS = {"": (1.10, 0.80, 0.12), "other": (1.25, 0.75, 0.10)}
"""Time against the bare products, time against the plain path and peak extra memory against it, at most."""
RATIOS = ("to products", "to plain", "memory to plain")
LONG = [("sft", (n, H, V)) for n in (1024, 4096, 16_384)] + [("target_sft", (8192, 1024, 151_936))]
"""Rows for how time and memory grow, one run each: the last has to fit into ``ROOM``."""
ROOM = 4096  # MiB


class Case:
    """A case in its own process, where its inputs wait between its turns."""

    def __init__(self, way: str, method: str, shape: tuple[int, int, int]):
        self.named: dict[str, Any] = {"method": method, "way": way, "shape": shape}
        told = json.dumps(self.named | {"threads": torch.get_num_threads()})
        command = [sys.executable, "-m", "qlens.analysis.benchmarks.baselines", told]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.seconds: list[float] = []

    def __enter__(self) -> "Case":
        return self

    def __exit__(self, *raised: object) -> None:
        """End a process that is still there: another case, or this one, has failed."""
        if self.process.poll() is None:
            self.process.kill()
            self.process.communicate()

    def turn(self) -> float:
        """Seconds of one run."""
        assert self.process.stdin
        with contextlib.suppress(BrokenPipeError):  # it has ended, and what is told says how
            self.process.stdin.write("\n")
            self.process.stdin.flush()
        return self._told()

    def measure(self) -> None:
        """One run that counts."""
        self.seconds.append(self.turn())

    def row(self) -> dict[str, Any]:
        """The median of the seconds and the peak, in MiB; ends the process."""
        told, _ = self.process.communicate()
        return self.named | {"seconds": statistics.median(self.seconds), "peak": float(told), "turns": self.seconds}

    def _told(self) -> float:
        assert self.process.stdout
        if line := self.process.stdout.readline():
            return float(line)
        self.process.communicate()
        raise RuntimeError(
            f"{self.named['way']} for {self.named['method']} ended with status {self.process.returncode}"
        )


def engine(repeats: int) -> list[dict[str, Any]]:
    """A row per method and way, with ratios to the bare products and the plain path of the same method; then the long ones.

    A ratio of times is the median, over the rounds, of the ratio within a round.
    """
    there = importlib.util.find_spec("liger_kernel") is not None
    ways = [way for way in WAYS if there or way != "liger chunked"]
    groups = {m: [way for way in ways if m in ONLY.get(way, METHODS)] for m in METHODS}
    rows = []
    with Progress(console=Console(stderr=True)) as progress:  # what is printed may be JSON
        work = progress.add_task("engine", total=sum(map(len, groups.values())) * (repeats + 1) + len(LONG))
        for method, some in groups.items():
            with contextlib.ExitStack() as stack:
                cases = [stack.enter_context(Case(way, method, (N, H, V))) for way in some]
                for turn in range(repeats + 1):
                    for case in cases[:: 1 if turn % 2 else -1]:
                        case.measure() if turn else case.turn()  # the first is to warm up
                        progress.advance(work)
                rows += _compared([case.row() for case in cases])
        for method, shape in LONG:
            with Case("qlens", method, shape) as case:
                case.measure()
                progress.advance(work)
                rows.append(case.row())
    return rows


def _compared(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rows of one method with their ratios."""
    ways = {row["way"]: row for row in rows}
    bare, plain = ways["bare products"], ways["plain path"]
    for row in rows:
        for key, other in zip(RATIOS, (bare, plain), strict=False):
            row[key] = statistics.median(a / b for a, b in zip(row["turns"], other["turns"], strict=True))
        row["memory to plain"] = row["peak"] / plain["peak"]
    return rows


def show_engine(rows: list[dict[str, Any]]) -> None:
    """Print the benchmark, what misses its bar marked."""
    console = Console(width=None if sys.stdout.isatty() else 130)
    table = Table(title=f"N {N}, H {H}, V {V}, float32, {torch.get_num_threads()} threads; medians")
    for column in ("method", "way", "seconds", "to products", "to plain", "peak MiB", "memory to plain"):
        table.add_column(column, justify="left" if column in ("method", "way") else "right")
    for row in rows:
        if "to plain" not in row:
            continue
        bars = bars_of(row["method"]) if row["way"] == "qlens" else (float("inf"),) * 3
        cells = [
            f"{row[key]:.2f}" + (f" (bar {bar:.2f})" if row[key] > bar else "")
            for key, bar in zip(RATIOS, bars, strict=True)
        ]
        table.add_row(row["method"], row["way"], f"{row['seconds']:.2f}", *cells[:2], f"{row['peak']:.0f}", cells[2])
    console.print(table)
    table = Table(title="qlens on more rows and entries; one run each", caption=f"room for the last: {ROOM} MiB")
    for column in ("method", "N", "H", "V", "seconds", "peak MiB"):
        table.add_column(column, justify="left" if column == "method" else "right")
    for row in rows:
        if "to plain" not in row:
            table.add_row(row["method"], *map(str, row["shape"]), f"{row['seconds']:.2f}", f"{row['peak']:.0f}")
    console.print(table)


LOOKS: dict[str, dict[str, Any]] = {
    "bare products": {"color": "0.88"},
    "per-chunk checkpoint": {"color": "0.7"},
    "torch linear_cross_entropy": {"color": "0.5"},
    "liger chunked": {"color": "0.3"},
    "qlens": {"color": "#D55E00"},
    "qlens with comparables": {"color": "#F0C09A", "hatch": "////"},
}
"""The peers in greys, the engine in colour."""


def draw_engine(rows: list[dict[str, Any]]) -> tuple[Figure, pd.DataFrame]:
    """Time and memory of every way, by method, as a share of the plain path; and what is drawn."""
    frame = pd.DataFrame([row for row in rows if "to plain" in row])
    methods = list(dict.fromkeys(frame["method"]))
    figure, axes = panels(DOUBLE, 2, 2, 3.4)
    for ax, key, label in zip(axes, RATIOS[1:], ("time / plain path", "peak memory / plain path"), strict=True):
        for place, method in enumerate(methods):
            some = frame[(frame["method"] == method) & frame["way"].isin(LOOKS)]
            thick = 0.84 / len(LOOKS)
            for number, (_, row) in enumerate(some.iterrows()):
                at = place + (number - (len(some) - 1) / 2) * thick
                ax.barh(at, row[key], thick, label=row["way"], edgecolor="white", linewidth=0.4, **LOOKS[row["way"]])
            bar = bars_of(method)[1 if key == "to plain" else 2]
            ax.plot([bar] * 2, [place - 0.45, place + 0.45], color=INK, lw=0.9, ls=":", label="limit set for qlens")
        ax.axvline(1, color=INK, lw=0.8)
        ax.set(xlabel=label, xlim=(0, None), ylim=(len(methods) - 0.5, -0.5))
        ax.set_yticks(range(len(methods)), methods)
        clean(ax, grid="x")
        ax.tick_params(axis="y", length=0)
    axes[1].set_yticklabels([])
    keys = {label: key for key, label in zip(*axes[0].get_legend_handles_labels(), strict=True)}
    legend_below(figure, [keys[way] for way in (*LOOKS, "limit set for qlens") if way in keys])
    return figure, frame


def bars_of(method: str) -> tuple[float, float, float]:
    """What the engine has to keep for a method."""
    return BARS["other" if METHODS[method] else ""]
