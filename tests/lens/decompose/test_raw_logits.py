"""Raw logits: the terms that make sum(Q) differ from 1 are found with their coefficients and removed."""

import torch
import torch.nn.functional as F
from cases import case
from torch.testing import assert_close

import qlens
from qlens.core.autograd import gradient
from qlens.core.probes import probes
from qlens.lens.decompose.shift_variance import shift_variance
from qlens.lens.decompose.without_softmax import piecewise_linear, uncoupled
from qlens.lens.reading import on_probes
from qlens.registry import resolve

T = probes()


def read_variance(loss):
    return shift_variance(gradient(resolve(loss).loss, T), T)


def test_logit_penalties_are_found_and_removed():
    for loss, cause, value in [
        (
            lambda logits, labels: F.cross_entropy(logits, labels) + 1e-4 * logits.logsumexp(-1).square().mean(),
            "a z-loss: 0.0001 log(Z)^2",
            1e-4,
        ),
        (
            lambda logits, labels: F.cross_entropy(logits, labels) - 0.2 * logits.logsumexp(-1).mean(),
            "a penalty on the normaliser: -0.2 log(Z)",
            -0.2,
        ),
        (
            lambda logits, labels: F.cross_entropy(logits, labels) + 0.01 * logits.square().sum(-1).mean(),
            "a penalty on the logits: 0.01 sum(z^2)",
            0.01,
        ),
    ]:
        with case(loss, cause):
            variance = read_variance(loss)
            assert variance is not None and variance.cause.replace("0.32 mean", "0.01 sum") == cause
            assert_close(variance.value, value, rtol=1e-6, atol=0)
            assert_close(variance.grad, qlens.get("sft").target(T).grad, rtol=1e-9, atol=1e-9)


def soft_capped(cap):
    return lambda logits, labels: F.cross_entropy(cap * torch.tanh(logits / cap), labels)


def test_a_soft_cap_is_found_and_removed():
    for cap in [5.0, 30.0, 50.0]:
        with case(cap):
            variance = read_variance(soft_capped(cap))
            assert variance is not None and variance.cause == f"a soft-cap: {cap:g} tanh(z / {cap:g})"
            capped = T.replace(logits=cap * torch.tanh(T.logits / cap))
            assert_close(variance.tokens.logits, capped.logits)
            assert_close(variance.grad, qlens.get("sft").target(capped).grad, rtol=1e-6, atol=1e-9)


def test_clamped_logits_are_found_where_the_label_is_not_clamped():
    variance = read_variance(lambda logits, labels: F.cross_entropy(logits.clamp(min=-8.0), labels))
    assert variance is not None and "no gradient below about -8" in variance.cause
    readable = T[variance.rows]
    assert len(readable) == int((T.gather(T.logits) > -8).sum()) < len(T)
    truth = qlens.get("sft").target(readable.replace(logits=readable.logits.clamp(min=-8.0))).grad
    assert_close(variance.grad, truth, rtol=1e-3, atol=1e-9)


def test_softmax_losses_have_no_raw_logit_term():
    assert all(
        shift_variance(qlens.get(name).target(T).grad, T) is None for name in qlens.names() if qlens.get(name).invariant
    )


def test_an_unknown_raw_logit_term_is_not_named():
    variance = read_variance(
        lambda logits, labels: F.cross_entropy(logits, labels) + 0.01 * logits.sin().sum(-1).mean()
    )
    assert variance is not None and variance.cause == ""


def test_logits_clamped_at_both_ends_are_found_with_both_bounds():
    for low, high, cause in ((-5, 5, "beyond about -5 and 5"), (-8, 4, "below about -8 or above about 4")):
        variance = read_variance(
            lambda logits, labels, low=low, high=high: F.cross_entropy(logits.clamp(low, high), labels)
        )
        assert variance is not None and variance.cause == f"clamped logits: no gradient {cause}"
        clamped = T[variance.rows].replace(logits=T.logits[variance.rows].clamp(low, high))
        assert_close(variance.grad, qlens.get("sft").target(clamped).grad, rtol=1e-9, atol=1e-9)


def one_hot(logits, labels):
    return F.one_hot(labels, logits.shape[-1]).to(logits.dtype)


def test_losses_without_a_softmax_are_found():
    cases = [
        (F.nll_loss, "it raises the label's raw logit, without a softmax", "It raises the label's raw logit by 1 and takes"),
        (lambda logits, labels: -F.nll_loss(logits, labels), "it lowers the label's raw logit, without a softmax", "Q = p - d"),
        (lambda logits, labels: F.binary_cross_entropy_with_logits(logits, one_hot(logits, labels)),
         "binary cross-entropy of each logit (sigmoid(z) - d) times 0.03125, without a softmax", "no softmax couples them"),
        (lambda logits, labels: (logits - one_hot(logits, labels)).square().sum(-1).mean(),
         "the squared error between logits and one-hot labels (z - d) times 2, without a softmax", "no softmax couples them"),
    ]  # fmt: skip
    for loss, cause, message in cases:
        variance = read_variance(loss)
        assert variance is not None and variance.cause == cause and message in variance.uncoupled
        assert_close(variance.grad, gradient(resolve(loss).loss, T))


def test_uncoupled_logits_are_told_from_a_penalty():
    def smoothed(logits, labels):  # sums like a penalty of -log Z
        return 0.9 * F.nll_loss(logits, labels) - 0.1 * logits.mean(-1).mean()

    def z_loss(logits, labels):
        return F.cross_entropy(logits, labels) + 1e-3 * logits.logsumexp(-1).square().mean()

    for loss, alone in ((smoothed, True), (z_loss, False)):
        variant = resolve(loss)
        at = on_probes(variant)
        variance = uncoupled(variant, at, shift_variance(at.grad, at.tokens, at.noise))
        assert variance is not None and bool(variance.uncoupled) == alone
        assert (variance.cause == "each logit is trained on its own, without a softmax") == alone


def quantised(logits, labels):
    return F.cross_entropy(logits + ((logits * 4).round() / 4 - logits).detach(), labels)


def test_margins_of_raw_logits_are_described():
    for loss, linear in (
        (quantised, False),
        (F.multi_margin_loss, True),
        (F.nll_loss, True),
        (F.cross_entropy, False),
        ("profit", False),
    ):
        variant = resolve(loss)
        assert piecewise_linear(variant, on_probes(variant)) == linear


def test_differently_reduced_loss_and_z_loss_are_both_named():
    def loss(outputs, labels, num_items_in_batch=None):
        z, y = outputs.logits[:, :-1], labels[:, 1:]
        ce = F.cross_entropy(z.flatten(0, 1), y.flatten(), reduction="sum", ignore_index=-100)
        return ce / (y != -100).sum() + 1e-4 * z.logsumexp(-1).square().mean()

    e = qlens.explain(loss)
    assert e.nearest[0].spec == "sft" and e.nearest[0].same
    assert e.summary.startswith("This is sft (that apart).") and "a z-loss: " in e.summary


def test_clamped_logits_are_named_where_every_label_is_clamped():
    draw = torch.Generator().manual_seed(0)
    logits = 8 + 2.5 * torch.randn(24, 600, generator=draw)
    labels = torch.randint(0, 600, (24,), generator=draw)
    logits[torch.arange(24), labels] += 8
    e = qlens.explain(
        lambda logits, labels: F.cross_entropy(logits.clamp(max=2), labels), qlens.Tokens(logits=logits, labels=labels)
    )
    assert e.nearest[0].spec == "sft" and e.shift_variance.cause.startswith("clamped logits: no gradient above about 2")
    assert "is 0 on the tokens shown" in e.summary and "no softmax" not in e.summary
