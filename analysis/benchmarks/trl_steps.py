"""Training steps of QSFTTrainer against those of trl.SFTTrainer, on a user's model: seconds, interleaved, and peak memory.

Full fine-tuning and LoRA, float32 on the CPU, rows of random tokens that are all supervised, activations checkpointed as an
SFTConfig has it by default; peaks with plain SGD, so that no optimizer state hides a difference. TRL computes its metrics
(entropy, accuracy) at every step, qlens those of both at the steps that are logged, which these are not.
"""

import json
import logging
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from contextlib import redirect_stdout
from functools import partial
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from qlens.analysis.benchmarks.real_text import Peak
from qlens.core.progress import track
from qlens.data.base_models import with_adapters
from qlens.data.models import freeze, load_model, load_tokenizer

TIME, MEMORY = 1.05, 1.0
"""Limits: seconds of a step and peak memory, against TRL's own; with a teacher its forward pass is added to both."""
BATCH, LENGTH, STEPS, RANK = 4, 256, 3, 16
METHODS = {"full": ("sft", "dft", "eaft", "target_sft"), "LoRA": ("sft", "dft", "eaft", "target_sft", "asft_anchored")}
TEACHER, ADAPTERS_OFF, TRL = "target_sft", "asft_anchored", "trl"


def opened(folder: str, tuning: str) -> Any:
    """The model in float32, with adapters where they are trained."""
    model = load_model(folder, dtype="float32")
    return with_adapters(model, RANK) if tuning == "LoRA" else model


def trainer_of(method: str, model: Any, folder: str, out: str, teacher: Any = None) -> Any:
    """A trainer of TRL's, or of a method, on the benchmark's rows."""
    from datasets import Dataset
    from trl.trainer.sft_config import SFTConfig
    from trl.trainer.sft_trainer import SFTTrainer

    from qlens.training.sft_trainer import QSFTTrainer

    draw = torch.Generator().manual_seed(0)
    ids = torch.randint(0, model.config.vocab_size, (BATCH * STEPS, LENGTH), generator=draw).tolist()
    args = SFTConfig(
        out, per_device_train_batch_size=BATCH, max_steps=STEPS, optim="sgd", report_to=[], disable_tqdm=True, use_cpu=True,
        save_strategy="no", bf16=False, dataloader_pin_memory=False, learning_rate=1e-6,
    )  # fmt: skip
    options: dict[str, Any] = dict(
        model=model, args=args, train_dataset=Dataset.from_dict({"input_ids": ids, "labels": ids}),
        processing_class=load_tokenizer(folder),
    )  # fmt: skip
    if method == TRL:
        return SFTTrainer(**options)
    return QSFTTrainer(variant=method, teacher=teacher if method == TEACHER else None, fused=True, **options)


def trl_steps(folder: str, repeats: int) -> list[dict[str, Any]]:
    """A row per way of tuning and method: seconds a step, TRL's, their ratio, and peaks in GiB.

    Seconds are those of forward and backward pass (an optimizer's are the same for all): the trainers take steps on one
    model in turn, in one process, and the ratio is the median of those of each turn. Each peak is that of a training in a
    process of its own.
    """
    rows = []
    for tuning, methods in METHODS.items():
        seconds, forward = _seconds(folder, tuning, (TRL, *methods), repeats)
        peaks = {
            name: _peak(folder, tuning, name) for name in track((TRL, *methods), len(methods) + 1, f"{tuning}, memory")
        }
        for name in methods:
            ratios = [mine / other for mine, other in zip(seconds[name], seconds[TRL], strict=True)]
            own, trl = statistics.median(seconds[name]), statistics.median(seconds[TRL])
            extra = {
                "seconds": forward["seconds"] if name in (TEACHER, ADAPTERS_OFF) else 0.0,
                "GiB": forward["GiB"] if name == TEACHER else 0.0,  # a reference without adapters holds no weights
            }
            rows.append(
                {
                    "case": f"{tuning}, {name}", "seconds": own, "trl": trl, "ratio": statistics.median(ratios),
                    "limit": TIME + extra["seconds"] / trl, "GiB": peaks[name], "trl GiB": peaks[TRL],
                    "GiB limit": MEMORY * peaks[TRL] + extra["GiB"],
                }
            )  # fmt: skip
    return rows


def _seconds(
    folder: str, tuning: str, methods: tuple[str, ...], repeats: int
) -> tuple[dict[str, list[float]], dict[str, float]]:
    """Seconds of forward and backward pass by method, one per repeat; and seconds and GiB of the teacher's forward pass."""
    model, teacher, passes = opened(folder, tuning), freeze(load_model(folder, dtype="float32")), []
    weights = sum(value.numel() * value.element_size() for value in teacher.parameters()) / 2**30
    seconds: dict[str, list[float]] = {name: [] for name in methods}
    with tempfile.TemporaryDirectory() as out, _quiet():
        trainers = {name: trainer_of(name, model, folder, out, teacher) for name in methods}
        batches = {name: next(iter(trainer.get_train_dataloader())) for name, trainer in trainers.items()}
        for trainer in trainers.values():
            trainer.current_gradient_accumulation_steps = 1  # as in a run
        model.activation_checkpointing_enable()
        for turn in track(range(repeats + 1), repeats + 1, f"{tuning}, seconds"):
            for name in methods if turn % 2 else reversed(methods):
                elapsed = _elapsed(partial(trainers[name].training_step, model, dict(batches[name])))
                seconds[name] += [elapsed] if turn else []  # the first is warm-up
                model.zero_grad()
            with torch.no_grad():
                passes.append(_elapsed(partial(teacher.model, input_ids=batches[TRL]["input_ids"], use_cache=False)))
    return seconds, {"seconds": statistics.median(passes), "GiB": weights}


def _elapsed(run: Callable[[], Any]) -> float:
    began = time.perf_counter()
    run()
    return time.perf_counter() - began


def _peak(folder: str, tuning: str, method: str) -> float:
    """Peak memory of the training of one method in a process of its own, in GiB."""
    code = f"from qlens.analysis.benchmarks import trl_steps as b; b.measure({folder!r}, {tuning!r}, {method!r})"
    command = [sys.executable, "-c", f"import torch; torch.set_num_threads({torch.get_num_threads()}); {code}"]
    run = subprocess.run(command, check=True, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    return json.loads(run.stdout.splitlines()[-1])


def measure(folder: str, tuning: str, method: str) -> None:
    """Train one method and print its peak memory."""
    with tempfile.TemporaryDirectory() as out, redirect_stdout(sys.stderr), _quiet():
        teacher = load_model(folder, dtype="float32") if method == TEACHER else None
        trainer = trainer_of(method, opened(folder, tuning), folder, out, teacher)
        with Peak() as peak:
            trainer.train()
    print(json.dumps(peak.before + peak.above))


class _quiet(warnings.catch_warnings):
    """Context without the warnings and progress bars of other packages."""

    def __enter__(self) -> Any:
        import datasets

        datasets.disable_progress_bars()
        for name in ("transformers", "trl", "peft"):
            logging.getLogger(name).setLevel(logging.ERROR)
        entered = super().__enter__()
        warnings.simplefilter("ignore")
        return entered


def show_trl_steps(rows: list[dict[str, Any]]) -> None:
    """Print the benchmark as a table."""
    caption = (
        f"{BATCH} x {LENGTH} tokens; the forward pass of a teacher or reference is added to the limit of the ratio, "
        "the weights of a teacher to that of memory"
    )
    table = Table(title="training steps against those of trl.SFTTrainer", caption=caption)
    for column in ("", "s", "TRL", "ratio", "limit", "GiB", "limit GiB", "verdict"):
        table.add_column(column, justify="left" if column in ("", "verdict") else "right", no_wrap=True)
    for row in rows:
        over = [name for name, limit in (("ratio", "limit"), ("GiB", "GiB limit")) if row[name] > row[limit]]
        numbers = [f"{row[name]:.2f}" for name in ("seconds", "trl")] + [
            f"{row[name]:.3f}" for name in ("ratio", "limit")
        ]
        memory = [f"{row[name]:.2f}" for name in ("GiB", "GiB limit")]
        table.add_row(row["case"], *numbers, *memory, f"over in {' and '.join(over)}" if over else "within")
    Console(width=120).print(table)
