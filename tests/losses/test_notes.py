"""Notes on what a loss does beyond its logit gradient: other models, passes, heads, hidden states, unused inputs."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.testing import assert_close
from written_losses import V, ce, distils, twice, weighted

import qlens
from qlens.registry import resolve
from qlens.testing import random_tokens


def tokens(n=12):
    return random_tokens(n, V)


def implied(loss, batch=None):
    return qlens.implied_target(loss, tokens() if batch is None else batch)


class Embedded(nn.Module):
    def __init__(self, size=V):
        super().__init__()
        self.table = nn.Embedding(size, size, dtype=torch.float64)

    def forward(self, input_ids, attention_mask=None):
        return SimpleNamespace(logits=self.table(input_ids))


def notes(loss, batch=None):
    return " ".join(resolve(loss).account(tokens() if batch is None else batch).notes)


def test_another_model_is_noted_and_gets_no_labels():
    other = Embedded()

    def distils_from_a_closure(model, inputs):
        labels = inputs.pop("labels")
        with torch.no_grad():
            teacher = other(**inputs).logits
        supervised = labels[:, 1:] != -100
        return distils(model(**inputs).logits[:, :-1][supervised], teacher[:, :-1][supervised])

    assert "It runs another model (Embedded)" in notes(distils_from_a_closure)
    batch = tokens()
    changed = batch.replace(labels=(batch.labels + 1) % V)
    assert_close(implied(distils_from_a_closure, batch).q, implied(distils_from_a_closure, changed).q)
    with pytest.raises(
        qlens.InputError, match=r"runs another model \(Embedded\), and is tried with a vocabulary of 24"
    ):
        qlens.check(distils_from_a_closure)
    explained = qlens.explain(distils_from_a_closure, tokens(24))
    assert explained.nearest[0].spec == "kd" and explained.nearest[0].relation == "identical"
    other = Embedded(24)
    assert qlens.check(distils_from_a_closure)["shift"].state == "not applicable"


def test_passes_heads_hidden_states_and_further_labels_are_noted():
    head = nn.Linear(V, 3, dtype=torch.float64)

    def auxiliary(model, inputs):
        outputs = model(**inputs, output_hidden_states=True)
        return outputs.loss + head(outputs.hidden_states[-1]).square().mean()

    def two_ahead(outputs, labels):
        def term(k):
            return ce(outputs.logits[:, :-k].flatten(0, 1), labels[:, k:].flatten(), reduction="sum")

        return (term(1) + 0.25 * term(2)) / (labels[:, 1:] != -100).sum()

    assert "It runs the model 2 times" in notes(twice)
    note_text = notes(auxiliary)
    assert "layers of its own (Linear)" in note_text and "reaches the hidden states past the head" in note_text
    note_text = notes(two_ahead)
    assert "the one 1 further on (0.25 times as strongly)" in note_text and "multi-token prediction" in note_text
    assert implied(two_ahead).q.isfinite().all()


def test_two_old_policies_are_named():
    def truncated(logprobs, old_logprobs, rollout_logprobs, advantages):
        weight = (old_logprobs - rollout_logprobs).exp().clamp(max=2.0).detach()
        return -(weight * (logprobs - old_logprobs).exp() * advantages).mean()

    def plain(logprobs, old_logprobs, advantages):
        return -((logprobs - old_logprobs).exp() * advantages).mean()

    note_text = "old_logprobs is the old policy that ratios are taken to; rollout_logprobs another one"
    assert note_text in notes(truncated)
    assert "old policy" not in notes(plain)


def test_an_input_without_effect_is_named():
    def drops(logits, labels, sample_weight, advantages):
        return (ce(logits, labels, reduction="none") * advantages).mean()

    assert notes(drops) == "sample_weight has no effect on its gradient."
    assert notes(weighted) == ""


def test_the_part_that_is_the_loss_is_named():
    assert "the entry 'total' of what it returns" in notes(lambda logits, labels: {"total": ce(logits, labels)})
    assert "number 2 of the 2 things" in notes(lambda logits, labels: (logits.argmax(-1), ce(logits, labels)))
