"""Forward passes without gradients."""

from collections.abc import Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn


@contextmanager
def evaluating(model: nn.Module):
    """Context: the model in evaluation mode and without gradients; the mode of every submodule is restored."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        with torch.no_grad():
            yield model
    finally:
        for module in training:
            module.training = True


@torch.no_grad()
def model_logits(model: nn.Module, inputs: Mapping[str, Any]) -> Tensor:
    """A model's logits on a batch, (B, T, V), without gradient and without a key-value cache."""
    return model(**inputs, use_cache=False)["logits"]
