"""Ten training steps of QTrainer and of the plain Trainer, on random models of known shapes."""

import gc
import statistics
import tempfile
from collections.abc import Iterator
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM, PrinterCallback, Trainer, TrainingArguments

from qlens.analysis.benchmarks.gpu.kernels import synchronize
from qlens.data.collator import collate
from qlens.training.trainer import QTrainer

STEPS, WARM_UP = 10, 3
SIZES: dict[str, tuple[dict[str, Any], dict[str, int]]] = {
    "SmolLM2-135M": (
        dict(hidden_size=576, intermediate_size=1536, num_hidden_layers=30, num_attention_heads=9, num_key_value_heads=3,
             vocab_size=49_152, tie_word_embeddings=True),
        dict(batch=16, length=1024),
    ),
    "Qwen2.5-1.5B": (
        dict(hidden_size=1536, intermediate_size=8960, num_hidden_layers=28, num_attention_heads=12,
             num_key_value_heads=2, vocab_size=151_936, tie_word_embeddings=True),
        dict(batch=8, length=1024),
    ),
}  # fmt: skip
SMALL_SIZES: dict[str, tuple[dict[str, Any], dict[str, int]]] = {
    "2 x 32": (
        dict(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, vocab_size=512),
        dict(batch=2, length=32),
    ),
}
TRAINERS = ("Trainer", "QTrainer sft", "QTrainer dft", "QTrainer kd")


def steps(device: str, small: bool) -> Iterator[dict[str, Any]]:
    """A row per model and trainer: seconds of a step and peak memory; QTrainer kd has a teacher of the student's shape."""
    for size in SMALL_SIZES if small else SIZES:
        for trainer in TRAINERS:
            yield {"model": size, "trainer": trainer, "run": lambda s=size, t=trainer: train(s, t, device, small)}


def train(size: str, kind: str, device: str, small: bool) -> dict[str, Any]:
    """Median seconds of a step but the first ones, and peak MiB of the whole run."""
    from qlens.analysis.benchmarks.bench import StepTimer

    shape, data = (SMALL_SIZES if small else SIZES)[size]
    gc.collect()
    if device != "cpu":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    torch.manual_seed(0)
    ids = torch.randint(shape["vocab_size"], (data["batch"] * STEPS, data["length"])).tolist()
    examples = [{"input_ids": row, "labels": row} for row in ids]
    timer = StepTimer(lambda: synchronize(device))
    with tempfile.TemporaryDirectory() as folder:
        args = TrainingArguments(
            folder, per_device_train_batch_size=data["batch"], max_steps=STEPS, report_to=[], disable_tqdm=True,
            logging_strategy="no", save_strategy="no", bf16=device != "cpu", use_cpu=device == "cpu", learning_rate=1e-4,
        )  # fmt: skip
        common: dict[str, Any] = dict(
            model=random_model(shape, data["length"], device), args=args, train_dataset=examples, callbacks=[timer],
            data_collator=collate,
        )  # fmt: skip
        if kind == "Trainer":
            trainer = Trainer(**common)
        else:
            method = kind.split()[1]
            teacher = {"teacher": random_model(shape, data["length"], device)} if method == "kd" else {}
            trainer = QTrainer(variant=method, **teacher, **common)
        trainer.remove_callback(PrinterCallback)
        loss = trainer.train().training_loss
    peak = torch.cuda.max_memory_allocated() / 2**20 if device != "cpu" else None
    tokens = data["batch"] * data["length"]
    seconds = statistics.median(timer.seconds[WARM_UP:])
    return {
        "seconds": seconds, "peak": peak, "tokens per second": tokens / seconds, "loss": loss, "turns": timer.seconds,
    }  # fmt: skip


def random_model(shape: dict[str, Any], length: int, device: str) -> LlamaForCausalLM:
    """A model with random weights in float32 on the device; training casts to bfloat16."""
    with torch.device(device):
        return LlamaForCausalLM(LlamaConfig(max_position_embeddings=length, **shape))
