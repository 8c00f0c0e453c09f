"""Tiny models, tokenizers, rows and trainers for the tests."""

import random
import re

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, TrainingArguments

from qlens.core.supervised import IGNORE
from qlens.data.collator import collate
from qlens.training.trainer import QTrainer

CHARACTERS = ["<s>", "</s>", "|", *"\n abcdefghijklmnopqrstuvwxyz:"]
VOCAB = len(CHARACTERS)
MARKED = (
    "{% for m in messages %}{{ m.role[0] }}:{% if m.role == 'assistant' %}{% generation %}{{ m.content }}</s>"
    "{% endgeneration %}{% else %}{{ m.content }}\n{% endif %}{% endfor %}{% if add_generation_prompt %}a:{% endif %}"
)
"""A chat template that marks what the assistant generates."""


def llama(seed: int = 0, vocab: int = VOCAB, context: int = 32) -> LlamaForCausalLM:
    """A language model of one layer, as the seed made it."""
    torch.manual_seed(seed)
    shape = dict(hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2)
    model = LlamaForCausalLM(LlamaConfig(vocab_size=vocab, max_position_embeddings=context, **shape))
    model.lm_head.weight.data.mul_(20)  # sharp enough for the methods to differ
    return model


def letters(template: str | None = None, special: bool = True, order=CHARACTERS) -> PreTrainedTokenizerFast:
    """A tokenizer with a piece per character, longer pieces first."""
    longer = [re.escape(piece) for piece in order if len(piece) > 1]
    tokenizer = Tokenizer(models.WordLevel({piece: at for at, piece in enumerate(order)}, unk_token="|"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("|".join([*longer, r"[\s\S]"])), "isolated")
    tokenizer.decoder = decoders.Fuse()
    marks = dict(bos_token="<s>", eos_token="</s>") if special else {}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, chat_template=template, **marks)


def rows(count: int, seed: int = 0) -> list[dict]:
    """Rows of unequal lengths; the third has nothing supervised."""
    draw = random.Random(seed)
    ids = [[draw.randrange(VOCAB) for _ in range(draw.randint(4, 12))] for _ in range(count)]
    examples = [{"input_ids": row, "labels": [IGNORE, IGNORE, *row[2:]]} for row in ids]
    if count > 2:
        examples[2]["labels"] = [IGNORE] * len(ids[2])
    return examples


BY_SGD = dict(
    optim="sgd", learning_rate=0.1, lr_scheduler_type="constant", max_grad_norm=0.0, logging_steps=1, save_strategy="no",
    report_to=[], disable_tqdm=True, use_cpu=True, dataloader_pin_memory=False, seed=7,
)  # fmt: skip
"""Arguments of quiet trainings by SGD at a constant rate on the CPU."""


def trainer_in(
    folder, variant="sft", kind=QTrainer, model=None, examples=None, batch=4, accumulate=1, steps=2, **overrides
):
    """A QTrainer (or another kind) on the CPU, quiet, by SGD at a constant rate unless told otherwise."""
    names = (
        "teacher",
        "reference",
        "eval_dataset",
        "compute_metrics",
        "compute_loss_func",
        "data_collator",
        "old_every",
        "processing_class",
        "teacher_template",
        "callbacks",
        "fused",
        "log_every",
    )
    trainer_options = {name: overrides.pop(name) for name in names if name in overrides}
    options = dict(
        per_device_train_batch_size=batch, gradient_accumulation_steps=accumulate, max_steps=steps, **BY_SGD,
    ) | overrides  # fmt: skip
    trainer_options |= {"variant": variant} if kind is QTrainer else {"data_collator": collate}
    args = TrainingArguments(str(folder), **options)
    examples = rows(8) if examples is None else examples
    return kind(model=model or llama(), args=args, train_dataset=examples, **trainer_options)


def parameters(model) -> torch.Tensor:
    """All of them, in one row."""
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def steps_of(trainer) -> list[dict]:
    """The logs of its training steps."""
    return [entry for entry in trainer.state.log_history if "loss" in entry]


def without_labels(examples) -> dict:
    """A batch that lacks labels."""
    return {name: value for name, value in collate(examples).items() if name != "labels"}


class Recorder:
    """A collator that remembers its batches."""

    def __init__(self):
        self.batches = []

    def __call__(self, examples):
        self.batches.append(collate(examples))
        return self.batches[-1]
