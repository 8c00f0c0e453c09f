"""A resumed run equals the uninterrupted one: old policy, start of a penalty, state of losses, random draws."""

import copy
import shutil

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from tiny_models import llama, parameters, steps_of
from torch.testing import assert_close

import qlens
from qlens.core.errors import InputError

NAME = "qlens_state.safetensors"


def straight_and_resumed(make, folder, spec, model, steps=6, at=3, **options):
    """A run that saves a checkpoint, and another that resumes from it with the model given to it."""
    options = dict(steps=steps, optim="adamw_torch", learning_rate=0.01, teacher=llama(1), reference=llama(2)) | options
    whole = make(spec, model=copy.deepcopy(model), save_strategy="steps", save_steps=at, **options)
    whole.train()
    resumed = make(spec, model=copy.deepcopy(model), **options)
    resumed.train(resume_from_checkpoint=str(folder / f"checkpoint-{at}"))
    return whole, resumed


@pytest.mark.parametrize(
    ("spec", "fused", "options"),
    [
        ("psft", None, dict(old_every=4)),
        ("psft", False, dict(old_every=4)),
        ("psft", None, dict(old_every=100, accumulate=2, log_every=2)),
        ("iw_sft", False, {}),
        ("rpsft(weight=0.5, k=4)", None, {}),
        ("profit(keep='random', threshold=0.5)", None, dict(log_every=2)),
        ("profit(keep='random', threshold=0.5)", False, dict(log_every=2)),
    ],
)
def test_a_resumed_run_equals_the_uninterrupted_one(make, tmp_path, spec, options, fused):
    whole, resumed = straight_and_resumed(make, tmp_path, spec, llama(), fused=fused, **options)
    assert torch.equal(parameters(whole.model), parameters(resumed.model))
    logs = [[sorted(map(repr, entry.items())) for entry in steps_of(trainer)] for trainer in (whole, resumed)]
    assert logs[0] == logs[1] and len(logs[0]) == 6


def test_a_resumed_random_loss_continues_its_draws(make, tmp_path):
    def dropped(logits, labels):
        return F.cross_entropy(logits * (torch.rand_like(logits) < 0.9), labels, reduction="none")

    for fused in (None, False):
        whole, resumed = straight_and_resumed(make, tmp_path, dropped, llama(), fused=fused)
        assert torch.equal(parameters(whole.model), parameters(resumed.model))


def test_a_penalty_is_measured_from_the_first_run_whatever_model_is_resumed(make, tmp_path):
    start, options = llama(), dict(steps=4, learning_rate=0.1)
    spec = "rpsft(weight=0.5, k=4)"
    whole = make(spec, model=copy.deepcopy(start), save_strategy="steps", save_steps=2, **options)
    whole.train()
    trained = type(start).from_pretrained(tmp_path / "checkpoint-2")  # instead of the model that the run began with
    resumed = make(spec, model=trained, **options)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert torch.equal(parameters(whole.model), parameters(resumed.model))


def test_the_start_of_a_penalty_belongs_to_a_run(make):
    model, options = llama(), dict(steps=3)
    first = make("rpsft(weight=0.5, k=4)", model=model, **options)
    first.train()
    model.load_state_dict(llama(5).state_dict())  # the same module with other weights
    second = make("rpsft(weight=0.5, k=4)", model=model, **options)
    second.train()
    fresh = make("rpsft(weight=0.5, k=4)", model=llama(5), **options)
    fresh.train()
    assert torch.equal(parameters(model), parameters(fresh.model))


def test_the_start_of_a_penalty_can_be_saved_and_restored():
    model, variant = llama(), qlens.get("rpsft", k=4)
    start = variant.start(model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1
    penalty = variant.penalty(model).detach()
    variant.start(model)
    assert float(penalty) > 1 and float(variant.penalty(model).detach()) < 1e-8
    variant.start(model, start)
    assert_close(variant.penalty(model).detach(), penalty)
    with pytest.raises(InputError, match=r"no start of model.embed_tokens.weight for rpsft\(k=8, half=False\)"):
        qlens.get("rpsft", k=8).start(model, start)
    assert qlens.get("dft").start(model) == {}


def test_only_what_training_changes_of_the_old_policy_is_saved(make, tmp_path):
    model = llama()
    model.model.embed_tokens.requires_grad_(False)
    model.model.layers[0].mlp.requires_grad_(False)
    whole, resumed = straight_and_resumed(make, tmp_path, "psft", model, old_every=100)
    assert torch.equal(parameters(whole.model), parameters(resumed.model))
    names = set(load_file(tmp_path / "checkpoint-3" / NAME))
    assert names == {f"old.{name}" for name, p in model.named_parameters() if p.requires_grad}


def test_tied_weights_are_saved_once(make, tmp_path):
    config = llama().config
    config.tie_word_embeddings = True
    torch.manual_seed(0)
    whole, resumed = straight_and_resumed(make, tmp_path, "psft", type(llama())(config), old_every=100)
    assert torch.equal(parameters(whole.model), parameters(resumed.model))


def test_checkpoints_hold_only_the_state_the_method_needs(make, tmp_path):
    make("psft", save_strategy="steps", save_steps=1, steps=3, save_only_model=True).train()
    assert (tmp_path / "checkpoint-3").is_dir() and not list(tmp_path.glob(f"checkpoint-*/{NAME}"))
    make("dft", save_strategy="steps", save_steps=1, steps=1).train()
    assert load_file(tmp_path / "checkpoint-1" / NAME) == {}  # the name of the method alone


def test_a_checkpoint_without_the_state_of_the_run_is_not_resumed_from(make, tmp_path):
    make("dft", save_strategy="steps", save_steps=2, steps=2).train()
    folder = tmp_path / "checkpoint-2"
    for spec in ("psft", "rpsft(k=4)"):
        with pytest.raises(
            InputError, match=f"{NAME} has no state of such a run, so that {spec[:4]}.*cannot be resumed"
        ):
            make(spec).train(resume_from_checkpoint=str(folder))
    (folder / NAME).unlink()
    with pytest.raises(InputError, match=f"{NAME} is not there, so that psft cannot be resumed"):
        make("psft").train(resume_from_checkpoint=str(folder))
    (folder / NAME).write_bytes(b"no tensors")
    with pytest.raises(InputError, match=f"{NAME} cannot be read"):
        make("psft").train(resume_from_checkpoint=str(folder))
    shutil.rmtree(folder)
    make("psft", save_strategy="steps", save_steps=2, steps=2).train()
    narrow = make("psft", steps=4)
    narrow.model.model.embed_tokens.requires_grad_(False)
    with pytest.raises(InputError, match="old policy does not fit the model: model.embed_tokens.weight has shape"):
        narrow._run.checkpoint = folder
        narrow._run.on_train_begin(None, None, None, model=narrow.model)


def test_a_new_run_of_a_resumed_trainer_starts_fresh(make, tmp_path):
    whole, resumed = straight_and_resumed(make, tmp_path, "psft", llama(), old_every=100)
    for trainer in (whole, resumed):
        trainer.train()
    assert torch.equal(parameters(whole.model), parameters(resumed.model))


def test_resuming_as_another_method_is_logged(make, tmp_path, caplog):
    make("sft", save_strategy="steps", save_steps=1, steps=2).train()
    for spec, says in (
        ("sft", ""),
        ("dft", "was trained by sft and goes on as dft"),
        ("label_smoothing(epsilon=0.2)", "trained by sft and goes on as label_smoothing(epsilon=0.2)"),
    ):
        caplog.clear()
        make(spec, steps=2).train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))
        messages = [each.getMessage() for each in caplog.records if each.name == "qlens.training.checkpoints"]
        assert (len(messages) == 1 and says in messages[0]) if says else not messages


def running_mean():
    mean = {"p": 0.5}

    def centred(logits, labels):
        losses = F.cross_entropy(logits, labels, reduction="none")
        mean["p"] = 0.9 * mean["p"] + 0.1 * float((-losses).exp().mean())
        return losses * (1 + mean["p"])

    return centred


def own_generator():
    draw = torch.Generator().manual_seed(0)

    def dropped(logits, labels):
        return F.cross_entropy(logits, labels, reduction="none") * torch.rand(len(labels), generator=draw)

    return dropped


def without_state():
    return lambda logits, labels: F.cross_entropy(logits, labels, reduction="none")


def test_state_missing_from_checkpoints_is_logged(make, tmp_path, caplog):
    for write in (running_mean, own_generator, without_state):
        for fused in (None, False):
            caplog.clear()
            whole, _ = straight_and_resumed(make, tmp_path, write(), llama(), fused=fused)
            messages = [record.getMessage() for record in caplog.records if "keeps values" in record.getMessage()]
            assert len(messages) == (0 if write is without_state else 2), (write.__name__, messages)
            resumed = make(write(), model=llama(), steps=6, optim="adamw_torch", learning_rate=0.01)
            resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))  # as another process would
            equal = torch.equal(parameters(whole.model), parameters(resumed.model))
            assert equal == (write is without_state)
            messages = [
                record.getMessage() for record in caplog.records if "is no uninterrupted one" in record.getMessage()
            ]
            assert len(messages) == (0 if write is without_state else 2)


class OfModel(torch.nn.Module):
    """A loss of a model with a learned temperature."""

    def __init__(self):
        super().__init__()
        self.temperature = torch.nn.Parameter(torch.tensor(1.5))

    def forward(self, model, inputs):
        logits = model(**{name: inputs[name] for name in ("input_ids", "attention_mask")}).logits
        return F.cross_entropy(logits[:, :-1].flatten(0, 1) / self.temperature, inputs["labels"][:, 1:].flatten())


def test_a_learned_parameter_is_named_and_cleared_in_a_resumed_run_too(make, tmp_path, caplog):
    loss = OfModel()
    make(loss, save_strategy="steps", save_steps=2).train()
    caplog.clear()
    loss.temperature.grad = None
    make(loss, steps=4).train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert sum("has a parameter of its own" in record.getMessage() for record in caplog.records) == 1
    assert loss.temperature.grad is None
