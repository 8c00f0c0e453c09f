"""float16 under a loss scale, and other models that hold NaN: what only low precision and bad inputs show."""

import pytest
import torch
from user_methods import hidden_and_head, user_method

import qlens
from qlens import Tokens, fused_loss
from qlens.errors import InputError


@pytest.mark.parametrize("spec", ["sft", "dft", "label_smoothing"])
@pytest.mark.parametrize("scale", [2.0**15, 2.0**16])
def test_a_loss_scale_keeps_the_small_gradients_of_float16(spec, scale):
    hidden, head, labels = hidden_and_head(2000, 300)
    leaves = [(0.3 * x.detach()).half().requires_grad_() for x in (hidden, head)]
    bias = torch.zeros(2000, dtype=torch.float16, requires_grad=True)
    logits = (leaves[0] @ leaves[1].T + bias).float()
    whole = qlens.get(spec).loss(Tokens(logits=logits, labels=labels)).sum() / 20000
    value = fused_loss(spec, *leaves, labels, bias=bias, denominator=20000, chunk=70)
    wanted, got = (torch.autograd.grad(v * scale, (*leaves, bias)) for v in (whole, value))
    for a, b in zip(got, wanted, strict=True):
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
