"""Floors, clamps, ties and limits of further methods, as in released code."""

import math

import pytest
import torch
from oracle import (
    BATCHES,
    NEAR,
    USUAL,
    assert_agrees,
    assert_near,
    ce,
    full,
    hot,
    logit_of,
    logp,
    number,
    one,
    push,
    unit,
)
from test_published_further_losses import idft, unlikelihood
from torch.testing import assert_close

import qlens
from qlens.testing import random_tokens
from qlens.variants.likelihood.idft import mix_at


@pytest.mark.parametrize("beta", [0.0, 1.0, 20.0, 600.0])
def test_gift_mixes_the_reference_with_the_label(beta):
    target = qlens.get("gift@exact", beta=beta).target(USUAL)
    r = full(USUAL, "reference").exp()
    trust = 1 - 1 / (1 + math.expm1(beta) * logp(USUAL, "reference").exp())
    assert_near(target.q, trust[:, None] * hot(USUAL) + (1 - trust)[:, None] * r)
    assert_near(target.scale, torch.ones_like(trust))


def test_the_floor_of_gift_applies_to_impossible_labels():
    tokens = one(0.0, reference=-500.0)
    odds = math.exp(20) * 1e-10 / (1 + 5e-10)
    assert_near(unit("gift", tokens)[:, 0], number(odds / (1 + odds)))
    assert_near(unit("gift@exact", tokens)[:, 0], number(0.0))


@pytest.mark.parametrize(("prob", "floored"), [(0.9e-10, True), (1.1e-10, False), (1e-12, True), (1e-6, False)])
def test_idft_has_no_gradient_below_its_floor(prob, floored):
    tokens = one(logit_of(prob))
    assert_agrees("idft", idft(), tokens)
    assert (qlens.get("idft").target(tokens).grad.abs().max() == 0) == floored
    assert qlens.get("idft@exact").target(tokens).grad.abs().max() > 0
    power = 2.0  # far out of distribution
    assert_near(push("idft@exact", tokens), number(prob**power))


@pytest.mark.parametrize(
    ("label", "old", "active"), [(1.0, 0.8, True), (1.0, 0.6, False), (-9.0, 9.0, True), (-22.0, 22.0, False)]
)
def test_psft_has_no_gradient_beyond_its_clip_and_its_clamp(label, old, active):
    tokens = one(label, old=old)
    log_ratio = float(logp(tokens) - logp(tokens, "old"))
    assert active == (-20 <= log_ratio <= math.log(1.28))
    assert bool(qlens.get("psft").target(tokens).grad.any()) == active
    assert bool(qlens.get("psft@paper").target(tokens).grad.any()) == (log_ratio <= math.log(1.28))


def test_idft_is_warmed_up_from_dft():
    at = [mix_at(x) for x in (0.0, 0.19, 0.225, 0.25, 0.3, 1.0)]
    assert_close(at, [0.0, 0.0, 0.25, 0.5, 1.0, 1.0])
    assert_close([mix_at(x, warmup=0.0, transition=0.0) for x in (0.0, 0.5)], [1.0, 1.0])
    assert_close([mix_at(x, warmup=0.5, transition=0.5) for x in (0.5, 0.75, 1.0)], [0.0, 0.5, 1.0])


def test_focal_overshoots_by_its_known_maximum():
    p_y = torch.arange(10, 500).double() / 1000
    logits = torch.zeros(len(p_y), 6).double()
    logits[:, 0] = torch.logit(p_y) + math.log(5)
    tokens = qlens.Tokens(logits=logits, labels=torch.zeros(len(p_y), dtype=torch.long))
    for gamma, prob, most in ((1.0, 0.135, 1.135), (2.0, 0.104, 1.2246), (5.0, 0.064, 1.394)):
        weights = push(f"focal(gamma={gamma})", tokens)
        assert_close(float(weights.max()), most, rtol=0, atol=5e-4)
        assert_close(float(p_y[weights.argmax()]), prob, rtol=0, atol=1.1e-3)
        closed = (1 - p_y) ** gamma - gamma * p_y * (1 - p_y) ** (gamma - 1) * p_y.log()
        assert_near(weights, closed)


def test_small_guards_scale_the_power_losses():
    v = 151_936
    tokens = qlens.Tokens(logits=torch.zeros(1, v).double(), labels=torch.tensor([0]))
    assert_close(push("deft", tokens), number(0.87), rtol=0, atol=2e-3)
    alpha = (full(USUAL).exp() ** 2).sum(-1)
    assert_near(push("deft", USUAL), logp(USUAL).exp() ** alpha * alpha / (alpha + 1e-6))
    assert_close(push("mile(gamma=3.0)", USUAL).mean(), number(1.0)[0])


@pytest.mark.parametrize("tokens", BATCHES)
def test_pushes_of_label_only_losses(tokens):
    p = logp(tokens).exp()
    assert_near(push("sce", tokens), 0.1 + 4 * p)
    assert_near(push("mae", tokens), 2 * p)
    assert_near(push("poly(epsilon=(2.0, 0.5))", tokens), 1 + p * (2 + 2 * 0.5 * (1 - p)))
    assert_near(push("bootstrap_soft", tokens), torch.full_like(p, 0.95))
    assert_near(push("label_kl(estimator='k1', weight=1.5)", tokens), torch.full_like(p, -0.5))  # pushed down
    rejected = qlens.get("label_kl", estimator="k1", weight=1.5).target(tokens).at("natural")
    assert_near(rejected.q, torch.softmax(tokens.logits.masked_fill(hot(tokens).bool(), -torch.inf), -1))
    assert_close(rejected.scale, 0.5 * (1 - p) / p)


@pytest.mark.parametrize("spec", ["confidence_penalty", "r_drop", "bootstrap_soft@attached", "unlikelihood"])
def test_signed_targets_add_up_to_one(spec):
    tokens = random_tokens(60, 12, spread=4.0, seed=2)
    q = unit(spec, tokens)
    assert_near(q.sum(-1), torch.ones(60).double())
    assert (q < 0).any()
    natural = qlens.get(spec).target(tokens).at("natural").q
    assert_near(natural.min(-1).values, torch.zeros(60).double())


def test_ties_go_to_the_lowest_id():
    tokens = qlens.Tokens(logits=torch.tensor([[0.0, 2.0, 2.0, 1.0]]).double(), labels=torch.tensor([3]))
    assert_near(unit("bootstrap_hard", tokens), torch.tensor([[0.0, 0.2, 0.0, 0.8]], dtype=torch.float64))
    even = NEAR.replace(reference=NEAR.logits, old=NEAR.logits)
    for mode in ("rho-1", "sstoken"):
        selected = (qlens.get(f"token_mask@{mode}", keep=0.51).loss(even) > 0).tolist()
        assert selected == [True] * 21 + [False] * 19


@pytest.mark.parametrize(("prob", "pushed"), [(1 - 2e-5, True), (1 - 0.5e-5, False)])
def test_unlikelihood_has_no_gradient_at_a_certain_negative(prob, pushed):
    tokens = one(logit_of(prob)).replace(labels=torch.tensor([1]), negatives=torch.tensor([[True] + [False] * 5]))
    assert_agrees("unlikelihood(nll=0.0)", unlikelihood(nll=0.0), tokens)
    assert bool(qlens.get("unlikelihood(nll=0.0)").target(tokens).grad.any()) == pushed
    assert bool(qlens.get("unlikelihood@sequence").target(tokens).grad.any())


@pytest.mark.parametrize("tokens", BATCHES)
def test_unlikelihood_of_the_label_moves_its_mass_to_other_tokens(tokens):
    tokens = tokens.replace(negatives=hot(tokens).bool())
    without_label = torch.softmax(tokens.logits.masked_fill(tokens.negatives, -torch.inf), -1)
    assert_near(unit("unlikelihood@sequence", tokens), without_label)
    p = logp(tokens).exp()
    assert_near(push("unlikelihood@sequence", tokens), -p / (1 - p))


@pytest.mark.parametrize(
    ("gap", "spec", "a"),
    [
        (3.0, "label_kl@verl(weight=1.0)", 1.0),  # exp(3) - 4 = 16 > 10: cut
        (2.5, "label_kl@verl(weight=1.0)", math.exp(2.5)),
        (-21.0, "label_kl(weight=1.0)", 1.0),
        (-19.0, "label_kl(weight=1.0)", math.exp(-19.0)),
        (21.0, "label_kl(weight=1.0)", 1.0),
        (3.0, "label_kl@verl-k3+(weight=1.0)", 1.0 + 3.0),
        (-11.0, "label_kl@skyrl(weight=1.0)", 0.5),
        (-9.0, "label_kl@skyrl(weight=1.0)", 0.5 - 1 + math.exp(-9.0)),
    ],
)
def test_estimators_lose_their_gradient_at_their_clamps(gap, spec, a):
    prob = 0.5 if gap < 0 or "skyrl" in spec else 1e-10
    tokens = one(logit_of(prob), reference=logit_of(prob * math.exp(gap)))
    assert_near(push(spec, tokens), number(a))


def test_two_equal_passes_of_r_drop_are_two_cross_entropies():
    tokens = USUAL.replace(second=USUAL.logits)
    assert_near(unit("r_drop", tokens), hot(tokens))
    assert_near(qlens.get("r_drop").loss(tokens), 2 * ce(tokens))
