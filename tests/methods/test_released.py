"""What released code computes, rewritten in numpy from its description: the push on the label, and whole targets."""

import numpy as np
import pytest
from numpy.testing import assert_allclose

import qlens
from qlens.testing import random_tokens

TOKENS = random_tokens(96, 30, spread=2.5, seed=11)
Z, Y = TOKENS.logits.numpy(), TOKENS.labels.numpy()
ROWS = np.arange(len(Y))


def softmax(z):
    e = np.exp(z - z.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


P = softmax(Z)
R, T, OLD, S = (softmax(getattr(TOKENS, name).numpy()) for name in ("reference", "teacher", "old", "second"))
D = np.eye(Z.shape[1])[Y]
PY, RY, OY = (x[ROWS, Y] for x in (P, R, OLD))
H = -(P * np.log(P)).sum(-1)
A = TOKENS.advantage.numpy()
SEQ, PAIR, CHOSEN = (getattr(TOKENS, name).numpy() for name in ("sequence", "pair", "chosen"))


def sigma(x):
    return 0.5 * (1 + np.tanh(x / 2))


def by(ids, values, how):
    """A statistic of every token's group, at every token."""
    return np.array([how(values[ids == i]) for i in ids])


def top_entropy(k, floor=0.0):
    top = -np.sort(-Z, axis=1)[:, :k]
    q = softmax(top)
    return -(q * np.log(q + floor)).sum(1)


def clipped(advantage, ratio, low, high, cap=np.inf):
    active = np.where(advantage > 0, ratio <= 1 + high, (ratio >= 1 - low) & (ratio <= cap))
    return advantage * ratio * active


def sequence_ratio(temperature, how):
    return np.exp(np.minimum(temperature * by(SEQ, np.log(PY / RY), how), np.log(16)))


def idft_power(floor):
    phi = np.log(PY) - (P * np.log(P + floor)).sum(-1)
    return PY ** (1 + (np.clip(np.exp(-phi), 0.1, 2.0) - 1))


def cayley_power():
    base = 0.5 * PY.mean()
    a = np.clip(base + (1 - base) * PY / (2 - PY + 1e-8), 0.001, 1)
    return PY**a * a / (a + 1e-8)


def pair_margin(values, how):
    """chosen minus rejected, at every token."""
    sides = [np.array([how(values[(PAIR == i) & (CHOSEN == side)]) for i in PAIR]) for side in (True, False)]
    return sides[0] - sides[1]


SIGN = np.where(CHOSEN, 1.0, -1.0)
LENGTH = by(SEQ, np.ones_like(PY), np.sum)
RATIO = np.log(PY / RY)
MEAN = np.exp(by(SEQ, np.log(PY), np.mean))  # P of the token's own sequence
ODDS = np.log(MEAN / (1 - MEAN))
CONC = (P**2).sum(-1)
MILE = 1 - (np.maximum(P, 1e-8) * np.log(np.maximum(P, 1e-8))).sum(-1)
ORPO_H = sigma(-np.array([ODDS[(PAIR == i) & CHOSEN][0] - ODDS[(PAIR == i) & ~CHOSEN][0] for i in PAIR]))
SIMPO = sigma(0.5 - 2.0 * pair_margin(np.log(PY), np.mean))
GAP = np.log(RY / PY)


PUSHES = {  # a = -dl / dlog p_y of label-only losses: Q = a d + (1 - a) p
    "sft": np.ones_like(PY),
    "dft": PY,
    "beyond_log(alpha=10.0)": PY**10,
    "beyond_log(alpha=-0.5)": PY**-0.5,
    "beyond_log_log1mp": PY / (1 - PY),
    "beyond_log_threshold": PY >= 0.2,
    "beyond_log_threshold@OnlyBottomLogP": PY <= 0.2,
    "beyond_log_threshold@OnlyTopP": PY * (PY >= 0.2),
    "beyond_log_threshold@base-quantile": RY >= np.quantile(RY, 0.2),
    "profit": PY >= 0.1,
    "profit(keep='lower', threshold=0.3)": PY <= 0.3,
    "profit(keep='middle', threshold=0.05, upper=0.6)": (PY >= 0.05) & (PY <= 0.6),
    "eaft": top_entropy(20) / np.log(20),
    "eaft@llama-factory": top_entropy(20) / 3.0,
    "eaft@axolotl": top_entropy(20, 1e-10),
    "eaft@cubed(k=7)": (top_entropy(7) / np.log(7)) ** 3,
    "eaft@sigmoid": sigma(30 * (top_entropy(20) / np.log(20) - 0.17)),
    "eaft@mask": top_entropy(20) > np.quantile(top_entropy(20), 0.15),
    "iw_sft": sequence_ratio(1.0, np.mean),
    "iw_sft(level='sequence_sum', temperature=0.5)": sequence_ratio(0.5, np.sum),
    "iw_sft@step": np.clip(PY / RY, 0.2, 1.8),
    "cft": TOKENS.critical.numpy(),
    "psft": PY / OY * (PY / OY <= 1.28),
    "label_kl(estimator='k1')": 0.9 * np.ones_like(PY),
    "label_kl(estimator='k2', weight=0.3)": 1 + 0.3 * GAP,
    "label_kl": 1 - 0.1 * (1 - RY / PY),
    "label_kl@verl(weight=1.0)": 1 - (1 - RY / PY) * (RY / PY - GAP - 1 <= 10),
    "label_kl@verl-k3+": 1 + 0.1 * GAP,
    "label_kl@skyrl": PY - 0.03 * (1 - RY / PY) * (np.abs(GAP) <= 10),
    "idft": idft_power(1e-10),
    "deft": PY**CONC * CONC / (CONC + 1e-6),
    "cayley": cayley_power(),
    "mile(gamma=2.0)": MILE**2 / (MILE**2).mean(),
    "focal": (1 - PY) ** 2 - 2 * PY * (1 - PY) * np.log(PY),
    "focal@detached": (1 - PY) ** 2,
    "gce": PY**0.7,
    "gce@truncated": PY**0.7 * (OY > 0.5),
    "sce": 0.1 + 4 * PY,
    "mae": 2 * PY,
    "poly": 1 + PY,
    "poly(epsilon=(1.0, 0.5))": 1 + PY * (1 + 2 * 0.5 * (1 - PY)),
    "bootstrap_soft": 0.95 * np.ones_like(PY),
    "reinforce": A,
    "ppo_clip": clipped(A, PY / OY, 0.2, 0.2),
    "ppo_clip@verl": clipped(A, PY / OY, 0.2, 0.2, 3.0),
    "grpo(weight=0.5)": clipped(A, PY / OY, 0.2, 0.2) - 0.5 * (1 - RY / PY),
    "grpo@grpo-sequence-mean": clipped(A, PY / OY, 0.2, 0.2) / LENGTH,
    "grpo@dr_grpo": clipped(A, PY / OY, 0.2, 0.2) / 256,
    "grpo@cispo": A * np.minimum(PY / OY, 5.0),
    "grpo@gspo": by(SEQ, clipped(A, np.exp(by(SEQ, np.log(PY / OY), np.mean)), 0.2, 0.2), np.mean),
    "grpo@sapo": 4 * A * PY / OY * np.prod([sigma(s * np.where(A > 0, 1, 1.05) * (PY / OY - 1)) for s in (1, -1)], 0),
    "dpo": SIGN * 0.1 * sigma(-0.1 * pair_margin(RATIO, np.sum)),
    "dpo@conservative": SIGN * 0.1 * (sigma(-0.1 * pair_margin(RATIO, np.sum)) - 0.1),
    "dpo@sigmoid-norm": SIGN * 0.1 * sigma(-0.1 * pair_margin(RATIO, np.mean)) / LENGTH,
    "simpo": SIGN * 2.0 * SIMPO / LENGTH,
    "simpo@trl": (SIGN * 2.0 * SIMPO + CHOSEN) / LENGTH,
    "ipo": -SIGN * 2 * (pair_margin(RATIO, np.mean) - 5) / LENGTH,
    "apo_zero": SIGN * 0.1 * np.prod([sigma(s * 0.1 * by(SEQ, RATIO, np.sum)) for s in (1, -1)], 0),
    "orpo": (CHOSEN + SIGN * 0.1 * ORPO_H / (1 - MEAN)) / LENGTH,
    "asft_absolute": np.where(CHOSEN, 2.0, -MEAN / (1 - MEAN)) / LENGTH,
}


@pytest.mark.parametrize("spec", PUSHES)
def test_label_only_losses_push_as_released(spec):
    a = PUSHES[spec].astype(float)[:, None]
    assert_allclose(qlens.get(spec).target(TOKENS).at("unit").q, a * D + (1 - a) * P, atol=2e-9, rtol=1e-9)


def kl(p, q):
    return (p * np.log(p / q)).sum(-1, keepdims=True)


def topk(rule, k=8):
    order = np.argsort(-T, axis=1, kind="stable")[:, :k]
    on = np.zeros_like(T)
    np.put_along_axis(on, order, 1.0, 1)
    q, m = T * on, (T * on).sum(-1, keepdims=True)
    p, tail = (P * on).sum(-1, keepdims=True), P * (1 - on)
    return {
        "student": q + (1 - m) * P,
        "renorm": q / m,
        "renorm_both": q / m - P * on * (1 - p) / p + tail,
        "bucket": q + (1 - m) * tail / (1 - p),
        "uniform": q + (1 - m) / (T.shape[1] - k) * (1 - on),
    }[rule]


M1, M2 = 0.1 * T + 0.9 * P, 0.9 * T + 0.1 * P
HALF = (T + P) / 2
C = np.log(P / M2) - 0.1 * P / M2
GEM, GEM_W = softmax(Z / 0.7), sigma(0.01 * (Z - Z[ROWS, Y][:, None]))
GUIDED = P**0.5 * T**0.5 / (P**0.5 * T**0.5).sum(-1, keepdims=True)
GIFT = (R + 1e-10) * np.exp(20 * D)
NEG = TOKENS.negatives.numpy()
SIDE = 0.5 * np.sign(P - T)
TARGETS = {
    "label_smoothing": 0.9 * D + 0.1 / 30,
    "label_smoothing@fairseq": 0.9 * D + 0.1 / 29 * (1 - D),
    "sft_kl": D + 0.1 * R - 0.1 * P,
    "sft_reverse_kl": D - 0.1 * P * (np.log(P / R) - kl(P, R)),
    "asft_anchored": PY[:, None] * D + 0.05 * R + (1 - PY[:, None] - 0.05) * P,
    "asft_anchored@v1": PY[:, None] * D + (1 - PY[:, None]) * P - 0.05 * P * (np.log(P / R) - kl(P, R)),
    "gem": D + P - GEM,
    "gem@scripts": P - GEM * GEM_W + (GEM * GEM_W).sum(-1, keepdims=True) * D,
    "kd": T,
    "kd@hinton": P - 2.0 * (softmax(Z / 2) - softmax(TOKENS.teacher.numpy() / 2)),
    "kd_hybrid": 0.5 * D + 0.5 * T,
    "kd_hybrid@liger": 0.5 * D + 0.5 * (P - 0.5 * (softmax(Z / 2) - softmax(TOKENS.teacher.numpy() / 2))),
    "target_sft": PY[:, None] * D + (1 - PY[:, None]) * GUIDED,
    "gift": GIFT / GIFT.sum(-1, keepdims=True),
    "brier": P - 2 * P * (P - D - CONC[:, None] + PY[:, None]),
    "bootstrap_soft@attached": 0.95 * D + 0.05 * P * (1 + np.log(P) + H[:, None]),
    "bootstrap_hard": 0.8 * D + 0.2 * np.eye(30)[Z.argmax(-1)],
    "confidence_penalty": D - 0.1 * P * (np.log(P) + H[:, None]),
    "unlikelihood": D - (NEG * P / (1 - P)) + P * (NEG * P / (1 - P)).sum(-1, keepdims=True),
    "r_drop": D - 0.5 * ((P - S) + P * (np.log(P / S) - kl(P, S))),
    "reverse_kl": P * (1 + np.log(T / P) + kl(P, T)),
    "jsd": P - 0.5 * P * (np.log(P / HALF) - kl(P, HALF)),
    "skew_fkl": P * (1 - 0.9 * (P * T / M1).sum(-1, keepdims=True) + 0.9 * T / M1),
    "skew_rkl": P * (1 - C + (P * C).sum(-1, keepdims=True)),
    "tvd": P * (1 - SIDE + (P * SIDE).sum(-1, keepdims=True)),
} | {f"topk_kd(k=8, tail={rule!r})": topk(rule) for rule in ("student", "renorm", "renorm_both", "bucket", "uniform")}


@pytest.mark.parametrize("spec", TARGETS)
def test_whole_targets_are_as_released(spec):
    assert_allclose(qlens.get(spec).target(TOKENS).at("unit").q, TARGETS[spec], atol=2e-9)


def test_every_method_has_an_oracle_here():
    named = {spec.partition("(")[0].partition("@")[0] for spec in (*PUSHES, *TARGETS)}
    built_in = {n for n, m in qlens.registry.methods().items() if m.fn.__module__.startswith("qlens.variants")}
    elsewhere = {"rpsft", "token_mask", "opd", "uft"}  # test_rpsft.py and below
    assert built_in - named == elsewhere


def unit(spec, tokens=TOKENS):
    return qlens.get(spec).target(tokens).at("unit").q.numpy()


def test_masks_made_from_losses():
    for spec, score in (("token_mask@rho-1", np.log(RY / PY)), ("token_mask@sstoken", np.log(PY / OY))):
        kept = score >= np.sort(score)[::-1][int(np.ceil(0.6 * len(score))) - 1]
        assert_allclose(unit(spec), np.where(kept[:, None], D, P), atol=1e-12)
    critical = TOKENS.critical.numpy()[:, None]
    assert_allclose(unit("token_mask"), np.where(critical, D, P), atol=1e-12)


def test_on_policy_distillation_weighs_by_the_clipped_ratio():
    weight = np.minimum(PY / OY, 2.0)[:, None]
    jensen = 0.5 * P * (np.log(P / HALF) - kl(P, HALF))
    assert_allclose(unit("opd@trl-sdft"), P - weight * jensen, atol=1e-12)


def test_uft_is_likelihood_on_hints_and_ppo_beyond():
    hint = TOKENS.hint.numpy()[:, None]
    push = (clipped(A, PY / OY, 0.2, 0.2) - 0.001 * (1 - RY / PY))[:, None]
    paper = np.where(hint, 0.001 * (P - D), push * (P - D))
    assert_allclose(qlens.get("uft").target(TOKENS).grad, paper, atol=1e-12)
    k3 = RY / PY - GAP - 1
    push = (clipped(A, PY / OY, 0.2, 0.2) - 0.001 * (1 - RY / PY) * (k3 <= 10))[:, None]
    bonus = 0.001 * P * (np.log(P) + H[:, None])
    code = np.where(hint, 0.001 * (P - D) / hint.sum(), (push * (P - D) + bonus) / (~hint).sum())
    assert_allclose(qlens.get("uft@code").target(TOKENS).grad, code, atol=1e-12)
