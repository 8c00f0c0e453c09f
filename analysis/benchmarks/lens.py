"""The lens measured: implied_target against the loss's own forward and backward, and the seconds that explain takes."""

import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table
from torch import Tensor

from qlens import explain, implied_target
from qlens.core.tokens import Tokens

SHAPE = (4096, 32_000)
TIME, COPIES, SECONDS = 1.5, 1.0, 5.0
"""implied_target may take so many times the loss's own passes and so many more copies of the logits; explain so long."""
EXPLAINED = ("sft", "eaft@axolotl", "dpo", "reverse_kl")


def cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """A loss as anybody writes it: a mean over tokens."""
    return F.cross_entropy(logits, labels)


def forgotten_detach(logits: Tensor, labels: Tensor) -> Tensor:
    """A loss that no registered method has: every search runs to its end."""
    log_p = logits.log_softmax(-1).gather(-1, labels[:, None])[:, 0]
    return -(log_p.exp() * log_p).mean()


def own(tokens: Tokens) -> Tensor:
    """The loss's own forward and backward."""
    leaf = tokens.logits.detach().requires_grad_()
    return torch.autograd.grad(cross_entropy(leaf, tokens.labels), leaf)[0]


SIDES: dict[str, Callable[[Tokens], Any]] = {
    "the loss itself": own,
    "implied_target": lambda tokens: implied_target(cross_entropy, tokens),
}


def made() -> Tokens:
    """Random tokens of the benchmark's shape, float32."""
    draw = torch.Generator().manual_seed(0)
    return Tokens(logits=torch.randn(SHAPE, generator=draw), labels=torch.randint(SHAPE[1], SHAPE[:1], generator=draw))


def lens(repeats: int) -> list[dict[str, Any]]:
    """Seconds of both sides, one after the other, and each one's peak memory in a process of its own; then explain's."""
    tokens = made()
    seconds: dict[str, list[float]] = {name: [] for name in SIDES}
    for turn in range(repeats + 1):
        for name in sorted(SIDES, reverse=turn % 2 == 1):
            start = time.perf_counter()
            result = SIDES[name](tokens)
            seconds[name] += [time.perf_counter() - start] if turn else []  # the first is warm-up
            del result
    ratios = [b / a for a, b in zip(*seconds.values(), strict=True)]
    peaks = {name: _peak(name) for name in SIDES}
    copy = tokens.logits.numel() * 4 / 2**20
    rows = [{"what": name, "seconds": statistics.median(seconds[name]), "peak": peaks[name]} for name in SIDES]
    rows[1] |= {
        "ratio": statistics.median(ratios),
        "copies": (peaks["implied_target"] - peaks["the loss itself"]) / copy,
    }
    for loss in (*EXPLAINED, forgotten_detach):
        times = []
        for _ in range(3):
            start = time.perf_counter()
            str(explain(loss))
            times.append(time.perf_counter() - start)
        name = loss if isinstance(loss, str) else loss.__name__
        rows.append({"what": f"explain {name}", "seconds": statistics.median(times)})
    return rows


def _peak(name: str) -> float:
    """Peak memory of one side in a process of its own, in MiB."""
    code = (
        "import resource; from qlens.analysis import bench_lens as b; "
        f"r = b.SIDES[{name!r}](b.made()); print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)"
    )
    return float(subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout)


def show_lens(rows: list[dict[str, Any]]) -> None:
    """Print the benchmark as a table."""
    caption = (
        f"bars: ratio at most {TIME}, {COPIES:g} more copy of the logits; explain at most {SECONDS:g} s on 2 cores"
    )
    table = Table(title=f"{SHAPE[0]} tokens x {SHAPE[1]} entries, float32; explain on its probes", caption=caption)
    for column in ("", "seconds", "ratio", "peak MiB", "more copies"):
        table.add_column(column, justify="left" if not column else "right")
    for row in rows:
        cells = [f"{row[key]:{form}}" if key in row else "" for key, form in
                 (("seconds", ".2f"), ("ratio", ".2f"), ("peak", ".0f"), ("copies", ".2f"))]  # fmt: skip
        table.add_row(row["what"], *cells)
    Console().print(table)
