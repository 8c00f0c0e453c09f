"""The engine measured: time and peak memory beside bare matrix products, the plain path and other ways to save memory.

Each case runs in a process of its own, on the same inputs, with preallocated gradients of hidden states and head.
"""

import json
import os
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from qlens.engine import fused_loss
from qlens.registry import get
from qlens.tokens import Tokens

N, H, V = 2048, 512, 65_536
METHODS = {
    "sft": "", "dft": "", "label_smoothing": "", "asft_anchored": "reference", "kd": "teacher", "target_sft": "teacher"
}  # fmt: skip
BARS = {"": (1.10, 0.80, 0.12), "other": (1.25, 0.75, 0.10)}
"""Time against the bare products, time against the plain path and peak extra memory against it, at most."""
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


def qlens_fused(x: Inputs, method: str) -> Callable[[], None]:
    """The engine."""
    others: dict[str, Any] = {METHODS[method]: x.other} if x.other else {}
    return lambda: fused_loss(method, x.hidden, x.head, x.labels, **others).backward()


WAYS: dict[str, Callable[[Inputs, str], Callable[[], None]]] = {
    "bare products": products,
    "plain path": plain,
    "per-chunk checkpoint": checkpointed,
    "torch linear_cross_entropy": torch_fused,
    "qlens": qlens_fused,
}


def measured(way: str, method: str, shape: tuple[int, int, int], repeats: int) -> dict[str, float]:
    """Median seconds after warm-up, and the peak of memory above inputs and gradients, in MiB; in this process."""
    x = Inputs(*shape, other=bool(METHODS[method]))
    before = _resident()
    run, seconds = WAYS[way](x, method), []
    for turn in range(repeats + 1):
        start = time.perf_counter()
        run()
        seconds += [time.perf_counter() - start] if turn else []
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024 - before
    return {"seconds": statistics.median(seconds), "peak": max(peak, 0.0)}


def _resident() -> float:
    """The memory that is resident now, in MiB."""
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20


def engine(repeats: int, shape: tuple[int, int, int] = (N, H, V)) -> list[dict[str, Any]]:
    """A row per method and way; ratios to the bare products and to the plain path of the same method."""
    cases = [
        (way, method) for method in METHODS for way in WAYS if way != "torch linear_cross_entropy" or method in _HARD
    ]
    rows = []
    for way, method in track(cases, description="engine"):
        call = f"b.measured({way!r}, {method!r}, {shape}, {repeats})"
        code = f"import json; from qlens.analysis import bench_engine as b; print(json.dumps({call}))"
        done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
        rows.append({"method": method, "way": way, **json.loads(done.stdout)})
    for row in rows:
        same = {other["way"]: other for other in rows if other["method"] == row["method"]}
        row["to products"] = row["seconds"] / same["bare products"]["seconds"]
        row["to plain"] = row["seconds"] / same["plain path"]["seconds"]
        row["memory to plain"] = row["peak"] / same["plain path"]["peak"]
    return rows


_HARD = ("sft", "label_smoothing")


def show_engine(rows: list[dict[str, Any]]) -> None:
    """Print the benchmark, what misses its bar marked."""
    table = Table(title=f"N {N}, H {H}, V {V}, float32, {torch.get_num_threads()} threads; medians")
    for column in ("method", "way", "seconds", "to products", "to plain", "peak MiB", "memory to plain"):
        table.add_column(column, justify="left" if column in ("method", "way") else "right")
    for row in rows:
        bars = BARS["other" if METHODS[row["method"]] else ""] if row["way"] == "qlens" else (float("inf"),) * 3
        ratios = [
            (row[key], bar) for key, bar in zip(("to products", "to plain", "memory to plain"), bars, strict=True)
        ]
        cells = [f"{value:.2f}" + (" (bar " + f"{bar:.2f})" if value > bar else "") for value, bar in ratios]
        table.add_row(row["method"], row["way"], f"{row['seconds']:.2f}", *cells[:2], f"{row['peak']:.0f}", cells[2])
    Console(width=None if sys.stdout.isatty() else 130).print(table)
