"""Benchmarks that anybody can repeat: ``python -m qlens.analysis.bench step``."""

import argparse
import logging
import statistics
import tempfile
import time
from collections.abc import Callable
from typing import Any

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PrinterCallback,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

from qlens.batching import collate
from qlens.training import QTrainer

BAR = 1.1
"""A step of QTrainer with ``sft`` may cost this many times the same step of the plain Trainer."""

CASES = {
    "4 x 128, V 8192, batch 8 x 128": (
        dict(hidden_size=128, intermediate_size=384, num_hidden_layers=4, num_attention_heads=4, vocab_size=8192),
        dict(batch=8, length=128),
    ),
    "llama2xs-279k, V 512, batch 8 x 128": (
        dict(hidden_size=64, intermediate_size=192, num_hidden_layers=5, num_attention_heads=8, num_key_value_heads=4,
             vocab_size=512, tie_word_embeddings=True),
        dict(batch=8, length=128),
    ),
}  # fmt: skip


class Clock(TrainerCallback):
    """The seconds of every optimizer step, its forward and backward passes included."""

    def __init__(self):
        self.seconds: list[float] = []

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Start."""
        self.began = time.perf_counter()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Stop."""
        self.seconds.append(time.perf_counter() - self.began)


def step(repeats: int = 9, steps: int = 8) -> list[dict[str, Any]]:
    """Seconds per training step: the plain Trainer against QTrainer with sft, on the same model and data, interleaved.

    Every repeat trains both, one after the other; a run's time is the median over its steps but the first two. Returns
    one row per case: its name, each side's median over the repeats, and the median of the repeats' ratios.
    """
    rows = []
    for name, (shape, data) in CASES.items():
        seconds: dict[str, list[float]] = {"trainer": [], "qlens": []}
        for repeat in track(range(repeats), description=name):
            for kind in sorted(seconds, reverse=repeat % 2 == 0):  # whoever goes first changes
                seconds[kind].append(statistics.median(_run(kind, shape, steps, **data)[2:]))
        medians = {kind: statistics.median(values) for kind, values in seconds.items()}
        ratios = [ours / plain for ours, plain in zip(seconds["qlens"], seconds["trainer"], strict=True)]
        rows.append({"case": name, **medians, "ratio": statistics.median(ratios)})
    return rows


def _run(kind: str, shape: dict[str, Any], steps: int, batch: int, length: int) -> list[float]:
    """The seconds of every step of one short training run."""
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(max_position_embeddings=length, **shape))
    ids = torch.randint(shape["vocab_size"], (batch * steps, length)).tolist()
    examples = [{"input_ids": row, "labels": row} for row in ids]  # no masked rows to drop: the worst case for qlens
    clock = Clock()
    with tempfile.TemporaryDirectory() as folder:
        args = TrainingArguments(
            folder, per_device_train_batch_size=batch, max_steps=steps, report_to=[], disable_tqdm=True,
            logging_strategy="no", save_strategy="no", use_cpu=True,
        )  # fmt: skip
        common = dict(model=model, args=args, train_dataset=examples, callbacks=[clock], data_collator=collate)
        trainer = Trainer(**common) if kind == "trainer" else QTrainer(variant="sft", **common)
        trainer.remove_callback(PrinterCallback)
        trainer.train()
    return clock.seconds


def show_step(rows: list[dict[str, Any]]) -> None:
    """Print the step benchmark as a table."""
    table = Table(title="milliseconds per training step (medians)", caption=f"bar: ratio at most {BAR}")
    for column in ("case", "Trainer", "QTrainer sft", "ratio"):
        table.add_column(column, justify="left" if column == "case" else "right", no_wrap=True)
    for row in rows:
        times = [f"{1000 * row[kind]:.1f}" for kind in ("trainer", "qlens")]
        table.add_row(row["case"], *times, f"{row['ratio']:.3f}")
    Console().print(table)


BENCHMARKS: dict[str, tuple[Callable, Callable]] = {"step": (step, show_step)}
"""What can be measured, by name: a function that measures and one that prints its rows."""


def main(argv: list[str] | None = None) -> None:
    """Run the benchmarks named on the command line."""
    parser = argparse.ArgumentParser(prog="python -m qlens.analysis.bench", description=__doc__)
    parser.add_argument("benchmark", choices=sorted(BENCHMARKS))
    parser.add_argument("--repeats", type=int, default=9, help="interleaved repeats (9)")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="threads of torch")
    options = parser.parse_args(argv)
    torch.set_num_threads(options.threads)
    logging.getLogger("transformers").setLevel(logging.ERROR)
    measure, show = BENCHMARKS[options.benchmark]
    show(measure(repeats=options.repeats))


if __name__ == "__main__":
    main()
