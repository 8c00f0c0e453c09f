"""float16 under a loss scale, models of two precisions, other models that hold NaN, batches without a gradient."""

import pytest
import torch
from cases import case
from tiny_models import llama, parameters, trainer_in
from torch.testing import assert_close
from user_methods import hidden_and_head, user_method

import qlens
from qlens import Tokens, fused_loss
from qlens.core.errors import InputError


def test_a_loss_scale_keeps_the_small_gradients_of_float16():
    for spec in ["sft", "dft", "label_smoothing"]:
        for scale in [2.0**15, 2.0**16]:
            with case(spec, scale):
                hidden, head, labels = hidden_and_head(2000, 300)
                leaves = [(0.3 * x.detach()).half().requires_grad_() for x in (hidden, head)]
                bias = torch.zeros(2000, dtype=torch.float16, requires_grad=True)
                logits = (leaves[0] @ leaves[1].T + bias).float()
                whole = qlens.get(spec).loss(Tokens(logits=logits, labels=labels)).sum() / 20000
                value = fused_loss(spec, *leaves, labels, bias=bias, denominator=20000, chunk=70)
                expected, got = (torch.autograd.grad(v * scale, (*leaves, bias)) for v in (whole, value))
                for a, b in zip(got, expected, strict=True):
                    assert a.dtype == torch.float16 and bool(a.isfinite().all())
                    assert float((a.double() - b.double()).norm()) < 5e-3 * float(b.double().norm())


def test_other_models_that_are_not_a_number_are_refused():
    hidden, head, labels = hidden_and_head(40, 12)
    teacher = torch.zeros(12, 40, dtype=torch.float64)
    teacher[3, 4] = torch.nan
    own = user_method(
        loss=lambda tokens: -(tokens.log_probs_of("teacher").exp() * tokens.log_probs).sum(-1), scope="token"
    )
    for spec in ("kd", "target_sft", own):
        with pytest.raises(InputError, match="teacher holds NaN"):
            fused_loss(spec, hidden, head, labels, teacher=teacher, chunk=5)


def test_a_teachers_head_may_have_another_precision():
    for dtype in [torch.float32, torch.float64]:
        with case(dtype):
            hidden, head, labels = (x.detach() for x in hidden_and_head(40, 12))
            other = torch.float64 if dtype == torch.float32 else torch.float32
            for spec in ("kd", "target_sft"):
                values = [
                    fused_loss(
                        spec, hidden.to(dtype), head.to(dtype), labels, teacher=((hidden / 2).to(kind), head.to(kind))
                    )
                    for kind in (dtype, other)
                ]
                assert_close(values[1], values[0], rtol=1e-5, atol=1e-5)


def test_a_batch_whose_tokens_are_all_skipped_changes_nothing(tmp_path):
    for scope in ["", "token"]:
        with case(scope):

            def skipping(tokens):
                selected = tokens.label_probs.detach() > 2
                return -tokens.label_log_probs * selected if bool(selected.any()) else torch.zeros(len(tokens))

            model = llama()
            before = parameters(model).clone()
            trainer_in(tmp_path, user_method(loss=skipping, scope=scope), model=model, steps=1).train()
            assert_close(parameters(model), before, rtol=0, atol=0)


def test_label_smoothing_at_an_impossible_label_is_infinite():
    hidden, head, labels = (x.detach() for x in hidden_and_head(40, 12))
    bias = torch.zeros(40, dtype=torch.float64)
    bias[labels[3]] = -torch.inf
    assert fused_loss("label_smoothing", hidden, head, labels, bias=bias) == torch.inf


def test_fields_new_in_a_later_batch_are_verified():
    def masked(tokens):
        label = -tokens.label_log_probs
        return label if tokens.critical is None else torch.where(tokens.critical, label * tokens.probs.amax(-1), label)

    variant = user_method(loss=masked, structure="label")
    hidden, head, labels = hidden_and_head(40, 12)
    mask = torch.zeros(12, dtype=torch.bool)
    fused_loss(variant, hidden, head, labels)
    for critical in (mask, ~mask):  # rows of every kind are tried, so that a mask without a mark is refused too
        with pytest.raises(InputError, match="declare structure='dense'"):
            fused_loss(variant, hidden, head, labels, critical=critical)
