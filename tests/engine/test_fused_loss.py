"""fused_loss against autograd on whole logits: values and gradients of every method and preset, and of real heads."""

import pytest
import torch
from cases import case
from torch.testing import assert_close

import qlens
from qlens.engine.fused import ROUNDING, fused_loss, fusible
from qlens.registry import methods
from qlens.testing import random_tokens

N, V, H = 24, 32, 8
TOKENS = random_tokens(N, V, spread=1.5, seed=6)


def parts(dtype=torch.float64, seed=0, bias=True):
    draw = torch.Generator().manual_seed(seed)
    hidden, head, b = (torch.randn(*shape, generator=draw, dtype=torch.float64) for shape in ((N, H), (V, H), (V,)))
    return [x.to(dtype).requires_grad_() for x in ((hidden, head, b) if bias else (hidden, head))]


def other_fields(tokens=TOKENS):
    return {name: value for name, value in tokens.fields().items() if name not in ("logits", "labels", "weight")}


def dense(variant, hidden, head, bias=None, *, tokens=TOKENS, softcap=None, logit_scale=1.0):
    z = hidden @ head.T if bias is None else hidden @ head.T + bias
    z = logit_scale * z
    z = softcap * torch.tanh(z / softcap) if softcap else z
    return qlens.get(variant).loss(tokens.replace(logits=z)).sum()


def engine(variant, hidden, head, bias=None, *, denominator=1.0, **options):
    return fused_loss(
        variant, hidden, head, TOKENS.labels, bias=bias, denominator=denominator, **other_fields(), **options
    )


def both(variant, dtype=torch.float64, seed=0, **options):
    """Value and gradients, by the engine and by autograd."""
    results = []
    for path in (engine, dense):
        leaves = parts(dtype, seed)
        path_options = {k: v for k, v in options.items() if path is engine or k in ("softcap", "logit_scale")}
        value = path(variant, *leaves, **path_options)
        results.append((value.detach(), *torch.autograd.grad(value, leaves)))
    return results


def assert_matches_autograd(spec, **options):
    for fused, plain in zip(*both(spec, **options), strict=True):
        assert_close(fused, plain, rtol=1e-10, atol=1e-10 * max(1.0, float(plain.abs().max())))


@pytest.mark.parametrize("name", methods())
def test_every_method_and_preset_matches_the_plain_path(name):
    for preset in ("", *methods()[name].modes):
        with case(preset):
            assert_matches_autograd(f"{name}@{preset}" if preset else name, chunk=7)


@pytest.mark.parametrize(
    "options",
    [
        dict(chunk=1),
        dict(chunk=N),
        dict(chunk=1000),
        dict(softcap=3.0),
        dict(logit_scale=0.3),
        dict(softcap=5.0, logit_scale=1.7, chunk=5),
    ],
    ids=["one row", "all rows", "more than all", "softcap", "scale", "both"],
)
def test_chunks_and_real_heads(options):
    for spec in ("sft", "dft", "psft", "iw_sft", "dpo", "kd", "target_sft", "label_smoothing", "gem", "eaft"):
        with case(spec):
            assert_matches_autograd(spec, **options)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_precision(dtype):
    for name in qlens.names():
        if fusible(qlens.get(name)):
            with case(name):
                assert_matches_float64(name, dtype)


def assert_matches_float64(name, dtype):
    """Against float64 on the same logits, which are the product in the inputs' own dtype."""
    leaves = parts(dtype)
    rounded = {k: v.to(dtype) if v.is_floating_point() else v for k, v in other_fields().items()}
    value = fused_loss(name, leaves[0], leaves[1], TOKENS.labels, bias=leaves[2], denominator=1.0, chunk=7, **rounded)
    hidden, head, bias = (leaf.detach() for leaf in leaves)
    z = ((hidden @ head.T).double() + bias).requires_grad_()
    whole = {k: v.double() if v.is_floating_point() else v for k, v in rounded.items()}
    expected = qlens.get(name).loss(TOKENS.replace(logits=z, **whole)).sum()
    (g,) = torch.autograd.grad(expected, z)
    assert value.dtype == torch.float32
    tolerance = ROUNDING[torch.float32]
    assert_close(value.double(), expected, rtol=tolerance, atol=tolerance * N)
    true = (g @ head.double(), g.T @ hidden.double(), g.sum(0))
    for leaf, grad, exact in zip(leaves, torch.autograd.grad(value, leaves), true, strict=True):
        assert grad.dtype == leaf.dtype
        assert_close(grad.double(), exact, rtol=0, atol=ROUNDING[dtype] * max(1.0, float(exact.abs().max())))


def test_gradients_are_finite_differences_of_the_value():
    for spec in ("sft", "gce", "kd_hybrid", "sft_kl", "label_smoothing", "focal", "dpo", "simpo", "orpo", "jsd"):
        for softcap in (None, 4.0):
            with case(spec, softcap):
                assert_gradcheck(spec, softcap)


def assert_gradcheck(spec, softcap):
    variant = qlens.get(spec)
    rows = slice(0, 4) if variant.scope == "token" else slice(0, N)
    leaves = [leaf.detach()[rows] if i == 0 else leaf.detach() for i, leaf in enumerate(parts())]
    some = {name: value[rows] for name, value in other_fields().items()}

    def value(hidden, head, bias):
        return fused_loss(spec, hidden, head, TOKENS.labels[rows], bias=bias, softcap=softcap, chunk=3, **some)

    class Again(torch.autograd.Function):
        """gradcheck calls backward several times; the engine's gradients can be used once, so that they are recomputed."""

        @staticmethod
        def forward(ctx, *args):
            with torch.enable_grad():
                fresh = [x.detach().requires_grad_() for x in args]
                result = value(*fresh)
                ctx.save_for_backward(*torch.autograd.grad(result, fresh))
            return result.detach()

        @staticmethod
        def backward(ctx, upstream):
            return tuple(upstream * g for g in ctx.saved_tensors)

    inputs = [leaf.requires_grad_() for leaf in leaves]
    assert torch.autograd.gradcheck(Again.apply, inputs, fast_mode=True, atol=1e-7, rtol=1e-5)


def test_the_heads_gradient_is_summed_in_float32():
    hidden, head = torch.ones(512, 1).bfloat16(), torch.zeros(2, 1).bfloat16().requires_grad_()
    fused_loss("sft", hidden, head, torch.zeros(512, dtype=torch.long), denominator=1.0, chunk=1).backward()
    assert_close(head.grad.float(), torch.tensor([[-256.0], [256.0]]))  # a sum in bfloat16 would stop at 128


def test_masked_rows_are_dropped_and_the_mean_is_over_the_others():
    masked = TOKENS.labels.clone()
    masked[::3] = -100
    keep = masked != -100
    for spec in ("sft", "asft_anchored", "orpo", "bootstrap_hard", "label_smoothing"):
        with case(spec):
            hidden, head, bias = parts()
            value = fused_loss(spec, hidden, head, masked, bias=bias, chunk=4, **other_fields())
            some = TOKENS[keep]
            expected = qlens.get(spec).loss(some.replace(logits=(hidden @ head.T + bias)[keep])).sum()
            count = some.pair.unique().numel() if spec == "orpo" else int(keep.sum())
            assert_close(value, expected / count)
            (g,) = torch.autograd.grad(value, hidden)
            assert float(g[~keep].abs().max()) == 0 and float(g[keep].abs().min(-1).values.max()) > 0


def test_no_rows_give_zero_with_a_graph():
    for spec in ("sft", "kd", "dpo", "label_smoothing"):
        with case(spec):
            hidden, head, bias = parts()
            value = fused_loss(spec, hidden, head, torch.full((N,), -100), bias=bias, **other_fields())
            value.backward()
            assert float(value.detach()) == 0
            assert float(hidden.grad.abs().max()) == 0 and float(head.grad.abs().max()) == 0


def test_frozen_heads_and_upstream_factors():
    hidden, head, bias = parts()
    frozen = fused_loss("dft", hidden, head.detach(), TOKENS.labels, denominator=1.0)
    (once,) = torch.autograd.grad(frozen, hidden)
    scaled = 1024.0 * fused_loss("dft", hidden, head, TOKENS.labels, denominator=1.0)
    for a, b in zip(torch.autograd.grad(scaled, hidden), (1024.0 * once,), strict=True):
        assert_close(a, b)
    for part in range(2):  # accumulation
        rows = slice(12 * part, 12 * part + 12)
        fused_loss("dft", hidden[rows], head, TOKENS.labels[rows], denominator=float(N)).backward()
    assert_close(hidden.grad, once / N)
    assert bias.grad is None


def test_a_second_backward_is_refused():
    hidden, head, _ = parts()
    value = fused_loss("sft", hidden, head, TOKENS.labels)
    value.backward(retain_graph=True)
    with pytest.raises(qlens.InputError, match="used up by the first backward"):
        value.backward()


def test_autocast_and_non_contiguous_inputs():
    hidden, head, bias = (x.detach().float() for x in parts())
    strided = hidden.T.contiguous().T.requires_grad_()
    assert not strided.is_contiguous()
    plain = hidden.clone().requires_grad_()
    values = [fused_loss("dft", x, head, TOKENS.labels, bias=bias) for x in (strided, plain)]
    assert_close(*values)
    assert_close(*(torch.autograd.grad(v, x)[0] for v, x in zip(values, (strided, plain), strict=True)))
    with torch.autocast("cpu", torch.bfloat16):
        cast = fused_loss("dft", plain, head, TOKENS.labels, bias=bias)
    assert_close(cast, values[1], rtol=5e-2, atol=5e-2)
    (g,) = torch.autograd.grad(cast, plain)
    assert g.dtype == torch.float32


def test_weights_multiply():
    hidden, head, _ = parts()
    weight = torch.linspace(0, 2, N).double()
    value = fused_loss(
        "kd", hidden, head, TOKENS.labels, teacher=TOKENS.teacher, weight=weight, denominator=1.0, chunk=5
    )
    expected = (qlens.get("kd").loss(TOKENS.replace(logits=hidden @ head.T)) * weight).sum()
    assert_close(value, expected)
    assert_close(*(torch.autograd.grad(v, hidden)[0] for v in (value, expected)))


def test_arguments_that_do_not_fit_are_refused():
    for change, message in (
        (dict(variant="kd"), "kd needs a teacher: give fused_loss\\(teacher=...\\)"),
        (dict(labels=torch.zeros(3, dtype=torch.long)), "hidden has 24 rows, but labels have 3"),
        (dict(variant="kd", teacher=torch.zeros(3, V)), "teacher has 3 rows, but labels have 24"),
        (dict(head=torch.zeros(V, H + 1).double()), "hidden must be \\(N, H\\) and head \\(V, H\\)"),
        (dict(head=torch.zeros(V, H)), "they must have one dtype"),
        (dict(bias=torch.zeros(3).double()), "bias must be \\(32,\\), got \\(3,\\)"),
        (dict(softcap=-1.0), "softcap must be above 0"),
        (dict(wait=torch.zeros(N)), "unknown field 'wait'"),
    ):
        hidden, head, _ = parts()
        options = dict(variant="sft", hidden=hidden, head=head, labels=TOKENS.labels) | change
        with case(message), pytest.raises(qlens.InputError, match=message):
            fused_loss(**options)
