"""Teachers of QSFTTrainer: without adapters, averages, and such that see more; their columns through TRL's preparation."""

import pytest
from cases import case
from peft import LoraConfig
from tiny_models import MARKED, letters, llama, parameters
from torch.testing import assert_close

import qlens
from qlens.core.errors import InputError

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")  # of peft with newer transformers


def lora():
    shape = dict(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM", init_lora_weights=False)
    return LoraConfig(**shape)


def test_methods_with_a_reference_need_none_under_lora(train, words):
    for spec in ("asft_anchored", "psft", "sft_kl(weight=0.5)"):
        with case(spec):
            ends = [
                parameters(train("qlens", words, variant=spec, peft_config=lora(), fused=f).model)
                for f in (True, False)
            ]
            assert_close(ends[0], ends[1], rtol=1e-4, atol=1e-6)
    ends = [
        parameters(train("qlens", words, variant="target_sft", teacher=teacher, peft_config=lora()).model)
        for teacher in (qlens.AdaptersOff(), llama(context=256))
    ]
    assert_close(ends[0], ends[1], rtol=1e-4, atol=1e-6)


def test_averages_train_under_every_option(train, words):
    for options in (
        {},
        dict(peft_config=lora()),
        dict(packing=True, max_length=48),
        dict(activation_checkpointing=True),
    ):
        with case(str(sorted(options))):
            ends = []
            for fused in (True, False):
                trainer = train(
                    "qlens", words, variant="kd_hybrid", teacher=qlens.EMA(0.5), fused=fused, steps=3, **options
                )
                ends.append(parameters(trainer.model))
            assert_close(ends[0], ends[1], rtol=1e-4, atol=1e-6)


def test_a_teacher_that_sees_more_is_the_same_in_both_trainers(train, make, words):
    rows = [{**row, "hint": f"it is {row['completion']}", "source": "x"} for row in words]
    turns = [
        {
            "prompt": [{"role": "user", "content": row["prompt"]}],
            "completion": [{"role": "assistant", "content": row["completion"]}],
            "hint": row["hint"],
        }
        for row in rows
    ]
    template = "{prompt} hint: {hint}"
    options = dict(variant="kd", teacher=llama(1, context=256), teacher_template=template, fused=True)
    mine = train("qlens", turns, template=MARKED, **options)
    shown = letters(MARKED).decode(mine.train_dataset[0]["teacher_prompt_ids"])
    assert shown == "u:say ab hint: it is ba\na:"
    both = [{"messages": [*row["prompt"], *row["completion"]], "hint": row["hint"]} for row in turns]
    other = make("kd", model=llama(context=256), examples=both, batch=2, processing_class=letters(MARKED),
                 **{name: options[name] for name in ("teacher", "teacher_template", "fused")})  # fmt: skip
    other.train()
    assert_close(parameters(mine.model), parameters(other.model), rtol=1e-4, atol=1e-6)
    train("qlens", rows, **options)
    with pytest.raises(InputError, match="teacher_prompt is one per row, and packing and padding_free join rows"):
        train("qlens", rows, packing=True, max_length=64, **options)
