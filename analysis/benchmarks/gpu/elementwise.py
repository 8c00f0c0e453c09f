"""Element-wise part of a chunk alone, from products to gradients: plain torch, torch.compile and Triton at several blocks."""

from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from qlens.analysis.benchmarks.gpu.kernels import REPEATS, synchronize, timed
from qlens.engine.kernels import plain
from qlens.engine.kernels.raw import raw_mixture_gradient_, raw_mixture_terms
from qlens.engine.kernels.raw_logits import RawLogits
from qlens.registry.structure import GeometricMixture

SHAPE, SMALL = (2048, 128_256), (64, 1031)
MIXTURES = {"label": None, "uniform": GeometricMixture.uniform(), "mixture": GeometricMixture("teacher", 0.5, 0.5)}
BLOCKS = ((2048, 4), (4096, 4), (4096, 8), (8192, 8), (8192, 16), (16_384, 16), (16_384, 32))
"""Entries of a block, and warps."""


def elementwise(device: str, small: bool) -> Iterator[dict[str, Any]]:
    """A row per structure and way: milliseconds, and bytes of the products, read once and written once, per second."""
    for structure in MIXTURES:
        for way in ("torch", "compiled"):
            yield {"structure": structure, "way": way, "run": lambda s=structure, w=way: measure(s, w, device, small)}
        for block in BLOCKS:
            way = "triton {} {}".format(*block)
            yield {"structure": structure, "way": way, "run": lambda s=structure, w=way: measure(s, w, device, small)}


def measure(structure: str, way: str, device: str, small: bool) -> dict[str, Any]:
    """Least seconds of some runs on fresh products."""
    rows, vocabulary = SMALL if small else SHAPE
    draw = torch.Generator(device).manual_seed(0)
    place: dict[str, Any] = {"generator": draw, "device": device, "dtype": torch.bfloat16}
    z, y = (3 * torch.randn(rows, vocabulary, **place) for _ in range(2))
    labels = torch.randint(vocabulary, (rows,), generator=draw, device=device)
    buffer, run, turns = z.clone(), runner(structure, way), []
    for turn in range(2 + REPEATS):
        buffer.copy_(z)
        synchronize(device)
        seconds = timed(lambda: run(buffer, y, labels), device)
        turns += [seconds] if turn > 1 else []
    moved = buffer.nbytes * (3 if structure == "mixture" else 2)
    return {"seconds": min(turns), "peak": None, "terabytes per second": moved / min(turns) / 1e12}


def runner(structure: str, way: str) -> Callable[[Tensor, Tensor, Tensor], object]:
    """The function that turns products into gradients in their place."""
    if way == "torch":
        return lambda z, y, labels: in_torch(structure, z, y, labels)
    if way == "compiled":
        compiled = torch.compile(label_formula if structure == "label" else mixture_formula)
        uniform = structure == "uniform"
        return lambda z, y, labels: compiled(z, labels[:, None]) if structure == "label" else compiled(
            z, y, labels[:, None], uniform
        )  # fmt: skip
    from qlens.engine.kernels import triton_kernels

    block, warps = map(int, way.split()[1:])

    def run(z: Tensor, y: Tensor, labels: Tensor) -> None:
        with mock.patch.multiple(triton_kernels, BLOCK=block, WARPS=warps):
            in_triton(structure, z, y, labels)

    return run


def in_torch(structure: str, z: Tensor, y: Tensor, labels: Tensor) -> None:
    """The kernels in plain torch, with the conversions to float32 and back."""
    wide, labels = z.float(), labels[:, None]
    trust = torch.full_like(wide[:, 0], 0.9)
    if structure == "label":
        plain.label_gradient_(wide, labels)
    elif structure == "uniform":
        plain.uniform_gradient_(wide, labels, plain.uniform_terms_(wide, labels), trust, MIXTURES[structure])
    else:
        terms = plain.mixture_terms_(wide, y.float(), labels, MIXTURES[structure])
        plain.mixture_gradient_(wide, labels, terms, trust)
    z.copy_(wide)


def in_triton(structure: str, z: Tensor, y: Tensor, labels: Tensor) -> None:
    """The Triton kernels."""
    raw, other = RawLogits(z), RawLogits(y) if structure == "mixture" else None
    if structure == "label":
        plain.label_gradient_(raw, labels[:, None])
        return
    mixture = MIXTURES[structure]
    terms = raw_mixture_terms(raw, other, labels, mixture)
    raw_mixture_gradient_(raw, other, labels, terms, torch.full_like(terms.log_p, 0.9), mixture)


def label_formula(z: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """p_{-y} - d in place of z, written for torch.compile."""
    x = z.float()
    at_label, others = x.gather(1, labels), x.scatter(1, labels, -torch.inf)
    rest = others.logsumexp(-1, keepdim=True)
    z.copy_((others - rest).exp().scatter(1, labels, -1.0))
    return at_label, rest


def mixture_formula(z: Tensor, y: Tensor, labels: Tensor, uniform: bool) -> tuple[Tensor, ...]:
    """p - t d - (1 - t) r in place of z at t = 0.9, written for torch.compile."""
    x, t = z.float(), 0.9
    r_logits = torch.zeros_like(x) if uniform else 0.5 * x + 0.5 * y.float()
    log_z, log_r = x.logsumexp(-1, keepdim=True), r_logits.logsumexp(-1, keepdim=True)
    p, r = (x - log_z).exp(), (r_logits - log_r).exp()
    loss = (r * (r_logits - x)).sum(-1, keepdim=True)
    z.copy_((p - (1 - t) * r).scatter_add(1, labels, torch.full_like(log_z, -t)))
    return x.gather(1, labels) - log_z, log_r, loss
