"""Benchmarks of training steps and of parallel jobs, and the command line of all benchmarks."""

import argparse
import json
import logging
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from joblib import cpu_count
from joblib.externals.loky import get_reusable_executor
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

from qlens.analysis.benchmarks.engine import draw_engine, engine, show_engine
from qlens.analysis.benchmarks.lens import lens, show_lens
from qlens.analysis.benchmarks.real_text import real_text
from qlens.analysis.compare.environments import LabSource
from qlens.analysis.compare.jobs import Job
from qlens.analysis.compare.recipes import Recipe
from qlens.analysis.compare.schedule import run_all
from qlens.core import progress
from qlens.data.collator import collate
from qlens.lab import SETTINGS, build
from qlens.registry import get
from qlens.training.trainer import QTrainer

JOBS = 16
THROUGHPUT = 1.6
"""Lower limit for the throughput of parallel jobs on two cores, against one process."""
LIMIT = 1.1
"""Upper limit for the time of a step of QTrainer with ``sft``, against the plain Trainer."""

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


class StepTimer(TrainerCallback):
    """Seconds of every optimizer step, forward and backward passes included; ``wait`` waits for the device."""

    def __init__(self, wait: Callable[[], None] = lambda: None):
        self.seconds: list[float] = []
        self.wait = wait

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Start the clock."""
        self.wait()
        self.began = time.perf_counter()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Stop the clock."""
        self.wait()
        self.seconds.append(time.perf_counter() - self.began)


def step(repeats: int = 9, steps: int = 8) -> list[dict[str, Any]]:
    """Seconds per training step of the plain Trainer and of QTrainer with sft, interleaved, on the same model and data.

    The time of a run is the median over its steps but the first two.

    Returns:
        a row per case: its name, medians over the repeats, and the median ratio of the repeats.
    """
    rows = []
    for name, (shape, data) in CASES.items():
        seconds: dict[str, list[float]] = {"trainer": [], "qlens": []}
        for repeat in track(range(repeats), description=name):
            for kind in sorted(seconds, reverse=repeat % 2 == 0):  # alternates the order
                seconds[kind].append(statistics.median(_run(kind, shape, steps, **data)[2:]))
        medians = {kind: statistics.median(values) for kind, values in seconds.items()}
        ratios = [qlens / plain for qlens, plain in zip(seconds["qlens"], seconds["trainer"], strict=True)]
        rows.append({"case": name, **medians, "ratio": statistics.median(ratios)})
    return rows


def _run(kind: str, shape: dict[str, Any], steps: int, batch: int, length: int) -> list[float]:
    """Seconds of every step of one short training run."""
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(max_position_embeddings=length, **shape))
    ids = torch.randint(shape["vocab_size"], (batch * steps, length)).tolist()
    examples = [{"input_ids": row, "labels": row} for row in ids]  # no masked rows to drop: the worst case for qlens
    timer = StepTimer()
    with tempfile.TemporaryDirectory() as folder:
        args = TrainingArguments(
            folder, per_device_train_batch_size=batch, max_steps=steps, report_to=[], disable_tqdm=True,
            logging_strategy="no", save_strategy="no", use_cpu=True,
        )  # fmt: skip
        common = dict(model=model, args=args, train_dataset=examples, callbacks=[timer], data_collator=collate)
        trainer = Trainer(**common) if kind == "trainer" else QTrainer(variant="sft", **common)
        trainer.remove_callback(PrinterCallback)
        trainer.train()
    return timer.seconds


def show_step(rows: list[dict[str, Any]]) -> None:
    """Print the step benchmark as a table."""
    table = Table(title="milliseconds per training step (medians)", caption=f"limit: ratio at most {LIMIT}")
    for column in ("case", "Trainer", "QTrainer sft", "ratio"):
        table.add_column(column, justify="left" if column == "case" else "right", no_wrap=True)
    for row in rows:
        times = [f"{1000 * row[kind]:.1f}" for kind in ("trainer", "qlens")]
        table.add_row(row["case"], *times, f"{row['ratio']:.3f}")
    Console().print(table)


def jobs(repeats: int) -> list[dict[str, Any]]:
    """Seconds for the jobs of a comparison in one process and in parallel ones, interleaved; worker start-up counts.

    Returns:
        one row: the number of processes, medians over the repeats, and the median ratio (the gain in throughput).
    """
    setting, processes = SETTINGS["strong-prior"], cpu_count()
    build([setting])
    rates: dict[str, Any] = {"source": LabSource(setting), "learning_rate": 3e-3, "reads": False}
    seconds: dict[int, list[float]] = {1: [], processes: []}
    for repeat in range(repeats):
        for number in sorted(seconds, reverse=repeat % 2 == 1):
            with tempfile.TemporaryDirectory() as folder:
                jobs = [
                    Job(folder=Path(folder), method=name, recipe=Recipe(get(name)), seed=seed, **rates)
                    for seed in range(JOBS // 2)
                    for name in ("sft", "target_sft")
                ]
                began = time.perf_counter()
                description = f"{number} process{'es' * (number > 1)}"
                for _ in progress.track(run_all(jobs, number), len(jobs), description):
                    pass
                seconds[number].append(time.perf_counter() - began)
                if missing := [job.name for job in jobs if job.finished() is None]:
                    raise RuntimeError(f"{len(missing)} jobs failed, {missing[0]} among them")
            get_reusable_executor().shutdown(wait=True)
    ratios = [alone / together for alone, together in zip(seconds[1], seconds[processes], strict=True)]
    medians = {"alone": statistics.median(seconds[1]), "together": statistics.median(seconds[processes])}
    return [{"processes": processes, **medians, "ratio": statistics.median(ratios)}]


def show_jobs(rows: list[dict[str, Any]]) -> None:
    """Print the jobs benchmark as a table."""
    table = Table(title=f"seconds for {JOBS} jobs (medians)", caption=f"limit on 2 cores: ratio at least {THROUGHPUT}")
    for column in ("processes", "one", "all", "ratio"):
        table.add_column(column, justify="right")
    for row in rows:
        table.add_row(str(row["processes"]), f"{row['alone']:.1f}", f"{row['together']:.1f}", f"{row['ratio']:.2f}")
    Console().print(table)


BENCHMARKS: dict[str, tuple[Callable, Callable, int]] = {
    "step": (step, show_step, 9),
    "jobs": (jobs, show_jobs, 3),
    "lens": (lens, show_lens, 5),
    "engine": (engine, show_engine, 5),
}
"""Benchmarks by name: the measuring function, the printing one, and the usual number of repeats."""


def main(argv: list[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(prog="python -m qlens.analysis.benchmarks.bench", description=__doc__)
    parser.add_argument("benchmark", choices=sorted(BENCHMARKS))
    parser.add_argument("--repeats", type=int, help="interleaved repeats (step: 9, lens and engine: 5, jobs: 3)")
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="threads of torch")
    parser.add_argument("--out", type=Path, help="a folder for the engine's JSON and figure")
    parser.add_argument(
        "--model", help="a Hugging Face folder; with lens: measured on a text too; with step: against TRL"
    )
    parser.add_argument("--data", help="with --model: JSON Lines")
    options = parser.parse_args(argv)
    torch.set_num_threads(options.threads)
    logging.getLogger("transformers").setLevel(logging.ERROR)
    measure, show, usual = BENCHMARKS[options.benchmark]
    if options.out is not None and options.benchmark != "engine":
        parser.error("--out goes with engine, the only benchmark that has a figure")
    if options.model is not None and options.benchmark == "step":
        from qlens.analysis.benchmarks.trl_steps import show_trl_steps, trl_steps

        rows = trl_steps(options.model, repeats=options.repeats or 3)
        print(json.dumps(rows, indent=2)) if options.json else show_trl_steps(rows)
        return
    if (options.model is None) != (options.data is None) or (options.model and options.benchmark != "lens"):
        parser.error("--model and --data go together with lens; --model alone goes with step")
    rows = measure(repeats=options.repeats or usual)
    if options.model is not None:
        rows += real_text(options.model, options.data)
    if options.out is not None:
        from qlens.analysis.plots.save import save_figure

        options.out.mkdir(parents=True, exist_ok=True)
        (options.out / "engine.json").write_text(json.dumps(rows, indent=2) + "\n", encoding="utf-8")
        figure, frame = draw_engine(rows)
        save_figure(figure, options.out / "engine.png", frame)
    print(json.dumps(rows, indent=2)) if options.json else show(rows)


if __name__ == "__main__":
    main()
