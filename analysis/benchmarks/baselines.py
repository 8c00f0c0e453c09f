"""The ways that the engine is measured beside: bare matrix products, the plain path and other ways to save memory.

Each works on the same inputs, with preallocated gradients of hidden states and head. As a program this module is one case,
in a process of its own: it warms up, then takes a turn for every line that it is sent, and tells its peak at the end.
"""

import json
import os
import resource
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from qlens.core.tokens import Tokens
from qlens.engine.fused import fused_loss
from qlens.registry import get

METHODS = {
    "sft": "", "dft": "", "label_smoothing": "", "asft_anchored": "reference", "kd": "teacher", "target_sft": "teacher"
}  # fmt: skip
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
    others: dict[str, Any] = {METHODS[method]: x.other} if x.other else {}
    return lambda: fused_loss(method, x.hidden, x.head, x.labels, **others).backward()


def qlens_told(x: Inputs, method: str) -> Callable[[], None]:
    """The engine, with the comparables that a trainer logs out of the same pass."""
    from qlens.training.metrics import MetricSums

    others: dict[str, Any] = {METHODS[method]: x.other} if x.other else {}
    return lambda: fused_loss(method, x.hidden, x.head, x.labels, observe=MetricSums().add, **others).backward()


WAYS: dict[str, Callable[[Inputs, str], Callable[[], None]]] = {
    "bare products": products,
    "plain path": plain,
    "per-chunk checkpoint": checkpointed,
    "torch linear_cross_entropy": torch_fused,
    "liger chunked": liger_chunked,
    "qlens": qlens_fused,
    "qlens with comparables": qlens_told,
}
ONLY = {
    "torch linear_cross_entropy": ("sft", "label_smoothing"),
    "liger chunked": ("kd",),
    "qlens with comparables": ("sft", "target_sft"),
}
"""Methods of the ways that do not serve all."""


def case(way: str, method: str, shape: tuple[int, int, int], threads: int) -> None:
    """One case: a line of seconds for every line read, the first to warm up, then the peak above inputs and gradients, in MiB.

    What a way loads once, its code and threads, is loaded on a small input before.
    """
    torch.set_num_threads(threads)
    WAYS[way](Inputs(8, 16, 64, other=bool(METHODS[method])), method)()
    x = Inputs(*shape, other=bool(METHODS[method]))
    before = _resident()
    run = WAYS[way](x, method)
    for _ in sys.stdin:
        start = time.perf_counter()
        run()
        print(time.perf_counter() - start, flush=True)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024 - before
    print(max(peak, 0.0), flush=True)


def _resident() -> float:
    """The memory that is resident now, in MiB."""
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20


if __name__ == "__main__":
    case(**json.loads(sys.argv[1]))
