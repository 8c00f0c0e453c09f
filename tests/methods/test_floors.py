"""Floors, clips and clamps of released code, at their edges."""

import numpy as np
import pytest
import torch
from numpy.testing import assert_allclose

import qlens
from qlens.testing import random_tokens

TOKENS = random_tokens(96, 30, spread=2.5, seed=11)


def unit(spec, tokens):
    return qlens.get(spec).target(tokens).at("unit").q.numpy()


def extreme(label_logit, v=6):
    """One token whose label's logit lies this far from the others'."""
    z = torch.zeros(1, v, dtype=torch.float64)
    z[0, 0] = label_logit
    others = {name: z.clone() for name in ("reference", "teacher", "old")}
    return qlens.Tokens(logits=z, labels=torch.tensor([0]), **others)


def test_idft_has_no_gradient_below_its_floor():
    below, above = extreme(np.log(5 * 0.9e-10)), extreme(np.log(5 * 1.1e-10))
    assert float(qlens.get("idft").target(below).grad.abs().max()) == 0.0
    assert float(qlens.get("idft").target(above).grad.abs().max()) > 0.0
    assert float(qlens.get("idft@exact").target(below).grad.abs().max()) > 0.0
    assert_allclose(qlens.implied_target("idft", below).grad, 0.0, atol=0.0)


def test_gifts_floor_decides_for_impossible_labels():
    tokens = extreme(-60.0)
    odds = np.exp(20) * 1e-10 / (1.0 + 5e-10)
    assert_allclose(unit("gift", tokens)[0, 0], odds / (1 + odds), rtol=1e-6)
    assert unit("gift@exact", tokens)[0, 0] < 1e-15


@pytest.mark.parametrize(
    ("label", "old", "active"), [(1.0, 0.8, True), (1.0, 0.6, False), (-9, 9, True), (-22, 22, False)]
)
def test_psft_ends_above_the_clip_and_below_the_log_ratio_of_20(label, old, active):
    tokens = extreme(label).replace(old=extreme(old).logits)
    log_ratio = float(tokens.label_log_probs - tokens.gather(tokens.log_probs_of("old")))
    assert active == (-20 <= log_ratio <= np.log(1.28))
    assert bool(qlens.get("psft").target(tokens).grad.any()) == active
    assert bool(qlens.get("psft@paper").target(tokens).grad.any()) == (log_ratio <= np.log(1.28))


def test_clamped_penalties_and_sure_negatives_have_no_gradient():
    tokens = extreme(0.0)
    far = tokens.replace(reference=extreme(-30.0).logits)
    assert_allclose(unit("label_kl@skyrl(weight=1.0)", far), unit("dft", far), atol=1e-12)
    sure = extreme(20.0).replace(negatives=torch.tensor([[True] + [False] * 5]), labels=torch.tensor([1]))
    assert_allclose(unit("unlikelihood", sure), unit("sft", sure), atol=1e-12)
    assert unit("unlikelihood(floor=1e-20)", sure)[0, 0] < -0.9


def test_a_truncated_value_below_zero_has_no_gradient_under_verls_floor():
    near = TOKENS.replace(teacher=TOKENS.logits + 0.3 * TOKENS.second)
    values = qlens.get("topk_kd(k=4)").loss(near)
    floored = qlens.get("topk_kd(k=4, floor=True)").target(near).grad
    assert 0 < int((values < 0).sum()) < len(values)
    assert torch.equal((floored == 0).all(-1), values < 0)
    capped = qlens.get("topk_kd(k=4, cap=0.1)").target(near).grad
    assert torch.equal((capped == 0).all(-1), values > 0.1) and bool((values > 0.1).any())


def test_unlikelihood_of_the_label_leaves_the_others_their_shares():
    tokens = TOKENS.replace(negatives=TOKENS.one_hot.bool())
    target = qlens.get("unlikelihood(nll=0.0, floor=1e-12)").target(tokens)
    assert_allclose(target.at("unit").q, TOKENS.others, atol=1e-9)
