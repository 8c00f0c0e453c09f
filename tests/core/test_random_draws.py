"""Random methods: new draws at every step, reproducible ones wherever a step is evaluated, logged or not."""

import pytest
import torch
from tiny_models import llama, parameters, rows, steps_of
from torch.testing import assert_close

import qlens
from qlens.core.random_draws import draws_of, uniform
from qlens.losses.replay import Replay
from qlens.testing import random_tokens

RANDOM = "profit(keep='random', threshold=0.5)"


@pytest.fixture
def selections(monkeypatch):
    """Which tokens a random selection kept, call by call."""
    import qlens.variants.selection.profit as module

    calls = []

    def recorded(count, seed):
        calls.append(uniform(count, seed) >= 0.5)
        return uniform(count, seed)

    monkeypatch.setattr(module, "uniform", recorded)
    return calls


def of_one_size(count: int) -> list[dict]:
    return [{"input_ids": [at % 7 + 1] * 6, "labels": [-100, *[at % 5 + 1] * 5]} for at in range(count)]


@pytest.mark.parametrize("fused", [None, False], ids=["fused", "whole logits"])
def test_random_selections_differ_between_steps(make, selections, fused):
    if fused is None:
        qlens.engine.fused.fusible(qlens.get(RANDOM))  # its trials draw too
    selections.clear()
    make(RANDOM, examples=of_one_size(8), steps=6, fused=fused, log_every=0).train()
    dealt = {tuple(selection.tolist()) for selection in selections if len(selection) == 20}
    assert len(dealt) == 6


def test_micro_batches_of_a_step_differ_and_a_seed_draws_the_same_again(make, selections):
    runs = []
    for seed in (7, 7, 8):
        selections.clear()
        make(
            RANDOM, examples=of_one_size(8), batch=2, accumulate=2, steps=3, fused=False, log_every=0, seed=seed
        ).train()
        runs.append([tuple(selection.tolist()) for selection in selections if len(selection) == 10])
    assert len(set(runs[0])) == 6
    assert runs[0] == runs[1] != runs[2]


def test_fused_and_whole_logits_draw_the_same(make):
    ends = []
    for fused in (True, False):
        trainer = make(RANDOM, model=llama().double(), steps=4, fused=fused)
        trainer.train()
        ends.append((parameters(trainer.model), [entry["trust"] for entry in steps_of(trainer)]))
    assert_close(ends[0][0], ends[1][0], rtol=1e-9, atol=1e-10)
    assert ends[0][1] == pytest.approx(ends[1][1], rel=1e-9)
    assert len(set(ends[0][1])) == 4


def test_evaluation_draws_the_same_every_time_and_leaves_training_alone(make):
    quiet, evaluated = (
        make(RANDOM, steps=3),
        make(RANDOM, steps=3, eval_dataset=rows(6), eval_strategy="steps", eval_steps=1),
    )
    for trainer in (quiet, evaluated):
        trainer.train()
    assert torch.equal(parameters(quiet.model), parameters(evaluated.model))
    assert (
        evaluated.evaluate() == pytest.approx(evaluated.evaluate(), rel=1e9) and evaluated.evaluate()["eval_trust"] < 1
    )
    assert evaluated.evaluate()["eval_trust"] == evaluated.evaluate()["eval_trust"]


def test_loss_and_target_share_their_draws_outside_training():
    tokens, variant = random_tokens(40, 9), qlens.get(RANDOM)
    for place in ((), (1, 2)):
        with draws_of(*place):
            trusted = variant.target(tokens).trust != 0
            assert torch.equal(variant.loss(tokens) != 0, trusted) and 5 < int(trusted.sum()) < 35
    assert torch.equal(uniform(40, 0), uniform(40, 0))
    assert not torch.equal(uniform(40, 0), uniform(40, 1))


def test_replay_repeats_draws_without_advancing_generators():
    torch.manual_seed(3)
    replay = Replay(torch.device("cpu"))
    first, second = torch.rand(3), torch.rand(3)
    with replay.again():
        assert torch.equal(torch.rand(3), first)
    torch.manual_seed(3)
    assert torch.equal(torch.rand(9)[3:6], second)
    torch.manual_seed(3)
    torch.rand(6)
    after = torch.rand(3)
    torch.manual_seed(3)
    replay = Replay(torch.device("cpu"))
    torch.rand(6)
    with replay.again():
        torch.rand(100)
    assert torch.equal(torch.rand(3), after)


def noisy(tokens):
    """A loss that draws numbers from torch's own generator."""
    return -tokens.label_log_probs * torch.rand(len(tokens))


@pytest.mark.parametrize("scope", ["token", ""], ids=["fused", "whole logits"])
def test_logging_does_not_change_the_training_of_a_random_loss(make, scope):
    ends, logs = [], []
    for every in (1, 1000):
        method = qlens.registry.Method(name="noisy", fn=noisy, scope=scope)
        trainer = make(method.variant(), steps=4, logging_steps=every, logging_first_step=True)
        trainer.train()
        ends.append(parameters(trainer.model))
        logs.append(steps_of(trainer)[0])
    assert torch.equal(*ends)
    assert logs[0]["trust"] == logs[1]["trust"]


@pytest.mark.parametrize("spec", ["sft", "kd", "target_sft", "label_smoothing", "psft", "gem", "iw_sft"])
def test_logging_changes_no_bit_of_a_step(make, spec):
    for fused in (True, False):
        trained = []
        for every in (1, 1000):
            models = dict(teacher=llama(1), reference=llama(2), old_every=2)
            trainer = make(spec, steps=4, logging_steps=every, fused=fused, examples=rows(8), **models)
            trainer.train()
            trained.append(parameters(trainer.model))
        assert torch.equal(*trained), fused
