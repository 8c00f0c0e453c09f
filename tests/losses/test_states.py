"""Stateful and random losses: further calls by qlens do not change their training."""

import random

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from losses import nll
from tiny_models import llama, parameters, rows
from torch.testing import assert_close

import qlens
from qlens.core.supervised import Supervised
from qlens.data.collator import collate
from qlens.losses.replay import Replay
from qlens.losses.states import COPIED
from qlens.registry import Method

LARGE = torch.zeros(COPIED + 1)
HISTORY = {"mean": torch.ones(())}


class Running(torch.nn.Module):
    """Weighs by a running mean of itself, in a buffer that is written on in place."""

    def __init__(self):
        super().__init__()
        self.register_buffer("mean", torch.ones(()))
        self.calls = 0

    def forward(self, logits, labels):
        losses = nll(logits, labels)
        self.calls += 1
        with torch.no_grad():
            self.mean.mul_(0.9).add_(0.1 * losses.mean())
        return losses * self.mean


class Plain:
    """The same in attributes of an object, and in its parts."""

    def __init__(self):
        self.parts = {"means": [1.0]}

    def __call__(self, logits, labels):
        losses = nll(logits, labels)
        self.parts["means"].append(0.9 * self.parts["means"][-1] + 0.1 * float(losses.detach().mean()))
        return losses * self.parts["means"][-1]


def in_a_closure():
    mean = 1.0

    def loss(logits, labels):
        nonlocal mean
        losses = nll(logits, labels)
        mean = 0.9 * mean + 0.1 * float(losses.detach().mean())
        return losses * mean

    return loss


def in_a_global():
    HISTORY["mean"] = torch.ones(())

    def loss(logits, labels):
        losses = nll(logits, labels)
        HISTORY["mean"] = 0.9 * HISTORY["mean"] + 0.1 * losses.detach().mean()
        return losses * HISTORY["mean"]

    return loss


def in_a_default():
    def loss(logits, labels, *, keep=[1.0]):  # noqa: B006
        losses = nll(logits, labels)
        keep[0] = 0.9 * keep[0] + 0.1 * float(losses.detach().mean())
        return losses * keep[0]

    return loss


def reduced():
    running = Running()
    return lambda logits, labels: running(logits, labels).mean()


def by_hand(steps):
    """SGD on all examples as one batch, with a running mean of the loss."""
    model, mean, losses = llama(), 1.0, []
    batch = collate(rows(4))
    where = Supervised.of(batch)
    for _ in range(steps):
        logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
        each = nll(where.take(logits), where.labels)
        mean = 0.9 * mean + 0.1 * float(each.detach().mean())
        (each.mean() * mean).backward()
        losses.append(float(each.detach().mean() * mean))
        with torch.no_grad():
            for value in model.parameters():
                value -= 0.1 * value.grad
                value.grad = None
    return parameters(model), losses


def test_logging_does_not_change_the_training_of_a_stateful_loss(make):
    expected, values = by_hand(4)
    for build in (Running, Plain, in_a_closure, in_a_global, in_a_default, reduced):
        for fused, log_every in ((True, 0), (True, 1), (False, 0), (False, 1)):
            loss = build()
            trainer = make(
                Method(name="running", fn=loss, scope="token").variant(),
                examples=rows(4), batch=4, steps=4, fused=fused, log_every=log_every,
            )  # fmt: skip
            trainer.train()
            assert_close(parameters(trainer.model), expected, rtol=1e-4, atol=1e-5, msg=f"{build} {fused} {log_every}")
            logged = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
            assert logged == pytest.approx(values, rel=1e-4)
            assert getattr(loss, "calls", 4) == 4


def test_a_large_tensor_that_is_written_on_is_refused_and_one_that_is_read_is_not():
    def writes(logits, labels):
        LARGE[0] += 1
        return nll(logits, labels) + LARGE[0]

    def reads(logits, labels):
        return nll(logits, labels) + LARGE[1]

    tokens = qlens.testing.random_tokens(6, 9)
    with pytest.raises(qlens.InputError, match=r"changes a tensor of shape \(1048577,\) in place"):
        qlens.registry.resolve(writes).loss(tokens)
    assert qlens.registry.resolve(reads).loss(tokens).shape == (6,)


def test_replay_restores_the_state_of_functions():
    numbers, generator = [1], np.random.default_rng(0)
    table = {"self": numbers, "rows": [torch.zeros(2)]}
    table["table"] = table

    def function():
        numbers.append(len(numbers))
        table["rows"][0] += 1
        table["new"] = True
        return generator.random(), random.random(), np.random.rand(), float(torch.rand(()))

    replay = Replay(torch.device("cpu"), function)
    first = function()
    rows_before = table["rows"][0]
    with replay.again():
        assert numbers == [1] and "new" not in table
        assert function() == first
    with replay.again():
        assert function() == first
    assert numbers == [1, 1] and table["new"] and table["rows"][0] is rows_before and float(rows_before[0]) == 1
    assert function() != first


GENERATOR = torch.Generator()
NUMPY = np.random.default_rng(1)
DRAWS = {
    "torch": lambda count: torch.rand(count),
    "numpy": lambda count: torch.from_numpy(np.random.rand(count)),
    "python": lambda count: torch.tensor([random.random() for _ in range(count)]),
    "a generator of torch": lambda count: torch.rand(count, generator=GENERATOR),
    "a generator of numpy": lambda count: torch.from_numpy(NUMPY.random(count)),
}


def seeded():
    GENERATOR.manual_seed(0)
    NUMPY.bit_generator.state = np.random.default_rng(1).bit_generator.state


def test_logging_does_not_change_the_training_of_reduced_random_losses(make):
    for name, draw in DRAWS.items():
        ends = []
        for fused, mean, log_every in ((True, False, 0), (True, True, 1), (False, False, 1), (False, True, 0)):

            def loss(logits, labels, mean=mean, draw=draw):
                losses = nll(logits, labels) * (draw(len(labels)) < 0.5).to(logits)
                return losses.mean() if mean else losses

            seeded()
            variant = Method(name="drawn", fn=loss, scope="token").variant()
            trainer = make(variant, examples=rows(8), batch=4, steps=3, fused=fused, log_every=log_every)
            trainer.train()
            ends.append(parameters(trainer.model))
        assert (ends[0] - parameters(llama())).norm() > 1e-3
        for other in ends[1:]:
            assert_close(other, ends[0], rtol=1e-4, atol=1e-6, msg=name)


def test_seeded_randomness_is_replayed_and_other_randomness_refused():
    count = iter(range(10**6))

    def dropped(logits, labels):
        return F.cross_entropy(F.dropout(logits, 0.2), labels)

    def counted(logits, labels):
        return F.cross_entropy(logits, labels) * (1 + next(count) % 3)

    tokens = qlens.testing.random_tokens(30, 9)
    variant = qlens.registry.resolve(dropped)
    torch.manual_seed(0)
    total = variant.loss(tokens).sum()
    torch.manual_seed(0)
    assert_close(total, 30 * dropped(tokens.logits, tokens.labels))
    with pytest.raises(qlens.InputError, match="not deterministic"):
        qlens.registry.resolve(counted).loss(tokens)


def test_a_loss_runs_inside_checkpointing():
    tokens = qlens.probes()
    grads = []
    for run in (lambda fn, z: fn(z), lambda fn, z: torch.utils.checkpoint.checkpoint(fn, z, use_reentrant=False)):
        leaf = tokens.logits.clone().requires_grad_()
        run(lambda z: qlens.get("dft").loss(tokens.with_logits(z)).sum(), leaf).backward()
        grads.append(leaf.grad)
    assert grads[0].abs().max() > 0
    assert torch.equal(*grads)
