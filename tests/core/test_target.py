"""Targets at their scales, and the arithmetic of Q, against hand calculation."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.testing import assert_close

import qlens
from qlens.testing import random_tokens


def small():
    """One token with p = (.5, .3, .2), label 0."""
    logits = torch.tensor([[0.5, 0.3, 0.2]], dtype=torch.float64).log()
    return qlens.Tokens(logits=logits, labels=torch.tensor([0]))


def double(*values):
    return torch.tensor(values, dtype=torch.float64)


def test_mix_matches_hand_computed_values():
    target = qlens.Target.mix(small(), trust=0.6, residual=double([0.1, 0.4, 0.5]), scale=2.0)
    assert_close(target.q, double([0.64, 0.16, 0.20]))
    assert_close(target.grad, 2 * (double([0.5, 0.3, 0.2]) - target.q))
    assert_close(target.trust, double(0.6))
    assert_close(target.residual, double([0.1, 0.4, 0.5]))
    assert_close(target.structural, double(2.0))
    unit = target.at("unit")
    assert_close(unit.q, double([0.5 + 2 * 0.14, 0.3 - 2 * 0.14, 0.2]))
    assert_close(unit.trust, double(1.2))  # the label coefficient of s (p - Q) does not change: s * trust = 1.2


def test_metrics_match_hand_computed_values():
    target = qlens.Target.dense(small(), double([1.2, -0.2, 0.0]))
    assert_close(target.negative_mass, double(0.2))
    assert target.in_simplex.tolist() == [False]
    assert target.kl.isnan().all() and target.entropy.isnan().all()
    assert_close(target.label_weight, double(1.4))  # (1.2 - .5) / (1 - .5)
    # the student's own alternatives would hold (1 - 1.2) * (.6, .4) = (-.12, -.08)
    assert_close(target.reshape, double(0.5 * (0.08 + 0.08)))
    inside = qlens.Target.dense(small(), double([0.5, 0.5, 0.0]))
    assert_close(inside.entropy, double(2.0).log())
    assert_close(inside.kl, double(0.5 * torch.tensor(1.0).item()) * (double(1.0).log() + double(5 / 3).log()))


def test_residual_is_nan_where_trust_is_one():
    target = qlens.get("sft").target(small())
    assert bool(target.residual.isnan().all())


def test_natural_scale_of_label_only_losses_is_their_weight():
    tokens = random_tokens(30, 9)
    natural = qlens.get("dft").target(tokens).at("natural")
    assert_close(natural.scale, tokens.label_probs)
    assert_close(natural.q, tokens.one_hot)
    assert_close(natural.trust, torch.ones(30, dtype=torch.float64))


def test_natural_scale_of_a_negative_label_weight():
    tokens = random_tokens(30, 9)
    rejected = qlens.implied_target(lambda tokens: tokens.label_log_probs, tokens, scale="natural")
    p, d = tokens.probs, tokens.one_hot
    p_y = tokens.label_probs[:, None]
    assert_close(rejected.q, (p - p_y * d) / (1 - p_y))
    assert_close(rejected.scale, ((1 - p_y) / p_y)[:, 0])


@settings(max_examples=50, deadline=None)
@given(seed=st.integers(0, 10**6), trust=st.floats(-0.5, 1.5), scale=st.floats(0.01, 10), v=st.integers(2, 9))
def test_conversions_keep_the_gradient_and_sum(seed, trust, scale, v):
    tokens = random_tokens(4, v, seed=seed)
    target = qlens.Target.mix(tokens, trust=trust, residual=tokens.log_probs_of("teacher").exp(), scale=scale)
    for name in ("unit", "natural"):
        other = target.at(name)
        assert_close(other.scale[:, None] * (tokens.probs - other.q), target.grad, rtol=0, atol=1e-9)
        assert_close(other.total, torch.ones(4, dtype=torch.float64))
    natural = target.at("natural")
    assert float(natural.q.min()) > -1e-9
    assert bool((natural.q.amin(-1).abs() < 1e-9).all())  # the smallest such scale: an entry is zero


def test_structural_scale_is_refused_with_the_reason():
    tokens = random_tokens(4, 5)
    with pytest.raises(qlens.InputError, match="not known"):
        qlens.implied_target("sft", tokens).at("structural")
    with pytest.raises(qlens.InputError, match="negative weight"):
        qlens.Target.mix(tokens, trust=-0.1, residual="student").at("structural")
    with pytest.raises(qlens.InputError, match="'unit', 'structural' or 'natural', got 'other'"):
        qlens.get("sft").target(tokens).at("other")


REFUSED = (
    (dict(labels=torch.tensor([0, 5])), "labels hold 5, outside the vocabulary 0..2"),
    (dict(labels=torch.tensor([0, -100])), "labels hold -100"),
    (dict(labels=torch.tensor([0.0, 1.0])), "labels must be an integer tensor"),
    (dict(labels=torch.tensor([0])), r"labels has shape \(1,\)"),
    (dict(logits=torch.zeros(2)), r"logits must be a floating-point tensor \(N, V\)"),
    (dict(logits=torch.zeros(2, 1)), "vocabulary of 1"),
    (dict(logits=torch.tensor([[0.0, 1.0, 2.0], [0.0, torch.nan, 0.0]])), "logits holds NaN.* row 1"),
    (dict(logits=torch.tensor([[0.0, torch.inf, 2.0], [0.0, 0.0, 0.0]])), r"\+inf"),
    (dict(teacher=torch.zeros(2, 4)), r"teacher has shape \(2, 4\)"),
    (dict(weight=torch.ones(3)), r"weight has shape \(3,\)"),
)


def test_tokens_refuse_invalid_fields():
    fields = dict(logits=torch.zeros(2, 3), labels=torch.tensor([0, 2]))
    for change, message in REFUSED:
        with pytest.raises(qlens.InputError, match=message):
            qlens.Tokens(**(fields | change))


def test_targets_refuse_invalid_arguments():
    tokens = random_tokens(3, 4)
    with pytest.raises(qlens.InputError, match="residual must be 'student', 'uniform' or probabilities"):
        qlens.Target.mix(tokens, trust=0.5, residual="teacher")
    with pytest.raises(qlens.InputError, match="residual has shape"):
        qlens.Target.mix(tokens, trust=0.5, residual=torch.ones(3, 5))
    with pytest.raises(qlens.InputError, match="trust has shape"):
        qlens.Target.mix(tokens, trust=torch.ones(2), residual="student")
    with pytest.raises(qlens.InputError, match="q has shape"):
        qlens.Target.dense(tokens, torch.ones(3, 5))


def test_half_precision_is_computed_in_float32():
    tokens = random_tokens(5, 6)
    half = qlens.Tokens(logits=tokens.logits.bfloat16(), labels=tokens.labels)
    assert half.log_probs.dtype == torch.float32
    exact = qlens.get("dft").target(qlens.Tokens(logits=half.logits.double(), labels=tokens.labels))
    assert_close(qlens.get("dft").target(half).q.double(), exact.q, rtol=0, atol=1e-6)
    assert_close(qlens.implied_target("dft", half).q.double(), exact.q, rtol=0, atol=1e-6)


def test_losses_of_half_precision_logits_are_float32_losses_of_them():
    tokens = random_tokens(7, 6)
    names = ("logits", "teacher", "reference")
    tokens = tokens.replace(old=None, second=None)
    half = tokens.replace(**{name: getattr(tokens, name).bfloat16() for name in names})
    full = tokens.replace(**{name: getattr(half, name).float() for name in names})
    for name in ("sft", "dft", "kd", "asft_anchored", "target_sft", "label_smoothing"):
        loss = qlens.get(name).loss(half)
        assert loss.dtype == torch.float32, name
        assert_close(loss, qlens.get(name).loss(full), rtol=0, atol=0)


def test_indexing_and_joining_targets_keep_their_rows():
    tokens = random_tokens(6, 9)
    for name in ("dft", "focal", "label_smoothing", "kd", "gem", "sft_kl"):
        whole = qlens.get(name).target(tokens)
        joined = qlens.Target.join([whole[:2], whole[2:].cpu()])
        for target in (joined, joined.at("unit")):
            expected = whole if target is joined else whole.at("unit")
            for figure in ("q", "grad", "scale", "trust", "label_weight", "negative_mass", "in_simplex", "reshape"):
                assert_close(getattr(target, figure), getattr(expected, figure), msg=f"{name}: {figure}")
        assert_close(whole[torch.tensor([4, 1])].q, whole.q[[4, 1]])


def test_token_weights_multiply_the_gradient_only():
    tokens = random_tokens(6, 9)
    weight = torch.linspace(0.5, 2, 6, dtype=torch.float64)
    for name in ("dft", "focal", "label_smoothing", "kd", "gem"):
        plain = qlens.get(name).target(tokens)
        weighted = qlens.get(name).target(tokens.replace(weight=weight))
        assert_close(weighted.q, plain.q, msg=name)
        assert_close(weighted.grad, weight[:, None] * plain.grad, msg=name)
        assert_close(weighted.at("unit").label_weight, weight * plain.label_weight, msg=name)


def test_negative_mass_counts_the_label_and_the_other_entries():
    logits = torch.tensor([[0.2, 0.5, 0.3]], dtype=torch.float64).log().repeat(3, 1)
    tokens = qlens.Tokens(logits=logits, labels=torch.zeros(3, dtype=torch.long))
    trust = torch.tensor([-2.0, 0.5, 2.0], dtype=torch.float64)
    target = qlens.Target.mix(tokens, trust=trust, residual="student")
    assert target.label_only
    assert_close(target.negative_mass, torch.tensor([1.4, 0.0, 0.8], dtype=torch.float64))  # Q_y = p_y + t (1 - p_y)
    assert_close(target.negative_mass, (-target.q).clamp(min=0).sum(-1))


def test_selected_tokens_are_those_with_a_trust():
    tokens = random_tokens(4, 5)
    trust = torch.tensor([0.0, 1.0, -0.5, 0.0], dtype=torch.float64)
    assert int(qlens.Target.mix(tokens, trust, "student").selected) == 2


def test_q_of_the_label_is_read_from_any_construction():
    tokens = random_tokens(seed=3, n=5, v=7)
    for name in ("sft", "dft", "gem", "kd", "label_smoothing", "sft_kl"):
        for target in (qlens.get(name).target(tokens), qlens.get(name).target(tokens).at("natural")):
            assert_close(target.q_y, tokens.gather(target.q))


def test_sums_over_the_vocabulary_are_shared_at_the_same_logits_only():
    tokens, other = (random_tokens(seed=seed, n=5, v=7) for seed in (3, 4))
    first = qlens.get("sft").target(tokens)
    rest = first.rest
    assert qlens.get("dft").target(tokens).with_sums_of(first).rest is rest
    for apart in (other, tokens.replace(labels=other.labels)):
        assert_close(qlens.get("dft").target(apart).with_sums_of(first).rest, 1 - apart.label_probs)
