"""Losses that hold values of their own for every token, like a teacher's probabilities in a closure."""

import pytest
import torch
import torch.nn.functional as F
from torch.testing import assert_close

import qlens
from qlens.core.probes.trial_tokens import random_tokens

N, V = 21, 30
TEACHER = random_tokens(N, V, seed=3).logits.softmax(-1)


def distillation(logits, labels):
    return -(TEACHER * F.log_softmax(logits, -1)).sum(-1)


def hybrid(logits, labels):
    return F.cross_entropy(logits, labels, reduction="none") + distillation(logits, labels)


class Weighted(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.per_token = TEACHER[:, 0] + 0.5

    def forward(self, logits, labels):
        return self.per_token * F.cross_entropy(logits, labels, reduction="none")


TARGETS = {
    distillation: lambda t: t.probs - TEACHER,
    hybrid: lambda t: 2 * t.probs - TEACHER - t.one_hot,
    Weighted(): lambda t: (TEACHER[:, :1] + 0.5) * (t.probs - t.one_hot),
}


@pytest.mark.parametrize("sequences", [False, True])
def test_gradients_use_the_values_of_each_row(sequences):
    batch = random_tokens(N, V)
    tokens = qlens.Tokens(logits=batch.logits, labels=batch.labels, sequence=batch.sequence if sequences else None)
    for loss, gradient in TARGETS.items():
        assert_close(qlens.implied_target(loss, tokens).grad, gradient(tokens), rtol=1e-9, atol=1e-12)
        e = qlens.explain(loss, tokens, residuals={"my teacher": TEACHER})
        assert_close(e.target.grad, gradient(tokens), rtol=1e-9, atol=1e-12)
        assert e.residual == ("the student" if isinstance(loss, Weighted) else "my teacher")
        assert e.scope.of == "token" and "holds values of its own for these tokens" in e.scope.evidence


def test_a_mean_is_refused_with_the_value_to_return():
    batch = random_tokens(N, V)
    tokens = qlens.Tokens(logits=batch.logits, labels=batch.labels)
    for function in (qlens.implied_target, qlens.explain):
        with pytest.raises(
            qlens.InputError, match=rf"holds values of its own for these {N} tokens.* unreduced loss \(N,\)"
        ):
            function(lambda logits, labels: distillation(logits, labels).mean(), tokens)


def test_other_tokens_are_refused():
    given = random_tokens(N + 3, V)
    one_text = qlens.Tokens(logits=given.logits, labels=given.labels)  # its batch of one broadcasts against the teacher
    for call in (distillation, hybrid):

        def loss(logits, labels, call=call):  # whose layout no other test has searched
            return call(logits, labels)

        with pytest.raises(qlens.InputError, match="The size of tensor a"):
            qlens.explain(loss)
        for tokens in (given, one_text):
            with pytest.raises(qlens.InputError, match="The size of tensor a"):
                qlens.implied_target(loss, tokens)
