"""Sources of another distribution than the student's: what ``teacher`` and ``reference`` of a trainer may be.

- a fixed model, given as an object, a folder or a name; loaded once where teacher and reference are the same;
- ``AdaptersOff()``, the trained model without its adapters; what a model with adapters has as its reference anyway;
- ``EMA(decay)``, an exponential moving average of the trained weights;
- ``CurrentModel()``, the trained model itself, which is a teacher where it reads a longer prompt.

Beside them the old policy is the trained model with the weights of some steps ago. None of the last three holds a second
model in memory: a pass swaps the trained weights (under LoRA those of the adapters) for the kept ones, and back. Whatever the
source, no gradient reaches it, and dropout is off.

A teacher that sees more than the student (a hint, the demonstration, a system prompt) is any of these on data with a column
``teacher_prompt``: see ``qlens.training.datasets.privileged``.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from qlens.core.errors import InputError, brief
from qlens.core.numerics import precision
from qlens.data.base_models import SameModel, WithoutAdapters, has_adapters


@dataclass(frozen=True)
class AdaptersOff:
    """The trained model without its adapters (peft), as a teacher or reference.

    Example:
        >>> trainer = QTrainer(model=lora_model, variant="target_sft", teacher=AdaptersOff(), ...)  # doctest: +SKIP
    """


@dataclass(frozen=True)
class CurrentModel:
    """The trained model as it is at each step, as a teacher: of use where ``teacher_prompt`` shows it more than the student.

    Example:
        >>> trainer = QTrainer(model=model, variant="kd", teacher=CurrentModel(), ...)  # doctest: +SKIP
    """


@dataclass(frozen=True)
class EMA:
    r"""An exponential moving average of the trained weights, :math:`w \leftarrow d w + (1 - d) \theta` after every step.

    It begins as the model that training begins with. Only trained weights are averaged (under LoRA the adapters'), in float32
    at least. Checkpoints hold it.

    Args:
        decay: d, at least 0 and below 1.

    Raises:
        InputError: another decay.

    Example:
        >>> trainer = QTrainer(model=model, variant="kd", teacher=EMA(decay=0.99), ...)  # doctest: +SKIP
    """

    decay: float = 0.999

    def __post_init__(self):
        if isinstance(self.decay, bool) or not isinstance(self.decay, int | float) or not 0 <= self.decay < 1:
            raise InputError(f"EMA: decay must be at least 0 and below 1, got {brief(self.decay)}")


Source = AdaptersOff | CurrentModel | EMA


def of_student(source: Source, model: Any, name: str) -> SameModel:
    """A source that runs the trained model.

    Raises:
        InputError: ``AdaptersOff`` of a model that has none.
    """
    if isinstance(source, EMA):
        return KeptWeights(model, wide=True)
    if isinstance(source, CurrentModel):
        return SameModel(model)
    if not has_adapters(model):
        raise InputError(
            f"{name}=AdaptersOff() is the model without its adapters, and it has none: give peft_config=LoraConfig(...) to "
            f"QSFTTrainer, or a copy of the model as {name}"
        )
    return WithoutAdapters(model)


class KeptWeights(SameModel):
    """A model with other values of its trained weights and buffers: those of an earlier step, or an average.

    Args:
        model: whose weights are copied.
        wide: whether they are kept in float32 at least, so that an average does not lose small changes.
    """

    def __init__(self, model: Any, wide: bool = False):
        self.wide = wide
        super().__init__(model)

    def bind(self, model: Any) -> None:
        """Predict by a model from now on, with its present weights."""
        super().bind(model)
        self._inside = False
        trained = {id(value) for value in model.parameters() if value.requires_grad}
        buffers = {id(value) for value in model.buffers()}
        named = {id(value): name for name, value in model.state_dict(keep_vars=True).items()}  # a shared weight once
        values = {name: value for name, value in model.state_dict(keep_vars=True).items() if named[id(value)] == name}
        self.live = {name: value for name, value in values.items() if id(value) in trained or id(value) in buffers}
        self.sync()

    @torch.no_grad()
    def sync(self) -> None:
        """Take the model's present weights."""
        self.kept = {name: value.detach().to(self._dtype(value), copy=True) for name, value in self.live.items()}

    def _dtype(self, value: Tensor) -> torch.dtype:
        return precision(value.dtype) if self.wide and value.is_floating_point() else value.dtype

    @torch.no_grad()
    def average(self, decay: float) -> None:
        """Move towards the model's present weights: decay times the kept ones plus 1 - decay times these."""
        for name, value in self.live.items():
            if value.is_floating_point():
                self.kept[name].lerp_(value.detach().to(self.kept[name]), 1 - decay)
            else:
                self.kept[name].copy_(value)

    @contextmanager
    def active(self) -> Iterator[None]:
        """Context in which the model has the kept weights."""
        if self._inside:
            yield
            return
        present = {name: value.data for name, value in self.live.items()}
        self._inside = True
        try:
            for name, value in self.live.items():
                value.data = self.kept[name].to(value.dtype)
            yield
        finally:
            for name, value in self.live.items():
                value.data = present[name]
            self._inside = False

    def state(self) -> dict[str, Tensor]:
        """The kept weights by name."""
        return {name: value.contiguous() for name, value in self.kept.items()}

    @torch.no_grad()
    def restore(self, saved: Mapping[str, Tensor], description: str) -> None:
        """Take the weights that ``state`` returned.

        Raises:
            InputError: they are of another model.
        """
        own = {name: tuple(value.shape) for name, value in self.kept.items()}
        stored = {name: tuple(value.shape) for name, value in saved.items()}
        if own != stored:
            name = sorted(own.items() ^ stored.items())[0][0]
            raise InputError(
                f"the checkpoint's {description} does not fit the model: {name} has shape {stored.get(name)} there and "
                f"{own.get(name)} here; resume with the model that it was saved with"
            )
        for name, value in saved.items():
            self.kept[name].copy_(value)
