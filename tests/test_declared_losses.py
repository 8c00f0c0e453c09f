"""Printed losses beside a declared target, in training: on the true model and batch, with all of their gradients."""

import copy
import functools

import pytest
import torch
import torch.nn.functional as F
from tiny import llama, parameters, rows, steps_of, trainer_in
from torch.testing import assert_close
from user_methods import hidden_and_head, user_method

from qlens import Target, fused_loss
from qlens.batching import collate
from qlens.errors import InputError


@pytest.fixture
def make(tmp_path):
    """Trainers of one step on one batch."""
    return functools.partial(trainer_in, tmp_path, examples=rows(4), steps=1)


def label_target(tokens):
    return Target.mix(tokens, trust=torch.ones_like(tokens.label_probs.detach()), residual="student")


def shifted(logits, labels):
    kept = labels[:, 1:] != -100
    return logits[:, :-1][kept], labels[:, 1:][kept]


def weight_decay(model, inputs):
    logits = model(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"]).logits
    squares = sum(value.square().sum() for value in model.parameters())
    return F.cross_entropy(*shifted(logits, inputs["labels"])) + 0.01 * squares


def repeats_the_input(model, inputs):
    logits = model(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"]).logits
    again = logits.softmax(-1).gather(-1, inputs["input_ids"][..., None])[:, :-1, 0]
    return F.cross_entropy(*shifted(logits, inputs["labels"])) + again[inputs["labels"][:, 1:] != -100].mean()


def test_a_loss_that_runs_the_model_is_trained_on_the_true_one(make):
    batch = collate(rows(4))
    for loss in (weight_decay, repeats_the_input):
        variant = user_method(label_target, loss)
        for fused in (None, False):
            model = llama()
            by_hand = copy.deepcopy(model)
            value = loss(by_hand, dict(batch))
            grads = torch.autograd.grad(value, list(by_hand.parameters()))
            wanted = parameters(by_hand) - 0.1 * torch.cat([grad.flatten() for grad in grads])
            trainer = make(variant, model=model, fused=fused)
            trainer.train()
            assert_close(parameters(trainer.model), wanted, rtol=1e-4, atol=1e-6)
            assert steps_of(trainer)[0]["loss"] == pytest.approx(value.item(), rel=1e-5)
        hidden, head, labels = hidden_and_head(50, 4)
        with pytest.raises(InputError, match=r"runs a model on its inputs, f\(model, inputs\)"):
            fused_loss(variant, hidden, head, labels)
