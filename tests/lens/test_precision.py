"""Losses that compute in a narrow type are read in float64, without the rounding of their casts."""

import torch
import torch.nn.functional as F
from losses import label_log_probs
from released_losses import float32_only
from torch.testing import assert_close

import qlens
from qlens.core.autograd import gradient
from qlens.core.scales import carried
from qlens.lens.exact import Exact, read_exactly
from qlens.lens.implied import read
from qlens.lens.reading import whole_where_needed
from qlens.lens.rounding import traced
from qlens.registry import resolve


def autocast(logits, labels):
    with torch.autocast("cpu", dtype=torch.bfloat16):
        return F.cross_entropy(logits.float() @ torch.eye(logits.shape[-1]), labels)


def smoothed_by_constants(logits, labels):
    size = logits.shape[-1]
    chosen = F.one_hot(labels, size)
    target = 0.9 * chosen + 0.1 / (size - 1) * (1 - chosen)
    return -(target * logits.half().log_softmax(-1)).sum(-1).mean()


def weighted(logits, labels):
    log_p = torch.log_softmax(logits.bfloat16(), -1, dtype=torch.float32).gather(1, labels[:, None])[:, 0]
    return (-log_p.exp().detach() * log_p * torch.tensor(0.3, dtype=torch.float32)).sum()


class _Kernel(torch.autograd.Function):
    @staticmethod
    def forward(ctx, logits, labels):
        ctx.save_for_backward(logits, labels)
        return F.cross_entropy(logits.float(), labels, reduction="none")

    @staticmethod
    def backward(ctx, *grads):
        logits, labels = ctx.saved_tensors
        grad = (logits.float().softmax(-1) - F.one_hot(labels, logits.shape[-1])) * grads[0][:, None]
        return grad.bfloat16().to(logits.dtype), None


def kernel(logits, labels):
    return _Kernel.apply(logits, labels)


def test_the_gradient_is_that_of_the_loss_in_float64():
    tokens, before = qlens.probes(), torch.get_default_dtype()
    cases = {
        float32_only: ("sft", 1), autocast: ("sft", 1), kernel: ("sft", 1), weighted: ("dft", 0.3),
        smoothed_by_constants: ("label_smoothing(over='others')", 1),
    }  # fmt: skip
    for loss, (spec, factor) in cases.items():
        variant = resolve(loss)
        exact = Exact(variant.method, variant.params)
        for value in (exact.loss, exact.total):
            grad = read(exact, tokens, value)
            assert grad.dtype == torch.float64
            torch.testing.assert_close(grad, factor * qlens.get(spec).target(tokens).grad, rtol=1e-12, atol=1e-14)
        with torch.no_grad():
            assert exact.loss(tokens).dtype == torch.float64
    assert torch.get_default_dtype() == before


def test_losses_without_rounding_are_not_rewritten():
    def smoothed_by_type(logits, labels):
        z = logits.half()
        return F.cross_entropy(z, labels, label_smoothing=100 * torch.finfo(z.dtype).eps)

    for loss in (F.cross_entropy, smoothed_by_type):
        variant = resolve(loss)
        studied, reading, own = read_exactly(variant, None)
        assert studied is variant and own is None and bool(reading.grad.any())


def test_explanations_do_not_depend_on_precision():
    def in_type(dtype):
        def gce(logits, labels):
            return ((1 - label_log_probs(logits.to(dtype), labels).exp() ** 0.7) / 0.7).mean()

        return qlens.explain(gce)

    exact = in_type(torch.float64)
    for dtype in (torch.float32, torch.bfloat16):
        other = in_type(dtype)
        assert other.summary == exact.summary and other.computes_in == dtype
        assert [line for line in other.findings if not line.startswith("Precision")] == exact.findings


def test_precision_is_not_inferred_from_zeros_and_ones():
    def forgotten_softmax(logits, labels):
        return F.nll_loss(logits, labels)

    tokens = qlens.probes()
    grad = gradient(resolve(forgotten_softmax).loss, tokens)
    assert carried(grad) == torch.float64
    assert carried(torch.randn(99).bfloat16().double()) == torch.bfloat16
    assert read_exactly(resolve(forgotten_softmax), None)[1].precision == torch.float64
    assert traced(resolve(smoothed_by_constants).loss, tokens)[2] == torch.float32
    batched = resolve(lambda logits, labels: F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten()))
    assert traced(batched.loss, tokens)[1:] == (torch.float64, torch.float64)  # padding is exact


def test_a_loss_that_needs_its_batch_is_read_whole_in_float64():
    def hardest(logits, labels, dtype=torch.bfloat16):
        losses = F.cross_entropy(logits.to(dtype), labels, reduction="none")
        k = int(0.6 * len(losses))
        return losses.topk(k).values.sum() / k

    variant, why = whole_where_needed(resolve(hardest), None)
    exact, reading, own = read_exactly(variant, None)
    assert "reduction could not be found" in why and isinstance(exact, Exact)
    assert own is not None and own.dtype == torch.bfloat16 and reading.precision == torch.float64
    z = reading.inputs.logits.clone().requires_grad_()
    hardest(z, reading.inputs.labels, torch.float64).mul(len(z)).backward()
    assert_close(reading.grad, z.grad, rtol=1e-9, atol=1e-12)


class _Twice(torch.autograd.Function):
    @staticmethod
    def forward(ctx, logits):
        return logits.clone()

    @staticmethod
    def backward(ctx, *grads):
        return 2 * grads[0]


def test_a_custom_backward_is_named_where_the_loss_casts_too():
    explanation = qlens.explain(lambda logits, labels: F.cross_entropy(_Twice.apply(logits.float()), labels))
    assert explanation.own_precision is not None and explanation.own_precision.dtype == torch.float32
    assert (
        explanation.scope.backward == "_Twice"
        and explanation.nearest[0].spec == "sft"
        and explanation.nearest[0].factor == 2
    )
