"""Methods that are equal at some parameters, by their gradients."""

import torch.nn.functional as F
from oracle import (
    NEAR,
    SHARP,
    USUAL,
    assert_near,
    differentiate,
    entropy,
    full,
    hot,
    p_of,
    push,
    unit,
)
from torch.testing import assert_close

import qlens

EQUAL = [  # methods with one gradient, and the factor between them
    *(("dft", spec, 1.0) for spec in ("beyond_log(alpha=1.0)", "gce(q=1.0)", "target_sft(eta=0.0)", "idft@warmup")),
    ("dft", "asft_anchored(weight=0.0)", 1.0),
    *((f"gce(q={q})", f"beyond_log(alpha={q})", 1.0) for q in (0.3, 0.7)),
    ("sft", "gem(beta=1.0)", 1.0),
    ("sft_kl(weight=0.5)", "kd_hybrid(weight=0.3333333333333333)", 1.5),
    ("bootstrap_soft(beta=0.6)", "sft", 0.6),
    ("sft", "label_smoothing(epsilon=0.0)", 1.0),
    ("sft", "kd_hybrid(weight=0.0)", 1.0),
    ("kd", "kd_hybrid(weight=1.0)", 1.0),
    ("sft", "psft", 1.0),
    ("sft", "iw_sft", 1.0),
]


def test_identities_between_methods():
    for first, second, factor in EQUAL:
        for t in (NEAR, USUAL):
            student = t.logits if second in ("psft", "iw_sft") else t.reference  # there, no step has been made yet
            tokens = t.replace(old=student, reference=student, teacher=student)
            left, right = (qlens.get(spec).target(tokens).grad for spec in (first, second))
            assert_close(left, factor * right, rtol=1e-8, atol=1e-8, msg=lambda text: f"{first}, {second}: {text}")  # noqa: B023


def test_beyond_log_tends_to_sft_and_gem_is_a_warmer_cross_entropy():
    assert_close(unit("beyond_log(alpha=1e-9)", USUAL), hot(USUAL), rtol=0, atol=1e-7)
    _, grad = differentiate(lambda t: 0.7 * F.cross_entropy(t.logits / 0.7, t.labels, reduction="none"), SHARP)
    assert_near(qlens.get("gem").target(SHARP).grad, grad)


def test_target_sft_adds_a_reverse_kl_to_dft_to_first_order():
    eta, p = 1e-5, p_of(USUAL)[:, None]
    pulled = qlens.get("target_sft", eta=eta).target(USUAL).grad - qlens.get("dft").target(USUAL).grad
    assert_close(pulled / eta, (1 - p) * qlens.get("reverse_kl").target(USUAL).grad, rtol=0, atol=1e-4)


def test_one_token_rollouts_are_dft_in_expectation_and_entropy_is_bounded():
    beta = -0.1  # the reward of a wrong token; the sampled tokens' policy gradient, in expectation
    reward = hot(USUAL) * (1 - beta) + beta
    _, grad = differentiate(lambda t: -(full(t).exp().detach() * reward * full(t)).sum(-1), USUAL)
    assert_near(grad, (1 - beta) * qlens.get("dft").target(USUAL).grad)
    assert bool((entropy(USUAL) >= push("eaft(k=32, normalizer=None)", USUAL) - 1e-12).all())
