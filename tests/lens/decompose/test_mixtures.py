"""Mixtures: what a gradient is made of, recovered from made-up ones, and not found where there is nothing to find."""

import pytest
import torch
from cases import case
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.testing import assert_close

import qlens
from qlens import get
from qlens.core.probes import probes
from qlens.lens.decompose.mixture import RAW
from qlens.lens.decompose.mixture_search import decompose
from qlens.lens.decompose.residuals import dictionary
from qlens.lens.reading import models_taken
from qlens.registry import resolve
from qlens.testing import random_tokens

TOKENS = random_tokens(60, 24, spread=1.5, seed=3)
FIXED = [entry for entry in dictionary(TOKENS) if not entry.parameter]
NAMES = [entry.name for entry in FIXED]


def pulled(tokens, parts):
    """sum_j c_j (p - R_j), from the words of the field and plain torch."""
    p = tokens.logits.softmax(-1)
    by_name = {entry.name: entry for entry in dictionary(tokens)}
    return sum(c[:, None] * (p - by_name[name].of(tokens)) for name, c in parts.items())


@settings(max_examples=40, deadline=None)
@given(st.lists(st.sampled_from(NAMES), min_size=2, max_size=3, unique=True), st.integers(0, 10**6), st.booleans())
def test_random_mixtures_are_recovered(names, seed, signed):
    draw = torch.Generator().manual_seed(seed)
    parts = {name: 0.1 + torch.rand(60, generator=draw, dtype=torch.float64) for name in names}
    if signed:
        parts[names[0]] = -parts[names[0]]
    found = decompose(pulled(TOKENS, parts), TOKENS)
    assert found.explains and set(found.parts) == set(names) and found.signed == signed
    for name, pull in parts.items():
        assert_close(found.parts[name][found.unique], pull[found.unique], rtol=1e-6, atol=1e-8)
    assert int(found.unique.sum()) >= 30


def test_random_gradients_are_no_mixture():
    held = []
    for seed in range(20):
        noise = torch.randn(60, 24, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
        found = decompose(noise - noise.mean(-1, keepdim=True), TOKENS)
        held.append(found.held)
        assert not found.explains and found.closest is not None and found.closest > 0.5
    assert min(held) > 0.5  # a false positive would need 1e-6


def test_methods_are_made_of_what_they_say():
    for spec, parts, parameter in [
        ("sft", ["the label"], None),
        ("kd", ["the teacher"], None),
        ("bootstrap_hard", ["the label", "the student's most probable token"], None),
        ("asft_anchored", ["the label", "the reference"], None),
        ("label_smoothing", ["the label", "uniform"], None),
        ("target_sft(eta=0.37)", ["the label", "the student-teacher mix (eta = 0.37)"], ("eta", 0.37)),
        ("gem(beta=1.4)", ["the label", "the student at temperature 1.4"], ("temperature", 1.4)),
        (
            "kd(temperature=2.5)",
            ["the student at temperature 2.5", "the teacher at temperature 2.5"],
            ("temperature", 2.5),
        ),
        ("topk_kd(k=7, tail='student')", ["the teacher's top 7"], ("k", 7.0)),
        ("topk_kd(k=7, tail='renorm')", ["the teacher's top 7"], ("k", 7.0)),
        ("topk_kd(k=7, tail='bucket')", ["the teacher's top 7, the tail as the student's"], ("k", 7.0)),
        ("topk_kd(k=7, tail='uniform')", ["the teacher's top 7, the tail spread evenly"], ("k", 7.0)),
        (
            "topk_kd(k=7, tail='renorm_both')",
            ["the teacher's top 7", "the student on the teacher's top 7"],
            ("k", 7.0),
        ),
    ]:
        with case(spec, parts):
            for tokens in (TOKENS, probes()):
                found = decompose(get(spec).target(tokens).grad, tokens)
                assert found.explains and sorted(found.parts) == sorted(parts), (
                    found.parts.keys(),
                    found.misfit,
                    found.held,
                )
                if parameter is None:
                    assert found.parameter is None
                else:
                    assert found.parameter is not None and found.parameter[0] == parameter[0]
                    assert_close(found.parameter[1], parameter[1], rtol=1e-5, atol=0)


def test_what_is_no_mixture_is_not_called_one():
    for spec in ["reverse_kl", "tvd", "jsd", "skew_rkl", "confidence_penalty", "unlikelihood"]:
        with case(spec):
            found = decompose(get(spec).target(probes()).grad, probes())
            assert not found.explains and max(found.misfit, found.held) > 1e-5


def test_scale_and_trust_are_the_construction_s():
    target = get("asft_anchored", weight=0.3).target(TOKENS)
    found = decompose(target.grad, TOKENS)
    assert_close(found.pull, target.scale)
    assert_close(found.trust / found.pull, target.trust)


def test_residuals_that_coincide_are_said_and_not_guessed():
    tokens = TOKENS.replace(teacher=TOKENS.reference, old=TOKENS.logits)
    found = decompose(get("kd").target(tokens).grad, tokens)
    assert list(found.parts) == ["the teacher"]
    assert set(found.alike) >= {("the teacher", "the reference"), ("the student", "the old policy")}
    sure = TOKENS.replace(logits=TOKENS.logits + 60 * TOKENS.one_hot)  # p is one-hot: the label is the student
    unsure = torch.cat([sure.logits[:20], TOKENS.logits[20:]])
    mixed = TOKENS.replace(logits=unsure)
    found = decompose(get("label_smoothing").target(mixed).grad, mixed)
    assert found.explains and not bool(found.unique[:20].any()) and int(found.unique[20:].sum()) == 40


def test_a_residual_of_one_s_own():
    mine = torch.softmax(torch.randn(60, 24, dtype=torch.float64, generator=torch.Generator().manual_seed(9)), -1)
    grad = TOKENS.probs - (0.7 * TOKENS.one_hot + 0.3 * mine)
    found = decompose(grad, TOKENS, {"mine": mine})
    assert list(found.parts) == ["the label", "mine"]
    assert_close(found.parts["mine"], torch.full((60,), 0.3).double())
    assert not decompose(grad, TOKENS).explains
    with pytest.raises(qlens.InputError, match="residuals\\['mine'\\] has shape"):
        decompose(grad, TOKENS, {"mine": mine[:3]})


def test_raw_logits_are_a_part_of_their_own():
    grad = get("dft").target(TOKENS).grad + 0.02 * TOKENS.probs
    found = decompose(grad, TOKENS)
    assert set(found.parts) == {RAW, "the label"}
    assert_close(found.parts[RAW], torch.full((60,), 0.02).double())


def test_no_gradient_is_no_pull():
    found = decompose(torch.zeros(60, 24).double(), TOKENS)
    assert found.parts == {} and found.explains and float(found.pull.abs().max()) == 0


def test_a_pull_that_rounding_hides_is_not_said_to_be_absent_or_away():
    def anchored(logits, labels, ref_logits):
        log_p, log_r = logits.float().log_softmax(-1), ref_logits.float().log_softmax(-1)
        label = log_p.gather(-1, labels[:, None])[:, 0]
        return (-label.exp().detach() * label + 0.1 * (log_r.exp() * (log_r - log_p)).sum(-1)).mean()

    said = qlens.explain(anchored).text(full=True)
    assert "This is asft_anchored(weight=0.1)." in said and "Near match" not in said
    assert "R = the label: w = p_y\n" in said and "R = the reference: w = 0.1\n" in said
    assert "0 elsewhere" not in said and "pushes away" not in said


def test_half_precision_keeps_the_name_and_the_parts():
    """A cast of the logits to bfloat16 costs digits of the gradient; all operations in bfloat16 cost some more."""

    def anchored(z, labels, r):
        log_p, log_r = z.log_softmax(-1), r.log_softmax(-1)
        label = log_p.gather(-1, labels[:, None])[:, 0]
        return (-label.exp().detach() * label + 0.1 * (log_r.exp() * (log_r - log_p)).sum(-1)).mean()

    def cast_only(logits, labels, ref_logits):
        return anchored(logits.bfloat16().float(), labels, ref_logits.bfloat16().float())

    def whole(logits, labels, ref_logits):
        return anchored(logits.bfloat16(), labels, ref_logits.bfloat16())

    for loss in (cast_only, whole):
        said = qlens.explain(loss).text(full=True)
        assert "This is asft_anchored(weight=0.1)." in said, loss
        assert "R = the label: w = p_y\n" in said and "R = the reference: w = 0.1\n" in said, loss
        assert "dft: parallel" not in said, loss


def test_a_loss_sends_nothing_to_a_model_that_it_does_not_take():
    def alone(logits, labels):
        return torch.nn.functional.cross_entropy(logits, labels)

    def taught(logits, labels, teacher_logits=None, ref_logits=None):
        return torch.nn.functional.cross_entropy(logits, labels)

    tokens = probes()
    assert not {"teacher", "reference", "old", "second"} & set(models_taken(resolve(alone), tokens).fields())
    kept = set(models_taken(resolve(taught), tokens).fields())
    assert {"teacher", "reference"} <= kept and not {"old", "second"} & kept
    assert models_taken(get("r_drop"), tokens) is tokens
