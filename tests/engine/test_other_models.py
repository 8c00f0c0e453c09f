"""Other models of fused_loss, as hidden states, logits, heads or top-k; and the observer."""

import pytest
import torch
from cases import case
from test_fused_loss import TOKENS, N, V, engine, parts
from torch.testing import assert_close

import qlens
from qlens.engine.fused import fused_loss
from qlens.engine.heads import Head, TopK


def test_the_repr_of_heads_and_top_k_teachers():
    hidden, head, bias = (value.detach() for value in parts())
    assert repr(Head(hidden, head, bias, softcap=30.0)) == (
        "<Head: 24 rows of width 8, vocabulary 32, torch.float64, softcap 30>"
    )
    top_log_probs, ids = TOKENS.log_probs_of("teacher").topk(5, -1)
    assert repr(TopK(ids, top_log_probs)) == "<TopK: 24 rows of 5 tokens, tail 'renorm'>"


def test_other_models_as_hidden_states_logits_and_masked():
    hidden, head, bias = parts()
    other, other_head = parts(seed=5, bias=False)
    masked = TOKENS.labels.clone()
    masked[:5] = -100
    for spec, name in (("kd", "teacher"), ("target_sft", "teacher"), ("psft", "old"), ("asft_anchored", "reference")):
        as_pair = fused_loss(spec, hidden, head, masked, bias=bias, chunk=6, **{name: (other, other_head)})
        as_logits = fused_loss(spec, hidden, head, masked, bias=bias, chunk=6, **{name: other @ other_head.T})
        assert_close(as_pair, as_logits)
        for a, b in zip(*(torch.autograd.grad(x, (hidden, head)) for x in (as_pair, as_logits)), strict=True):
            assert_close(a, b)
        assert other.grad is None and other_head.grad is None


@pytest.mark.parametrize("tail", ["renorm", "uniform", "student"])
def test_a_top_k_teacher_equals_its_logits(tail):
    for spec in ("target_sft", "kd_hybrid", "topk_kd(k=3)", "kd(temperature=2.0)", "jsd", "label_smoothing"):
        with case(spec):
            assert_top_k_equals_logits(spec, tail)


def assert_top_k_equals_logits(spec, tail):
    hidden, head, bias = parts()
    top_log_probs, ids = TOKENS.log_probs_of("teacher").topk(5, -1)
    teacher = TopK(ids, top_log_probs, tail)
    as_logits = teacher.logits(slice(None), (hidden @ head.T + bias).detach())
    values = [
        fused_loss(spec, hidden, head, TOKENS.labels, bias=bias, teacher=teacher, chunk=7),
        qlens.get(spec).loss(TOKENS.replace(logits=hidden @ head.T + bias, teacher=as_logits)).mean(),
    ]
    assert_close(*values)
    for a, b in zip(*(torch.autograd.grad(v, (hidden, head)) for v in values), strict=True):
        assert_close(a, b)


def test_the_observer_gets_every_row_once_with_its_target():
    for spec in ("dft", "iw_sft", "target_sft", "gem", "label_smoothing"):
        calls = []
        leaves = parts()
        value = engine(spec, *leaves, chunk=7, observe=lambda *values: calls.append(values))  # noqa: B023
        tokens = TOKENS.replace(logits=(leaves[0] @ leaves[1].T + leaves[2]).detach())
        target = qlens.get(spec).target(tokens).at("unit")
        assert_close(torch.cat([some.labels for some, _, _ in calls]), TOKENS.labels)
        assert_close(torch.cat([each.at("unit").q for _, each, _ in calls]), target.q)
        assert_close(torch.cat([losses for _, _, losses in calls]).sum(), value.detach())
        assert_close(torch.cat([some.label_log_probs for some, _, _ in calls]), tokens.label_log_probs)


def test_another_model_as_a_head_of_its_own():
    hidden, head, bias = parts()
    other, weight, shift = parts(seed=5)
    teacher_head = Head(other.detach(), weight.detach(), shift.detach(), softcap=2.0, logit_scale=0.5)
    values = [
        fused_loss("kd", hidden, head, TOKENS.labels, bias=bias, teacher=teacher, softcap=9.0, chunk=5)
        for teacher in (teacher_head, teacher_head.logits(slice(None)))
    ]
    assert_close(*values)
    assert_close(*(torch.autograd.grad(v, hidden)[0] for v in values))


@pytest.mark.parametrize("tail", ["renorm", "uniform", "student"])
def test_a_top_k_teacher_matches_its_full_distribution(tail):
    hidden, head, bias = parts()
    log_t = TOKENS.log_probs_of("teacher")
    top_log_probs, ids = log_t.topk(5, -1)
    value = fused_loss("kd", hidden, head, TOKENS.labels, bias=bias, teacher=TopK(ids, top_log_probs, tail), chunk=7)
    z = hidden @ head.T + bias
    p = z.detach().softmax(-1)
    in_top = torch.zeros_like(p).scatter(1, ids, 1.0).bool()
    rest = 1 - top_log_probs.exp().sum(-1, keepdim=True)
    by_tail = {
        "renorm": 0 * p,
        "uniform": rest / (V - 5) + 0 * p,
        "student": rest * p / (p * ~in_top).sum(-1, keepdim=True),
    }
    full = torch.where(in_top, log_t.exp(), by_tail[tail])
    full = full / full.sum(-1, keepdim=True)
    expected = (torch.special.xlogy(full, full) - full * z.log_softmax(-1)).sum() / N
    assert_close(value, expected)
    for a, b in zip(*(torch.autograd.grad(x, (hidden, head)) for x in (value, expected)), strict=True):
        assert_close(a, b)
