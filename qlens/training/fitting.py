"""Short, seeded training runs that leave no files."""

import gc
import random
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel, PrinterCallback, TrainerCallback, TrainingArguments

from qlens.core.errors import InputError, brief
from qlens.data.models import loaded
from qlens.registry import Variant
from qlens.training.trainer import QTrainer

FIELDS = TrainingArguments.__dataclass_fields__
CHECKPOINTING = "activation_checkpointing" if "activation_checkpointing" in FIELDS else "gradient_checkpointing"
"""Name of an argument that transformers 5.23 renamed."""


def fit(
    model: PreTrainedModel | str | Path,
    examples: Sequence[Mapping[str, list[int]]],
    *,
    steps: int,
    batch_size: int,
    learning_rate: float,
    seed: int,
    variant: Variant | str | Callable = "sft",
    teacher: PreTrainedModel | str | Path | None = None,
    reference: PreTrainedModel | str | Path | None = None,
    micro_batch_size: int | None = None,
    gradient_checkpointing: bool = False,
    dtype: str = "float32",
    tick: Callable[[], None] = lambda: None,
    callbacks: Sequence[TrainerCallback] = (),
) -> PreTrainedModel:
    """Train a model in place with QTrainer: AdamW, 5 % warm-up, linear decay; no files are left.

    At one seed every method sees the same batches in the same order. One fit at a time in a process: seed, threads and garbage
    collection are the process's.

    Args:
        model: the model, trained on its own device, or the path of one.
        examples: dicts of ``input_ids`` and ``labels``, and columns, as ``qlens.data.encode`` returns them.
        steps: optimizer steps.
        batch_size: rows per step.
        learning_rate: the highest, after the warm-up.
        seed: of data order, dropout and draws of the method.
        variant: a Variant, a spec like "kd(temperature=2.0)", or a loss function.
        teacher, reference: other models or their paths, for methods that need them.
        micro_batch_size: rows per forward pass, a divisor of ``batch_size``; None: all of them.
        gradient_checkpointing: whether activations are computed twice, to hold fewer of them.
        dtype: of the products: "float32", or "bfloat16" or "float16" by autocast, the weights as they are.
        tick: called after every step.
        callbacks: of the Trainer.

    Returns:
        The model, in evaluation mode.

    Raises:
        InputError: fewer than one step; any that QTrainer raises.

    Example:
        >>> fit(model, examples, steps=100, batch_size=16, learning_rate=1e-3, seed=0, variant="dft")  # doctest: +SKIP
    """
    if not isinstance(steps, int) or isinstance(steps, bool) or steps < 1:
        raise InputError(f"steps must be a whole number, at least 1, got {brief(steps)}")
    model, micro = loaded(model, "model"), micro_batch_size or batch_size
    if batch_size % micro:
        raise InputError(f"micro_batch_size must divide batch_size={batch_size}, got {micro}")
    with tempfile.TemporaryDirectory() as folder, isolated(seed):
        arguments = TrainingArguments(
            output_dir=folder,
            max_steps=steps,
            per_device_train_batch_size=micro,
            gradient_accumulation_steps=batch_size // micro,
            bf16=dtype == "bfloat16",
            fp16=dtype == "float16",
            learning_rate=learning_rate,
            warmup_steps=max(1, steps // 20),
            adam_beta2=0.98,
            seed=seed,
            use_cpu=model.device.type == "cpu",
            logging_strategy="no",
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            **{CHECKPOINTING: gradient_checkpointing},
        )
        trainer, frozen = None, gc.get_freeze_count() == 0
        if frozen:  # not where the caller has frozen objects, which unfreeze() would release
            gc.freeze()  # the Trainer calls gc.collect(), which would scan every imported object
        try:
            trainer = ShortTrainer(
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


class ShortTrainer(QTrainer):
    """QTrainer without an estimate of operations, for which the Trainer walks through all modules at every step."""

    def floating_point_ops(self, inputs: Any) -> int:
        """Not estimated."""
        return 0


class Ticker(TrainerCallback):
    """Calls a function after every optimizer step."""

    def __init__(self, tick: Callable[[], None]):
        self.tick = tick

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Call the function."""
        self.tick()


@contextmanager
def isolated(seed: int, threads: int | None = 1) -> Iterator[None]:
    """Context with a fixed seed and one thread; random states and threads are restored at its end.

    They are the whole process's: its other threads see them changed.

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
