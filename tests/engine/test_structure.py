"""Declared structures: compared with detected ones for built-in methods, verified for user methods."""

import copy
from dataclasses import replace

import pytest
import torch
from cases import case
from real_model import smollm2
from structure_detection import detect_structure
from tiny_models import llama, trainer_in
from torch.testing import assert_close
from user_methods import (
    GATES,
    combination,
    compare,
    hidden_and_head,
    random_methods,
    rank_gate,
    student,
    teacher_top,
    user_method,
)

import qlens
from qlens import GeometricMixture, Target, Tokens, fused_loss
from qlens.core.errors import InputError
from qlens.data.models import load_model, load_tokenizer
from qlens.engine.fused import ROUNDING
from qlens.engine.structures import gradients_by_structure
from qlens.registry import methods
from qlens.testing import CONTRACT, wide_tokens

BUILT_IN = [name for name, method in methods().items() if qlens.get(name).built_in]


def test_the_declared_structure_is_the_simplest():
    for name in BUILT_IN:
        declared = qlens.get(name).structure
        if isinstance(declared, GeometricMixture) and declared.value is None:
            declared = replace(declared, value="kl")  # the default beside a printed loss
        with case(name):
            assert declared == detect_structure(qlens.get(name))


def test_invalid_structures_are_refused():
    for structure, says in (
        ("labels", 'GeometricMixture\\("teacher"\\)'),
        (GeometricMixture("teacher"), "declare needs=\\('teacher',\\)"),
    ):
        with pytest.raises(InputError, match=says):
            _ = user_method(loss=lambda tokens: -tokens.label_log_probs, structure=structure).structure
    with pytest.raises(InputError, match="negatives name entries"):
        _ = user_method(loss=lambda tokens: -tokens.label_log_probs, structure="label", needs=("negatives",)).structure
    for wrong in (dict(model="student"), dict(model="teacher", value="ce"), dict(model=None, other=1.0)):
        with pytest.raises(InputError, match="GeometricMixture"):
            GeometricMixture(**wrong)


def test_user_methods_match_autograd():
    """Eight methods drawn at random, rows cut where their scope allows, else whole; the slow test below has 200."""
    scopes = []
    for number, variant in enumerate(random_methods(8)):
        with case(number, variant.spec, variant.scope):
            compare(variant, 500, chunk=7)
        scopes.append(variant.scope)
    assert set(scopes) == {"token", "batch", "sequence"}


def test_a_gate_seen_only_at_large_vocabularies_is_applied():
    for gate in GATES[:2]:
        variant = combination((gate,), student, "token", "both", 1.0)
        tokens = wide_tokens(5000)
        grad, _ = gradients_by_structure(variant, tokens)
        assert float((grad - qlens.get("sft").target(tokens).grad).abs().max()) > 0.1
        CONTRACT["structure_as_declared"](variant)


def test_a_wrong_declaration_is_refused_by_contract_and_engine():
    def gated(tokens):
        return Target.mix(tokens, trust=1.0, residual="student", scale=rank_gate(tokens))

    def top(tokens):
        return Target.mix(tokens, trust=0.5, residual=teacher_top(tokens))

    wrong = {
        "label": user_method(gated, structure="label"),
        "teacher": user_method(top, structure=GeometricMixture("teacher", value="cross_entropy"), needs=("teacher",)),
    }
    for variant in wrong.values():
        with pytest.raises(AssertionError, match="by structure="):
            CONTRACT["structure_as_declared"](variant)
        with pytest.raises(InputError, match="declare structure='dense'"):
            compare(variant, 5000)
    value = user_method(lambda tokens: Target.mix(tokens, 0.3, "student"), structure="label")
    with pytest.raises(InputError, match="its gradient is one of label probabilities, but its loss is not"):
        compare(value, 500)  # s CE(Q, p), the value of a target alone, sees the whole of p
    right = user_method(
        lambda tokens: Target.mix(tokens, 0.3, "student"),
        lambda tokens: -0.3 * tokens.label_log_probs,
        structure="label",
    )
    CONTRACT["structure_as_declared"](right)
    compare(right, 500, chunk=5)


def test_target_and_printed_loss_that_differ_are_refused():
    variant = user_method(
        lambda tokens: Target.mix(tokens, rank_gate(tokens), "student"), lambda tokens: -tokens.label_log_probs
    )
    with pytest.raises(InputError, match="printed loss and s \\(p - Q\\) of its target differ"):
        compare(variant, 5000)


def test_cached_log_probs_belong_to_their_logits():
    """A z-loss beside the label's log-probability: both parts have a gradient, in the engine and in the lens."""

    def loss(tokens):
        return -tokens.label_log_probs + 0.1 * tokens.logits.logsumexp(-1).square()

    compare(user_method(loss=loss), 300, chunk=5)
    compare(user_method(loss=lambda tokens: -tokens.label_log_probs), 300, chunk=5)
    tokens, gaps = wide_tokens(50), []

    def observe(tokens, target, losses):
        implied = qlens.implied_target(loss, tokens)
        gaps.append(float((implied.grad - target.grad).abs().max()))

    hidden, head, labels = hidden_and_head(50, 9)
    fused_loss(user_method(loss=loss, scope="token"), hidden, head, labels, chunk=4, observe=observe)
    assert len(gaps) == 3 and max(gaps) < 1e-12
    assert len(tokens) == 16


def test_a_fixed_top_k_runs_at_large_vocabularies():
    def top_twenty(tokens):
        p = tokens.probs.detach()
        return Target.mix(tokens, p.topk(20, -1).values.sum(-1), "student")

    def top_fifty(tokens):
        return -tokens.label_log_probs * tokens.probs.detach().topk(50, -1).values.sum(-1)

    compare(user_method(top_twenty), 500, chunk=5)
    compare(user_method(loss=top_fifty), 500)
    assert user_method(loss=top_fifty).derived


def test_observed_tensors_are_copies():
    hidden, head, labels = hidden_and_head(40, 12)
    teacher = torch.randn(12, 40, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    for spec in ("sft", "kd", "label_smoothing", "gem"):
        calls = []
        extra = {"teacher": teacher} if spec == "kd" else {}
        fused_loss(
            spec, hidden, head, labels, chunk=5, observe=lambda *values, calls=calls: calls.append(values), **extra
        )
        tokens = Tokens(logits=(hidden @ head.T).detach(), labels=labels, **extra)
        expected = qlens.get(spec).target(tokens)
        assert_close(torch.cat([t.logits for t, _, _ in calls]), tokens.logits)
        assert_close(torch.cat([target.q for _, target, _ in calls]), expected.q, rtol=1e-9, atol=1e-12)
        assert_close(torch.cat([target.grad for _, target, _ in calls]), expected.grad, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_observer_does_not_change_the_result(dtype):
    hidden, head, labels = (x.detach() for x in hidden_and_head(3000, 400))
    teacher = torch.randn(400, 3000, generator=torch.Generator().manual_seed(1)).to(dtype)
    for spec in ("sft", "dft", "kd", "target_sft", "label_smoothing", "asft_anchored", "gem"):
        bits = []
        for observe in (None, lambda *args: None):
            leaves = hidden.to(dtype).requires_grad_(), head.to(dtype).requires_grad_()
            value = fused_loss(spec, *leaves, labels, teacher=teacher, reference=teacher, chunk=150, observe=observe)
            bits.append((value.detach(), *torch.autograd.grad(value, leaves)))
        assert all(torch.equal(a, b) for a, b in zip(*bits, strict=True)), spec


def test_logits_that_are_not_a_number_are_refused():
    for spec in ("sft", "kd", "gem", "label_smoothing"):
        hidden, head, labels = hidden_and_head(40, 12)
        with torch.no_grad():
            hidden[3, 0] = torch.nan
        with pytest.raises(InputError, match="NaN.* in 1 rows"):
            fused_loss(spec, hidden, head, labels, teacher=torch.zeros(12, 40, dtype=torch.float64))


@pytest.mark.slow
def test_two_hundred_random_user_methods_match_autograd(tmp_path):
    """By fused_loss and by a step of QTrainer, fused where it can be, against float64 autograd at a vocabulary of 5,000."""
    student, teacher = (llama(seed, vocab=5000).double() for seed in (0, 1))
    ids = torch.randint(5000, (4, 9), generator=torch.Generator().manual_seed(1))
    examples = [{"input_ids": row.tolist(), "labels": [-100, -100, *row.tolist()[2:]]} for row in ids]
    with torch.no_grad():
        teachers = teacher(ids).logits[:, 1:-1].flatten(0, 1)
    differences = []
    for variant in random_methods(200, seed=1):
        other_models = {"teacher": teacher} if "teacher" in variant.needs else {}
        if variant.scope == "token":
            compare(variant, 5000, chunk=7)
        trained, expected = copy.deepcopy(student), copy.deepcopy(student)
        trainer_in(
            tmp_path, variant, model=trained, examples=examples, steps=1, learning_rate=1.0, **other_models
        ).train()
        fields = {"sequence": torch.arange(4).repeat_interleave(7)} | {name: teachers for name in other_models}
        logits = expected(ids).logits[:, 1:-1].flatten(0, 1)
        (variant.loss(Tokens(logits=logits, labels=ids[:, 2:].flatten(), **fields)).sum() / 28).backward()
        steps = [(a - b + b.grad).abs().max() for a, b in zip(trained.parameters(), expected.parameters(), strict=True)]
        differences.append(float(torch.stack(steps).detach().max()))
    assert len(differences) == 200 and max(differences) < 1e-9


@pytest.mark.real
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_engine_matches_autograd_on_a_real_model(dtype):
    """Built-in methods and gates of one's own at a vocabulary of 49,152, against float64 on the same hidden states."""
    folder = smollm2()
    model, tokenizer = load_model(folder, dtype=dtype), load_tokenizer(folder)
    ids = tokenizer(
        "Natalia sold clips to 48 of her friends in April, and then half as many in May.", return_tensors="pt"
    )
    with torch.no_grad():
        hidden = model.model(ids["input_ids"]).last_hidden_state[0, :-1]
    head, labels = model.lm_head.weight.detach(), ids["input_ids"][0, 1:]
    teacher = (hidden @ head.T).double() * 0.7
    gated = [combination((gate,), teacher_top, "token", form, 0.7) for gate in GATES[:2] for form in ("both", "loss")]
    for variant in [qlens.get(spec) for spec in ("sft", "dft", "label_smoothing", "target_sft", "gem")] + gated:
        models = {"teacher": teacher} if "teacher" in variant.needs else {}
        leaf = hidden.clone().requires_grad_()
        value = fused_loss(variant, leaf, head, labels, chunk=16, **models)
        z = (hidden @ head.T).double().requires_grad_()
        whole = variant.loss(Tokens(logits=z, labels=labels, **models)).sum() / len(labels)
        (g,), (got,) = torch.autograd.grad(whole, z), torch.autograd.grad(value, leaf)
        assert_close(value.double(), whole, rtol=1e-4, atol=1e-5)
        expected = g @ head.double()
        assert_close(got.double(), expected, rtol=0, atol=ROUNDING[dtype] * max(1.0, float(expected.abs().max())))
