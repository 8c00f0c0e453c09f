"""Rounding causes no finding in any precision, and true findings are still made."""

import math

import torch
import torch.nn.functional as F
from cases import case
from losses import label_log_probs

import qlens
from qlens.core.autograd import gradient
from qlens.core.probes import probes
from qlens.core.probes import trials as wider
from qlens.lens.decompose.shift_variance import shift_variance
from qlens.lens.reading import Reading, on_own_tokens, on_probes, on_trials
from qlens.lens.rounding import nothing_but_rounding, traced
from qlens.registry import resolve
from qlens.testing import random_tokens


def in_float32(logits, labels):
    return F.cross_entropy(logits.float(), labels)


def in_bfloat16(logits, labels):
    return F.cross_entropy(logits.bfloat16(), labels)


def out_of_bfloat16(logits, labels):
    return F.cross_entropy(logits.bfloat16().float(), labels)


def weighted_in_float32(logits, labels):
    weight = label_log_probs(logits.float(), labels).exp().detach()
    return -(weight * label_log_probs(logits, labels)).mean()


def smoothed_in_float32(logits, labels):
    return F.cross_entropy(logits.float(), labels, label_smoothing=0.01)


def brier_in_float32(logits, labels):
    p = logits.float().softmax(-1)
    return (p - F.one_hot(labels, p.shape[-1])).square().sum(-1).mean()


def reverse_kl_in_float32(logits, labels, teacher):
    log_p = logits.float().log_softmax(-1)
    return (log_p.exp() * (log_p - teacher.float().log_softmax(-1))).sum(-1).mean()


CAST = {
    in_float32: torch.float32, in_bfloat16: torch.bfloat16, out_of_bfloat16: torch.bfloat16,
    weighted_in_float32: torch.float32, smoothed_in_float32: torch.float32, brier_in_float32: torch.float32,
    reverse_kl_in_float32: torch.float32,
}  # fmt: skip


def test_rounding_causes_no_finding():
    """In every precision, on the probes and on the wider trials, against the same loss in float64."""
    exact = {in_bfloat16: "sft", out_of_bfloat16: "sft", in_float32: "sft", weighted_in_float32: "dft"}
    for loss, precision in CAST.items():
        variant = resolve(loss)
        first_reading = on_probes(variant)
        for reading in (first_reading, on_trials(variant, first_reading)):
            assert isinstance(reading, Reading) and reading.precision == precision, loss
            assert shift_variance(reading.grad, reading.tokens, reading.noise) is None, loss
            if loss in exact:
                off = (reading.grad - qlens.get(exact[loss]).target(reading.tokens).grad).norm(dim=-1)
                assert bool((off <= 1e-6 * reading.grad.norm(dim=-1) + reading.noise.rows).all()), loss


def test_raw_logit_terms_are_found_in_float32():
    def z_loss(logits, labels):
        z = logits.float()
        return F.cross_entropy(z, labels) + 1e-4 * z.logsumexp(-1).square().mean()

    def capped(logits, labels):
        return F.cross_entropy(30 * torch.tanh(logits.float() / 30), labels)

    for loss, cause in ((z_loss, "a z-loss: 0.0001 log(Z)^2"), (capped, "a soft-cap: 30 tanh(z / 30)")):
        reading = on_probes(resolve(loss))
        variance = shift_variance(reading.grad, reading.tokens, reading.noise)
        assert variance is not None and variance.cause == cause


def test_precision_is_detected_from_casts():
    def detached(logits, labels):
        weight = logits.bfloat16().softmax(-1).amax(-1).detach().double()
        return (weight * F.cross_entropy(logits, labels, reduction="none")).mean()

    def masked(logits, labels):
        return (F.cross_entropy(logits, labels, reduction="none") * (labels > 3).float()).mean()

    tokens = probes()
    assert traced(resolve(detached).loss, tokens)[1] == torch.bfloat16
    half = tokens.with_precision(torch.bfloat16).with_precision(torch.float64)
    exact = Reading.of(resolve(out_of_bfloat16), half)  # its cast loses no digit of the logits, but the gradient's
    assert (exact.arithmetic, exact.precision) == (torch.float32, torch.bfloat16)
    assert Reading.of(resolve(out_of_bfloat16), tokens).arithmetic == torch.bfloat16
    assert traced(resolve(masked).loss, tokens)[1] == torch.float64  # a mask is exact in any type


def test_rounding_gradients_are_told_from_small_ones():
    for dtype in [torch.float64, torch.float32]:
        with case(dtype):

            def cancels(logits, labels, teacher):
                s, t = logits.log_softmax(-1), teacher.log_softmax(-1)
                return (s.exp().detach() * (s - t)).sum(-1)

            tokens = probes(dtype)
            for loss, silent in (
                (cancels, True),
                (lambda logits, labels: 1e-20 * F.cross_entropy(logits, labels), False),
            ):
                variant = resolve(loss)
                assert nothing_but_rounding(variant.loss, tokens, gradient(variant.loss, tokens), dtype) == silent


def test_logits_of_a_model_are_read_in_float64():
    tokens = random_tokens(20, 5000, spread=3.0).with_precision(torch.bfloat16)
    for name in ("dft", "sft", "label_smoothing", "target_sft", "eaft"):
        reading = on_own_tokens(qlens.get(name), tokens)
        assert reading.precision == torch.float64 and reading.inputs.logits.dtype == torch.float64
        assert shift_variance(reading.grad, reading.tokens, reading.noise) is None, name


def test_trials_cover_the_thresholds_of_published_losses():
    trials = wider()
    ratio = (trials.label_log_probs - trials.gather(trials.log_probs_of("reference"))).exp()
    entropy = -(trials.probs * trials.log_probs).sum(-1)
    rank = (trials.logits > trials.gather(trials.logits)[:, None]).sum(-1)
    assert float(trials.label_probs.min()) < 1e-12 and float(entropy.max()) > math.log(128)
    assert int(rank.max()) > 100 and set(range(160)) <= set(trials.labels.tolist())
    assert float(ratio.min()) < 0.02 and float(ratio.max()) > 50
    for k in (4, 20, 100):  # a truncated divergence is negative where the student has more on the teacher's top k
        log_t, ids = trials.teacher.log_softmax(-1).topk(k, -1)
        kl = (log_t.exp() * (log_t - trials.log_probs.gather(-1, ids))).sum(-1)
        assert 5 < int((kl < 0).sum()) < 100
