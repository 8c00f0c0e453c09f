"""QSFTTrainer on SmolLM2: losses and gradients of TRL's, with LoRA, in the engine and by whole logits."""

import pytest
from datasets import Dataset
from peft import LoraConfig
from real_model import smollm2
from tiny_models import steps_of
from trl import SFTConfig, SFTTrainer

import qlens
from qlens.data.models import load_tokenizer

pytestmark = [pytest.mark.real, pytest.mark.filterwarnings("ignore")]

TALKS = Dataset.from_list(
    [
        {
            "prompt": [{"role": "user", "content": f"What is {n} + {n}?"}],
            "completion": [{"role": "assistant", "content": f"It is {2 * n}."}],
        }
        for n in range(3, 9)
    ]
)


def run(tmp_path, kind, steps=2, packing=False, **options):
    args = SFTConfig(
        str(tmp_path), max_steps=steps, per_device_train_batch_size=2, optim="sgd", learning_rate=1e-2, logging_steps=1,
        save_strategy="no", report_to=[], disable_tqdm=True, use_cpu=True, bf16=False, dataloader_pin_memory=False,
        loss_type=options.pop("loss_type", "nll"), packing=packing, max_length=128,
    )  # fmt: skip
    shape = dict(r=8, target_modules="all-linear", task_type="CAUSAL_LM", init_lora_weights=False)
    trainer = kind(
        str(smollm2()), args=args, train_dataset=TALKS, processing_class=load_tokenizer(smollm2()),
        peft_config=LoraConfig(**shape), **options,
    )  # fmt: skip
    trainer.train()
    return steps_of(trainer)


def test_steps_equal_those_of_trl(tmp_path):
    for loss, variant, packing in (("nll", "sft", False), ("dft", "dft", True)):
        theirs = run(tmp_path, SFTTrainer, loss_type=loss, packing=packing)
        for fused in (True, False):
            ours = run(tmp_path, qlens.QSFTTrainer, variant=variant, packing=packing, fused=fused)
            for one, two in zip(ours, theirs, strict=True):
                for name in ("loss", "grad_norm", "entropy", "mean_token_accuracy", "num_tokens"):
                    assert one[name] == pytest.approx(two[name], rel=2e-3), (variant, packing, fused, name)


def test_every_source_of_a_teacher_trains(tmp_path):
    for options in (
        dict(variant="target_sft", teacher=str(smollm2())), dict(variant="asft_anchored"), dict(variant="psft"),
        dict(variant="kd_hybrid", teacher=qlens.EMA(0.9)), dict(variant="target_sft", teacher=qlens.AdaptersOff()),
        dict(variant="kd", teacher=qlens.CurrentModel(), teacher_template="{prompt} The answer is: {completion}"),
    ):  # fmt: skip
        steps = run(tmp_path, qlens.QSFTTrainer, fused=True, **options)
        assert all(0 < step["nll"] < 20 and step["grad_norm"] > 0 for step in steps), options
