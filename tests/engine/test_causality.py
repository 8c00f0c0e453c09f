"""Causality: only models that predict a token from those before it are trained and read."""

import logging

import pytest
import torch
from tiny_models import VOCAB, letters, llama, rows, trainer_in
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    BertConfig,
    BertForMaskedLM,
    BertLMHeadModel,
    T5Config,
    T5ForConditionalGeneration,
)

import qlens
from qlens.core.errors import InputError

SHAPE = dict(hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2)


def bert(kind=BertForMaskedLM, **options):
    torch.manual_seed(0)
    return kind(BertConfig(vocab_size=VOCAB, max_position_embeddings=64, **SHAPE, **options))


def encoder_decoders():
    ends = dict(pad_token_id=1, bos_token_id=0, eos_token_id=2, decoder_start_token_id=2)
    torch.manual_seed(0)
    yield T5ForConditionalGeneration(
        T5Config(vocab_size=VOCAB, d_model=16, d_kv=8, d_ff=32, num_layers=1, num_heads=2, decoder_start_token_id=0)
    )
    yield BartForConditionalGeneration(
        BartConfig(
            vocab_size=VOCAB,
            d_model=16,
            encoder_ffn_dim=32,
            decoder_ffn_dim=32,
            encoder_layers=1,
            decoder_layers=1,
            encoder_attention_heads=2,
            decoder_attention_heads=2,
            max_position_embeddings=64,
            **ends,
        )
    )


def from_inputs(model, inputs, return_outputs=False, num_items_in_batch=None):
    return model(input_ids=inputs["input_ids"]).logits.logsumexp(-1).mean()


def test_a_model_that_sees_later_tokens_is_refused_before_the_first_step(tmp_path):
    for fused in (None, False):
        model = bert()
        before = [value.clone() for value in model.parameters()]
        with pytest.raises(InputError, match=r"the model \(BertForMaskedLM\) is no causal language model"):
            trainer_in(tmp_path, "sft", model=model, fused=fused).train()
        assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
    with pytest.raises(InputError, match="no causal language model"):
        trainer_in(tmp_path, from_inputs, model=bert()).train()
    with pytest.raises(InputError, match=r"the teacher \(BertForMaskedLM\) is no causal language model"):
        trainer_in(tmp_path, "kd", teacher=bert()).train()
    with pytest.raises(InputError, match="no causal language model"):
        trainer_in(tmp_path, "sft", model=bert(), eval_dataset=rows(3)).evaluate()


def test_an_encoder_decoder_is_refused_when_the_trainer_is_made(tmp_path):
    for model in encoder_decoders():
        with pytest.raises(InputError, match="is an encoder-decoder"):
            trainer_in(tmp_path, "sft", model=model)


def test_a_decoder_of_berts_kind_is_trained(tmp_path):
    logging.disable(logging.WARNING)
    try:
        trainer = trainer_in(tmp_path, "sft", model=bert(BertLMHeadModel, is_decoder=True))
        assert trainer.train().training_loss > 0
    finally:
        logging.disable(logging.NOTSET)


def test_reading_refuses_a_model_that_sees_later_tokens():
    tokenizer = letters()
    with pytest.raises(InputError, match=r"the model \(BertForMaskedLM\) is no causal"):
        qlens.Tokens.from_text(bert(), tokenizer, ["some text"])
    with pytest.raises(InputError, match=r"the teacher \(BertForMaskedLM\) is no causal"):
        qlens.Tokens.from_text(llama(), tokenizer, ["some text"], teacher=bert())
    assert len(qlens.Tokens.from_text(llama(), tokenizer, ["some text"])) == 9


def test_a_command_refuses_a_model_that_sees_later_tokens(run, tmp_path):
    bert().save_pretrained(tmp_path / "bert")
    letters().save_pretrained(tmp_path / "bert")
    (tmp_path / "data.jsonl").write_text('{"text": "abc def"}\n' * 4)
    for verb in (
        ["explain", "dft", "--json"],
        ["view"],
        ["compare", "--variants", "sft", "--steps", "1", "--seeds", "1", "--out", "R"],
    ):
        code, _, err = run(*verb, "--model", "bert", "--data", "data.jsonl")
        assert code == 2 and "is no causal language model" in err, err
