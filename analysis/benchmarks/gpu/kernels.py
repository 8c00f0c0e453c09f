"""Time and peak memory of one pass, forward and backward, beside the alternatives."""

import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch

from qlens.analysis.benchmarks.baselines import OTHER, Inputs
from qlens.analysis.benchmarks.gpu.ways import ONLY, WAYS

SHAPES = ((8192, 4096, 128_256), (8192, 4096, 151_936))
"""Shapes that other projects publish, in bfloat16."""
METHODS = ("sft", "target_sft", "kd", "label_smoothing", "dft", "jsd", "eaft")
ROWS, LONG = (2048, 32_768), ("sft", "target_sft")
SMALL = (96, 32, 1031)
WARM_UP, REPEATS, SECONDS = 2, 9, 1.5
"""Runs that are not timed, timed runs at most, and the time after which no further one starts."""
LIMITS = {"": 1.3, "other": 1.35}
"""Upper limits: time against bare products, without and with another model."""


def kernels(device: str, small: bool) -> Iterator[dict[str, Any]]:
    """A row per shape, method and way: seconds of a run, and peak memory above the inputs in MiB, gradients included."""
    shapes = (SMALL,) if small else SHAPES
    groups = [(shape, method) for shape in shapes for method in METHODS]
    groups += [] if small else [((n, *SHAPES[0][1:]), method) for n in ROWS for method in LONG]
    for shape, method in groups:
        for way in WAYS:
            if method in ONLY.get(way, METHODS):
                key = {"method": method, "way": way, "shape": shape}
                yield key | {"run": lambda s=shape, m=method, w=way: measure(s, m, w, device)}


def measure(shape: tuple[int, int, int], method: str, way: str, device: str) -> dict[str, Any]:
    """Median seconds and peak MiB of one case."""
    dtype = torch.float32 if device == "cpu" else torch.bfloat16
    x = Inputs(*shape, other=bool(OTHER[method]), dtype=dtype, device=device)
    run = WAYS[way](x, method)
    x.hidden.grad = x.head.grad = None  # bare products hold theirs
    synchronize(device)
    before = torch.cuda.memory_allocated() if device != "cpu" else 0
    turns: list[float] = []
    for turn in range(WARM_UP + REPEATS):
        x.hidden.grad = x.head.grad = None
        if turn == WARM_UP and device != "cpu":
            torch.cuda.reset_peak_memory_stats()
        seconds = timed(run, device)
        turns += [seconds] if turn >= WARM_UP else []
        if sum(turns) > SECONDS:
            break
    peak = (torch.cuda.max_memory_allocated() - before) / 2**20 if device != "cpu" else None
    return {"seconds": statistics.median(turns), "least": min(turns), "peak": peak, "turns": turns}


def timed(run: Callable[[], None], device: str) -> float:
    """Seconds of one run: of the device between two events, or of the host."""
    if device == "cpu":
        began = time.perf_counter()
        run()
        return time.perf_counter() - began
    first, last = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    first.record()
    run()
    last.record()
    last.synchronize()
    return first.elapsed_time(last) / 1000


def synchronize(device: str) -> None:
    """Wait for the device."""
    if device != "cpu":
        torch.cuda.synchronize()


def compared(rows: list[dict[str, Any]]) -> None:
    """Add to every row the ratio of times to the bare products of the same shape and method, and the limit of qlens."""
    bare = {(row["method"], tuple(row["shape"])): row for row in rows if row["way"] == "bare products"}
    for row in rows:
        base = bare.get((row["method"], tuple(row["shape"])))
        if base and "seconds" in base and "seconds" in row:
            row["to products"] = row["seconds"] / base["seconds"]
            row["limit"] = LIMITS["other" if OTHER[row["method"]] else ""] if row["way"] == "qlens" else None
