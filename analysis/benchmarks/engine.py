"""Engine benchmark: time and peak memory against bare matrix products, the plain path and other implementations.

Each case runs in its own process; the cases of one method are interleaved to cancel machine noise.
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
LIMITS = {"": (1.10, 0.80, 0.12), "other": (1.25, 0.75, 0.10)}
"""Upper limits: time against bare products, time and extra peak memory against the plain path."""
RATIOS = ("to products", "to plain", "memory to plain")
LONG = [("sft", (n, H, V)) for n in (1024, 4096, 16_384)] + [("target_sft", (8192, 1024, 151_936))]
"""Larger shapes, one run each; the last must fit into ``LIMIT``."""
LIMIT = 4096  # MiB


class Case:
    """A case in its own process, which keeps its inputs between runs."""

    def __init__(self, way: str, method: str, shape: tuple[int, int, int]):
        self.key: dict[str, Any] = {"method": method, "way": way, "shape": shape}
        arguments = json.dumps(self.key | {"threads": torch.get_num_threads()})
        command = [sys.executable, "-m", "qlens.analysis.benchmarks.baselines", arguments]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.seconds: list[float] = []

    def __enter__(self) -> "Case":
        return self

    def __exit__(self, *raised: object) -> None:
        """Kill a process that still runs, after a failed case."""
        if self.process.poll() is None:
            self.process.kill()
            self.process.communicate()

    def turn(self) -> float:
        """Seconds of one run."""
        assert self.process.stdin
        with contextlib.suppress(BrokenPipeError):  # the process has ended; _read reports its status
            self.process.stdin.write("\n")
            self.process.stdin.flush()
        return self._read()

    def measure(self) -> None:
        """Record one run."""
        self.seconds.append(self.turn())

    def row(self) -> dict[str, Any]:
        """Median seconds and peak MiB; ends the process."""
        output, _ = self.process.communicate()
        return self.key | {"seconds": statistics.median(self.seconds), "peak": float(output), "turns": self.seconds}

    def _read(self) -> float:
        assert self.process.stdout
        if line := self.process.stdout.readline():
            return float(line)
        self.process.communicate()
        raise RuntimeError(f"{self.key['way']} for {self.key['method']} ended with status {self.process.returncode}")


def engine(repeats: int) -> list[dict[str, Any]]:
    """A row per method and implementation, with ratios to bare products and plain path; then the larger shapes.

    A ratio of times is the median over rounds of the ratio within a round.
    """
    has_liger = importlib.util.find_spec("liger_kernel") is not None
    ways = [way for way in WAYS if has_liger or way != "liger chunked"]
    groups = {m: [way for way in ways if m in ONLY.get(way, METHODS)] for m in METHODS}
    rows = []
    with Progress(console=Console(stderr=True)) as progress:  # stdout may be JSON
        work = progress.add_task("engine", total=sum(map(len, groups.values())) * (repeats + 1) + len(LONG))
        for method, implementations in groups.items():
            with contextlib.ExitStack() as stack:
                cases = [stack.enter_context(Case(way, method, (N, H, V))) for way in implementations]
                for turn in range(repeats + 1):
                    for case in cases[:: 1 if turn % 2 else -1]:
                        case.measure() if turn else case.turn()  # the first is warm-up
                        progress.advance(work)
                rows += _compared([case.row() for case in cases])
        for method, shape in LONG:
            with Case("qlens", method, shape) as case:
                case.measure()
                progress.advance(work)
                rows.append(case.row())
    return rows


def _compared(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Rows of one method with ratios."""
    ways = {row["way"]: row for row in rows}
    bare, plain = ways["bare products"], ways["plain path"]
    for row in rows:
        for key, other in zip(RATIOS, (bare, plain), strict=False):
            row[key] = statistics.median(a / b for a, b in zip(row["turns"], other["turns"], strict=True))
        row["memory to plain"] = row["peak"] / plain["peak"]
    return rows


def show_engine(rows: list[dict[str, Any]]) -> None:
    """Print the benchmark; values above their limit are marked."""
    console = Console(width=None if sys.stdout.isatty() else 130)
    table = Table(title=f"N {N}, H {H}, V {V}, float32, {torch.get_num_threads()} threads; medians")
    for column in ("method", "way", "seconds", "to products", "to plain", "peak MiB", "memory to plain"):
        table.add_column(column, justify="left" if column in ("method", "way") else "right")
    for row in rows:
        if "to plain" not in row:
            continue
        limits = limits_of(row["method"]) if row["way"] == "qlens" else (float("inf"),) * 3
        cells = [
            f"{row[key]:.2f}" + (f" (limit {limit:.2f})" if row[key] > limit else "")
            for key, limit in zip(RATIOS, limits, strict=True)
        ]
        table.add_row(row["method"], row["way"], f"{row['seconds']:.2f}", *cells[:2], f"{row['peak']:.0f}", cells[2])
    console.print(table)
    table = Table(title="qlens on more rows and entries; one run each", caption=f"limit for the last: {LIMIT} MiB")
    for column in ("method", "N", "H", "V", "seconds", "peak MiB"):
        table.add_column(column, justify="left" if column == "method" else "right")
    for row in rows:
        if "to plain" not in row:
            table.add_row(row["method"], *map(str, row["shape"]), f"{row['seconds']:.2f}", f"{row['peak']:.0f}")
    console.print(table)


STYLES: dict[str, dict[str, Any]] = {
    "bare products": {"color": "0.88"},
    "per-chunk checkpoint": {"color": "0.7"},
    "torch linear_cross_entropy": {"color": "0.5"},
    "liger chunked": {"color": "0.3"},
    "qlens": {"color": "#D55E00"},
    "qlens with metrics": {"color": "#F0C09A", "hatch": "////"},
}
"""Baselines in grey, the engine in colour."""


def draw_engine(rows: list[dict[str, Any]]) -> tuple[Figure, pd.DataFrame]:
    """Figure of time and memory as a share of the plain path, by method; and its data."""
    frame = pd.DataFrame([row for row in rows if "to plain" in row])
    methods = list(dict.fromkeys(frame["method"]))
    figure, axes = panels(DOUBLE, 2, 2, 3.4)
    for ax, key, label in zip(axes, RATIOS[1:], ("time / plain path", "peak memory / plain path"), strict=True):
        for place, method in enumerate(methods):
            some = frame[(frame["method"] == method) & frame["way"].isin(STYLES)]
            thick = 0.84 / len(STYLES)
            for number, (_, row) in enumerate(some.iterrows()):
                at = place + (number - (len(some) - 1) / 2) * thick
                ax.barh(at, row[key], thick, label=row["way"], edgecolor="white", linewidth=0.4, **STYLES[row["way"]])
            limit = limits_of(method)[1 if key == "to plain" else 2]
            ax.plot([limit] * 2, [place - 0.45, place + 0.45], color=INK, lw=0.9, ls=":", label="limit set for qlens")
        ax.axvline(1, color=INK, lw=0.8)
        ax.set(xlabel=label, xlim=(0, None), ylim=(len(methods) - 0.5, -0.5))
        ax.set_yticks(range(len(methods)), methods)
        clean(ax, grid="x")
        ax.tick_params(axis="y", length=0)
    axes[1].set_yticklabels([])
    keys = {label: key for key, label in zip(*axes[0].get_legend_handles_labels(), strict=True)}
    legend_below(figure, [keys[way] for way in (*STYLES, "limit set for qlens") if way in keys])
    return figure, frame


def limits_of(method: str) -> tuple[float, float, float]:
    """Limits of the engine for a method."""
    return LIMITS["other" if METHODS[method] else ""]
