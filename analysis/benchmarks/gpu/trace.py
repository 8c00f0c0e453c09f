"""Trace of one pass: host synchronisations, with the lines that cause them, and kernels launched."""

import collections
import linecache
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch.autograd.profiler_util import DeviceType  # pyright: ignore[reportPrivateImportUsage]
from torch.profiler import ProfilerActivity, profile

import qlens
from qlens.analysis.benchmarks.baselines import OTHER, Inputs
from qlens.analysis.benchmarks.gpu.kernels import SHAPES, SMALL, synchronize
from qlens.analysis.benchmarks.gpu.ways import WAYS

METHODS = ("sft", "target_sft", "label_smoothing", "dft", "eaft", "jsd")
SYNCHRONISATIONS = (
    "cudaStreamSynchronize", "cudaDeviceSynchronize", "cudaEventSynchronize", "aten::item", "aten::_local_scalar_dense",
    "aten::nonzero", "aten::is_nonzero", "Memcpy DtoH (Device -> Pageable)", "Memcpy DtoH (Device -> Pinned)",
)  # fmt: skip
LAUNCHES = ("cudaLaunchKernel", "cudaLaunchKernelExC", "cuLaunchKernel", "cuLaunchKernelEx")
TOP = 12  # kernels shown


def trace(device: str, small: bool) -> Iterator[dict[str, Any]]:
    """A row per method: counts of synchronisations and launches, the lines that wait, and the kernels of most time."""
    for method in METHODS:
        yield {"method": method, "run": lambda m=method: traced(m, SMALL if small else SHAPES[0], device)}


def traced(method: str, shape: tuple[int, int, int], device: str) -> dict[str, Any]:
    """The trace of one pass, forward and backward."""
    cuda = device != "cpu"
    x = Inputs(*shape, other=bool(OTHER[method]), dtype=torch.bfloat16 if cuda else torch.float32, device=device)
    run = WAYS["qlens"](x, method)
    run()
    synchronize(device)
    activities = [ProfilerActivity.CPU, ProfilerActivity.CUDA] if cuda else [ProfilerActivity.CPU]
    with profile(activities=activities) as profiler:
        run()
    events = profiler.key_averages()
    synchronize(device)
    counts = {event.key: event.count for event in events}
    on_device = [e for e in events if e.device_type == DeviceType.CUDA] if cuda else list(events)
    span = (lambda e: e.self_device_time_total) if cuda else (lambda e: e.self_cpu_time_total)
    top = sorted(on_device, key=span, reverse=True)[:TOP]
    return {
        "shape": shape,
        "synchronisations": {name: counts[name] for name in SYNCHRONISATIONS if name in counts},
        "launches": sum(counts.get(name, 0) for name in LAUNCHES),
        "device ms": sum(span(e) for e in on_device) / 1000,
        "waits": waits(run, device),
        "top": [{"kernel": e.key, "count": e.count, "ms": span(e) / 1000} for e in top],
    }


def waits(run: Any, device: str) -> list[dict[str, Any]]:
    """The lines at which the host waits for the device in one run, with their numbers."""
    if device == "cpu":
        return []
    root = str(Path(qlens.__file__).resolve().parent.parent)
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as records:
            warnings.simplefilter("always")
            run()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    lines = collections.Counter((record.filename, record.lineno) for record in records)
    return [
        {"file": file.removeprefix(root).lstrip("/"), "line": line, "count": count,
         "code": linecache.getline(file, line).strip()}
        for (file, line), count in lines.most_common()
    ]  # fmt: skip
