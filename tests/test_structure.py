"""The structure on a method's card: proved for qlens' own methods, and trained by it alone for anybody's."""

import copy
import logging

import pytest
import torch
from detectors import detected
from tiny import llama, trainer_in
from torch.testing import assert_close
from user_methods import GATES, combination, drawn, hidden_and_head, rank_gate, student, teacher_top, user_method

import qlens
from qlens import GeometricMixture, Target, Tokens, fused_loss
from qlens.errors import InputError
from qlens.registry import methods
from qlens.row_gradients import by_structure
from qlens.testing import CONTRACT, wide_tokens

BUILT_IN = [name for name, method in methods().items() if qlens.get(name).built_in]


@pytest.mark.parametrize("name", BUILT_IN)
def test_the_declared_structure_is_the_simplest(name):
    declared, simplest = qlens.get(name).structure, detected(qlens.get(name))
    assert declared == simplest


def test_structures_that_are_none_are_refused():
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


def compare(variant, vocabulary, n=22, **options):
    """The engine's value and gradients against autograd on whole logits, float64."""
    hidden, head, labels = hidden_and_head(vocabulary, n)
    draw = torch.Generator().manual_seed(5)
    fields = {"sequence": torch.arange(n) // 4}
    if "teacher" in variant.needs:
        fields["teacher"] = 2 * torch.randn(n, vocabulary, generator=draw, dtype=torch.float64)
    whole = variant.loss(Tokens(logits=hidden @ head.T, labels=labels, **fields)).sum() / n
    value = fused_loss(variant, hidden, head, labels, **fields, **options)
    assert_close(value, whole, rtol=1e-9, atol=1e-12)
    for got, wanted in zip(*(torch.autograd.grad(v, (hidden, head)) for v in (value, whole)), strict=True):
        assert_close(got, wanted, rtol=0, atol=1e-9 * max(1e-3, float(wanted.abs().max())))


def test_anybodys_method_is_trained_as_it_is_written():
    """Seventy methods drawn at random at a vocabulary of 5,000, rows cut wherever their scope allows."""
    refused = 0
    for variant in drawn(70):
        if variant.scope in ("batch", "sequence"):
            with pytest.raises(InputError, match="needs whole distributions"):
                compare(variant, 5000, chunk=7)
            refused += 1
        else:
            compare(variant, 5000, chunk=7)
    assert 5 < refused < 40


@pytest.mark.parametrize("gate", GATES[:2])
def test_a_gate_beyond_small_vocabularies_is_no_sft(gate):
    variant = combination((gate,), student, "token", "both", 1.0)
    tokens = wide_tokens(5000)
    grad, _ = by_structure(variant, tokens)
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
    with pytest.raises(InputError, match="another loss or gradient"):
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


def mean_weighted(tokens):
    weight = tokens.label_probs.detach()
    return -tokens.label_log_probs * weight / weight.mean()


def by_rows(tokens):
    return -tokens.label_log_probs / len(tokens)


def hardest(logits, labels):
    rows = torch.nn.functional.cross_entropy(logits, labels, reduction="none")
    return rows * (rows >= rows.detach().quantile(0.8))


def neighbours(tokens):
    return -tokens.label_log_probs * (1 + 0.5 * tokens.label_probs.detach().roll(1))


@pytest.mark.parametrize("loss", [mean_weighted, by_rows, hardest, neighbours])
def test_rows_that_depend_on_each_other_are_not_cut(loss, caplog):
    variant = user_method(loss=loss, name=loss.__name__)
    with caplog.at_level(logging.WARNING, "qlens"):
        compare(variant, 5000, chunk=5)
        compare(variant, 5000, chunk=5)
    (line,) = caplog.messages
    assert "declare scope='batch'" in line and loss.__name__ in line


def test_a_losss_own_tokens_hold_no_log_probs_of_other_logits():
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
    fused_loss(user_method(loss=loss), hidden, head, labels, chunk=4, observe=observe)
    assert len(gaps) == 3 and max(gaps) < 1e-12
    assert len(tokens) == 16


def test_a_bare_topk_runs_where_the_vocabulary_has_so_many():
    def top_twenty(tokens):
        p = tokens.probs.detach()
        return Target.mix(tokens, p.topk(20, -1).values.sum(-1), "student")

    def top_fifty(tokens):
        return -tokens.label_log_probs * tokens.probs.detach().topk(50, -1).values.sum(-1)

    compare(user_method(top_twenty), 500, chunk=5)
    compare(user_method(loss=top_fifty), 500)
    assert user_method(loss=top_fifty).derived


def test_what_an_observer_is_given_stays():
    hidden, head, labels = hidden_and_head(40, 12)
    teacher = torch.randn(12, 40, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    for spec in ("sft", "kd", "label_smoothing", "gem"):
        seen = []
        extra = {"teacher": teacher} if spec == "kd" else {}
        fused_loss(spec, hidden, head, labels, chunk=5, observe=lambda *values, seen=seen: seen.append(values), **extra)
        tokens = Tokens(logits=(hidden @ head.T).detach(), labels=labels, **extra)
        expected = qlens.get(spec).target(tokens)
        assert_close(torch.cat([t.logits for t, _, _ in seen]), tokens.logits)
        assert_close(torch.cat([target.q for _, target, _ in seen]), expected.q, rtol=1e-9, atol=1e-12)
        assert_close(torch.cat([target.grad for _, target, _ in seen]), expected.grad, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_observer_changes_no_bit(dtype):
    hidden, head, labels = (x.detach() for x in hidden_and_head(3000, 400))
    teacher = torch.randn(400, 3000, generator=torch.Generator().manual_seed(1)).to(dtype)
    for spec in ("sft", "dft", "kd", "target_sft", "label_smoothing", "asft_anchored", "gem"):
        bits = []
        for observe in (None, lambda *given: None):
            leaves = hidden.to(dtype).requires_grad_(), head.to(dtype).requires_grad_()
            value = fused_loss(spec, *leaves, labels, teacher=teacher, reference=teacher, chunk=150, observe=observe)
            bits.append((value.detach(), *torch.autograd.grad(value, leaves)))
        assert all(torch.equal(a, b) for a, b in zip(*bits, strict=True)), spec


def test_a_field_that_nobody_declared_reaches_a_method_of_any_structure():
    def advantaged(tokens):
        label = -tokens.label_log_probs
        return label if tokens.advantage is None else label * tokens.advantage

    hidden, head, labels = hidden_and_head(60, 20)
    advantage = torch.linspace(-1, 1, 20, dtype=torch.float64)
    tokens = Tokens(logits=(hidden @ head.T).detach(), labels=labels, advantage=advantage)
    for structure in ("dense", "label"):
        variant = user_method(loss=advantaged, structure=structure)
        value = fused_loss(variant, hidden, head, labels, advantage=advantage, chunk=7)
        assert_close(value.detach(), variant.loss(tokens).mean())


def test_a_chunk_whose_rows_are_all_skipped_has_no_gradient():
    def skipping(tokens):
        kept = tokens.label_probs.detach() > 0.05
        return -tokens.label_log_probs * kept if bool(kept.any()) else torch.zeros(len(tokens))

    compare(user_method(loss=skipping), 300, chunk=1)
    with pytest.raises(InputError, match="without a graph"):
        compare(user_method(loss=lambda tokens: -tokens.label_log_probs.detach()), 300)
    with pytest.raises(InputError, match="returns float"):
        compare(user_method(loss=lambda tokens: 0.0), 300)


def test_a_target_that_draws_numbers_is_no_other_than_its_loss():
    def drawn_target(tokens):
        return Target.mix(tokens, 1.0, "student", scale=torch.rand(len(tokens), dtype=tokens.logits.dtype))

    def drawn_loss(tokens):
        return -tokens.label_log_probs * torch.rand(len(tokens), dtype=tokens.logits.dtype)

    for variant in (user_method(drawn_target), user_method(loss=drawn_loss, structure="label")):
        hidden, head, labels = hidden_and_head(50, 30)
        torch.manual_seed(3)
        whole = variant.loss(Tokens(logits=hidden @ head.T, labels=labels)).mean()
        torch.manual_seed(3)
        value = fused_loss(variant, hidden, head, labels)
        for got, wanted in zip(*(torch.autograd.grad(v, (hidden, head)) for v in (value, whole)), strict=True):
            assert_close(got, wanted)


def test_a_loss_of_pairs_is_verified_on_both_texts_of_a_pair():
    hidden, head, labels = hidden_and_head(50, 200)
    at = torch.arange(200)
    fields = {"pair": at // 10, "chosen": at % 10 < 5}
    printed = qlens.get("dpo").loss

    variant = user_method(
        loss=lambda tokens: printed(tokens), structure="label", scope="pair", needs=qlens.get("dpo").needs
    )
    fields["reference"] = torch.zeros(200, 50, dtype=torch.float64)
    values = [fused_loss(each, hidden, head, labels, **fields).detach() for each in (variant, "dpo")]
    assert_close(*values)


def test_a_loss_in_low_precision_is_verified():
    def products(tokens):
        return -torch.einsum("nv,nv->n", tokens.one_hot, tokens.log_probs)

    hidden, head, labels = (x.detach() for x in hidden_and_head(50, 20))
    leaves = hidden.float().requires_grad_(), head.float().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        value, sft = (fused_loss(m, *leaves, labels) for m in (user_method(loss=products, structure="label"), "sft"))
    assert_close(value.detach(), sft.detach())


def test_logits_that_are_not_a_number_are_refused():
    for spec in ("sft", "kd", "gem", "label_smoothing"):
        hidden, head, labels = hidden_and_head(40, 12)
        with torch.no_grad():
            hidden[3, 0] = torch.nan
        with pytest.raises(InputError, match="NaN.* in 1 rows"):
            fused_loss(spec, hidden, head, labels, teacher=torch.zeros(12, 40, dtype=torch.float64))


@pytest.mark.slow
def test_two_hundred_methods_of_users_are_trained_as_they_are_written(tmp_path):
    """By fused_loss and by a step of QTrainer, fused where it can be, against float64 autograd at a vocabulary of 5,000."""
    student, teacher = (llama(seed, vocab=5000).double() for seed in (0, 1))
    ids = torch.randint(5000, (4, 9), generator=torch.Generator().manual_seed(1))
    examples = [{"input_ids": row.tolist(), "labels": [-100, -100, *row.tolist()[2:]]} for row in ids]
    with torch.no_grad():
        teachers = teacher(ids).logits[:, 1:-1].flatten(0, 1)
    apart = []
    for variant in drawn(200, seed=1):
        others = {"teacher": teacher} if "teacher" in variant.needs else {}
        if variant.scope == "token":
            compare(variant, 5000, chunk=7)
        trained, expected = copy.deepcopy(student), copy.deepcopy(student)
        trainer_in(tmp_path, variant, model=trained, examples=examples, steps=1, learning_rate=1.0, **others).train()
        fields = {"sequence": torch.arange(4).repeat_interleave(7)} | {name: teachers for name in others}
        logits = expected(ids).logits[:, 1:-1].flatten(0, 1)
        (variant.loss(Tokens(logits=logits, labels=ids[:, 2:].flatten(), **fields)).sum() / 28).backward()
        steps = [(a - b + b.grad).abs().max() for a, b in zip(trained.parameters(), expected.parameters(), strict=True)]
        apart.append(float(torch.stack(steps).detach().max()))
    assert len(apart) == 200 and max(apart) < 1e-9
