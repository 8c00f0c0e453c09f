"""Lens benchmark: seconds of explain on its probes, and implied_target against the loss's own forward and backward pass."""

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
from torch import Tensor, nn

import qlens
from qlens.core.progress import track
from qlens.core.tokens import Tokens

SHAPE = (4096, 32_000)
TIME, COPIES, SECONDS = 1.5, 1.0, 5.0
"""Limits: time of implied_target against the loss itself, its extra copies of the logits, and seconds of explain."""


def cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """A mean over tokens."""
    return F.cross_entropy(logits, labels)


def smoothed(logits: Tensor, labels: Tensor) -> Tensor:
    """Label smoothing of .23, which is no method's default."""
    return F.cross_entropy(logits, labels, label_smoothing=0.23)


def clipped_policy(logits: Tensor, labels: Tensor, old_logits: Tensor, advantages: Tensor) -> Tensor:
    """A clipped policy gradient with a wide upper end."""
    new, old = (z.log_softmax(-1).gather(-1, labels[:, None])[:, 0] for z in (logits, old_logits))
    ratio = (new - old).exp()
    return -torch.min(ratio * advantages, ratio.clamp(0.8, 1.37) * advantages).mean()


def unregistered(logits: Tensor, labels: Tensor) -> Tensor:
    """A loss that no registered method has: a weight without a formula, and a term on sum(p^2)."""
    log_p = logits.float().log_softmax(-1)
    label = log_p.gather(-1, labels[:, None])[:, 0]
    p = label.exp().detach()
    return -(0.1 + p**0.3 * torch.sin(3 * p)) * label + 0.1 * log_p.exp().square().sum(-1)


EXPLAINED = (smoothed, unregistered, clipped_policy, "sft", "eaft@axolotl", "dpo", "reverse_kl")
LOSSES: dict[str, str | Callable] = {
    "a mean": cross_entropy, "a class": nn.CrossEntropyLoss(label_smoothing=0.1), "sft": "sft", "dft": "dft", "kd": "kd",
}  # fmt: skip
"""Losses by the name that their row has."""


def own(loss: str | Callable, tokens: Tokens) -> Tensor:
    """Forward and backward pass of the loss itself."""
    leaf = tokens.logits.detach().requires_grad_()
    value = loss(leaf, tokens.labels) if callable(loss) else qlens.get(loss).loss(tokens.with_logits(leaf)).sum()
    return torch.autograd.grad(value, leaf)[0]


SIDES: dict[str, Callable[[Any, Tokens], Any]] = {"own": own, "lens": qlens.implied_target}


def random_tokens(teacher: bool) -> Tokens:
    """Random tokens of the benchmark's shape, float32."""
    draw = torch.Generator().manual_seed(0)
    models = {name: torch.randn(SHAPE, generator=draw) for name in ("logits", "teacher")[: 1 + teacher]}
    return Tokens(labels=torch.randint(SHAPE[1], SHAPE[:1], generator=draw), **models)


def lens(repeats: int) -> list[dict[str, Any]]:
    """A row per case: seconds, peak memory and their limits.

    Loss and lens alternate in one process, and the least of the repeats counts; the peak memory of each is that of a process
    of its own.
    """
    rows = []
    for loss in track(EXPLAINED, len(EXPLAINED), "explaining"):
        name = loss if isinstance(loss, str) else loss.__name__
        seconds = _seconds(lambda loss=loss: str(qlens.explain(loss)))
        rows.append({"case": f"explain {name}, probes", "seconds": seconds, "limit": SECONDS})
    return rows + [_implied(name, repeats) for name in track(LOSSES, len(LOSSES), "implied targets")]


def _implied(name: str, repeats: int) -> dict[str, Any]:
    tokens, loss = random_tokens(name == "kd"), LOSSES[name]
    seconds: dict[str, list[float]] = {side: [] for side in SIDES}
    for turn in range(repeats + 1):
        for side in sorted(SIDES, reverse=turn % 2 == 1):
            elapsed = _seconds(lambda side=side: SIDES[side](loss, tokens))
            seconds[side] += [elapsed] if turn else []  # the first is warm-up
    target = qlens.implied_target(loss, tokens)
    own_seconds, lens_seconds = (min(values) for values in seconds.values())
    peaks = {side: _peak(side, name) for side in SIDES}
    return {
        "case": f"implied_target of {name}", "seconds": lens_seconds, "limit": TIME * own_seconds,
        "ratio": statistics.median(b / a for a, b in zip(*seconds.values(), strict=True)),
        "seconds of q": _seconds(lambda: target.q),
        "copies": (peaks["lens"] - peaks["own"]) / (SHAPE[0] * SHAPE[1] * 4 / 2**20), "copies limit": COPIES,
    }  # fmt: skip


def _seconds(run: Callable[[], Any]) -> float:
    began = time.perf_counter()
    run()
    return time.perf_counter() - began


def _peak(side: str, name: str) -> float:
    """Peak memory of loss or lens in its own process, in MiB."""
    code = (
        "import resource; from qlens.analysis.benchmarks import lens as b; "
        f"r = b.SIDES[{side!r}](b.LOSSES[{name!r}], b.random_tokens({name == 'kd'})); "
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)"
    )
    return float(subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout)


def verdict(row: dict[str, Any]) -> str:
    """Whether a row is within its limits; which it exceeds."""
    limits = {"seconds": "limit", "copies": "copies limit", "GiB": "GiB limit"}
    over = [name for name, limit in limits.items() if name in row and row[name] > row[limit]]
    return f"over in {' and '.join(over)}" if over else "within"


def show_lens(rows: list[dict[str, Any]]) -> None:
    """Print the benchmark as a table."""
    caption = (
        "limits on 2 quiet cores; seconds beyond imports, loading and the model's own forward pass; GiB above the loaded models; "
        f"implied_target on {SHAPE[0]} x {SHAPE[1]} in float32, its memory in copies of the logits above the loss itself"
    )
    table = Table(title="the lens against its limits", caption=caption)
    for column in ("", "seconds", "memory", "verdict"):
        table.add_column(column, justify="left" if column in ("", "verdict") else "right", no_wrap=True)
    for row in rows:
        memory = next((f"{row[u]:.2f} of {row[f'{u} limit']:g} {u}" for u in ("copies", "GiB") if u in row), "")
        table.add_row(row["case"], f"{row['seconds']:.2f} of {row['limit']:.2f}", memory, verdict(row))
    Console(width=120).print(table)
