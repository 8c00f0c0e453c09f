"""The load balancing loss of mixture-of-experts models in training."""

import copy

import pytest
import torch
from tiny_models import VOCAB, llama, parameters, rows, steps_of
from torch.testing import assert_close
from transformers import (
    JetMoeConfig,
    JetMoeForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
    Trainer,
)

from qlens.core.errors import InputError
from qlens.data.collator import collate
from qlens.training.step.router_loss import router_loss

SHAPE = dict(vocab_size=VOCAB, hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2)


def mixtral(**overrides):
    torch.manual_seed(0)
    options = (
        dict(num_local_experts=4, num_key_value_heads=2, output_router_logits=True, router_aux_loss_coef=0.5)
        | overrides
    )
    return MixtralForCausalLM(MixtralConfig(**SHAPE, **options))


def qwen3():
    torch.manual_seed(0)
    options = dict(num_experts=4, num_experts_per_tok=2, moe_intermediate_size=8, num_key_value_heads=2, head_dim=8)
    return Qwen3MoeForCausalLM(Qwen3MoeConfig(**SHAPE, **options, output_router_logits=True, router_aux_loss_coef=0.3))


def jetmoe():
    torch.manual_seed(0)
    shape = {name: value for name, value in SHAPE.items() if name != "num_attention_heads"}
    options = dict(num_key_value_heads=2, kv_channels=8, num_local_experts=4, num_experts_per_tok=2, aux_loss_coef=0.4)
    return JetMoeForCausalLM(JetMoeConfig(**shape, **options, output_router_logits=True))


@pytest.mark.parametrize("build", [mixtral, qwen3, jetmoe])
def test_sft_has_the_loss_and_gradient_of_transformers_own_training(make, build):
    runs = [make(kind=Trainer, model=build()), *(make("sft", model=build(), fused=fused) for fused in (None, False))]
    for trainer in runs:
        trainer.train()
    for trainer in runs[1:]:
        assert_close(parameters(trainer.model), parameters(runs[0].model), rtol=1e-5, atol=1e-6)
        for log, expected_log in zip(steps_of(trainer), steps_of(runs[0]), strict=True):
            assert log["loss"] == pytest.approx(expected_log["loss"], rel=1e-5)
            assert log["loss"] > log["nll"] + 0.1  # the router's part is there


@pytest.mark.parametrize("fused", [None, False], ids=["fused", "whole logits"])
def test_the_router_loss_is_a_mean_over_micro_batches(make, fused):
    model, examples = mixtral(), rows(4, seed=1)
    trainer = make("dft", model=copy.deepcopy(model), examples=examples, batch=2, accumulate=2, steps=1, fused=fused)
    batches = []
    trainer.data_collator = lambda batch: batches.append(collate(batch)) or batches[-1]
    trainer.train()
    losses = [model(input_ids=b["input_ids"], attention_mask=b["attention_mask"]).aux_loss for b in batches]
    mean = torch.stack(losses).mean()
    plain = make("dft", model=mixtral(output_router_logits=False), examples=examples, batch=2, accumulate=2, steps=1)
    plain.train()
    log = steps_of(trainer)[0]
    assert log["aux_loss"] == pytest.approx(mean.item(), rel=1e-5)
    assert log["loss"] == pytest.approx(steps_of(plain)[0]["loss"] + 0.5 * mean.item(), rel=1e-5)
    grads = torch.autograd.grad(0.5 * mean, list(model.parameters()), allow_unused=True)
    grads = [torch.zeros_like(p) if g is None else g for p, g in zip(model.parameters(), grads, strict=True)]
    flat = torch.cat([g.flatten() for g in grads])
    assert_close(parameters(plain.model) - parameters(trainer.model), 0.1 * flat, rtol=1e-3, atol=1e-6)
    assert float(flat.norm()) > 1e-4


def test_evaluation_reports_the_router_loss(make):
    metrics = {
        on: make("sft", model=mixtral(output_router_logits=on), eval_dataset=rows(4)).evaluate() for on in (True, False)
    }
    assert metrics[True]["eval_loss"] == pytest.approx(metrics[False]["eval_loss"], rel=1e-5)
    assert metrics[True]["eval_aux_loss"] > 1 and "eval_aux_loss" not in metrics[False]


def test_a_router_loss_without_a_weight_is_refused_and_one_of_zero_left_out(make):
    model = mixtral(router_aux_loss_coef=0.0)
    trainers = [make("sft", model=model), make("sft", model=mixtral(output_router_logits=False))]
    for trainer in trainers:
        trainer.train()
    assert_close(parameters(trainers[0].model), parameters(trainers[1].model), rtol=1e-6, atol=1e-7)
    assert steps_of(trainers[0])[0]["aux_loss"] > 1
    with pytest.raises(
        InputError, match="returns an aux_loss, but neither it nor its config has a router_aux_loss_coef"
    ):
        router_loss(llama(), {"logits": torch.zeros(1), "aux_loss": torch.ones(())})
    plain = make("sft", model=llama(), steps=1)
    plain.train()
    assert "aux_loss" not in steps_of(plain)[0]


def cross_entropy(logits, labels):
    supervised = labels[:, 1:] != -100
    return torch.nn.functional.cross_entropy(logits[:, :-1][supervised], labels[:, 1:][supervised])


def run(model, inputs):
    return model(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"])


def without_it(model, inputs):
    return cross_entropy(run(model, inputs).logits, inputs["labels"])


def with_it(model, inputs):
    outputs = run(model, inputs)
    return cross_entropy(outputs.logits, inputs["labels"]) + 0.5 * outputs.aux_loss


def from_the_model(model, inputs):
    return model(**inputs).loss


def in_two_passes(model, inputs):
    return 0.5 * without_it(model, inputs) + 0.5 * without_it(model, inputs)


def from_the_backbone(model, inputs):
    hidden = model.model(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"]).last_hidden_state
    return cross_entropy(model.lm_head(hidden), inputs["labels"])


@pytest.mark.parametrize("batch", [4, 2])
def test_model_losses_count_the_router_loss_once(make, batch, caplog):
    """Whether the loss leaves it out, has it already (then weighed by a micro-batch's tokens), or runs the model twice."""
    options = dict(examples=rows(4, seed=1), batch=batch, accumulate=4 // batch, steps=1)
    sft = make("sft", model=mixtral(), **options)
    sft.train()
    for loss in (without_it, in_two_passes, *([with_it, from_the_model] if batch == 4 else [])):
        trainer = make(loss, model=mixtral(), **options)
        trainer.train()
        assert_close(parameters(trainer.model), parameters(sft.model), rtol=1e-4, atol=1e-6)
        for name in ("loss", "aux_loss"):
            assert steps_of(trainer)[0][name] == pytest.approx(steps_of(sft)[0][name], rel=1e-5)
    lines = [line for line in caplog.messages if "router loss" in line]
    assert len(lines) == 2 and all("0.5 times the model's router loss (aux_loss) is added" in line for line in lines)
    make(from_the_backbone, model=mixtral(), **options).train()
    assert any("no router loss is trained" in line for line in caplog.messages)
