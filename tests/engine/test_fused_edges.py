"""Edge cases of fused_loss: arguments that require a gradient, losses without a target, numeric types, near-certain labels."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from tiny_models import VOCAB, llama, parameters, rows
from torch.testing import assert_close

import qlens
from qlens import GeometricMixture, InputError, Target, fused_loss
from qlens.registry import Method

N, V, H = 12, 9, 5
ONES, PLACES = torch.ones(V), np.arange(3)
DRAW = torch.Generator().manual_seed(0)
LABELS = torch.randint(V, (N,), generator=DRAW)
TEACHER = 3 * torch.randn(N, V, generator=DRAW, dtype=torch.float64)


def parts():
    draw = torch.Generator().manual_seed(1)
    return [torch.randn(size, H, generator=draw, dtype=torch.float64).requires_grad_() for size in (N, V)]


def nll(logits):
    return F.cross_entropy(logits, LABELS, reduction="none")


def kd(logits, teacher=TEACHER):
    return F.kl_div(logits.log_softmax(-1), teacher.softmax(-1), reduction="none").sum(-1)


def compare(variant, losses, **options):
    """The engine's loss and gradients against autograd of the mean of ``losses``, a function of logits."""
    hidden, head = parts()
    actual = fused_loss(variant, hidden, head, LABELS, **options)
    expected = losses(hidden @ head.T).mean()
    assert_close(actual, expected)
    for grad, expected_grad in zip(*(torch.autograd.grad(x, (hidden, head)) for x in (actual, expected)), strict=True):
        assert_close(grad, expected_grad)


class Tempered(torch.nn.Module):
    """A learned temperature."""

    def __init__(self, reduction):
        super().__init__()
        self.temperature = torch.nn.Parameter(torch.tensor(1.5, dtype=torch.float64))
        self.reduction = reduction

    def forward(self, logits, labels):
        return F.cross_entropy(logits / self.temperature, labels, reduction=self.reduction)


def test_a_parameter_of_the_loss_has_its_gradient_or_is_refused():
    for reduction in ("none", "mean", "sum"):
        loss, (hidden, head) = Tempered(reduction), parts()
        tokens = qlens.Tokens(logits=hidden @ head.T, labels=LABELS)
        qlens.registry.resolve(loss).loss(tokens).sum().backward()
        expected = torch.autograd.grad(nll((hidden @ head.T).detach() / loss.temperature).sum(), loss.temperature)[0]
        assert_close(loss.temperature.grad, expected)
        with pytest.raises(InputError, match=r"parameter of its own that requires a gradient, of shape \(\)"):
            fused_loss(loss, hidden, head, LABELS)
        compare(loss.requires_grad_(False), lambda logits: nll(logits / 1.5))
    weighted = qlens.Tokens(logits=hidden @ head.T, labels=LABELS, weight=torch.rand(N, dtype=torch.float64))
    with pytest.raises(InputError, match="weighted differently: return the unreduced loss"):
        qlens.registry.resolve(Tempered("mean")).loss(weighted).sum().backward()


def test_arguments_that_require_a_gradient_are_refused():
    hidden, head = parts()
    learned = torch.rand(N, dtype=torch.float64, requires_grad=True)
    for name, arguments in {
        "weight requires a gradient": dict(weight=learned),
        "logit_scale requires a gradient": dict(logit_scale=learned[0]),
        "softcap requires a gradient": dict(softcap=learned[0]),
        "denominator requires a gradient": dict(denominator=learned[0]),
    }.items():
        with pytest.raises(InputError, match=name):
            fused_loss("sft", hidden, head, LABELS, **arguments)
    with pytest.raises(InputError, match="no second derivative"):
        (once,) = torch.autograd.grad(fused_loss("sft", hidden, head, LABELS), hidden, create_graph=True)
        torch.autograd.grad(once.sum(), hidden)
    with pytest.raises(InputError, match="torch.func"):
        torch.func.grad(lambda h: fused_loss("sft", h, head.detach(), LABELS))(hidden.detach())


def test_numbers_of_numpy_and_torch_are_accepted():
    for arguments in (
        dict(denominator=np.int64(N)), dict(denominator=torch.tensor(float(N))), dict(chunk=np.int64(5)),
        dict(chunk=torch.tensor(5)), dict(softcap=np.float32(1e6)), dict(logit_scale=torch.tensor(1.0)),
        dict(logit_scale=np.float64(1.0)),
    ):  # fmt: skip
        hidden, head = parts()
        assert_close(
            fused_loss("sft", hidden, head, LABELS, **arguments), nll(hidden @ head.T).mean(), rtol=1e-6, atol=1e-6
        )
    hidden, head = parts()
    for arguments in (
        dict(chunk=2.5),
        dict(chunk=True),
        dict(denominator=10**400),
        dict(logit_scale=None),
        dict(softcap="3"),
    ):
        with pytest.raises(InputError, match=next(iter(arguments))):
            fused_loss("sft", hidden, head, LABELS, **arguments)


def test_unsupported_tensors_are_refused():
    hidden, head = (each.detach() for each in parts())
    small = torch.float8_e4m3fn
    for says, tensors_and_options in {
        "hidden is on the device 'meta'": (hidden.to("meta"), head, LABELS, {}),
        "head is on the device 'meta'": (hidden, head.to("meta"), LABELS, {}),
        "labels are on meta": (hidden, head, LABELS.to("meta"), {}),
        r"hidden is a torch.sparse_coo tensor: .*hidden.to_dense\(\)": (hidden.to_sparse(), head, LABELS, {}),
        r"hidden is torch.float8_e4m3fn: .*hidden.bfloat16\(\)": (hidden.to(small), head.to(small), LABELS, {}),
        "teacher is torch.float8_e4m3fn": (hidden, head, LABELS, dict(teacher=TEACHER.to(small))),
        "teacher is a torch.sparse_coo": (hidden, head, LABELS, dict(teacher=TEACHER.to_sparse())),
        "the head of teacher is on the device 'meta'": (hidden, head, LABELS, dict(teacher=(hidden, head.to("meta")))),
    }.items():
        *tensors, options = tensors_and_options
        with pytest.raises(InputError, match=says):
            fused_loss("kd", *tensors, **options)


def test_a_mixture_with_a_printed_loss_only_uses_the_loss():
    def of(fn, structure):
        return qlens.registry.registry._method("mixed", fn, structure=structure).variant()

    teacher = GeometricMixture("teacher")
    cases = [
        (lambda logits, labels, teacher_logits: kd(logits, teacher_logits), kd, teacher),
        (lambda logits, labels, teacher_logits: kd(logits, teacher_logits).mean(), kd, teacher),
        (lambda logits, labels, teacher_logits: 2 * kd(logits, teacher_logits), lambda z: 2 * kd(z), teacher),
        (
            lambda logits, labels, teacher_logits: (
                kd(logits, teacher_logits) + F.cross_entropy(logits, labels, reduction="none")
            ),
            lambda z: kd(z) + nll(z),
            teacher,
        ),
        (
            lambda logits, labels: F.cross_entropy(logits, labels, label_smoothing=0.1),
            lambda z: F.cross_entropy(z, LABELS, label_smoothing=0.1, reduction="none"),
            GeometricMixture.uniform(),
        ),
    ]
    for fn, losses, structure in cases:
        compare(of(fn, structure), losses, **({} if structure.model is None else {"teacher": TEACHER}))
    hidden, head = parts()
    with pytest.raises(InputError, match="structure must be 'label' .* or a GeometricMixture, got <class"):
        fused_loss(of(lambda logits, labels: nll(logits), GeometricMixture), hidden, head, LABELS)


def test_a_float32_loss_in_a_float64_model_matches_its_target():
    def trusted(tokens):
        return Target.mix(tokens, trust=tokens.label_probs, residual="student")

    method = Method(name="cast", fn=trusted, scope="token")

    @method.loss
    def cast(tokens):
        losses = F.cross_entropy(tokens.logits.float(), tokens.labels, reduction="none")
        return (-losses).exp().detach() * losses

    hidden, head = parts()
    value = fused_loss(method, hidden, head, LABELS)
    assert_close(value, fused_loss("dft", hidden, head, LABELS), rtol=1e-6, atol=1e-6)


def test_near_certain_labels_keep_their_gradient():
    for margin in (80.0, 100.0, 120.0, 400.0, 900.0):
        hidden, head = torch.zeros(4, 4), torch.zeros(5, 4)
        hidden[:, 0], head[0, 0] = 1, margin
        labels = torch.zeros(4, dtype=torch.long)
        for dtype in (torch.float32, torch.float64):
            h, w = hidden.to(dtype).requires_grad_(), head.to(dtype).requires_grad_()
            value = fused_loss("beyond_log_log1mp", h, w, labels)
            assert float(torch.autograd.grad(value, w)[0].abs().max()) == pytest.approx(1.0)
            assert float(value.detach()) == pytest.approx(math.log(4) - margin, rel=1e-5)


def test_impossible_labels_keep_their_gradient_under_any_reduction():
    bias = torch.zeros(V, dtype=torch.float64)
    bias[LABELS[0]] = -torch.inf
    by_reduction = []
    for reduction in ("none", "mean"):
        hidden, head = parts()
        value = fused_loss(
            lambda logits, labels, reduction=reduction: F.cross_entropy(logits, labels, reduction=reduction),
            hidden, head, LABELS, bias=bias,
        )  # fmt: skip
        by_reduction.append(torch.autograd.grad(value, (hidden, head)))
    hidden, head = parts()
    expected = torch.autograd.grad(nll(hidden @ head.T + bias).mean(), (hidden, head))
    for each in by_reduction:
        for grad, expected_grad in zip(each, expected, strict=True):
            assert_close(grad, expected_grad)


def test_tensor_and_array_parameters_are_distinguished():
    def smoothed(tokens, *, prior=ONES, at=PLACES):
        return -(tokens.log_probs * (prior / prior.sum())).sum(-1) + tokens.label_log_probs * 0

    method = Method(name="prior", fn=smoothed)
    for prior in (torch.ones(V), torch.arange(V) + 1.0):
        variant = method.variant(prior=prior)
        compare(variant, lambda z, prior=prior: -(z.log_softmax(-1) * (prior / prior.sum())).sum(-1))
    specs = [method.variant(prior=prior).spec for prior in (torch.ones(V), torch.arange(V) + 1.0, torch.zeros(V))]
    assert specs[0] == "prior" and len(set(specs)) == 3 and "<Tensor (9,)" in specs[1]


def test_a_method_for_one_vocabulary_is_verified_at_it(make):
    weights = torch.rand(VOCAB + 3)

    def by_class(tokens):
        return -(weights * tokens.one_hot * tokens.log_probs).sum(-1)

    def prior(tokens):
        return Target.dense(tokens, 0.9 * tokens.one_hot + 0.1 * weights / weights.sum())

    for fn, scope in ((by_class, "token"), (by_class, ""), (prior, "")):
        ends = []
        for fused in (None, False):
            method = Method(name="wide", fn=fn, scope=scope).variant()
            trainer = make(method, model=llama(vocab=VOCAB + 3), examples=rows(4), fused=fused, steps=2)
            trainer.train()
            ends.append(parameters(trainer.model))
        assert_close(*ends, rtol=1e-4, atol=1e-6)
        assert (ends[0] - parameters(llama(vocab=VOCAB + 3))).norm() > 1e-3


def test_a_mean_beside_a_log_normaliser_is_the_mean_of_both():
    def with_normaliser(logits, labels):
        return F.cross_entropy(logits, labels) + 0.004 * torch.logsumexp(logits, -1).mean()

    def rows_of(logits):
        return nll(logits) + 0.004 * torch.logsumexp(logits, -1)

    def mean_and_rows(logits, labels):
        return F.cross_entropy(logits, labels) + 0.004 * torch.logsumexp(logits, -1)

    for fn in (with_normaliser, mean_and_rows):
        for scope in ("", "token"):
            method, (hidden, head) = Method(name=fn.__name__, fn=fn, scope=scope), parts()
            assert_close(fused_loss(method, hidden, head, LABELS, chunk=5), rows_of(hidden @ head.T).mean())
            compare(method, rows_of, chunk=5)


def test_a_mean_is_weighed_exactly_by_as_many_weights_as_are_possible(monkeypatch):
    """A loss that reduces itself is called once a weight; of more weights than that it is refused, never estimated."""
    monkeypatch.setattr("qlens.losses.reduction.unreduced.MOST_WEIGHTS", 4)
    for different in (4, 5):
        weight = 0.5 + torch.arange(N, dtype=torch.float64) % different
        mean = Method(name="mean", fn=lambda logits, labels: F.cross_entropy(logits, labels), scope="token")
        if different == 4:
            compare(mean, lambda z, weight=weight: weight * nll(z), weight=weight)
        else:
            with pytest.raises(InputError, match="4 are possible; return the unreduced loss"):
                compare(mean, nll, weight=weight)
