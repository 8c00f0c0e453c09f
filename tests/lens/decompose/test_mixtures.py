"""Mixtures: the parts of a gradient, recovered from synthetic mixtures, and not found in other gradients."""

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


@settings(max_examples=25, deadline=None)
@given(st.lists(st.sampled_from(NAMES), min_size=2, max_size=3, unique=True), st.integers(0, 10**6), st.booleans())
def test_random_mixtures_are_recovered(names, seed, signed):
    draw = torch.Generator().manual_seed(seed)
    parts = {name: 0.1 + torch.rand(60, generator=draw, dtype=torch.float64) for name in names}
    if signed:
        parts[names[0]] = -parts[names[0]]
    mixture = decompose(pulled(TOKENS, parts), TOKENS)
    assert mixture.explains and set(mixture.parts) == set(names) and mixture.signed == signed
    for name, pull in parts.items():
        assert_close(mixture.parts[name][mixture.unique], pull[mixture.unique], rtol=1e-6, atol=1e-8)
    assert int(mixture.unique.sum()) >= 30


def test_random_gradients_are_no_mixture():
    held_out_misfits = []
    for seed in range(8):
        noise = torch.randn(60, 24, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
        mixture = decompose(noise - noise.mean(-1, keepdim=True), TOKENS)
        held_out_misfits.append(mixture.held)
        assert not mixture.explains and mixture.closest is not None and mixture.closest > 0.5
    assert min(held_out_misfits) > 0.5  # a false positive would need 1e-6


def test_methods_decompose_into_their_declared_parts():
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
                mixture = decompose(get(spec).target(tokens).grad, tokens)
                assert mixture.explains and sorted(mixture.parts) == sorted(parts), (
                    mixture.parts.keys(),
                    mixture.misfit,
                    mixture.held,
                )
                if parameter is None:
                    assert mixture.parameter is None
                else:
                    assert mixture.parameter is not None and mixture.parameter[0] == parameter[0]
                    assert_close(mixture.parameter[1], parameter[1], rtol=1e-5, atol=0)


def test_methods_that_are_no_mixture_are_reported_as_none():
    for spec in ["reverse_kl", "tvd", "jsd", "skew_rkl", "confidence_penalty", "unlikelihood"]:
        with case(spec):
            mixture = decompose(get(spec).target(probes()).grad, probes())
            assert not mixture.explains and max(mixture.misfit, mixture.held) > 1e-5


def test_scale_and_trust_match_the_construction():
    target = get("asft_anchored", weight=0.3).target(TOKENS)
    mixture = decompose(target.grad, TOKENS)
    assert_close(mixture.pull, target.scale)
    assert_close(mixture.trust / mixture.pull, target.trust)


def test_coinciding_residuals_are_reported_as_ambiguous():
    tokens = TOKENS.replace(teacher=TOKENS.reference, old=TOKENS.logits)
    mixture = decompose(get("kd").target(tokens).grad, tokens)
    assert list(mixture.parts) == ["the teacher"]
    assert set(mixture.alike) >= {("the teacher", "the reference"), ("the student", "the old policy")}
    sure = TOKENS.replace(logits=TOKENS.logits + 60 * TOKENS.one_hot)  # p is one-hot: the label is the student
    unsure = torch.cat([sure.logits[:20], TOKENS.logits[20:]])
    mixed = TOKENS.replace(logits=unsure)
    mixture = decompose(get("label_smoothing").target(mixed).grad, mixed)
    assert mixture.explains and not bool(mixture.unique[:20].any()) and int(mixture.unique[20:].sum()) == 40


def test_a_user_residual_is_found():
    residual = torch.softmax(torch.randn(60, 24, dtype=torch.float64, generator=torch.Generator().manual_seed(9)), -1)
    grad = TOKENS.probs - (0.7 * TOKENS.one_hot + 0.3 * residual)
    mixture = decompose(grad, TOKENS, {"mine": residual})
    assert list(mixture.parts) == ["the label", "mine"]
    assert_close(mixture.parts["mine"], torch.full((60,), 0.3).double())
    assert not decompose(grad, TOKENS).explains
    with pytest.raises(qlens.InputError, match="residuals\\['mine'\\] has shape"):
        decompose(grad, TOKENS, {"mine": residual[:3]})


def test_raw_logits_are_a_separate_part():
    grad = get("dft").target(TOKENS).grad + 0.02 * TOKENS.probs
    mixture = decompose(grad, TOKENS)
    assert set(mixture.parts) == {RAW, "the label"}
    assert_close(mixture.parts[RAW], torch.full((60,), 0.02).double())


def test_a_zero_gradient_has_no_parts():
    mixture = decompose(torch.zeros(60, 24).double(), TOKENS)
    assert mixture.parts == {} and mixture.explains and float(mixture.pull.abs().max()) == 0


def test_weights_hidden_by_rounding_are_not_reported_as_zero():
    def anchored(logits, labels, ref_logits):
        log_p, log_r = logits.float().log_softmax(-1), ref_logits.float().log_softmax(-1)
        label = log_p.gather(-1, labels[:, None])[:, 0]
        return (-label.exp().detach() * label + 0.1 * (log_r.exp() * (log_r - log_p)).sum(-1)).mean()

    text = qlens.explain(anchored).text(full=True)
    assert "This is asft_anchored(weight=0.1)." in text and "Near match" not in text
    assert "R = the label: w = p_y\n" in text and "R = the reference: w = 0.1\n" in text
    assert "0 elsewhere" not in text and "pushes away" not in text


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
        text = qlens.explain(loss).text(full=True)
        assert "This is asft_anchored(weight=0.1)." in text, loss
        assert "R = the label: w = p_y\n" in text and "R = the reference: w = 0.1\n" in text, loss
        assert "dft: parallel" not in text, loss


def test_only_the_models_that_a_loss_takes_are_residuals():
    def alone(logits, labels):
        return torch.nn.functional.cross_entropy(logits, labels)

    def taught(logits, labels, teacher_logits=None, ref_logits=None):
        return torch.nn.functional.cross_entropy(logits, labels)

    tokens = probes()
    assert not {"teacher", "reference", "old", "second"} & set(models_taken(resolve(alone), tokens).fields())
    fields = set(models_taken(resolve(taught), tokens).fields())
    assert {"teacher", "reference"} <= fields and not {"old", "second"} & fields
    assert models_taken(get("r_drop"), tokens) is tokens
