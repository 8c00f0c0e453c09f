"""Teachers and references made of the trained model: an average of its weights, itself, itself without adapters."""

import copy

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from tiny_models import llama, parameters
from torch.testing import assert_close
from transformers import TrainerCallback

import qlens
from qlens.core.errors import InputError
from qlens.training.sources import KeptWeights

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")  # of peft with newer transformers


def lora(seed=3):
    torch.manual_seed(seed)
    shape = dict(target_modules=["q_proj", "v_proj"], r=4, task_type="CAUSAL_LM", init_lora_weights=False)
    return get_peft_model(llama(), LoraConfig(**shape))


@pytest.mark.parametrize("build", [llama, lora])
def test_an_average_is_that_of_the_weights_after_every_step(make, build):
    model, steps = build(), []
    trained = [p for p in model.parameters() if p.requires_grad]
    average = [p.detach().clone() for p in trained]

    class Follow(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            for mean, p in zip(average, trained, strict=True):
                mean.mul_(0.8).add_(p.detach(), alpha=0.2)
            steps.append(state.global_step)

    trainer = make("kd", model=model, teacher=qlens.EMA(decay=0.8), steps=4, learning_rate=0.5, callbacks=[Follow()])
    trainer.train()
    (kept,) = trainer._method_inputs.kept.values()
    assert steps == [1, 2, 3, 4] and len(kept.kept) == len(trained)
    assert_close(torch.cat([v.flatten() for v in average]), torch.cat([v.flatten() for v in kept.kept.values()]))


def test_an_average_predicts_as_a_model_with_its_weights(make):
    for fused in (True, False):
        for build in (llama, lora):
            model = build()
            frozen = copy.deepcopy(model).requires_grad_(False)
            ends = []
            for teacher in (qlens.EMA(decay=0.0), qlens.EMA(decay=0.9999999), frozen):
                trainer = make("target_sft", model=copy.deepcopy(model), teacher=teacher, fused=fused, steps=3)
                trainer.train()
                ends.append(parameters(trainer.model))
            assert_close(ends[1], ends[2], rtol=1e-4, atol=1e-6)
            assert float((ends[0] - ends[2]).norm()) > 1e-5  # with decay 0 it is the model of the last step


@pytest.mark.parametrize("build", [llama, lora])
def test_a_run_with_an_average_is_resumed_bit_for_bit(make, tmp_path, build):
    options = dict(steps=6, learning_rate=0.05, teacher=qlens.EMA(decay=0.7), optim="adamw_torch")
    whole = make("kd_hybrid", model=build(), save_strategy="steps", save_steps=3, **options)
    whole.train()
    resumed = make("kd_hybrid", model=build(), **options)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert torch.equal(parameters(whole.model), parameters(resumed.model))
    saved = load_file(tmp_path / "checkpoint-3" / "qlens_state.safetensors")
    assert len(saved) == sum(p.requires_grad for p in whole.model.parameters())
    assert all(name.startswith("teacher.") for name in saved)


def test_under_lora_the_old_policy_keeps_the_adapters_alone(make, tmp_path):
    start = lora()
    ends = []
    for fused in (True, False):
        trainer = make(
            "psft", model=copy.deepcopy(start), fused=fused, old_every=3, steps=5, save_strategy="steps", save_steps=4
        )
        kept = trainer._method_inputs.other_models["old"]
        assert isinstance(kept, KeptWeights) and all("lora" in name for name in kept.kept)
        assert sum(v.numel() for v in kept.kept.values()) < 0.1 * sum(p.numel() for p in start.parameters())
        trainer.train()
        ends.append(parameters(trainer.model))
    assert_close(ends[0], ends[1], rtol=1e-4, atol=1e-6)
    resumed = make("psft", model=copy.deepcopy(start), fused=True, old_every=3, steps=5)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    assert_close(parameters(resumed.model), ends[0], rtol=1e-4, atol=1e-6)


def test_kept_weights_swap_in_and_out_without_a_trace():
    model = llama()
    kept, before = KeptWeights(model), parameters(model)
    features = {"input_ids": torch.tensor([[1, 2, 3, 4]])}
    expected = model(**features).logits.detach()
    with torch.no_grad():
        for value in model.parameters():
            value += 0.1
    assert_close(kept(**features).logits, expected, rtol=0, atol=0)
    assert_close(parameters(model), before + 0.1, rtol=0, atol=0)
    with pytest.raises(RuntimeError, match="stop"), kept.active():
        raise RuntimeError("stop")
    assert_close(parameters(model), before + 0.1, rtol=0, atol=0)
    assert not list(kept.parameters())
    half = KeptWeights(llama().bfloat16(), wide=True)
    assert all(value.dtype == torch.float32 for value in half.kept.values())


def test_a_teacher_without_adapters_is_the_base_model(make):
    ends = []
    for teacher in (qlens.AdaptersOff(), llama()):
        for fused in (True, False):
            trainer = make("target_sft", model=lora(), teacher=teacher, fused=fused, steps=3)
            trainer.train()
            ends.append(parameters(trainer.model))
    for end in ends[1:]:
        assert_close(end, ends[0], rtol=1e-4, atol=1e-6)
    with pytest.raises(InputError, match=r"teacher=AdaptersOff\(\) is the model without its adapters, and it has none"):
        make("kd", teacher=qlens.AdaptersOff())


def test_the_current_model_as_a_teacher_teaches_nothing(make):
    trainer = make("kd", teacher=qlens.CurrentModel(), steps=2)
    start = parameters(trainer.model)
    trainer.train()
    assert_close(parameters(trainer.model), start, rtol=0, atol=1e-5)


def test_one_model_as_teacher_and_reference_is_opened_and_run_once(make, tmp_path):
    def both(tokens):
        return -tokens.label_log_probs * (1 + 0 * tokens.teacher.sum() + 0 * tokens.reference.sum())

    variant = qlens.registry.Method(name="both", fn=both, needs=("teacher", "reference"), scope="token").variant()
    llama(1).save_pretrained(tmp_path / "other")
    other, calls = llama(1), []
    for teacher, reference in ((other, other), (tmp_path / "other", str(tmp_path / "other"))):
        trainer = make(variant, teacher=teacher, reference=reference, steps=1, batch=8)
        models = trainer._method_inputs.other_models
        assert models["teacher"] is models["reference"]
        trainer.train()
        models["teacher"].register_forward_hook(lambda *_: calls.append(1))
        batch = next(iter(trainer.get_train_dataloader()))
        trainer.compute_loss(trainer.model, batch)  # which verifies the hooked model anew
        calls.clear()
        trainer.compute_loss(trainer.model, batch)
        assert len(calls) == 1


def test_a_teacher_may_have_another_dtype(make):
    ends = []
    for dtype in (torch.float32, torch.float64, torch.bfloat16):
        trainer = make("target_sft", teacher=llama(1).to(dtype), steps=2, fused=True)
        trainer.train()
        ends.append(parameters(trainer.model))
    assert_close(ends[1], ends[0], rtol=1e-4, atol=1e-5)
    assert_close(ends[2], ends[0], rtol=0.1, atol=2e-2)


def test_decays_that_are_none_are_refused():
    for decay in (1.0, -0.1, "0.9", True, float("nan")):
        with pytest.raises(InputError, match="EMA: decay must be at least 0 and below 1"):
            qlens.EMA(decay)
