"""Base models: a model with adapters (peft), and run without them."""

from typing import Any

from torch import nn
from transformers import PreTrainedModel

from qlens.data.models import quiet
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


class WithoutAdapters(nn.Module):
    """A model whose adapters are switched off in every pass, in evaluation mode and without gradients.

    It has no parameters of its own, so that freezing or moving it leaves the model alone.

    Args:
        model: the model with adapters, such as a ``peft.PeftModel``.
    """

    def __init__(self, model: Any):
        super().__init__()
        self._model = (model,)  # in a tuple, so that its parameters are not this module's

    @property
    def config(self) -> Any:
        """The model's configuration."""
        return self._model[0].config

    @property
    def device(self) -> Any:
        """The model's device."""
        return self._model[0].device

    def get_base_model(self) -> Any:
        """The model beneath the adapters."""
        return self._model[0].get_base_model()

    def get_output_embeddings(self) -> Any:
        """The model's head."""
        return self._model[0].get_output_embeddings()

    def forward(self, **features: Any) -> Any:
        """The outputs of the model without its adapters."""
        model = self._model[0]
        trained = {id(value) for value in model.parameters() if value.requires_grad}
        with evaluating(model), model.disable_adapter():
            outputs = model(**features)
        for value in model.parameters():  # switching adapters on and off sets what is trained
            value.requires_grad_(id(value) in trained)
        return outputs
