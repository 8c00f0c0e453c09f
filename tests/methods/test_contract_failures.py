"""Every check of the contract fails on a method with the corresponding fault."""

import pytest
import torch

import qlens
from qlens.core.target import Target
from qlens.registry import Method
from qlens.testing import CONTRACT, check_variant


def nll(tokens):
    return -tokens.label_log_probs


def one_hot(tokens):
    return Target.mix(tokens, trust=1.0, residual="student")


def method(target, loss=None, **card):
    return Method(name="broken", fn=target, printed=loss, **card).variant()


def twice_the_loss(tokens):
    return 2 * nll(tokens)


def more_than_one(tokens):
    return Target.dense(tokens, 1.1 * tokens.one_hot)


def over_trusting(tokens):
    return Target.mix(tokens, trust=1.5, residual="student")


def log_of_softmax(tokens):
    return -torch.softmax(tokens.logits, -1).gather(1, tokens.labels[:, None])[:, 0].log()


def z_loss(tokens):
    return nll(tokens) + 0.1 * tokens.logits.logsumexp(-1).square()


def favours_the_first(tokens):
    return nll(tokens) * (1 + (tokens.labels == 0))


def batch_weighted(tokens):
    p = tokens.label_probs.detach()
    return nll(tokens) * p / p.sum()


def favours_high_ranks(tokens):
    high = (tokens.log_probs.detach() > tokens.label_log_probs.detach()[:, None]).sum(-1) < 50
    return Target.mix(tokens, trust=high.double(), residual="student")


def teacher_with_gradient(tokens):
    return -(torch.softmax(tokens.teacher, -1) * tokens.log_probs).sum(-1)


def leaking_target(tokens):
    target = one_hot(tokens)
    return Target(
        target.log_probs, target.labels, target.q, target.grad, tokens.label_probs, target.trust, target.structural
    )


BROKEN = {
    "identity": method(one_hot, twice_the_loss),
    "structure_as_declared": method(favours_high_ranks, structure="label"),
    "sums_to_one": method(more_than_one),
    "simplex_as_declared": method(over_trusting, simplex=True),
    "finite": method(log_of_softmax),
    "invariant_to_a_constant": method(z_loss),
    "equivariant_under_permutation": method(favours_the_first),
    "scope_is_kept": method(batch_weighted),
    "constants_carry_no_gradient": method(teacher_with_gradient),
}


@pytest.mark.parametrize("check", BROKEN)
def test_a_broken_method_fails_its_check(check):
    with pytest.raises(AssertionError, match=f"\n{check}: "):
        check_variant(BROKEN[check])


def test_declaring_too_little_fails():
    with pytest.raises(AssertionError, match="declared off the simplex"):
        CONTRACT["simplex_as_declared"](method(one_hot, nll, simplex=False))
    with pytest.raises(AssertionError, match="carries a gradient"):
        CONTRACT["constants_carry_no_gradient"](method(leaking_target))


def test_a_broken_conversion_fails(monkeypatch):
    right = Target.at

    def wrong(self, scale):
        target = right(self, scale)
        return Target(
            target.log_probs, target.labels, target.q, target.grad, 2 * target.scale, target.trust, target.structural
        )

    monkeypatch.setattr(Target, "at", wrong)
    with pytest.raises(AssertionError, match="at unit scale"):
        CONTRACT["scales_keep_the_gradient"](qlens.get("dft"))


def test_ignored_weights_fail(monkeypatch):
    monkeypatch.setattr(Target, "weighted", lambda self, weight: self)
    with pytest.raises(AssertionError, match="under weights"):
        CONTRACT["weight_multiplies"](qlens.get("dft"))


def test_a_spec_that_does_not_round_trip_fails(monkeypatch):
    monkeypatch.setattr(qlens.registry.registry.params, "show", lambda name, params, default: name)
    with pytest.raises(AssertionError):
        CONTRACT["spec_round_trips"](qlens.get("label_smoothing(epsilon=0.3)"))


def test_every_check_of_the_contract_has_a_fault():
    without_fault = {"scales_keep_the_gradient", "weight_multiplies", "spec_round_trips"}
    assert set(BROKEN) | without_fault == set(CONTRACT)


def test_a_loss_without_a_target_gets_a_warning():
    def forgotten_detach(tokens):
        return -tokens.label_probs * tokens.label_log_probs

    def detached(tokens):
        return -tokens.label_probs.detach() * tokens.label_log_probs

    for loss, message in (
        (forgotten_detach, "derivative of its value: nothing"),
        (detached, "something in it is detached"),
    ):
        with pytest.warns(UserWarning, match=f"without a target of its own.*{message}"):
            run = check_variant(method(loss))
        assert set(CONTRACT) - set(run) == {"identity", "structure_as_declared"}
    with pytest.warns(UserWarning, match="so that identity cannot fail"):
        assert "structure_as_declared" in check_variant(method(detached, structure="label"))


def test_a_method_for_large_vocabularies_is_checked_at_one():
    def top_fifty(tokens):
        mass = tokens.probs.detach().topk(50, -1).values.sum(-1)
        return Target.mix(tokens, trust=mass, residual="student")

    with pytest.warns(UserWarning, match="does not run on a vocabulary below 101"):
        assert set(check_variant(method(top_fifty))) == set(CONTRACT)

    def never(tokens):
        raise RuntimeError("no kernel")

    with pytest.raises(qlens.InputError, match="no kernel"):
        check_variant(method(never))
