"""Pairs of a chosen and a rejected answer: equal to trl.DPOTrainer, in QSFTTrainer and in QTrainer."""

import pytest
import torch
from cases import case
from datasets import Dataset
from peft import LoraConfig
from tiny_models import BY_SGD, MARKED, letters, llama, parameters, steps_of
from torch.testing import assert_close
from trl import DPOConfig, DPOTrainer

from qlens.core.errors import InputError

PAIRS = [
    {"prompt": f"say {word}", "chosen": word, "rejected": word[::-1] * (1 + n % 2)}
    for n, word in enumerate(("hello", "lamp", "tree", "xyz", "quick", "brown"))
]


def in_turns(pairs):
    return [
        {name: [{"role": "user" if name == "prompt" else "assistant", "content": text}] for name, text in pair.items()}
        for pair in pairs
    ]


def by_trl(folder, pairs, template, max_length, accumulate=1, batch=2, peft=None):
    args = DPOConfig(
        str(folder), per_device_train_batch_size=batch, gradient_accumulation_steps=accumulate, max_steps=2,
        bf16=False, activation_checkpointing=False, max_length=max_length, **BY_SGD,
    )  # fmt: skip
    trainer = DPOTrainer(
        llama(context=256), ref_model=None if peft else llama(2, context=256), args=args, peft_config=peft,
        train_dataset=Dataset.from_list(pairs), processing_class=letters(template),
    )  # fmt: skip
    trainer.train()
    return trainer


@pytest.mark.filterwarnings("ignore::FutureWarning")  # of TRL with newer transformers
def test_dpo_equals_that_of_trl(train, tmp_path):
    for pairs, template in ((PAIRS, None), (in_turns(PAIRS), MARKED)):
        for options in (
            dict(),
            dict(max_length=12 if template is None else 18),
            dict(batch=1, accumulate=2),
            dict(fused=False),
        ):
            with case(f"{'turns' if template else 'text'}, {options}"):
                other = by_trl(
                    tmp_path, pairs, template, options.get("max_length", 1024), accumulate=options.get("accumulate", 1),
                    batch=options.get("batch", 2),
                )  # fmt: skip
                mine = train(
                    "qlens", pairs, variant="dpo", reference=llama(2, context=256), template=template, **options
                )
                for ours, theirs in zip(steps_of(mine), steps_of(other), strict=True):
                    assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-4)
                    assert ours["grad_norm"] == pytest.approx(theirs["grad_norm"], rel=1e-4)
                assert_close(parameters(mine.model), parameters(other.model), rtol=1e-4, atol=1e-5)
                assert float((parameters(mine.model) - parameters(llama(context=256))).norm()) > 1e-3


@pytest.mark.filterwarnings("ignore::FutureWarning")  # of TRL and peft with newer transformers
def test_dpo_under_lora_equals_that_of_trl(train, tmp_path):
    shape = dict(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM", init_lora_weights=False)
    other = by_trl(tmp_path, PAIRS, None, 1024, peft=LoraConfig(**shape))
    for fused in (True, False):
        mine = train("qlens", PAIRS, variant="dpo", peft_config=LoraConfig(**shape), fused=fused)
        for ours, theirs in zip(steps_of(mine), steps_of(other), strict=True):
            assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-4)
        assert_close(parameters(mine.model), parameters(other.model), rtol=1e-4, atol=1e-5)


def test_qtrainer_takes_the_same_pairs(train, make, tmp_path):
    reference = llama(2, context=256)
    expected = parameters(train("qlens", PAIRS, variant="dpo", reference=reference).model)
    folder = tmp_path / "model"
    llama(context=256).save_pretrained(folder)
    letters().save_pretrained(folder)
    for data in (PAIRS, Dataset.from_list(PAIRS)):
        for model in (llama(context=256), folder):
            options = {} if model is folder else {"processing_class": letters()}
            trainer = make("dpo", model=model, reference=reference, examples=data, batch=2, **options)
            trainer.train()
            assert_close(parameters(trainer.model), expected, rtol=1e-4, atol=1e-6)


def test_every_method_of_pairs_trains_on_pairs(train):
    for spec in ("simpo", "ipo", "orpo", "apo_zero"):
        with case(spec):
            start = llama(context=256)
            trainer = train("qlens", PAIRS, variant=spec, reference=llama(2, context=256), eval_dataset=None)
            assert torch.isfinite(parameters(trainer.model)).all()
            assert float((parameters(trainer.model) - parameters(start)).norm()) > 1e-4


def test_pairs_are_refused_where_they_do_not_fit(train, make):
    with pytest.raises(
        InputError, match="train dataset has rows of chosen and rejected, but dft is no method of pairs"
    ):
        train("qlens", PAIRS, steps=0, variant="dft")
    with pytest.raises(InputError, match="packing and padding_free join rows of one text, and a pair has two"):
        train("qlens", PAIRS, steps=0, variant="dpo", reference=llama(2), packing=True)
    with pytest.raises(InputError, match="no row of the train dataset is left"):
        train("qlens", PAIRS, steps=0, variant="dpo", reference=llama(2), max_length=4)
    with pytest.raises(InputError, match="there is no tokenizer: give processing_class=AutoTokenizer"):
        make("dpo", reference=llama(2), examples=PAIRS)
    with pytest.raises(InputError, match="dft is no method of pairs: take one, such as variant='dpo'"):
        make("dft", examples=PAIRS)
