"""Packed rows: the texts of a row are trained as texts in rows of their own."""

import pytest
import torch
from tiny_models import VOCAB, llama, parameters, rows
from torch.testing import assert_close
from transformers import (
    DataCollatorWithFlattening,
    GPT2Config,
    GPT2LMHeadModel,
    MambaConfig,
    MambaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    Trainer,
)

import qlens
from qlens.core.errors import InputError
from qlens.core.supervised import IGNORE, Supervised, restarts
from qlens.data.collator import collate
from qlens.data.from_text import token_batches


def texts(count: int) -> list[dict]:
    """Rows whose every token is a label, the first ones too, which nothing may be taught to predict."""
    return [{**row, "labels": row["input_ids"]} for row in rows(count)]


def pack(examples: list[dict], positions: bool = True) -> dict:
    """One example that holds several texts, told apart by position ids or by lengths."""
    sizes = [len(example["input_ids"]) for example in examples]
    joined = {name: [value for example in examples for value in example[name]] for name in examples[0]}
    if positions:
        return {**joined, "position_ids": [at for size in sizes for at in range(size)]}
    return {**joined, "seq_lengths": sizes}


def gpt2(seed: int = 0) -> GPT2LMHeadModel:
    torch.manual_seed(seed)
    shape = dict(n_positions=64, n_embd=16, n_layer=2, n_head=2)
    return GPT2LMHeadModel(GPT2Config(vocab_size=VOCAB, bos_token_id=0, eos_token_id=0, **shape))


def eager(seed: int = 0):
    model = llama(seed, context=64)
    model.set_attn_implementation("eager")
    return model


def mixtral(seed: int = 0) -> MixtralForCausalLM:
    torch.manual_seed(seed)
    shape = dict(
        hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=2
    )
    return MixtralForCausalLM(MixtralConfig(vocab_size=VOCAB, num_local_experts=4, **shape))


def gradient(trainer, batch) -> tuple[torch.Tensor, torch.Tensor]:
    """Loss and gradient of a batch, without dropout."""
    trainer.model.eval()
    trainer.model.zero_grad()
    loss = trainer.compute_loss(trainer.model, batch)
    loss.backward()
    return loss.detach(), torch.cat([p.grad.flatten() for p in trainer.model.parameters()])


@pytest.mark.parametrize(
    ("spec", "build", "fused"),
    [
        ("target_sft", llama, None),
        ("target_sft", llama, False),
        ("iw_sft", eager, None),
        ("dft", gpt2, None),
        ("kd", gpt2, False),
        ("r_drop", eager, False),
        ("psft", llama, None),
        ("sft", mixtral, None),
    ],
)
def test_packed_texts_are_trained_as_separate_rows(make, spec, build, fused):
    examples = texts(5)
    other_models = dict(teacher=build(1), reference=build(2))  # whose configurations ask for a cache
    trainer = make(spec, model=build(), fused=fused, examples=examples, **other_models)
    alone = gradient(trainer, trainer.data_collator(examples))
    packs = [pack(examples[:3]), pack(examples[3:], positions=False)]
    assert_close(gradient(trainer, trainer.data_collator(packs)), alone, rtol=1e-4, atol=1e-6)
    single = trainer.data_collator([pack(examples)])
    masked = {**single, "attention_mask": torch.ones_like(single["input_ids"])}  # as other collators make them
    shifted = {name: torch.cat([torch.zeros_like(v[:, :2]), v], 1) for name, v in masked.items()}
    shifted["labels"][:, :2] = IGNORE
    for batch in (single, masked, shifted):
        assert_close(gradient(trainer, batch), alone, rtol=1e-4, atol=1e-6)


def test_a_packed_run_equals_the_run_of_its_rows(make):
    examples = texts(8)
    plain = make("dft", examples=examples, batch=8)
    packs = make("dft", examples=[pack(examples[:3]), pack(examples[3:5]), examples[5], pack(examples[6:])], batch=4)
    for trainer in (plain, packs):
        trainer.train()
    assert_close(parameters(packs.model), parameters(plain.model), rtol=1e-4, atol=1e-6)


def test_transformers_flattened_batches_are_taken(make):
    examples = [{**row, "labels": [IGNORE, *row["input_ids"][1:]]} for row in texts(4)]
    trainer = make("sft", examples=examples)
    flat = DataCollatorWithFlattening(return_tensors="pt")(examples)
    assert_close(gradient(trainer, flat), gradient(trainer, collate(examples)), rtol=1e-4, atol=1e-6)
    options = dict(return_tensors="pt", return_position_ids=False, return_flash_attn_kwargs=True)
    with pytest.raises(InputError, match="packed by cu_seq_lens_q alone: position_ids"):
        gradient(trainer, DataCollatorWithFlattening(**options)(examples))


def test_sft_of_packed_rows_matches_transformers(make):
    examples = [{**row, "labels": [IGNORE, *row["input_ids"][1:]]} for row in texts(4)]
    packs = [pack(examples[:2]), pack(examples[2:])]
    trainer_of_packs, reference = make("sft", examples=packs, batch=2), make(kind=Trainer, examples=packs, batch=2)
    for trainer in (trainer_of_packs, reference):
        trainer.train()
    assert_close(parameters(trainer_of_packs.model), parameters(reference.model), rtol=1e-5, atol=1e-6)


def test_tokens_of_packed_rows_equal_those_of_the_rows():
    examples = texts(4)
    alone = next(token_batches(llama(), examples, 4, needs=("negatives",), teacher=llama(1)))
    packs = next(token_batches(llama(), [pack(examples)], 4, needs=("negatives",), teacher=llama(1)))
    for name in ("logits", "teacher", "labels", "sequence", "negatives"):
        assert_close(getattr(packs, name), getattr(alone, name), rtol=1e-4, atol=1e-5)


class Leaky(type(llama())):
    """A model whose attention looks over the boundaries, as some kernels do: a mask of ones takes the packing away."""

    def forward(self, input_ids=None, attention_mask=None, position_ids=None, **kwargs):
        ones = torch.ones_like(input_ids)
        return super().forward(input_ids=input_ids, attention_mask=ones, position_ids=position_ids, **kwargs)


def test_a_model_that_does_not_keep_texts_apart_is_refused(make):
    torch.manual_seed(0)
    mamba = MambaForCausalLM(MambaConfig(vocab_size=VOCAB, hidden_size=16, state_size=4, num_hidden_layers=1))
    packs = [pack(texts(4))] * 4
    with pytest.raises(InputError, match="the data are packed .* but the model takes no position_ids"):
        make("sft", model=mamba, examples=packs).train()
    for dtype in (torch.float32, torch.bfloat16):
        leaky, sound = Leaky(llama().config).to(dtype), llama().to(dtype)
        with pytest.raises(InputError, match=r"in the model .* a text sees those before it in its row"):
            make("sft", model=leaky, examples=packs).train()
        make("sft", model=sound, examples=packs, steps=1).train()
    leaky = Leaky(llama().config)
    with pytest.raises(InputError, match=r"in the model \(attention 'sdpa'\) a text sees those before it in its row"):
        make("sft", model=leaky, examples=packs).train()
    with pytest.raises(InputError, match="in the teacher .* a text sees those before it"):
        make("kd", teacher=Leaky(llama().config), examples=packs).train()
    make("sft", model=leaky, examples=texts(4)).train()  # rows of one text are as good as ever


def test_positions_that_are_not_packed_change_nothing(make):
    examples = texts(4)
    placed = [{**row, "position_ids": list(range(len(row["input_ids"])))} for row in examples]
    batch = collate(placed)
    assert batch["attention_mask"].shape == batch["position_ids"].shape
    trainer = make("dft", examples=placed)
    assert_close(gradient(trainer, batch), gradient(trainer, collate(examples)), rtol=1e-5, atol=1e-7)


def test_text_boundaries_are_found_from_position_ids():
    ids = torch.tensor([[2, 3, 4, 2, 3, 2, 2, 3]])  # some models count from 2
    assert restarts(ids).nonzero()[:, 1].tolist() == [0, 3, 5, 6]
    labels = torch.arange(10, 18)[None]
    assert Supervised(labels, position_ids=ids).labels.tolist() == [11, 12, 14, 17]


def test_collate_pads_packed_rows_so_that_padding_belongs_to_no_text():
    batch = collate([pack(texts(2)), texts(3)[2]])
    assert "attention_mask" not in batch
    short = len(texts(3)[2]["input_ids"])
    assert batch["position_ids"][1].tolist() == [*range(short), *[0] * (batch["input_ids"].shape[1] - short)]
    both = Supervised.of(batch)
    assert both.sequence.unique().numel() == 3 and len(both) == sum(len(row["input_ids"]) - 1 for row in texts(3))


def test_model_inputs_are_kept_or_refused(make):
    example = {"input_ids": [1, 2, 3], "labels": [1, 2, 3], "token_type_ids": [0, 1, 1], "id": 7, "text": "abc"}
    assert set(collate([example])) == {"input_ids", "labels", "attention_mask", "token_type_ids"}
    assert collate([example, {**example, "token_type_ids": [1, 0, 1]}])["token_type_ids"].tolist() == [
        [0, 1, 1],
        [1, 0, 1],
    ]
    wrong = {"input_ids": [1, 2, 3], "labels": [1, 2, 3]}
    cases = [
        ([wrong | {"position_ids": [0, 1]}], r"'position_ids' is an input of the model.* has list \[0, 1\] for 3 tokens"),
        ([wrong | {"token_type_ids": [0.5, 1, 1]}], "'token_type_ids' is an input of the model"),
        ([wrong | {"token_type_ids": [0, 0, 0]}, wrong], "'token_type_ids' .* one lacks it"),
        ([wrong | {"seq_lengths": [2, 2]}], r"seq_lengths must be lengths of texts that add up to 3 tokens, got \[2, 2\]"),
        ([wrong | {"position_ids": [0, 1, 0], "attention_mask": [1, 1, 1]}], None),
        ([wrong | {"input_ids": [1] * 6, "labels": [1] * 6, "position_ids": [0, 1, 0, 1, 2, 3],
                   "attention_mask": [1, 1, 1, 1, 0, 1]}], "attention_mask hides a token inside a text of packed row 0"),
    ]  # fmt: skip
    for examples, message in cases:
        if message is None:
            assert "attention_mask" not in collate(examples)
        else:
            with pytest.raises(InputError, match=message):
                collate(examples)
    embedded = [{**row, "inputs_embeds": [[0.5] * 16] * len(row["input_ids"])} for row in texts(4)]
    with pytest.raises(InputError, match="'inputs_embeds' is an input of the model"):
        make("sft", examples=embedded).train()


def test_pairs_in_one_packed_example_are_pairs_in_rows(make):
    examples = [{**row, "chosen": at % 2 == 0, "pair": at // 2} for at, row in enumerate(texts(8))]
    spread = [{**row, "chosen": [row["chosen"]] * len(row["labels"]), "pair": [row["pair"]] * len(row["labels"])}
              for row in examples]  # fmt: skip
    packs = [pack(spread[at : at + 2]) for at in range(0, 8, 2)]
    rows_, packed = (
        make("dpo", examples=data, batch=batch, accumulate=accumulate, reference=llama(2))
        for data, batch, accumulate in ((examples, 8, 1), (packs, 1, 4))
    )
    for trainer in (rows_, packed):
        trainer.train()
    assert_close(parameters(packed.model), parameters(rows_.model), rtol=1e-4, atol=1e-6)
    assert float((parameters(packed.model) - parameters(llama())).norm()) > 1e-3
    split = make("dpo", examples=examples, batch=1, reference=llama(2))
    with pytest.raises(InputError, match="pair .* needs both, in training within one micro-batch"):
        split.train()
    assert qlens.get("dpo").scope == "pair"
