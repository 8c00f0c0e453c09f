"""Triton kernels against plain torch, in Triton's interpreter: label probabilities, mixtures, bias, scale and soft-cap."""

import pytest
import torch
from cases import case
from torch.testing import assert_close

from qlens.engine import Head, fused_loss
from qlens.engine.kernels import raw_logits

N, H, V = 9, 16, 700
OTHER = {"kd": "teacher", "target_sft": "teacher", "asft_anchored": "reference", "psft": "old"}
ROUNDING = {torch.float32: 1e-6, torch.bfloat16: 2e-2}  # the interpreter cuts bfloat16 off instead of rounding it
pytestmark = [
    pytest.mark.skipif(not raw_logits.has_triton(), reason="Triton is not installed"),
    pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning"),
]


def results(spec, dtype, device_types, monkeypatch, *, with_bias=False, impossible=False, **options):
    """Loss and gradients, by the Triton kernels where ``device_types`` has "cpu"."""
    monkeypatch.setattr(raw_logits, "DEVICES", device_types)
    draw = torch.Generator().manual_seed(0)
    hidden, other = (torch.randn(N, H, generator=draw).to(dtype) for _ in range(2))
    head, other_head = ((0.5 * torch.randn(V, H, generator=draw)).to(dtype) for _ in range(2))
    bias, labels = torch.randn(V, generator=draw).to(dtype), torch.randint(V, (N,), generator=draw)
    if impossible:
        bias[(labels[0] + 1) % V] = -torch.inf
    leaves = [leaf.requires_grad_() for leaf in (hidden, head, bias)[: 3 if with_bias else 2]]
    models = {OTHER[spec]: Head(other, other_head, bias.detach(), 7.0, 1.3)} if spec in OTHER else {}
    if impossible:  # the same entry of every model
        models = {name: Head(other, other_head, bias.detach()) for name in models}
    fields = {"advantage": torch.ones(N)} if spec == "psft" else {}
    value = fused_loss(
        spec, hidden, head, labels, bias=bias if with_bias else None, chunk=4, **models, **fields, **options
    )
    return [value.detach(), *torch.autograd.grad(value, leaves)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_triton_equals_plain_torch(monkeypatch, dtype):
    for spec in ("dft", "label_smoothing", "kd", "target_sft", "asft_anchored", "psft"):
        for options in (
            {},
            dict(with_bias=True, softcap=5.0, logit_scale=-0.7),
            dict(with_bias=True, impossible=True),
        ):
            if spec == "label_smoothing" and "impossible" in options:
                continue  # toward an impossible token the loss is infinite
            with case(spec, options):
                plain, triton = (results(spec, dtype, where, monkeypatch, **options) for where in (set(), {"cpu"}))
                for a, b in zip(triton, plain, strict=True):
                    assert_close(a, b, rtol=0, atol=ROUNDING[dtype] * max(1.0, float(b.abs().max())))


def test_damaged_logits_are_refused(monkeypatch):
    monkeypatch.setattr(raw_logits, "DEVICES", {"cpu"})
    for value in (torch.nan, torch.inf):
        for spec in ("sft", "kd"):
            with case(value, spec):
                hidden, head = torch.ones(2, 1), torch.ones(V, 1)
                head[3] = value
                models = {"teacher": (hidden, torch.ones(V, 1))} if spec == "kd" else {}
                with pytest.raises(ValueError, match="the logits hold NaN, \\+inf"):
                    fused_loss(spec, hidden, head, torch.tensor([1, 2]), **models)
