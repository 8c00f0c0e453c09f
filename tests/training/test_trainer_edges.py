"""Edge cases of QTrainer: models in evaluation mode, other signatures, unsigned labels, a method that is reassigned."""

import pytest
import torch
from tiny_models import VOCAB, llama, parameters, rows, trainer_in, without_labels
from transformers import LlamaForCausalLM, MixtralConfig, MixtralForCausalLM
from user_methods import user_method

import qlens
from qlens.core.errors import InputError
from qlens.core.supervised import Supervised
from qlens.data.collator import collate
from qlens.engine.heads import TopK


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
        ends = []
        for kind in (LlamaForCausalLM, always_in_evaluation(LlamaForCausalLM)):
            model = kind(start.config)
            model.load_state_dict(start.state_dict())
            trainer_in(tmp_path, "rpsft(weight=10.0)", model=model, fused=fused, steps=4).train()
            ends.append(parameters(model))
        assert torch.equal(*ends) and not torch.equal(ends[0], parameters(start))
    for variant in ("sft", as_written):
        ends = []
        for kind in (MixtralForCausalLM, always_in_evaluation(MixtralForCausalLM)):
            model = mixtral(kind)
            trainer_in(tmp_path, variant, model=model).train()
            ends.append(parameters(model))
        torch.testing.assert_close(*ends)


def test_a_model_whose_signature_has_no_labels_is_evaluated(tmp_path):
    class Unnamed(LlamaForCausalLM):
        def forward(self, input_ids=None, attention_mask=None, **kwargs):
            return super().forward(input_ids=input_ids, attention_mask=attention_mask, **kwargs)

    model = Unnamed(llama().config)
    model.load_state_dict(llama().state_dict())
    got = trainer_in(tmp_path, "dft", model=model).evaluate(rows(4))["eval_loss"]
    assert got == pytest.approx(trainer_in(tmp_path, "dft").evaluate(rows(4))["eval_loss"])
    wrapped = trainer_in(tmp_path, "dft", model=torch.nn.DataParallel(llama()), remove_unused_columns=False)
    assert wrapped.evaluate(rows(4))["eval_loss"] == pytest.approx(got)


def test_an_evaluation_without_labels_is_refused_and_a_prediction_is_not(tmp_path):
    trainer = trainer_in(tmp_path, "sft", data_collator=without_labels)
    with pytest.raises(InputError, match="has no loss: its batches lack one of .'labels'."):
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
        expected = torch.nn.functional.cross_entropy(hidden @ head.T, torch.tensor([156, 3]), reduction="none")
        torch.testing.assert_close(qlens.get("sft").loss(tokens), expected)
    signed = [qlens.fused_loss("sft", hidden, head, torch.tensor([-100, 3]).to(t)) for t in (torch.int8, torch.long)]
    assert torch.equal(*signed)


def test_the_method_of_a_trainer_is_read_only(tmp_path):
    trainer = trainer_in(tmp_path, as_written)
    with pytest.raises(InputError, match="for as long as this Trainer lives: make another"):
        trainer.variant = "dft"
    assert trainer.variant.name == "as_written"


def test_values_that_a_column_cannot_hold_are_refused():
    row = {"input_ids": [1, 2, 3], "labels": [1, 2, 3]}
    for name, value in (
        ("labels", [1.5, 2, 3]),
        ("input_ids", [1.9, 2, 3]),
        ("pair", 1.2),
        ("critical", [2, 0.5, 0]),
        ("critical", [0, -1, 0]),
        ("weight", "123"),
    ):
        with pytest.raises(InputError, match=f"{name} must hold"):
            collate([{**row, name: value}])
    assert collate([{**row, "critical": [1, 0, 1.0]}])["critical"].tolist() == [[True, False, True]]


def test_invalid_targets_and_top_k_teachers_are_refused():
    logits, labels = torch.randn(6, 9), torch.arange(6)
    tokens = qlens.Tokens(logits=logits, labels=labels)
    for build, what in (
        (lambda: qlens.Target.mix(tokens, trust=float("nan"), residual="student"), "trust is NaN"),
        (lambda: qlens.Target.mix(tokens, trust=0.5, residual=logits), "residual must be probabilities"),
        (lambda: qlens.Target.dense(tokens, logits.softmax(-1), scale=-1.0), "scale must be finite and at least 0"),
    ):
        with pytest.raises(InputError, match=what):
            build()
    hidden, head = torch.randn(6, 4), torch.randn(9, 4)
    for ids, p, what in (([0, 0], 0.5, "an id twice"), ([0, 1], 0.9, "more than 1"), ([0, 1], float("nan"), "NaN")):
        teacher = TopK(torch.tensor([ids] * 6), torch.full((6, 2), p).log(), "student")
        with pytest.raises(InputError, match=what):
            qlens.fused_loss("kd", hidden, head, labels, teacher=teacher)


def test_a_mixture_without_a_printed_loss_has_the_cross_entropy_of_its_target():
    def mixed(tokens):
        return qlens.Target.mix(tokens, trust=tokens.label_probs, residual=tokens.teacher.softmax(-1))

    structure = qlens.GeometricMixture("teacher")
    variant = user_method(mixed, needs=("teacher",), structure=structure, scope="token")
    draw = torch.Generator().manual_seed(0)
    hidden, head, teacher = (torch.randn(*s, generator=draw, dtype=torch.float64) for s in ((8, 4), (40, 4), (8, 40)))
    hidden.requires_grad_()
    labels, logits = torch.arange(8), hidden @ head.T
    q = variant.target(qlens.Tokens(logits=logits.detach(), labels=labels, teacher=teacher)).q
    expected = -(q * logits.log_softmax(-1)).sum(-1).mean()
    got = qlens.fused_loss(variant, hidden, head, labels, teacher=teacher)
    torch.testing.assert_close(got, expected)
    torch.testing.assert_close(*(torch.autograd.grad(loss, hidden)[0] for loss in (got, expected)))
