"""The engine measured: time and peak memory beside bare matrix products, the plain path and other ways to save memory.

Each case runs in a process of its own, on the same inputs, with preallocated gradients of hidden states and head.
"""

import importlib.util
import json
import os
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

import matplotlib
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from matplotlib.ticker import NullFormatter, ScalarFormatter
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from qlens.analysis.look import DOUBLE
from qlens.engine import fused_loss
from qlens.registry import get
from qlens.tokens import Tokens

N, H, V = 2048, 512, 65_536
METHODS = {
    "sft": "", "dft": "", "label_smoothing": "", "asft_anchored": "reference", "kd": "teacher", "target_sft": "teacher"
}  # fmt: skip
BARS = {"": (1.10, 0.80, 0.12), "other": (1.25, 0.75, 0.10)}
"""Time against the bare products, time against the plain path and peak extra memory against it, at most."""
RATIOS = ("to products", "to plain", "memory to plain")
CHUNK = 256  # rows, of the per-chunk checkpoint


class Inputs:
    """Hidden states, head and labels with preallocated gradients, and another model's hidden states and head."""

    def __init__(self, n: int, h: int, v: int, other: bool):
        draw = torch.Generator().manual_seed(0)
        self.hidden = torch.randn(n, h, generator=draw).requires_grad_()
        self.head = (0.05 * torch.randn(v, h, generator=draw)).requires_grad_()
        self.labels = torch.randint(v, (n,), generator=draw)
        self.other = (torch.randn(n, h, generator=draw), 0.05 * torch.randn(v, h, generator=draw)) if other else None
        self.hidden.grad, self.head.grad = torch.zeros_like(self.hidden), torch.zeros_like(self.head)


def products(x: Inputs, method: str) -> Callable[[], None]:
    """The matrix products alone, into preallocated buffers: the limit."""
    z = torch.empty(len(x.labels), len(x.head))

    @torch.no_grad()
    def run() -> None:
        torch.mm(x.hidden, x.head.T, out=z)
        torch.mm(z, x.head, out=x.hidden.grad)
        torch.mm(z.T, x.hidden, out=x.head.grad)
        if x.other:
            torch.mm(x.other[0], x.other[1].T, out=z)

    return run


def plain(x: Inputs, method: str) -> Callable[[], None]:
    """Logits whole, and autograd."""
    variant, name = get(method), METHODS[method]

    def run() -> None:
        others = {name: x.other[0] @ x.other[1].T} if x.other else {}
        tokens = Tokens(logits=x.hidden @ x.head.T, labels=x.labels, **others)
        (variant.loss(tokens).sum() / len(x.labels)).backward()

    return run


def checkpointed(x: Inputs, method: str) -> Callable[[], None]:
    """Chunks of rows, each computed again on the way back."""
    variant, name = get(method), METHODS[method]

    def part(hidden: Tensor, head: Tensor, rows: slice) -> Tensor:
        others = {name: x.other[0][rows] @ x.other[1].T} if x.other else {}
        return variant.loss(Tokens(logits=hidden @ head.T, labels=x.labels[rows], **others)).sum()

    def run() -> None:
        total = torch.zeros(())
        for start in range(0, len(x.labels), CHUNK):
            rows = slice(start, start + CHUNK)
            total = total + checkpoint(part, x.hidden[rows], x.head, rows, use_reentrant=False)
        (total / len(x.labels)).backward()

    return run


def torch_fused(x: Inputs, method: str) -> Callable[[], None]:
    """torch's own linear_cross_entropy; hard labels and label smoothing only."""
    smoothing = 0.1 if method == "label_smoothing" else 0.0
    return lambda: F.linear_cross_entropy(x.hidden, x.head, x.labels, label_smoothing=smoothing).backward()


def liger_chunked(x: Inputs, method: str) -> Callable[[], None]:
    """liger-kernel's chunked loss in plain torch: of those here, only distillation has one."""
    from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss  # pyright: ignore[reportMissingImports]

    loss = LigerFusedLinearJSDLoss(
        weight_hard_loss=0.0, weight_soft_loss=1.0, beta=0.0, compiled=False, chunk_size=CHUNK
    )
    hidden, head = x.other
    return lambda: loss(x.hidden, x.head, hidden, head, x.labels).backward()


def qlens_fused(x: Inputs, method: str) -> Callable[[], None]:
    """The engine."""
    others: dict[str, Any] = {METHODS[method]: x.other} if x.other else {}
    return lambda: fused_loss(method, x.hidden, x.head, x.labels, **others).backward()


def qlens_told(x: Inputs, method: str) -> Callable[[], None]:
    """The engine, with the comparables that a trainer logs out of the same pass."""
    from qlens.comparables import Tally

    others: dict[str, Any] = {METHODS[method]: x.other} if x.other else {}
    return lambda: fused_loss(method, x.hidden, x.head, x.labels, observe=Tally().add, **others).backward()


WAYS: dict[str, Callable[[Inputs, str], Callable[[], None]]] = {
    "bare products": products,
    "plain path": plain,
    "per-chunk checkpoint": checkpointed,
    "torch linear_cross_entropy": torch_fused,
    "liger chunked": liger_chunked,
    "qlens": qlens_fused,
    "qlens with comparables": qlens_told,
}
ONLY = {
    "torch linear_cross_entropy": ("sft", "label_smoothing"),
    "liger chunked": ("kd",),
    "qlens with comparables": ("sft", "target_sft"),
}
"""Methods of the ways that do not serve all."""
LONG = [("sft", (n, H, V)) for n in (1024, 4096, 16_384)] + [("target_sft", (8192, 1024, 151_936))]
"""Rows for how time and memory grow, one run each: the last has to fit into ``ROOM``."""
ROOM = 4096  # MiB


def measured(way: str, method: str, shape: tuple[int, int, int], repeats: int) -> dict[str, float]:
    """Median seconds after warm-up, and the peak of memory above inputs and gradients, in MiB; in this process.

    What a way loads once, its code and threads, is loaded on a small input before.
    """
    WAYS[way](Inputs(8, 16, 64, other=bool(METHODS[method])), method)()
    x = Inputs(*shape, other=bool(METHODS[method]))
    before = _resident()
    run, seconds = WAYS[way](x, method), []
    for turn in range(repeats + (repeats > 1)):
        start = time.perf_counter()
        run()
        seconds += [time.perf_counter() - start] if turn or repeats == 1 else []
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024 - before
    return {"seconds": statistics.median(seconds), "peak": max(peak, 0.0)}


def _resident() -> float:
    """The memory that is resident now, in MiB."""
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20


def engine(repeats: int) -> list[dict[str, Any]]:
    """A row per method and way, with ratios to the bare products and the plain path of the same method; then the long ones."""
    there = importlib.util.find_spec("liger_kernel") is not None
    ways = [way for way in WAYS if there or way != "liger chunked"]
    cases = [(way, m, (N, H, V), repeats) for m in METHODS for way in ways if m in ONLY.get(way, METHODS)]
    cases += [("qlens", method, shape, 1) for method, shape in LONG]
    rows = []
    for way, method, shape, turns in track(cases, description="engine"):
        call = f"b.measured({way!r}, {method!r}, {shape}, {turns})"
        code = f"import json; from qlens.analysis import bench_engine as b; print(json.dumps({call}))"
        done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
        rows.append({"method": method, "way": way, "shape": shape, **json.loads(done.stdout)})
    for row in rows:
        same = {
            other["way"]: other for other in rows if (other["method"], other["shape"]) == (row["method"], row["shape"])
        }
        if row["shape"] == (N, H, V):
            row["to products"] = row["seconds"] / same["bare products"]["seconds"]
            row["to plain"] = row["seconds"] / same["plain path"]["seconds"]
            row["memory to plain"] = row["peak"] / same["plain path"]["peak"]
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


def draw_engine(rows: list[dict[str, Any]]) -> tuple[Figure, pd.DataFrame]:
    """Time and memory of every way, by method, as a share of the plain path; and what is drawn."""
    frame = pd.DataFrame([row for row in rows if "to plain" in row])
    ways = [way for way in WAYS if way in set(frame["way"]) and way != "plain path"]
    looks = dict(zip(ways, matplotlib.colormaps["cividis"](np.linspace(0, 0.95, len(ways))), strict=True))
    figure, axes = plt.subplots(1, 2, figsize=(DOUBLE, 3.2), layout="constrained", sharey=True)
    at = {method: number for number, method in enumerate(dict.fromkeys(frame["method"]))}
    for ax, key, label in zip(axes, RATIOS[1:], ("time / plain path", "peak memory / plain path"), strict=True):
        for number, way in enumerate(ways):
            some = frame[frame["way"] == way]
            places = [at[method] + (number - (len(ways) - 1) / 2) * 0.8 / len(ways) for method in some["method"]]
            ax.barh(places, some[key], 0.8 / len(ways), color=looks[way], label=way, edgecolor="white", linewidth=0.4)
        for method, place in at.items():
            bar = bars_of(method)[1 if key == "to plain" else 2]
            ax.plot([bar, bar], [place - 0.45, place + 0.45], color="black", linewidth=0.9, linestyle=":")
        ax.axvline(1, color="0.6", linewidth=0.7)
        ax.set(xlabel=label, xscale="log")
        ax.xaxis.set_major_formatter(ScalarFormatter())
        ax.xaxis.set_minor_formatter(NullFormatter())
        ax.set_xticks([0.1, 0.2, 0.5, 1, 2], ["0.1", "0.2", "0.5", "1", "2"])
    axes[0].set_yticks(list(at.values()), list(at))
    axes[0].invert_yaxis()
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=3, fontsize=7, frameon=False)
    return figure, frame


def bars_of(method: str) -> tuple[float, float, float]:
    """What the engine has to keep for a method."""
    return BARS["other" if METHODS[method] else ""]
