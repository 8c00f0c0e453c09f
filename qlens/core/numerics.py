"""Numerics: softmax, expectations, divergences and mixtures of distributions, with their digits kept."""

import ctypes
import math
import sys
from collections.abc import Iterator
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

BLOCK_ENTRIES = 2**18  # entries worked on at a time, so that passes over them stay in the cache
SMALLEST = -80.0  # log of a share that adds nothing to 1; subnormal numbers, which are slow, are avoided


def precision(dtype: torch.dtype) -> torch.dtype:
    """The dtype that probabilities are computed in: float64 stays, everything else becomes float32."""
    return torch.promote_types(dtype, torch.float32)


def dtype_name(dtype: torch.dtype) -> str:
    """The name of a dtype without "torch.".

    Example:
        >>> dtype_name(torch.bfloat16)
        'bfloat16'
    """
    return str(dtype).removeprefix("torch.")


def log_softmax(logits: Float[Tensor, "*B V"]) -> Float[Tensor, "*B V"]:
    """log p = z - logsumexp(z), in float32 at least.

    On a CPU, torch sums the V terms of a float32 row one after another, so that log p is off by 4e-5 at V = 250,000.
    Here sum(p) = 1 up to 1e-6 at any V.
    """
    z = logits.to(precision(logits.dtype))
    if z.dtype == torch.float64 or z.device.type != "cpu":
        return torch.log_softmax(z, -1)
    return _LogSoftmax.apply(z)


class _LogSoftmax(torch.autograd.Function):
    """z - max(z) - log sum exp(z - max(z)), in blocks of rows, with torch's pairwise sums."""

    @staticmethod
    def forward(ctx: Any, z: Float[Tensor, "*B V"]) -> Float[Tensor, "*B V"]:
        log_p, size = torch.empty_like(z, memory_format=torch.contiguous_format), z.shape[-1]
        step = max(1, BLOCK_ENTRIES // size)
        for rows, out in zip(z.reshape(-1, size).split(step), log_p.view(-1, size).split(step), strict=True):
            torch.sub(rows, rows.amax(-1, keepdim=True), out=out)
            out.sub_(out.clamp(min=SMALLEST).exp_().sum(-1, keepdim=True).log_())
        ctx.save_for_backward(log_p)
        return log_p

    @staticmethod
    def backward(ctx: Any, *grads: Float[Tensor, "*B V"]) -> Float[Tensor, "*B V"]:
        (log_p,) = ctx.saved_tensors
        return torch.ops.aten._log_softmax_backward_data(grads[0], log_p, -1, log_p.dtype)


def softmax(logits: Float[Tensor, "*B V"]) -> Float[Tensor, "*B V"]:
    """p = softmax(z) without gradient, in float32 at least; as precise as ``log_softmax``, with one exponential."""
    z = logits.detach().to(precision(logits.dtype))
    if z.dtype == torch.float64 or z.device.type != "cpu":
        return torch.softmax(z, -1)
    p, size = torch.empty_like(z, memory_format=torch.contiguous_format), z.shape[-1]
    step = max(1, BLOCK_ENTRIES // size)
    for rows, out in zip(z.reshape(-1, size).split(step), p.view(-1, size).split(step), strict=True):
        torch.sub(rows, rows.amax(-1, keepdim=True), out=out)
        out.exp_().div_(out.sum(-1, keepdim=True))
    return p


def one_hot(labels: Int[Tensor, "*B"], size: int, dtype: torch.dtype) -> Float[Tensor, "*B size"]:
    """One-hot rows of the given width."""
    zeros = torch.zeros(*labels.shape, size, dtype=dtype, device=labels.device)
    return zeros.scatter(-1, labels[..., None].long(), 1.0)


def top_ids(values: Float[Tensor, "N V"], k: int) -> Int[Tensor, "N K"]:
    """The ids of the k greatest entries of every row; of equal ones at the k-th place those with the lowest ids.

    Example:
        >>> top_ids(torch.tensor([[1.0, 3.0, 1.0, 1.0]]), 2)
        tensor([[1, 0]])
    """
    k = min(k, values.shape[-1])
    top, ids = values.topk(k, dim=-1)
    if not k or bool(((values >= top[:, -1:]).sum(-1) == k).all()):
        return ids
    return values.sort(dim=-1, descending=True, stable=True).indices[:, :k]  # ties, which topk leaves open


def expectation(probs: Float[Tensor, "N V"], values: Float[Tensor, "N V"]) -> Float[Tensor, " N"]:
    """sum_k probs_k values_k, where an exact zero ignores even an infinite value (0 log 0 = 0)."""
    total = _dot(probs, values)
    if bool(total.isfinite().all()):  # the masks cost more than the sum, and few rows need them
        return total
    return torch.where(probs == 0, 0.0, probs * values.masked_fill(probs == 0, 0.0)).sum(-1)


def kl(log_a: Float[Tensor, "N V"], log_b: Float[Tensor, "N V"]) -> Float[Tensor, " N"]:
    """KL(a || b) = sum_k a_k (log a_k - log b_k) in nats, differentiable in both; a_k = 0 adds nothing."""
    if bool((total := _dot(log_a.exp(), log_a - log_b)).isfinite().all()):
        return total
    gap = (log_a - log_b.masked_fill(log_a.detach() == -torch.inf, 0.0)).masked_fill(log_a.detach() == -torch.inf, 0.0)
    return (log_a.exp() * gap).sum(-1)


def _dot(a: Float[Tensor, "N V"], b: Float[Tensor, "N V"]) -> Float[Tensor, " N"]:
    """sum_k a_k b_k without a tensor of the products."""
    dtype = torch.promote_types(a.dtype, b.dtype)
    return torch.linalg.vecdot(a.to(dtype), b.to(dtype))


def log_mix(log_a: Float[Tensor, "N V"], log_b: Float[Tensor, "N V"], share: float) -> Float[Tensor, "N V"]:
    """log(share a + (1 - share) b) of log-distributions, differentiable in both; -inf where both are."""
    first, second = (math.log(part) if part else -math.inf for part in (share, 1 - share))
    first, second = log_a + first, log_b + second
    neither = (first == -torch.inf) & (second == -torch.inf)
    mixed = torch.logaddexp(first.masked_fill(neither, 0.0), second.masked_fill(neither, 0.0))
    return mixed.masked_fill(neither, -torch.inf)


def row_blocks(rows: int, vocabulary: int, entries: int = 2**20) -> Iterator[slice]:
    """Slices of rows with about ``entries`` entries of the vocabulary each.

    Example:
        >>> list(row_blocks(5, vocabulary=10, entries=20))
        [slice(0, 2, None), slice(2, 4, None), slice(4, 5, None)]
    """
    size = max(1, entries // vocabulary)
    for start in range(0, rows, size):
        yield slice(start, min(start + size, rows))


def spread(number: int, most: int) -> Int[Tensor, " n"]:
    """Indices of at most ``most`` of ``number`` rows, evenly spread from the first to the last."""
    return torch.linspace(0, number - 1, min(number, most)).long().unique()


def release_memory() -> None:
    """Return freed memory to the system: the C library keeps the blocks of a chunk otherwise, about 1 GiB of them."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
    if trim is not None:
        trim(0)
