"""Tables, CSV and figure of the GPU benchmark."""

import json
from pathlib import Path
from typing import Any

import pandas as pd
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table

from qlens.analysis.benchmarks.gpu.kernels import compared
from qlens.analysis.plots.save import save_figure
from qlens.analysis.plots.style import DOUBLE, INK, clean, legend_below, panels
from qlens.core.files import written

OUTCOMES = ("error", "missing", "not run")
STYLES: dict[str, dict[str, Any]] = {
    "bare products": {"color": "0.9"},
    "liger": {"color": "0.2"},
    "liger, float32 sums": {"color": "0.35"},
    "cce": {"color": "0.5"},
    "trl": {"color": "0.62"},
    "torch cross_entropy": {"color": "0.72"},
    "torch linear_cross_entropy": {"color": "0.8"},
    "qlens, torch alone": {"color": "#F0C09A"},
    "qlens": {"color": "#D55E00"},
}
"""Alternatives in grey, the engine in colour."""


def line(part: str, row: dict[str, Any]) -> str:
    """One line of a case, printed as it ends."""
    name = " ".join(
        "x".join(map(str, value)) if isinstance(value, tuple) else str(value)
        for key, value in row.items()
        if key in ("method", "dtype", "way", "shape", "model", "trainer", "case", "structure")
    )
    if outcome := next((f"{key}: {row[key]}" for key in OUTCOMES if key in row), ""):
        return f"{name}: {outcome}"
    if part == "correctness":
        values = " ".join(f"{key} {row[key]:.1e}" for key in ("loss", "hidden", "head", "hidden norm", "head norm"))
        return f"{name}: {values}{'' if row['ok'] else '  ABOVE THE BAR'}"
    if part == "trace":
        waits = "; ".join(f"{each['count']}x {each['file']}:{each['line']} {each['code']}" for each in row["waits"])
        top = "; ".join(f"{each['ms']:.2f} ms {each['count']}x {each['kernel'][:60]}" for each in row["top"])
        return (
            f"{name}: {row['launches']} launches, {row['device ms']:.1f} ms on the device, {row['synchronisations']}\n"
            f"  waits: {waits}\n  top: {top}"
        )
    rate = f", {row['terabytes per second']:.2f} TB/s" if "terabytes per second" in row else ""
    return f"{name}: {1000 * row['seconds']:.2f} ms, {mebibytes(row)} MiB{rate}"


def mebibytes(row: dict[str, Any]) -> str:
    """Peak memory of a case; "-" on a CPU, where it is not measured."""
    return "-" if row["peak"] is None else f"{row['peak']:.0f}"


def failures(results: dict[str, Any]) -> list[dict[str, Any]]:
    """Rows that make the command fail: errors, but not of other projects' kernels, and values above their bar."""
    rows = [row for part, rows in results.items() if part != "environment" for row in rows]
    own = [row for row in rows if "error" in row and row.get("way", "qlens") == "qlens"]
    return own + [row for row in rows if row.get("ok") is False]


def show(results: dict[str, Any]) -> None:
    """Print the tables."""
    console = Console(width=150)
    if rows := results.get("correctness"):
        table = Table(title="largest errors against float64, as shares of max(1, largest entry)")
        for column in (
            "dtype",
            "methods",
            "loss",
            "hidden",
            "head",
            "hidden norm",
            "head norm",
            "bar",
            "above",
            "failed",
        ):
            table.add_column(column)
        for dtype in dict.fromkeys(row["dtype"] for row in rows if "dtype" in row):
            some = [row for row in rows if row.get("dtype") == dtype]
            valid = [row for row in some if "ok" in row]
            worst = [
                f"{max((row[key] for row in valid), default=float('nan')):.1e}"
                for key in ("loss", "hidden", "head", "hidden norm", "head norm", "bar")
            ]
            above = ", ".join(row["method"] for row in valid if not row["ok"]) or "none"
            table.add_row(dtype, str(len(valid)), *worst, above, ", ".join(r["method"] for r in some if "error" in r))
        console.print(table)
    if rows := results.get("kernels"):
        compared(rows)
        table = Table(title="one pass, forward and backward; medians")
        for column in ("shape", "method", "way", "ms", "to products", "peak MiB"):
            table.add_column(column)
        for row in rows:
            shape = " x ".join(map(str, row["shape"]))
            if "seconds" not in row:
                outcome = next(f"{key}: {row[key]}" for key in OUTCOMES if key in row)
                table.add_row(shape, row["method"], row["way"], outcome[:60], "", "")
                continue
            limit = row.get("limit")
            over = f" (limit {limit:.2f})" if limit and row["to products"] > limit else ""
            ratio = f"{row['to products']:.2f}{over}" if "to products" in row else ""
            table.add_row(shape, row["method"], row["way"], f"{1000 * row['seconds']:.2f}", ratio, mebibytes(row))
        console.print(table)
    if rows := results.get("steps"):
        table = Table(title="training steps; medians")
        for column in ("model", "trainer", "ms", "tokens/s", "peak MiB", "loss"):
            table.add_column(column)
        for row in rows:
            if "seconds" in row:
                numbers = [f"{n:.0f}" for n in (1000 * row["seconds"], row["tokens per second"])]
                table.add_row(row["model"], row["trainer"], *numbers, mebibytes(row), f"{row['loss']:.4f}")
        console.print(table)
    for row in failures(results):
        console.print(
            f"FAILED { ({k: v for k, v in row.items() if k not in ('turns', 'top', 'waits')}) }", markup=False
        )


def save(results: dict[str, Any], folder: Path) -> None:
    """Write the JSON and, where kernels were measured, the figure with its data."""
    with written(folder / "gpu.json") as file:
        file.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    if any("to products" in row for row in results.get("kernels", ())):
        figure, frame = draw(results["kernels"])
        save_figure(figure, folder / "gpu.png", frame)


def draw(rows: list[dict[str, Any]]) -> tuple[Figure, pd.DataFrame]:
    """Figure of time, as a multiple of the bare products, and of peak memory at the first shape, by method; and its data."""
    frame = pd.DataFrame([{k: v for k, v in row.items() if k != "turns"} for row in rows if "seconds" in row])
    first = frame[(frame["shape"].map(tuple) == tuple(rows[0]["shape"])) & frame["way"].isin(STYLES)]
    methods = list(dict.fromkeys(first["method"]))
    figure, axes = panels(DOUBLE, 2, 2, 3.6)
    gib = first.assign(peak=first["peak"].astype(float) / 1024)
    for ax, key, label in zip(axes, ("to products", "peak"), ("time / bare products", "peak memory, GiB"), strict=True):
        for place, method in enumerate(methods):
            some = gib[(gib["method"] == method) & (gib["way"] != "bare products")]
            thick = 0.84 / max(len(STYLES) - 1, 1)
            for number, (_, row) in enumerate(some.iterrows()):
                at = place + (number - (len(some) - 1) / 2) * thick
                ax.barh(at, row[key], thick, label=row["way"], edgecolor="white", linewidth=0.4, **STYLES[row["way"]])
        ax.set(xlabel=label, xlim=(0, None), ylim=(len(methods) - 0.5, -0.5))
        ax.set_yticks(range(len(methods)), methods)
        clean(ax, grid="x")
        ax.tick_params(axis="y", length=0)
    axes[0].axvline(1, color=INK, lw=0.8)
    axes[1].set_yticklabels([])
    keys = {label: key for key, label in zip(*axes[0].get_legend_handles_labels(), strict=True)}
    legend_below(figure, [keys[way] for way in STYLES if way in keys])
    return figure, frame
