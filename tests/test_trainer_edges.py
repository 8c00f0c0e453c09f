"""QTrainer at the edges: models in another mode or with another signature, unsigned labels, a method that is exchanged."""

import pytest
import torch
from tiny import VOCAB, llama, rows, trainer_in
from transformers import LlamaForCausalLM, MixtralConfig, MixtralForCausalLM

import qlens
from qlens.batching import Supervised, collate
from qlens.errors import InputError


def weights(model):
    return torch.cat([value.detach().flatten() for value in model.parameters()])


def always_in_evaluation(kind):
    return type(kind.__name__, (kind,), {"train": lambda self, mode=True: kind.train(self, False)})


def mixtral(kind):
    torch.manual_seed(0)
    shape = dict(hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2)
    experts = dict(num_key_value_heads=2, num_local_experts=4, output_router_logits=True, router_aux_loss_coef=0.5)
    return kind(MixtralConfig(vocab_size=VOCAB, **shape, **experts))


def as_written(model, inputs, return_outputs=False, num_items_in_batch=None):
    return model(**inputs).loss


def test_penalty_and_router_loss_are_trained_in_a_model_that_stays_in_evaluation_mode(tmp_path):
    start = llama()
    for fused in (None, False):
        found = []
        for kind in (LlamaForCausalLM, always_in_evaluation(LlamaForCausalLM)):
            model = kind(start.config)
            model.load_state_dict(start.state_dict())
            trainer_in(tmp_path, "rpsft(weight=10.0)", model=model, fused=fused, steps=4).train()
            found.append(weights(model))
        assert torch.equal(*found) and not torch.equal(found[0], weights(start))
    for variant in ("sft", as_written):
        found = []
        for kind in (MixtralForCausalLM, always_in_evaluation(MixtralForCausalLM)):
            model = mixtral(kind)
            trainer_in(tmp_path, variant, model=model).train()
            found.append(weights(model))
        torch.testing.assert_close(*found)


def test_a_model_whose_signature_has_no_labels_is_evaluated(tmp_path):
    class Unnamed(LlamaForCausalLM):
        def forward(self, input_ids=None, attention_mask=None, **given):
            return super().forward(input_ids=input_ids, attention_mask=attention_mask, **given)

    model = Unnamed(llama().config)
    model.load_state_dict(llama().state_dict())
    got = trainer_in(tmp_path, "dft", model=model).evaluate(rows(4))["eval_loss"]
    assert got == pytest.approx(trainer_in(tmp_path, "dft").evaluate(rows(4))["eval_loss"])
    wrapped = trainer_in(tmp_path, "dft", model=torch.nn.DataParallel(llama()), remove_unused_columns=False)
    assert wrapped.evaluate(rows(4))["eval_loss"] == pytest.approx(got)


def test_an_evaluation_without_labels_is_refused_and_a_prediction_is_not(tmp_path):
    def without_labels(examples):
        return {name: value for name, value in collate(examples).items() if name != "labels"}

    trainer = trainer_in(tmp_path, "sft", data_collator=without_labels)
    with pytest.raises(InputError, match="has no loss: its batches lack one of labels"):
        trainer.evaluate(rows(4))
    assert len(trainer.predict(rows(4)).predictions) == 4


def test_labels_of_an_unsigned_type_are_refused_where_some_may_be_masked(tmp_path):
    hidden, head = torch.randn(2, 4), torch.randn(256, 4)
    for dtype in (torch.uint8, torch.uint16, torch.uint64):
        labels = torch.tensor([156, 3]).to(dtype)
        with pytest.raises(InputError, match="in which -100 is some other id"):
            qlens.fused_loss("sft", hidden, head, labels)
        with pytest.raises(InputError, match="in which -100 is some other id"):
            Supervised(labels[None])
        tokens = qlens.Tokens(logits=hidden @ head.T, labels=labels)
        wanted = torch.nn.functional.cross_entropy(hidden @ head.T, torch.tensor([156, 3]), reduction="none")
        torch.testing.assert_close(qlens.get("sft").loss(tokens), wanted)
    signed = [qlens.fused_loss("sft", hidden, head, torch.tensor([-100, 3]).to(t)) for t in (torch.int8, torch.long)]
    assert torch.equal(*signed)


def test_the_method_of_a_trainer_is_not_exchanged(tmp_path):
    trainer = trainer_in(tmp_path, as_written)
    with pytest.raises(InputError, match="for as long as this Trainer lives: make another"):
        trainer.variant = "dft"
    assert trainer.variant.name == "as_written"
