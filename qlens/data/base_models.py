"""Base models: a model with adapters (peft), and other predictions of one model, as it is and without its adapters."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from qlens.data.model_folders import quiet
from qlens.engine.models.forward import evaluating


def has_adapters(model: Any) -> bool:
    """Whether a model has adapters that can be switched off, such as peft's."""
    return callable(getattr(model, "disable_adapter", None)) and callable(getattr(model, "get_base_model", None))


def with_adapters(model: PreTrainedModel, rank: int) -> Any:
    """A model with LoRA adapters on all linear layers but the head, which alone are trained; they begin at zero.

    Args:
        model: the base model, changed in place.
        rank: of the adapters; their scale is alpha / rank = 2.

    Returns:
        A ``peft.PeftModel``.
    """
    from peft import LoraConfig, TaskType, get_peft_model

    config = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules="all-linear", task_type=TaskType.CAUSAL_LM)
    with quiet():
        return get_peft_model(model, config)


class SameModel(nn.Module):
    """A model as a source of predictions: in evaluation mode and without gradients, whatever the model's mode.

    It has no parameters of its own, so that freezing or moving it leaves the model alone.

    Args:
        model: the model itself, or with adapters.
    """

    def __init__(self, model: Any):
        super().__init__()
        self.bind(model)

    def bind(self, model: Any) -> None:
        """Predict by another model from now on."""
        self._model = (model,)  # in a tuple, so that its parameters are not this module's

    @property
    def model(self) -> Any:
        """The model."""
        return self._model[0]

    @property
    def config(self) -> Any:
        """The model's configuration."""
        return self.model.config

    @property
    def device(self) -> Any:
        """The model's device."""
        return self.model.device

    def get_base_model(self) -> Any:
        """The model beneath the adapters."""
        return self.model.get_base_model() if callable(getattr(self.model, "get_base_model", None)) else self.model

    def get_output_embeddings(self) -> Any:
        """The model's head."""
        return self.model.get_output_embeddings()

    def get_input_embeddings(self) -> Any:
        """The model's input embedding."""
        return self.model.get_input_embeddings()

    @contextmanager
    def active(self) -> Iterator[None]:
        """Context in which the model's weights, its head's too, are those of this source."""
        yield

    def forward(self, **features: Any) -> Any:
        """The outputs of the model."""
        with evaluating(self.model), self.active():
            return self.model(**features)


class WithoutAdapters(SameModel):
    """A model whose adapters are switched off in every pass."""

    @contextmanager
    def active(self) -> Iterator[None]:
        """Context without adapters."""
        trained = {id(value) for value in self.model.parameters() if value.requires_grad}
        try:
            with self.model.disable_adapter():
                yield
        finally:
            for value in self.model.parameters():  # switching adapters on and off sets what is trained
                value.requires_grad_(id(value) in trained)
