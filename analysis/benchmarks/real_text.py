"""Real text: seconds and memory of explain, the distances and the token view on a user's own model and data."""

import json
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

import qlens
from qlens.analysis.token_view.token_view import view
from qlens.cli.inputs import own_models, own_tokens
from qlens.lens.equivalences import distances

ROWS = 8  # rows of the data
MEMORY = 1.3  # limit of the peak above the loaded models, in GiB
VIEW = 1.3  # limit of the view's time as a multiple of its two forward passes
STATUS = Path("/proc/self/status")


def unregistered(logits: Tensor, labels: Tensor) -> Tensor:
    """A loss that no registered method has: a weight without a formula, and a term on sum(p^2)."""
    log_p = logits.float().log_softmax(-1)
    label = log_p.gather(-1, labels[:, None])[:, 0]
    p = label.exp().detach()
    return -(0.1 + p**0.3 * torch.sin(3 * p)) * label + 0.1 * log_p.exp().square().sum(-1)


CASES: dict[str, tuple[str | Callable, float | None]] = {
    "explain dft": ("dft", 20.0),
    "explain eaft@axolotl": ("eaft@axolotl", 20.0),
    "explain an unregistered loss": (unregistered, 20.0),
    "explain target_sft, with a teacher": ("target_sft", 40.0),
    "list --distances": ("", 60.0),
    "view of sft and dft": ("", None),
}
"""The cases by name: the loss that is explained, and the limit in seconds beyond loading and the model's own forward pass."""


def real_text(model: str, data: str) -> list[dict[str, Any]]:
    """Seconds and peak memory of every case, each in its own process.

    Args:
        model: a Hugging Face folder, which is the teacher too.
        data: JSON Lines.

    Returns:
        a row per case: its seconds, its peak above the loaded models in GiB, and the seconds of the forward passes.
    """
    rows = []
    for name in CASES:
        code = f"from qlens.analysis.benchmarks.real_text import measure; measure({name!r}, {model!r}, {data!r})"
        run = subprocess.run([sys.executable, "-c", code], check=True, stdout=subprocess.PIPE, text=True)
        rows.append(json.loads(run.stdout.splitlines()[-1]))
    return rows


def measure(name: str, model: str, data: str) -> None:
    """Run one case and print its row as JSON."""
    loss, limit = CASES[name]
    teacher = model if "teacher" in name else None
    with redirect_stdout(sys.stderr):
        if limit is None:
            row = _view(model, data)
        else:
            needs = ("teacher",) if teacher else ("old", "second", "negatives") if not loss else ()
            own = own_tokens(model, teacher, None, data, ROWS, None, "float32", needs)
            _reset_peak()
            before, began = _memory("VmRSS"), time.perf_counter()
            str(qlens.explain(loss, **own)) if loss else str(distances(own["tokens"]))
            row = {"seconds": time.perf_counter() - began, "tokens": len(own["tokens"]), "limit": limit}
            logits = own["tokens"].logits.numel() * 4 / 2**30  # they stand above the model too
            row["peak"] = _memory("VmHWM") - before + logits * (2 if teacher else 1)
    print(json.dumps({"case": name} | row))


def _view(model: str, data: str) -> dict[str, Any]:
    """Seconds of the view of some rows, and of two forward passes over them."""
    loaded, rows = own_models(model, None, None, data, "cpu", "float32")
    examples = qlens.encode(rows[:ROWS], loaded["tokenizer"]).examples
    passes = [torch.tensor([example["input_ids"]]) for example in examples]
    with torch.inference_mode():
        loaded["model"](passes[0])  # warm-up
        began = time.perf_counter()
        for ids in (*passes, *passes):
            loaded["model"](ids)
    forward = time.perf_counter() - began
    _reset_peak()
    before, began = _memory("VmRSS"), time.perf_counter()
    page = view(loaded["model"], loaded["tokenizer"], rows[:ROWS], ["sft", "dft"])
    seconds = time.perf_counter() - began
    return {
        "seconds": seconds, "tokens": len(page.table), "forward": forward, "ratio": seconds / forward,
        "peak": _memory("VmHWM") - before,
    }  # fmt: skip


def _reset_peak() -> None:
    """Let the kernel measure the peak from here on."""
    Path("/proc/self/clear_refs").write_text("5")


def _memory(name: str) -> float:
    """A line of the process's status, in GiB."""
    (line,) = [line for line in STATUS.read_text().splitlines() if line.startswith(f"{name}:")]
    return int(line.split()[1]) / 2**20


def show_real_text(rows: list[dict[str, Any]]) -> None:
    """Print the benchmark as a table."""
    table = Table(
        title=f"on {rows[0]['tokens']} tokens of {ROWS} rows, float32, beyond imports, loading and the forward pass",
        caption=f"limits: seconds as listed; {MEMORY:g} GiB above the models; the view {VIEW:g} times two forward passes",
    )
    for column in ("", "seconds", "limit", "peak GiB"):
        table.add_column(column, justify="left" if not column else "right")
    for row in rows:
        limit = f"{row['limit']:.0f}" if "limit" in row else f"{VIEW * row['forward']:.1f}"
        table.add_row(row["case"], f"{row['seconds']:.1f}", limit, f"{row['peak']:.2f}")
    Console().print(table)
