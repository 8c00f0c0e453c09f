"""NaN and infinite losses or gradients of finite logits are refused with the method and its rows."""

import functools

import pytest
import torch
import torch.nn.functional as F
from tiny_models import llama, trainer_in

from qlens import GeometricMixture, InputError, Target, fused_loss
from qlens.registry import Method

N, V, H = 12, 9, 5
DRAW = torch.Generator().manual_seed(0)
LABELS = torch.randint(V, (N,), generator=DRAW)
HIDDEN, HEAD = (torch.randn(size, H, generator=DRAW) for size in (N, V))
P_Y = (HIDDEN @ HEAD.T).softmax(-1).gather(1, LABELS[:, None])[:, 0]
BOUND = float(P_Y.sort().values[2:4].mean())  # three rows lie below


def below(tokens, wrong, right):
    return torch.where(tokens.label_probs.detach() < BOUND, float(wrong), right)


def trust(tokens, *, wrong="nan"):
    return Target.mix(tokens, below(tokens, wrong, 0.5), "student")


def printed_trust(tokens):
    return trust(tokens)


def printed(tokens):
    return -below(tokens, torch.nan, 0.5) * tokens.label_log_probs


def scale(tokens, *, wrong="nan"):
    return Target.mix(tokens, 0.5, "uniform", scale=below(tokens, wrong, 1.0))


def uniform_trust(tokens, *, wrong="nan"):
    return Target.mix(tokens, below(tokens, wrong, 0.5), "uniform")


def entry(tokens, *, wrong="nan"):
    q = tokens.probs.detach().flip(-1)
    q[:, 1] += below(tokens, wrong, 0.0)
    return Target.dense(tokens, q)


def loss_alone(logits, labels):
    losses = F.cross_entropy(logits, labels, reduction="none")
    return torch.where((-losses).exp().detach() < BOUND, torch.nan, losses)


def gradient_alone(tokens):
    """Finite everywhere, with a slope that is infinite in some rows."""
    p = tokens.label_probs
    return -torch.sqrt(torch.where(p.detach() < BOUND, p - p.detach(), p))


METHODS = [
    (trust, "dense"), (printed_trust, "label"), (scale, "dense"), (entry, "dense"), (loss_alone, "dense"), (loss_alone, "label"),
    (gradient_alone, "dense"), (gradient_alone, "label"), (uniform_trust, GeometricMixture.uniform()),
    (scale, GeometricMixture.uniform()),
]  # fmt: skip


def method(fn, structure="dense", scope="token"):
    loss = printed if fn is printed_trust else None
    return Method(name=fn.__name__, fn=fn, scope=scope, structure=structure, printed=loss)


def named_rows(error):
    """The rows that a message names."""
    return [int(word) for word in str(error.value).partition("rows ")[2].partition(" (")[0].split(", ")]


@pytest.mark.parametrize("scope", ["token", "batch"])
def test_the_engine_names_method_and_rows(scope):
    expected = (P_Y < BOUND).nonzero()[:, 0].tolist()
    for fn, structure in METHODS:
        for chunk, bound in ((None, True), (5, True), (None, False)):
            hidden, head = HIDDEN.clone().requires_grad_(bound), HEAD.clone().requires_grad_()
            with pytest.raises(InputError) as error:
                fused_loss(method(fn, structure, scope), hidden, head, LABELS, chunk=chunk)
            assert fn.__name__ in str(error.value) and "NaN or infinite" in str(error.value), str(error.value)
            if bound:
                assert named_rows(error) == expected, (fn.__name__, structure, str(error.value))


def test_infinite_trust_and_scale_are_refused_too():
    for fn in (trust, scale, uniform_trust):
        hidden, head = HIDDEN.clone().requires_grad_(), HEAD.clone().requires_grad_()
        with pytest.raises(InputError, match="NaN or infinite in supervised rows"):
            fused_loss(method(fn).variant(wrong="inf"), hidden, head, LABELS)


def test_an_impossible_label_is_not_reported():
    bias = torch.zeros(V)
    bias[LABELS[0]] = -torch.inf
    hidden, head = HIDDEN.clone().requires_grad_(), HEAD.clone().requires_grad_()
    value = fused_loss(method(lambda logits, labels: F.cross_entropy(logits, labels)), hidden, head, LABELS, bias=bias)
    assert value.isinf() and torch.autograd.grad(value, head)[0].isfinite().all()


def test_a_target_equal_to_the_student_is_trained():
    """p - p is rounding in either way to it, and no reason to refuse a method."""
    for dtype in (torch.float32, torch.bfloat16):
        hidden, head = HIDDEN.to(dtype).requires_grad_(), HEAD.to(dtype).requires_grad_()
        same = method(lambda tokens: Target.dense(tokens, tokens.probs.detach()))
        slope = torch.autograd.grad(fused_loss(same, hidden, head, LABELS), head)[0]
        assert float(slope.abs().max()) < 1e-6


def in_training(tokens):
    return torch.where(tokens.labels % 5 == 0, torch.nan, -tokens.label_log_probs)


def slope_in_training(tokens):
    return torch.where(tokens.labels % 5 == 0, torch.sqrt(tokens.label_probs * 0), -tokens.label_log_probs)


def whole_batch(logits, labels):
    losses = F.cross_entropy(logits[:, :-1].transpose(1, 2), labels[:, 1:], reduction="none")
    return (losses * torch.log(labels[:, 1:].clamp(min=0) * 0.0)).sum() * 0


def of_model(model, inputs):
    return model(**inputs).loss * torch.nan


@pytest.mark.parametrize("fused", [None, False])
def test_a_trainer_names_method_and_rows(tmp_path, fused):
    make = functools.partial(trainer_in, tmp_path, fused=fused, max_grad_norm=1.0)
    for fn in (in_training, slope_in_training):
        before = llama()
        trainer = make(method(fn), model=before)
        with pytest.raises(InputError, match=rf"{fn.__name__}: its .* is NaN or infinite in supervised row"):
            trainer.train()
        assert trainer.state.global_step == 0


def test_a_loss_of_a_whole_batch_that_is_nan_is_named(tmp_path):
    for fn in (whole_batch, of_model):
        with pytest.raises(InputError, match=f"{fn.__name__}.*NaN"):
            trainer_in(tmp_path, fn).train()
    broken = llama()
    broken.lm_head.weight.data[3] = torch.nan
    with pytest.raises(InputError, match="model's logits hold NaN"):
        trainer_in(tmp_path, lambda model, inputs: model(**inputs).loss, model=broken).train()
