"""Fit: train a model in place for a number of steps, the same way everywhere, leaving no files behind."""

import gc
import random
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel, PrinterCallback, TrainerCallback, TrainingArguments

from qlens.core.errors import InputError, brief
from qlens.registry import Variant
from qlens.training.trainer import QTrainer


def fit(
    model: PreTrainedModel,
    examples: Sequence[Mapping[str, list[int]]],
    *,
    steps: int,
    batch_size: int,
    learning_rate: float,
    seed: int,
    variant: Variant | str = "sft",
    teacher: PreTrainedModel | None = None,
    reference: PreTrainedModel | None = None,
    tick: Callable[[], None] = lambda: None,
    callbacks: Sequence[TrainerCallback] = (),
) -> PreTrainedModel:
    """Train a model in place, on its own device, with QTrainer: AdamW, 5 % warm-up, linear decay.

    At one seed every method sees the same batches in the same order; ``tick`` is called after every step, and
    ``callbacks`` are the Trainer's. One fit at a time in a process: seed, threads and garbage collection are the process's.

    Raises:
        InputError: fewer than one step; what QTrainer raises.

    Example:
        >>> fit(model, examples, steps=100, batch_size=16, learning_rate=1e-3, seed=0, variant="dft")  # doctest: +SKIP
    """
    if not isinstance(steps, int) or isinstance(steps, bool) or steps < 1:
        raise InputError(f"steps must be a whole number, at least 1, got {brief(steps)}")
    with tempfile.TemporaryDirectory() as folder, isolated(seed):
        arguments = TrainingArguments(
            output_dir=folder,
            max_steps=steps,
            per_device_train_batch_size=batch_size,
            learning_rate=learning_rate,
            warmup_steps=max(1, steps // 20),
            adam_beta2=0.98,
            seed=seed,
            use_cpu=model.device.type == "cpu",
            logging_strategy="no",
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
        )
        trainer, frozen = None, gc.get_freeze_count() == 0
        if frozen:  # unless somebody else has, whose objects unfreezing would take in
            gc.freeze()  # a Trainer ends by collecting garbage: that of this run, not in all that was ever imported
        try:
            trainer = QTrainer(
                model=model,
                args=arguments,
                variant=variant,
                teacher=teacher,
                reference=reference,
                train_dataset=examples,
                callbacks=[Ticker(tick), *callbacks],
            )
            trainer.remove_callback(PrinterCallback)
            trainer.train()
        finally:
            del trainer  # a cycle that holds model and optimizer
            gc.collect()
            if frozen:
                gc.unfreeze()
    return model.eval()


class Ticker(TrainerCallback):
    """Calls a function after every optimizer step."""

    def __init__(self, tick: Callable[[], None]):
        self.tick = tick

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """A step is done."""
        self.tick()


@contextmanager
def isolated(seed: int, threads: int | None = 1) -> Iterator[None]:
    """Seeded and on one thread inside, so that results are the same everywhere; outside, nothing has changed.

    Random states and the number of torch's threads are those of the whole process: other threads of it see them changed.

    Args:
        seed: of torch, on every device in use.
        threads: of torch; None leaves them as they are.
    """
    states, before = (random.getstate(), np.random.get_state()), torch.get_num_threads()
    torch.set_num_threads(before if threads is None else threads)
    devices = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else []
    try:
        with torch.random.fork_rng(devices=list(devices)):
            torch.manual_seed(seed)
            yield
    finally:
        torch.set_num_threads(before)
        random.setstate(states[0])
        np.random.set_state(states[1])
