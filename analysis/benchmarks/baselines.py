"""Baselines of the engine benchmark: bare matrix products, the plain path and other memory-saving implementations.

All work on the same inputs, with preallocated gradients of hidden states and head. As a program, this module is one case in
its own process: it times one run per line of stdin, and prints its peak memory at the end.
"""

import json
import os
import resource
import sys
import timeit
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint, set_checkpoint_early_stop

from qlens.core.tokens import Tokens
from qlens.engine.fused import fused_loss
from qlens.registry import get

METHODS = {
    "sft": "", "dft": "", "label_smoothing": "", "asft_anchored": "reference", "kd": "teacher", "target_sft": "teacher"
}  # fmt: skip
"""The other model of every method of the engine benchmark, "" where it has none."""
OTHER = METHODS | {"eaft": "", "jsd": "teacher"}
"""The same, with the methods of the GPU benchmark."""
CHUNK = 256  # rows, of the per-chunk checkpoint


class Inputs:
    """Hidden states, head and labels with preallocated gradients, and another model's hidden states and head."""

    def __init__(self, n: int, h: int, v: int, other: bool, dtype: torch.dtype = torch.float32, device: str = "cpu"):
        place: dict[str, Any] = {"generator": torch.Generator(device).manual_seed(0), "device": device}

        def model() -> tuple[Tensor, Tensor]:
            return torch.randn(n, h, dtype=dtype, **place), 0.05 * torch.randn(v, h, dtype=dtype, **place)

        self.hidden, self.head = (part.requires_grad_() for part in model())
        self.labels = torch.randint(v, (n,), **place)
        self.other = model() if other else None
        self.hidden.grad, self.head.grad = torch.zeros_like(self.hidden), torch.zeros_like(self.head)


def products(x: Inputs, method: str) -> Callable[[], None]:
    """The matrix products alone, into preallocated buffers: a lower bound."""
    z = torch.empty(len(x.labels), len(x.head), dtype=x.hidden.dtype, device=x.hidden.device)
    d_hidden, d_head = x.hidden.grad, x.head.grad

    @torch.no_grad()
    def run() -> None:
        torch.mm(x.hidden, x.head.T, out=z)
        torch.mm(z, x.head, out=d_hidden)
        torch.mm(z.T, x.hidden, out=d_head)
        if x.other:
            torch.mm(x.other[0], x.other[1].T, out=z)

    return run


def plain(x: Inputs, method: str) -> Callable[[], None]:
    """All logits at once, and autograd."""
    variant, name = get(method), OTHER[method]

    def run() -> None:
        other_logits = {name: x.other[0] @ x.other[1].T} if x.other else {}
        tokens = Tokens(logits=x.hidden @ x.head.T, labels=x.labels, **other_logits)
        (variant.loss(tokens).sum() / len(x.labels)).backward()

    return run


def checkpointed(x: Inputs, method: str, chunk: int = CHUNK) -> Callable[[], None]:
    """Chunks of rows with activation checkpointing."""
    variant, name = get(method), OTHER[method]

    def part(hidden: Tensor, head: Tensor, rows: slice) -> Tensor:
        other_logits = {name: x.other[0][rows] @ x.other[1].T} if x.other else {}
        return variant.loss(Tokens(logits=hidden @ head.T, labels=x.labels[rows], **other_logits)).sum()

    def run() -> None:
        total = torch.zeros((), device=x.hidden.device)
        with set_checkpoint_early_stop(False):  # it ends a recomputation by an exception within the loss
            for start in range(0, len(x.labels), chunk):
                rows = slice(start, start + chunk)
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
    other_model: dict[str, Any] = {OTHER[method]: x.other} if x.other else {}
    return lambda: fused_loss(method, x.hidden, x.head, x.labels, **other_model).backward()


def qlens_with_metrics(x: Inputs, method: str) -> Callable[[], None]:
    """The engine, with the metrics that a trainer logs."""
    from qlens.training.metrics import MetricSums

    other_model: dict[str, Any] = {OTHER[method]: x.other} if x.other else {}
    return lambda: fused_loss(
        method, x.hidden, x.head, x.labels, observe=MetricSums().observe, **other_model
    ).backward()


WAYS: dict[str, Callable[[Inputs, str], Callable[[], None]]] = {
    "bare products": products,
    "plain path": plain,
    "per-chunk checkpoint": checkpointed,
    "torch linear_cross_entropy": torch_fused,
    "liger chunked": liger_chunked,
    "qlens": qlens_fused,
    "qlens with metrics": qlens_with_metrics,
}
ONLY = {
    "torch linear_cross_entropy": ("sft", "label_smoothing"),
    "liger chunked": ("kd",),
    "qlens with metrics": ("sft", "target_sft"),
}
"""Methods of baselines that do not support all."""


def case(way: str, method: str, shape: tuple[int, int, int], threads: int) -> None:
    """Run one case: print seconds for every line read, then the peak memory above inputs and gradients in MiB.

    A run on a small input comes first, so that code and threads are loaded.
    """
    torch.set_num_threads(threads)
    WAYS[way](Inputs(8, 16, 64, other=bool(OTHER[method])), method)()
    x = Inputs(*shape, other=bool(OTHER[method]))
    before = _resident()
    run = WAYS[way](x, method)
    for _ in sys.stdin:  # not torch's Timer: it would run two warm-ups before every single run
        print(timeit.timeit(run, number=1), flush=True)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024 - before
    print(max(peak, 0.0), flush=True)


def _resident() -> float:
    """Resident memory in MiB."""
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20


if __name__ == "__main__":
    case(**json.loads(sys.argv[1]))
