"""The command: runs the parts one after another, each within a time limit, and keeps what is measured after every case."""

import argparse
import gc
import json
import platform
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from qlens.analysis.benchmarks.gpu import report
from qlens.core.files import written
from qlens.engine.kernels import raw_logits

LIMITS = {"correctness": 80.0, "elementwise": 30.0, "kernels": 220.0, "trace": 30.0, "steps": 80.0}
"""Seconds after which a part starts no further case."""
PACKAGES = ("torch", "triton", "transformers", "trl", "liger-kernel", "cut-cross-entropy")
Cases = Callable[[str, bool], Iterator[dict[str, Any]]]


def main(argv: list[str] | None = None) -> None:
    """Command line; the exit status is 1 if a case failed that is not another project's."""
    parser = argparse.ArgumentParser(prog="python -m qlens.analysis.benchmarks gpu", description=__doc__)
    parser.add_argument("--device", default="cuda", help="cuda (default), cuda:1, ... or cpu")
    parser.add_argument("--small", action="store_true", help="small shapes: a trial of the command")
    parser.add_argument("--out", type=Path, help="a folder for the JSON, the tables and the figure")
    parser.add_argument("--only", help=f"some of the parts, with commas: {','.join(LIMITS)}")
    parser.add_argument("--methods", help="some of the methods, with commas")
    parser.add_argument("--seconds", type=float, help="a time limit for every part, instead of its usual one")
    options = parser.parse_args(argv)
    parts = options.only.split(",") if options.only else list(LIMITS)
    if unknown := [part for part in parts if part not in LIMITS]:
        parser.error(f"--only has {unknown[0]!r}: write some of {','.join(LIMITS)}")
    methods = options.methods.split(",") if options.methods else None
    if options.device != "cpu" and not torch.cuda.is_available():
        parser.error("no CUDA device here: write --device cpu --small to try the command")
    if options.out is not None:
        options.out.mkdir(parents=True, exist_ok=True)
    results: dict[str, Any] = {"environment": environment(options.device), **{part: [] for part in parts}}
    print(json.dumps(results["environment"]), flush=True)
    raw_logits.DEVICES.add("cuda")
    for part in parts:
        run_part(part, options, methods, results)
    report.show(results)
    if options.out is not None:
        report.save(results, options.out)
    sys.exit(int(bool(report.failures(results))))


def run_part(part: str, options: argparse.Namespace, methods: list[str] | None, results: dict[str, Any]) -> None:
    """Run the cases of one part, within its time limit; a case that fails is a row with its error."""
    began, limit = time.perf_counter(), options.seconds or LIMITS[part]
    print(f"== {part}", flush=True)
    try:
        cases = list(cases_of(part)(options.device, options.small))
    except Exception as error:  # a package that is missing on this machine; the other parts go on
        results[part].append(failure({"case": part}, error))
        cases = []
    for case in cases:
        run = case.pop("run")
        if methods and case.get("method", methods[0]) not in methods:
            continue
        if time.perf_counter() - began > limit:
            row = case | {"not run": f"time limit of {limit:.0f} s"}
        else:
            try:
                row = case | run()
            except Exception as error:  # reported as a failed row, with the exit status
                row = failure(case, error)
            gc.collect()
            if options.device != "cpu":
                torch.cuda.empty_cache()
        results[part].append(row)
        print(report.line(part, row), flush=True)
        if options.out is not None:
            with written(options.out / "gpu.json") as file:
                file.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    results["environment"][f"{part} seconds"] = round(time.perf_counter() - began, 1)


def cases_of(part: str) -> Cases:
    """The cases of a part; imported late, since a package of one part may be missing."""
    if part == "correctness":
        from qlens.analysis.benchmarks.gpu.correctness import correctness

        return correctness
    if part == "elementwise":
        from qlens.analysis.benchmarks.gpu.elementwise import elementwise

        return elementwise
    if part == "kernels":
        from qlens.analysis.benchmarks.gpu.kernels import kernels

        return kernels
    if part == "trace":
        from qlens.analysis.benchmarks.gpu.trace import trace

        return trace
    from qlens.analysis.benchmarks.gpu.steps import steps

    return steps


def failure(case: dict[str, Any], error: Exception) -> dict[str, Any]:
    """The row of a case that did not run to its end."""
    if isinstance(error, ModuleNotFoundError):
        return case | {"missing": str(error)}
    where = traceback.extract_tb(error.__traceback__)[-1]
    text = (str(error).strip() or type(error).__name__).splitlines()[0]
    return case | {"error": f"{type(error).__name__}: {text} ({Path(where.filename).name}:{where.lineno})"}


def environment(device: str) -> dict[str, Any]:
    """Versions and the device."""
    versions = {}
    for name in PACKAGES:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            versions[name] = None
    name = platform.processor() or "CPU" if device == "cpu" else torch.cuda.get_device_name(device)
    return {"device": name, "python": platform.python_version(), **versions}
