"""Lens benchmark: implied_target against the loss's own forward and backward pass, and the seconds of explain."""

import statistics
import subprocess
import sys
import timeit
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.utils.benchmark import Timer

from qlens import explain, implied_target
from qlens.core.tokens import Tokens

SHAPE = (4096, 32_000)
TIME, COPIES, SECONDS = 1.5, 1.0, 5.0
"""Limits: time of implied_target against the loss itself, its extra copies of the logits, and seconds of explain."""
EXPLAINED = ("sft", "eaft@axolotl", "dpo", "reverse_kl")


def cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """A mean over tokens."""
    return F.cross_entropy(logits, labels)


def forgotten_detach(logits: Tensor, labels: Tensor) -> Tensor:
    """A loss that no registered method has, so that every search runs to its end."""
    log_p = logits.log_softmax(-1).gather(-1, labels[:, None])[:, 0]
    return -(log_p.exp() * log_p).mean()


def own(tokens: Tokens) -> Tensor:
    """Forward and backward pass of the loss itself."""
    leaf = tokens.logits.detach().requires_grad_()
    return torch.autograd.grad(cross_entropy(leaf, tokens.labels), leaf)[0]


SIDES: dict[str, Callable[[Tokens], Any]] = {
    "the loss itself": own,
    "implied_target": lambda tokens: implied_target(cross_entropy, tokens),
}


def random_tokens() -> Tokens:
    """Random tokens of the benchmark's shape, float32."""
    draw = torch.Generator().manual_seed(0)
    return Tokens(logits=torch.randn(SHAPE, generator=draw), labels=torch.randint(SHAPE[1], SHAPE[:1], generator=draw))


def lens(repeats: int) -> list[dict[str, Any]]:
    """Seconds of loss and lens, interleaved, and the peak memory of each in its own process; then seconds of explain."""
    tokens = random_tokens()
    seconds: dict[str, list[float]] = {name: [] for name in SIDES}
    for turn in range(repeats + 1):
        for name in sorted(SIDES, reverse=turn % 2 == 1):
            elapsed = timeit.timeit(partial(SIDES[name], tokens), number=1)
            seconds[name] += [elapsed] if turn else []  # the first is warm-up
    ratios = [b / a for a, b in zip(*seconds.values(), strict=True)]
    peaks = {name: _peak(name) for name in SIDES}
    copy = tokens.logits.numel() * 4 / 2**20
    rows = [{"what": name, "seconds": statistics.median(seconds[name]), "peak": peaks[name]} for name in SIDES]
    rows[1] |= {
        "ratio": statistics.median(ratios),
        "copies": (peaks["implied_target"] - peaks["the loss itself"]) / copy,
    }
    for loss in (*EXPLAINED, forgotten_detach):
        timer = Timer(
            "str(explain(loss))", globals={"explain": explain, "loss": loss}, num_threads=torch.get_num_threads()
        )
        name = loss if isinstance(loss, str) else loss.__name__
        rows.append({"what": f"explain {name}", "seconds": timer.timeit(1).median})
    return rows


def _peak(name: str) -> float:
    """Peak memory of loss or lens in its own process, in MiB."""
    code = (
        "import resource; from qlens.analysis.benchmarks import lens as b; "
        f"r = b.SIDES[{name!r}](b.random_tokens()); print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)"
    )
    return float(subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout)


def show_lens(rows: list[dict[str, Any]]) -> None:
    """Print the benchmark as a table."""
    caption = (
        f"limits: ratio at most {TIME}, {COPIES:g} extra copy of the logits; explain at most {SECONDS:g} s on 2 cores"
    )
    table = Table(title=f"{SHAPE[0]} tokens x {SHAPE[1]} entries, float32; explain on its probes", caption=caption)
    for column in ("", "seconds", "ratio", "peak MiB", "extra copies"):
        table.add_column(column, justify="left" if not column else "right")
    for row in rows:
        cells = [f"{row[key]:{form}}" if key in row else "" for key, form in
                 (("seconds", ".2f"), ("ratio", ".2f"), ("peak", ".0f"), ("copies", ".2f"))]  # fmt: skip
        table.add_row(row["what"], *cells)
    Console().print(table)
