"""Alternatives to the engine on a GPU: those of the engine benchmark, and kernels of other projects where installed."""

from collections.abc import Callable
from functools import partial
from unittest import mock

import torch
import torch.nn.functional as F

from qlens.analysis.benchmarks.baselines import Inputs, checkpointed, plain, products, qlens_fused, torch_fused
from qlens.engine.kernels import raw_logits

ROWS = 1024  # of a chunk of the per-chunk checkpoint
BETA = {"kd": 0.0, "jsd": 0.5}
"""Of a generalised Jensen-Shannon divergence; 0 is KL(teacher || student)."""
SMOOTHING = {"sft": 0.0, "label_smoothing": 0.1}


def cross_entropy(x: Inputs, method: str) -> Callable[[], None]:
    """torch's cross_entropy of all logits at once."""
    return lambda: F.cross_entropy(x.hidden @ x.head.T, x.labels, label_smoothing=SMOOTHING[method]).backward()


def liger(x: Inputs, method: str, accum_dtype: torch.dtype | None = None) -> Callable[[], None]:
    """liger-kernel's fused linear cross-entropy or Jensen-Shannon divergence.

    The head's gradient is summed over chunks in ``accum_dtype``, by default in the dtype of the head.
    """
    if x.other is None:
        from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss  # pyright: ignore[reportMissingImports]

        entropy = LigerFusedLinearCrossEntropyLoss(label_smoothing=SMOOTHING[method], accum_dtype=accum_dtype)
        return lambda: entropy(x.head, x.hidden, x.labels).backward()
    from liger_kernel.transformers import LigerFusedLinearJSD  # pyright: ignore[reportMissingImports]

    divergence, (hidden, head) = LigerFusedLinearJSD(jsd_beta=BETA[method], accum_dtype=accum_dtype), x.other
    return lambda: divergence(x.hidden, x.head, hidden, head, x.labels).backward()


def cce(x: Inputs, method: str) -> Callable[[], None]:
    """Cut cross-entropy, which leaves out logits of negligible gradient."""
    from cut_cross_entropy import linear_cross_entropy  # pyright: ignore[reportMissingImports]

    return lambda: linear_cross_entropy(x.hidden, x.head, x.labels).backward()


def trl(x: Inputs, method: str) -> Callable[[], None]:
    """TRL's chunked log-probabilities or divergence."""
    if x.other is None:
        from trl.kernels.chunked_logprob import ChunkedLogProbFunction

        options = (1.0, TRL_ENTRIES, None, 1.0, ())
        return lambda: (
            ChunkedLogProbFunction.apply(x.hidden, x.head, None, x.labels, *options)[0].mean().neg().backward()
        )
    from trl.kernels.chunked_divergence import ChunkedDivergenceFunction

    hidden, head = x.other
    return lambda: (
        ChunkedDivergenceFunction.apply(x.hidden, x.head, None, hidden, head, None, BETA[method])[0].mean().backward()
    )


def torch_alone(x: Inputs, method: str) -> Callable[[], None]:
    """The engine in plain torch, without its Triton kernels."""
    run = qlens_fused(x, method)

    def plain_run() -> None:
        with mock.patch.object(raw_logits, "DEVICES", set()):
            run()

    return plain_run


TRL_ENTRIES = 32_768  # of the vocabulary at a time, as its trainer has it
WAYS: dict[str, Callable[[Inputs, str], Callable[[], None]]] = {
    "bare products": products,
    "qlens": qlens_fused,
    "qlens, torch alone": torch_alone,
    "liger": liger,
    "liger, float32 sums": partial(liger, accum_dtype=torch.float32),
    "cce": cce,
    "trl": trl,
    "torch cross_entropy": cross_entropy,
    "torch linear_cross_entropy": torch_fused,
    "plain path": plain,
    "per-chunk checkpoint": partial(checkpointed, chunk=ROWS),
}
ONLY = {
    "qlens, torch alone": ("sft", "dft", "label_smoothing", "kd", "target_sft"),
    "liger": ("sft", "label_smoothing", "kd", "jsd"),
    "liger, float32 sums": ("sft", "label_smoothing", "kd", "jsd"),
    "cce": ("sft",),
    "trl": ("sft", "kd", "jsd"),
    "torch cross_entropy": ("sft", "label_smoothing"),
    "torch linear_cross_entropy": ("sft", "label_smoothing"),
}
"""Methods of ways that do not support all."""
