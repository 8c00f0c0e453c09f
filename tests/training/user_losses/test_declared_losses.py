"""Printed losses of methods with a declared target, in training: on the trained model and batch, with all gradients."""

import copy
import functools

import pytest
import torch
import torch.nn.functional as F
from tiny_models import llama, parameters, rows, steps_of, trainer_in
from torch.testing import assert_close
from user_methods import hidden_and_head, user_method

from qlens import Target, fused_loss
from qlens.core.errors import InputError
from qlens.data.collator import collate


@pytest.fixture
def make(tmp_path):
    """Trainers of one step on one batch."""
    return functools.partial(trainer_in, tmp_path, examples=rows(4), steps=1)


def label_target(tokens):
    return Target.mix(tokens, trust=torch.ones_like(tokens.label_probs.detach()), residual="student")


def shifted(logits, labels):
    supervised = labels[:, 1:] != -100
    return logits[:, :-1][supervised], labels[:, 1:][supervised]


def weight_decay(model, inputs):
    logits = model(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"]).logits
    squares = sum(value.square().sum() for value in model.parameters())
    return F.cross_entropy(*shifted(logits, inputs["labels"])) + 0.01 * squares


def repeats_the_input(model, inputs):
    logits = model(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"]).logits
    p_input = logits.softmax(-1).gather(-1, inputs["input_ids"][..., None])[:, :-1, 0]
    return F.cross_entropy(*shifted(logits, inputs["labels"])) + p_input[inputs["labels"][:, 1:] != -100].mean()


def test_model_losses_train_the_given_model(make):
    batch = collate(rows(4))
    for loss in (weight_decay, repeats_the_input):
        variant = user_method(label_target, loss)
        for fused in (None, False):
            model = llama()
            by_hand = copy.deepcopy(model)
            value = loss(by_hand, dict(batch))
            grads = torch.autograd.grad(value, list(by_hand.parameters()))
            expected = parameters(by_hand) - 0.1 * torch.cat([grad.flatten() for grad in grads])
            trainer = make(variant, model=model, fused=fused)
            trainer.train()
            assert_close(parameters(trainer.model), expected, rtol=1e-4, atol=1e-6)
            assert steps_of(trainer)[0]["loss"] == pytest.approx(value.item(), rel=1e-5)
        hidden, head, labels = hidden_and_head(50, 4)
        with pytest.raises(InputError, match=r"runs a model on its inputs, f\(model, inputs\)"):
            fused_loss(variant, hidden, head, labels)


def test_a_parameter_of_the_loss_has_its_gradient_or_is_refused(make):
    """Learned beside a declared target, with and without a declared structure, and in a loss alone."""
    offset = torch.nn.Parameter(torch.tensor(0.3))

    def learned(tokens):
        return -tokens.label_log_probs + offset**2

    variants = [
        user_method(label_target, learned),
        user_method(label_target, learned, structure="label"),
        user_method(label_target, learned, scope="batch"),
        user_method(loss=learned, scope="token"),
        user_method(loss=learned),
        user_method(loss=lambda logits, labels: F.cross_entropy(logits, labels) + offset**2),
    ]
    hidden, head, labels = hidden_and_head(50, 6)
    for variant in variants:
        for fused in (None, False):
            offset.data.fill_(0.3)
            trainer = make(variant, model=llama(), fused=fused)
            trainer.optimizer = torch.optim.SGD([*trainer.model.parameters(), offset], lr=0.1)
            trainer.train()
            assert offset.item() == pytest.approx(0.3 - 0.1 * 0.6, rel=1e-5)
            trainer.evaluate(rows(4))
        with pytest.raises(InputError, match="has a parameter of its own that requires a gradient"):
            fused_loss(variant, hidden, head, labels)
        with torch.no_grad():
            assert fused_loss(variant, hidden, head, labels).item() > 0
    with pytest.raises(InputError, match="has a parameter of its own that requires a gradient"):
        make(variants[0], model=llama(), fused=True).train()


def test_a_parameter_that_learns_later_is_detected():
    offset = torch.nn.Parameter(torch.tensor(0.3, dtype=torch.float64), requires_grad=False)
    hidden, head, labels = hidden_and_head(50, 6)
    for structure in ("dense", "label"):
        variant = user_method(label_target, lambda tokens: -tokens.label_log_probs + offset**2, structure=structure)
        offset.requires_grad_(False)
        fused_loss(variant, hidden, head, labels)
        offset.requires_grad_()
        with pytest.raises(InputError, match="has a parameter of its own that requires a gradient"):
            fused_loss(variant, hidden, head, labels)


def test_a_parameter_in_the_optimizer_is_trained_by_the_gradient_of_its_step(make, caplog):
    """The Trainer clears the gradients of the model alone; where no optimizer holds the parameter, a log line says so."""
    examples = [row for row in rows(4) if row["labels"][-1] != -100]

    def loss_of(temperature):
        return lambda logits, labels: F.cross_entropy(logits / temperature, labels)

    by_hand, expected = llama(), torch.nn.Parameter(torch.tensor(1.3))
    batch = collate(examples)
    run = {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"]}
    optimizer = torch.optim.SGD([*by_hand.parameters(), expected], lr=0.1)
    for _ in range(3):
        logits, labels = shifted(by_hand(**run).logits, batch["labels"])
        optimizer.zero_grad()
        loss_of(expected)(logits, labels).backward()
        optimizer.step()

    for in_optimizer in (True, False):
        caplog.clear()
        temperature = torch.nn.Parameter(torch.tensor(1.3))
        trainer = make(loss_of(temperature), model=llama(), examples=examples, steps=3)
        trainer.optimizer = torch.optim.SGD(
            [*trainer.model.parameters(), *([temperature] if in_optimizer else [])], lr=0.1
        )
        trainer.train()
        (line,) = [line for line in caplog.messages if "a parameter of its own" in line]
        if in_optimizer:
            assert temperature.item() == pytest.approx(expected.item(), rel=1e-4)
            assert "is trained" in line
        else:
            assert temperature.item() == pytest.approx(1.3) and "is not in the optimizer" in line
