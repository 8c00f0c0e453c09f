"""Metrics that QTrainer logs, in training and in evaluation, against sums written out."""

import copy
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from cases import case
from tiny_models import VOCAB, Recorder, llama, parameters, rows, steps_of
from torch import nn
from transformers import TrainerCallback

from qlens.core.errors import InputError
from qlens.core.supervised import IGNORE
from qlens.core.target import Target
from qlens.data.collator import collate
from qlens.registry import resolve
from qlens.training.metrics import MetricSums
from qlens.training.update_norm import UpdateNorm


def metrics_by_hand(model, batches) -> dict[str, float]:
    """What must be logged for dft, Q = p_y d + (1 - p_y) p, from float64 loops."""
    pull, room, trust, entropy, kl, nll, loss = [], [], [], [], [], [], []
    for batch in batches:
        for ids, mask, labels in zip(batch["input_ids"], batch["attention_mask"], batch["labels"], strict=True):
            logits = model(input_ids=ids[: int(mask.sum())][None]).logits[0].detach().double().numpy()
            for t in range(1, len(logits)):
                if (y := labels[t].item()) == IGNORE:
                    continue
                p = np.exp(logits[t - 1]) / np.exp(logits[t - 1]).sum()
                q = (1 - p[y]) * p
                q[y] += p[y]
                pull.append((q - p)[y])
                room.append(1 - p[y])
                trust.append(p[y])
                entropy.append(-(q * np.log(q)).sum())
                kl.append((q * np.log(q / p)).sum())
                nll.append(-np.log(p[y]))
                loss.append(-p[y] * np.log(p[y]))
    means = {"loss": loss, "nll": nll, "target_entropy": entropy, "kl_target": kl, "negative_mass": [0]}
    ess = sum(trust) ** 2 / sum(a * a for a in trust) / len(trust)
    return {
        **{name: float(np.mean(values)) for name, values in means.items()},
        "ess": ess,
        "label_weight": sum(pull) / sum(room),
        "trust": sum(pull) / sum(room),  # its old key
    }


def test_metrics_cover_the_whole_logged_step(make):
    recorder, model = Recorder(), llama()
    trainer = make("dft", model=copy.deepcopy(model), batch=2, accumulate=4, steps=1, data_collator=recorder)
    trainer.train()
    log = steps_of(trainer)[0]
    expected = metrics_by_hand(model, recorder.batches)
    assert {name: log[name] for name in expected} == pytest.approx(expected, rel=1e-4, abs=1e-6)
    norm = (parameters(trainer.model) - parameters(model)).norm().item()
    assert log["update_norm"] == pytest.approx(norm, rel=1e-4)
    assert expected["ess"] < 0.9 and norm > 1e-3


def test_every_log_covers_its_own_step(make):
    recorder, model = Recorder(), llama()
    trainer = make("dft", model=copy.deepcopy(model), data_collator=recorder, learning_rate=0.0)
    trainer.train()
    for log, batch in zip(steps_of(trainer), recorder.batches, strict=True):
        expected = metrics_by_hand(model, [batch])
        assert {name: log[name] for name in expected} == pytest.approx(expected, rel=1e-4, abs=1e-6)


def test_metrics_are_in_unit_scale(make):
    logs = []
    for trust, scale in ((1.0, 0.5), (0.5, 1.0)):  # one gradient: half a pull to the label
        trainer = make(lambda tokens, t=trust, s=scale: Target.mix(tokens, t, "student", s), steps=1)
        trainer.train()
        logs.append(steps_of(trainer)[0])
    assert logs[0]["target_entropy"] > 0.1
    for name in ("trust", "target_entropy", "kl_target", "negative_mass", "ess", "update_norm"):
        assert logs[0][name] == pytest.approx(logs[1][name], rel=1e-5)


def test_sft_metrics_are_the_known_ones(make):
    trainer = make("sft", steps=1)
    trainer.train()
    log = steps_of(trainer)[0]
    expected = {"trust": 1, "ess": 1, "target_entropy": 0, "negative_mass": 0}
    assert {name: log[name] for name in expected} == pytest.approx(expected, abs=1e-6)
    assert log["kl_target"] == pytest.approx(log["nll"], rel=1e-5)  # Q is the label: KL is its negative log-likelihood


def test_a_signed_target_is_reported_and_has_no_divergence(make):
    tripled = resolve(lambda logits, labels: 3 * F.cross_entropy(logits, labels, reduction="none"))
    trainer = make(tripled, steps=1, eval_dataset=rows(2))
    assert trainer.evaluate()["eval_trust"] == pytest.approx(3, rel=1e-4)
    trainer.train()
    log = steps_of(trainer)[0]
    assert log["negative_mass"] > 0.1
    assert log["trust"] == pytest.approx(3, rel=1e-4)
    assert math.isnan(log["kl_target"]) and math.isnan(log["target_entropy"])


@pytest.mark.parametrize(
    ("options", "logged"),
    [
        (dict(logging_steps=2), [2, 4]),
        (dict(logging_steps=3, logging_first_step=True), [1, 3]),
        (dict(logging_strategy="epoch"), [2, 4, 5]),  # 8 rows by 4: two steps an epoch
        (dict(logging_strategy="no"), []),
    ],
    ids=["every 2", "first and 3", "epoch", "never"],
)
def test_only_logged_steps_pay_for_metrics(make, monkeypatch, options, logged):
    counted, add = [], MetricSums.add
    trainer = make("dft", steps=5, **options)
    monkeypatch.setattr(MetricSums, "add", lambda *args: (counted.append(trainer.state.global_step + 1), add(*args)))
    trainer.train()
    assert counted == logged
    assert [entry["step"] for entry in steps_of(trainer)] == logged
    assert all("nll" in entry and "update_norm" in entry for entry in steps_of(trainer))
    assert trainer._update.take() == {}  # no norm was measured and not logged


def test_evaluation_is_the_token_mean_of_the_whole_set(make):
    for batch in [1, 3, 8]:
        with case(batch):
            examples, model = rows(7, seed=3), llama()
            trainer = make("dft", model=model, eval_dataset=examples, per_device_eval_batch_size=batch)
            metrics = trainer.evaluate()
            expected = metrics_by_hand(model, [collate(examples)])
            assert {name: metrics[f"eval_{name}"] for name in expected} == pytest.approx(expected, rel=1e-4, abs=1e-6)


def test_evaluation_during_training_leaves_the_training_log_alone(make):
    quiet, evaluated = make("dft"), make("dft", eval_dataset=rows(5, seed=3), eval_strategy="steps", eval_steps=1)
    quiet.train()
    evaluated.train()
    assert all(a == pytest.approx(b) for a, b in zip(steps_of(evaluated), steps_of(quiet), strict=True))
    assert [e["step"] for e in evaluated.state.log_history if "eval_kl_target" in e] == [1, 2]
    evaluated.compute_loss(evaluated.model, collate(rows(2)))
    assert evaluated._sums.means(evaluated.accelerator) == {}  # a call by hand is in no log


def test_evaluation_of_several_sets_and_of_none_supervised(make):
    sets = {"a": rows(2, seed=3), "b": rows(2, seed=4), "c": [rows(3)[2]]}
    with pytest.raises(InputError, match="the evaluation set \\(eval_c\\) has no supervised token"):
        make("sft", eval_dataset=sets).evaluate()
    del sets["c"]
    metrics = make("sft", eval_dataset=sets).evaluate()
    assert metrics["eval_a_nll"] != metrics["eval_b_nll"]


def test_compute_metrics_gets_predictions(make):
    shapes = []
    metric = lambda p: (shapes.append((p.predictions.shape, p.label_ids.shape)), {"one": 1.0})[1]  # noqa: E731
    examples = rows(4, seed=3)
    metrics = make("kd", teacher=llama(1), eval_dataset=examples, compute_metrics=metric).evaluate()
    width = max(len(example["labels"]) for example in examples)
    assert shapes == [((4, width, VOCAB), (4, width))]
    assert metrics["eval_one"] == 1.0 and metrics["eval_nll"] > 0


def test_the_update_norm_is_exact_where_few_numbers_are_trained(make):
    for optim in ["sgd", "adamw_torch", "adafactor"]:
        with case(optim):
            model = llama()
            model.lm_head.weight.requires_grad_(False)
            trainer = make("dft", model=model, steps=1, optim=optim)
            start = parameters(model).clone()
            trainer.train()
            assert steps_of(trainer)[0]["update_norm"] == pytest.approx(
                float((parameters(model) - start).norm()), rel=1e-5
            )


def test_the_update_norm_of_many_is_an_estimate_with_the_error_that_is_stated():
    for kind in ["as the gradient", "all", "few rows"]:
        with case(kind):
            assert_estimate(kind)


def assert_estimate(kind):
    draw = torch.Generator().manual_seed(0)
    model = nn.ParameterList(nn.Parameter(torch.zeros(size)) for size in ((3000, 40), (7,), (20, 30, 40), (9000,)))
    changes = []
    for parameter in model:  # gradients of some rows are thousands of times those of others, as an embedding's are
        size = torch.randn(parameter.shape[:-1], generator=draw).mul(3).exp()[..., None]
        parameter.grad = torch.randn(parameter.shape, generator=draw) * size
        if kind == "few rows" and len(parameter) == 3000:
            parameter.grad[100:] = 0
        even = torch.randn(parameter.shape, generator=draw)
        changes.append({"as the gradient": -0.1 * parameter.grad, "all": even, "few rows": parameter.grad.sign()}[kind])
    norm = math.sqrt(sum(float(change.square().sum()) for change in changes))
    entries = 20_000
    callback, ratios = UpdateNorm(lambda: model, lambda: True, entries), []
    for _ in range(40):
        for parameter in model:
            parameter.data.zero_()
        callback.on_pre_optimizer_step(None, None, None)
        assert sum(rows.values.numel() for rows in callback.before) < 1.5 * entries
        for parameter, change in zip(model, changes, strict=True):
            parameter.data += change
        callback.on_optimizer_step(None, None, None)
        ratios.append(callback.take()["update_norm"] / norm)
    error = 0.71 / math.sqrt(entries / 40)
    assert abs(np.mean(ratios) - 1) < 4 * error / math.sqrt(40)
    assert 0 < np.std(ratios) < 1.3 * error


def test_the_update_norm_does_not_use_torchs_generator(make):
    torch.manual_seed(5)
    expected = torch.rand(3)
    model = nn.Linear(30, 30)
    callback = UpdateNorm(lambda: model, lambda: True, entries=10)
    torch.manual_seed(5)
    callback.on_pre_optimizer_step(None, None, None)
    callback.on_optimizer_step(None, None, None)
    assert torch.equal(torch.rand(3), expected) and callback.take() == {"update_norm": 0.0}
    assert callback.take() == {}


def test_unlogged_steps_copy_no_parameters(make):
    for options in [dict(log_every=0), dict(log_every=1, logging_strategy="no")]:
        with case(options):
            assert_nothing_remembered(make, options)


def assert_nothing_remembered(make, options):
    trainer, rows_kept = make("dft", steps=3, **options), []
    trainer.add_callback(Before(lambda: rows_kept.append(len(trainer._update.before))))
    trainer.train()
    assert rows_kept == [0, 0, 0]
    assert not any("update_norm" in entry for entry in trainer.state.log_history)


def test_thinned_logs_copy_parameters_at_logged_steps(make):
    trainer, rows_kept = make("dft", steps=4, log_every=2), []
    trainer.add_callback(Before(lambda: rows_kept.append(bool(trainer._update.before))))
    trainer.train()
    assert rows_kept == [True, False, True, False] == ["update_norm" in entry for entry in steps_of(trainer)]


class Before(TrainerCallback):
    """Calls a function right before every optimizer step."""

    def __init__(self, call):
        self.call = call

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        self.call()


def test_the_update_norm_is_exact_up_to_its_entries_and_estimated_beyond():
    draw = torch.Generator().manual_seed(0)
    parameters = [torch.nn.Parameter(torch.zeros(50, 4)), torch.nn.Parameter(torch.zeros(7))]
    change = [torch.randn(p.shape, generator=draw) for p in parameters]
    norm = math.sqrt(sum(float(each.square().sum()) for each in change))
    model = nn.ParameterList(parameters)
    for entries, exact in ((207, True), (206, False)):
        callback = UpdateNorm(lambda: model, lambda: True, entries)
        for parameter in parameters:
            parameter.data.zero_()
        callback.on_pre_optimizer_step(None, None, None)
        assert all(rows.index is None for rows in callback.before) == exact
        for parameter, each in zip(parameters, change, strict=True):
            parameter.data += each
        callback.on_optimizer_step(None, None, None)
        norm_logged = callback.take()["update_norm"]
        assert (abs(norm_logged / norm - 1) < 1e-6) == exact and norm_logged == pytest.approx(norm, rel=0.5)
