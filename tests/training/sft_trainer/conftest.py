"""Fixtures for the tests of QSFTTrainer: it and TRL's trainers, quiet, on the CPU, by SGD at a constant rate."""

import datasets
import pytest
from tiny_models import BY_SGD, letters, llama
from transformers.utils import logging as transformers_logging
from trl import SFTConfig, SFTTrainer

from qlens.training.sft_trainer import QSFTTrainer

datasets.disable_progress_bars()


@pytest.fixture
def words():
    """Prompts and completions of unequal lengths."""
    return [
        {"prompt": f"say {w}", "completion": w[::-1] * (1 + n % 3)}
        for n, w in enumerate("ab hello lamp tree x quick".split())
    ]


@pytest.fixture
def train(tmp_path):
    """Build a trainer of either kind and train it; with steps=0 it is only built."""

    def call(kind, rows, steps=2, model=None, template=None, batch=2, accumulate=1, **options):
        names = (
            "variant",
            "teacher",
            "reference",
            "teacher_template",
            "fused",
            "peft_config",
            "eval_dataset",
            "old_every",
            "callbacks",
        )
        own = {name: options.pop(name) for name in names if name in options}
        config = dict(
            per_device_train_batch_size=batch, gradient_accumulation_steps=accumulate, max_steps=max(steps, 1),
            bf16=False, activation_checkpointing=False, **BY_SGD,
        ) | options  # fmt: skip
        rows = datasets.Dataset.from_list(rows) if isinstance(rows, list) else rows
        transformers_logging.set_verbosity_error()
        trainer = {"trl": SFTTrainer, "qlens": QSFTTrainer}[kind](
            model=llama(context=256) if model is None else model, args=SFTConfig(str(tmp_path), **config),
            train_dataset=rows, processing_class=letters(template), **own,
        )  # fmt: skip
        if steps:
            trainer.train()
        return trainer

    return call
