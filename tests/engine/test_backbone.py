"""Backbones: changes of the logits after a model's head are detected, at the start and during a run."""

import logging

import pytest
import torch
import torch.nn.functional as F
from cases import case
from tiny_models import VOCAB, llama, parameters, rows
from torch import nn
from torch.testing import assert_close
from transformers import LlamaForCausalLM, RecurrentGemmaConfig, RecurrentGemmaForCausalLM

from qlens.core.supervised import Supervised
from qlens.data.collator import collate
from qlens.engine.models.backbone import Backbone, DamagedModel
from qlens.engine.models.head_capture import NoBackbone


def small(kind=LlamaForCausalLM):
    """A model with logits near zero, as at the start of training."""
    torch.manual_seed(0)
    return kind(llama().config)


def true_loss(model) -> float:
    batch = collate(rows(6))
    where = Supervised.of(batch)
    logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    return float(F.cross_entropy(where.take(logits), where.labels).detach())


class Behind(LlamaForCausalLM):
    """A model that does something with its head's outputs."""

    def forward(self, input_ids=None, attention_mask=None, labels=None, **kwargs):
        outputs = super().forward(input_ids=input_ids, attention_mask=attention_mask, **kwargs)
        outputs.logits = self.bend(outputs.logits)
        return outputs


class Capped(Behind):
    def bend(self, logits):
        return 30 * torch.tanh(logits / 30)


class Clamped(Behind):
    def bend(self, logits):
        return logits.clamp(-50, 50)


class Tempered(Behind):
    """A factor that is still 1, and would be trained."""

    def __init__(self, config):
        super().__init__(config)
        self.late = nn.Parameter(torch.ones(()))

    def bend(self, logits):
        return logits * self.late


class Floored(Behind):
    """Logits far below the largest are cut off: there are none at the start."""

    def bend(self, logits):
        return torch.where(logits < logits.amax(-1, keepdim=True) - 100, -torch.inf, logits)


def batch_of(count=2):
    return {name: value for name, value in collate(rows(count)).items() if name != "labels"}


def test_soft_caps_are_found_at_small_head_outputs():
    for kind in (Capped, Clamped, Floored):
        with pytest.raises(NoBackbone, match="its logits are not its head's"):
            Backbone(small(kind), batch_of())
    with pytest.raises(NoBackbone, match="depend on more than its head's output: on late"):
        Backbone(small(Tempered), batch_of())
    assert Backbone(small(), batch_of()).softcap is None


def test_a_model_that_caps_under_a_name_of_its_own_is_trained_with_the_cap(make):
    ends = []
    for fused in (None, False):
        trainer = make("sft", model=small(Capped), fused=fused, steps=3)
        trainer.train()
        trainer.model.lm_head.weight.data.mul_(1000)
        trainer.train()
        ends.append(parameters(trainer.model))
        assert trainer.evaluate(rows(6))["eval_loss"] == pytest.approx(true_loss(trainer.model), rel=1e-5)
    assert torch.equal(*ends)


def test_a_cap_under_another_name_in_use_is_fused():
    torch.manual_seed(0)
    shape = dict(hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, vocab_size=VOCAB)
    config = RecurrentGemmaConfig(**shape, lru_width=16, block_types=("recurrent",), logits_soft_cap=30.0)
    assert Backbone(RecurrentGemmaForCausalLM(config), batch_of()).softcap == 30.0


def test_a_change_after_the_head_during_a_run_is_detected(make, caplog):
    def suppress(module, args, out):
        out = out.clone()
        out[..., 7] = -50.0
        return out

    def hooked(model):
        model.lm_head.register_forward_hook(lambda module, args, out: 0.1 * out)

    changes = {
        "a hook on the head": hooked,
        "a hook on one entry": lambda model: model.lm_head.register_forward_hook(suppress),
        "a hook on the model": lambda model: model.register_forward_hook(
            lambda module, args, out: out.__setitem__("logits", 0.5 * out["logits"]) or out
        ),
        "a new head": lambda model: model.set_output_embeddings(nn.Linear(16, VOCAB, bias=True)),
        "a wider head": lambda model: model.resize_token_embeddings(VOCAB + 8, mean_resizing=False),
        "a cap in the configuration that the model has not": lambda model: setattr(
            model.config, "final_logit_softcapping", 3.0
        ),
    }
    for name, change in changes.items():
        trainer = make("sft", model=llama(), steps=2)
        trainer.train()
        assert trainer._student.backbones.of(trainer.model, batch_of()) is not None, name
        change(trainer.model)
        assert trainer.evaluate(rows(6))["eval_loss"] == pytest.approx(true_loss(trainer.model), rel=1e-5), name
        before = parameters(trainer.model)
        trainer.train()
        assert not torch.equal(before, parameters(trainer.model)), name


def test_changes_of_the_logits_in_the_verified_pass_are_detected(make, caplog):
    class Switched(Behind):
        factor = 1.0

        def bend(self, logits):
            return self.factor * logits

    trainer = make("sft", model=small(Switched), steps=1)
    trainer.train()
    trainer.model.factor = 0.1  # nothing that a fingerprint of head, hooks and configuration shows
    with caplog.at_level(logging.WARNING, "qlens"):
        assert trainer.evaluate(rows(6))["eval_loss"] == pytest.approx(true_loss(trainer.model), rel=1e-5)
    assert "the configuration says 32, the model makes 3.2" in caplog.text
    insists = make("sft", model=small(Switched), steps=1, fused=True)
    insists.train()
    insists.model.factor = 0.1
    with pytest.raises(NoBackbone, match="fused=True, but there are only whole logits of the model"):
        insists.evaluate(rows(6))


def test_mixed_precision_is_fused_and_right(make):
    for spec in ["dft", "kd", "target_sft"]:
        with case(spec):
            runs = []
            for fused in (True, False):
                trainer = make(spec, model=llama(), teacher=llama(1), fused=fused, bf16=True, steps=3)
                start = parameters(trainer.model)
                trainer.train()
                losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
                runs.append((parameters(trainer.model) - start, torch.tensor(losses)))
            (change, losses), (plain_change, plain_losses) = runs
            assert change.dtype == torch.float32 and plain_change.norm() > 1e-2
            assert float((change - plain_change).norm() / plain_change.norm()) < 0.02
            assert_close(losses, plain_losses, rtol=2e-3, atol=1e-4)


def test_an_adapted_head_is_reported():
    class Adapter(nn.Linear):
        def __init__(self, base):
            super().__init__(base.in_features, base.out_features)
            self.base_layer = base

    model = llama()
    model.set_output_embeddings(Adapter(model.lm_head))
    with pytest.raises(NoBackbone, match="its output embedding is a Adapter of .*, an adapted one"):
        Backbone(model, batch_of())


def test_a_model_whose_logits_are_nan_is_damaged_and_one_with_nan_at_some_tokens_is_not():
    ids = {"input_ids": torch.tensor([[3, 4, 5, 2]])}
    some, every = llama(), llama()
    some.model.norm.register_forward_hook(
        lambda module, args, output: output.index_fill(1, torch.tensor([3]), torch.nan)
    )
    assert Backbone(some, ids).head is some.lm_head
    every.lm_head.weight.data[:] = torch.nan
    with pytest.raises(DamagedModel, match="LlamaForCausalLM are NaN at every token"):
        Backbone(every, ids)
