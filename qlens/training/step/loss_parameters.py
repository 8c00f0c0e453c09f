"""Learnable parameters of a loss itself, such as a temperature, in training."""

import logging
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import TrainerCallback

from qlens.losses.leaves import leaves

logger = logging.getLogger(__name__)


class LearnedParameters(TrainerCallback):
    """Clears the gradients of a loss's own parameters after every step; the Trainer clears those of the model alone.

    Args:
        name: of the method.
        optimizer: returns the optimizer of the run.
    """

    def __init__(self, name: str, optimizer: Callable[[], Any]):
        self.name, self.optimizer = name, optimizer
        self.parameters: list[Tensor] = []
        self.searched = False  # in this run

    def note(self, loss: Tensor, *logits: Tensor, model: nn.Module) -> None:
        """Note the leaves of a loss other than its logits and the model's parameters, and log once what happens to each."""
        self.searched = True
        known_ids = {id(value) for value in (*model.parameters(), *self.parameters)}
        for leaf in leaves(loss, *logits):
            if id(leaf) in known_ids:
                continue
            self.parameters.append(leaf)
            groups = getattr(self.optimizer(), "param_groups", [])
            if any(leaf is each for group in groups for each in group["params"]):
                sentence = (
                    "is trained; checkpoints do not hold its value, so that a resumed run begins with the one you give"
                )
            else:
                sentence = (
                    "is not in the optimizer, so that it never changes: give QTrainer(optimizers=(optimizer, "
                    "scheduler)) with an optimizer that holds it beside the model's, or set requires_grad_(False)"
                )
            logger.warning(
                "qlens: %s has a parameter of its own, of shape %s, which %s", self.name, tuple(leaf.shape), sentence
            )

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Begin a run with no parameter known."""
        self.parameters, self.searched = [], False

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Clear their gradients, once the optimizer has used them."""
        with torch.no_grad():
            for leaf in self.parameters:
                leaf.grad = None
