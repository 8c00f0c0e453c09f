"""Correctness on the device: losses and gradients of every method against float64 on the same logits."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

import qlens
from qlens.core.numerics import dtype_name
from qlens.core.tokens import MODELS, Tokens
from qlens.engine import Head, fused_loss, fusible
from qlens.engine.fused import ROUNDING
from qlens.registry import Variant
from qlens.testing import random_tokens

SHAPE, SMALL = (256, 256, 8192), (24, 16, 512)
CAPPED = {"softcap": 5.0, "logit_scale": 0.7}
STRUCTURES = ("sft", "label_smoothing", "target_sft", "dpo", "eaft")
"""Methods of all structures, tried behind a bias, scale and cap too."""
DTYPES = (torch.bfloat16, torch.float32)


class Batch:
    """Hidden states and heads of the student and every other model, labels and every field, on a device."""

    def __init__(self, shape: tuple[int, int, int], dtype: torch.dtype, device: str, seed: int):
        n, h, v = shape
        place: dict[str, Any] = {"generator": torch.Generator(device).manual_seed(seed), "device": device}

        def model() -> tuple[Tensor, Tensor]:
            return torch.randn(n, h, **place).to(dtype), (2.5 / h**0.5 * torch.randn(v, h, **place)).to(dtype)

        self.models = {name: model() for name in ("student", *MODELS)}
        z = self.models["student"][0].float() @ self.models["student"][1].float().T
        drawn = torch.multinomial(z.softmax(-1), 1, generator=place["generator"])[:, 0]
        spare = random_tokens(n, v, seed=seed).fields()
        labels = torch.where(torch.arange(n, device=device) % 2 == 0, drawn, spare["labels"].to(device))
        names = spare.keys() - {"logits", "labels", *MODELS}
        self.fields = {name: spare[name].to(device) for name in names}
        self.fields["advantage"] = self.fields["advantage"].to(dtype)
        self.fields["negatives"] = self.fields["negatives"].scatter(1, labels[:, None], False)
        self.labels, self.chunk = labels, n // 2
        self.bias = torch.randn(v, **place).to(dtype)

    def logits(self, name: str, whole: bool, shape: dict[str, Any]) -> Tensor:
        """A model's logits in its own dtype, as the engine computes them, in float64; ``whole``: in one product."""
        hidden, weight = self.models[name]
        size, bias = len(hidden) if whole else self.chunk, self.bias if shape and name == "student" else None
        parts = [Head(part, weight, bias, **shape).logits(slice(None)) for part in hidden.split(size)]
        return torch.cat(parts).double()


def correctness(device: str, small: bool) -> Iterator[dict[str, Any]]:
    """A row per method and dtype: errors of the loss and the gradients of hidden states and head, and their bars.

    Errors of gradients are shares of max(1, the largest entry); that of the sum of the losses is in nats per row, or a
    share of the loss, whichever is less. The ``norm`` of an error is its Euclidean norm over that of the gradient.
    """
    for dtype in DTYPES:
        batch = Batch(SMALL if small else SHAPE, dtype, device, seed=1)
        cases: list[tuple[str, str, dict[str, Any]]] = [(name, name, {}) for name in qlens.names()]
        cases += [(name, f"{name} behind bias, scale and cap", CAPPED) for name in STRUCTURES]
        for name, title, shape in cases:
            key = {"method": title, "dtype": dtype_name(dtype)}
            yield key | {"run": lambda b=batch, m=name, s=shape: errors(b, qlens.get(m), s)}


def errors(batch: Batch, variant: Variant, shape: dict[str, Any]) -> dict[str, Any]:
    """Errors of one method, and whether all are within their bars; ``shape``: scale and cap, which bring a bias with them."""
    hidden, head = (part.clone().requires_grad_() for part in batch.models["student"])
    bias = batch.bias.clone().requires_grad_() if shape else None
    models: dict[str, Any] = {name: batch.models[name] for name in MODELS}
    total = fused_loss(
        variant, hidden, head, batch.labels, bias=bias, denominator=1.0, chunk=batch.chunk, **shape, **models,
        **batch.fields,
    )  # fmt: skip
    total.backward()
    whole = not fusible(variant)
    fields = {k: f.double() if f.is_floating_point() else f for k, f in batch.fields.items()}
    z = batch.logits("student", whole, shape).requires_grad_()
    others = {name: batch.logits(name, whole, shape) for name in MODELS}
    expected = variant.loss(Tokens(logits=z, labels=batch.labels, **others, **fields)).sum()
    (g,) = torch.autograd.grad(expected, z)
    if shape:
        g = g * shape["logit_scale"] * (1 - (z.detach() / shape["softcap"]) ** 2)
    true = (g @ head.detach().double(), g.T @ hidden.detach().double(), g.sum(0))
    loss_error = float((total.detach().double() - expected.detach()).abs())
    result: dict[str, Any] = {"loss": loss_error / (len(batch.labels) + abs(float(expected.detach())))}
    for name, leaf, exact in zip(("hidden", "head", "bias"), (hidden, head, bias), true, strict=True):
        if leaf is None or leaf.grad is None:
            continue
        error = leaf.grad.double() - exact
        result[name] = float(error.abs().max()) / max(1.0, float(exact.abs().max()))
        result[f"{name} norm"] = float(error.norm() / exact.norm().clamp(min=1e-30))
    bar = result["bar"] = ROUNDING[hidden.dtype]
    exact_enough = [result[name] <= bar for name in ("hidden", "head", "bias") if name in result]  # False for NaN
    result["ok"] = result["loss"] <= ROUNDING[torch.float32] and all(exact_enough)
    return result
