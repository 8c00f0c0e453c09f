"""Update norm: how far an optimizer step moves the trained parameters, without a copy of them."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import TrainerCallback

ENTRIES = 2**22  # that are remembered over a step, 50 MB at most


class UpdateNorm(TrainerCallback):
    r"""The norm of an optimizer step's change of the trained parameters, :math:`\|\theta_{t+1} - \theta_t\|_2`, where asked for.

    Exact where at most ``entries`` numbers are trained. Beyond that, estimated from so many entries, drawn anew every time
    and from every parameter by its size: :math:`\sqrt{\sum_i (n_i / m_i) \sum_j \Delta_{ij}^2}` over the m_i of the n_i
    entries of parameter i. Its standard error is c / (2 sqrt(entries)) of the norm, where c is the standard deviation of the
    squared changes by their mean: 0.07 % for normally distributed changes, 1 % where one entry in 400 moves at all. The
    generator is its own, so that a run draws the same numbers whether it is logged or not.

    Args:
        model: returns the model in training.
        wanted: returns whether the step under way is to be measured.
        entries: how many numbers may be remembered.
    """

    def __init__(self, model: Callable[[], nn.Module], wanted: Callable[[], bool], entries: int = ENTRIES):
        self.model, self.wanted, self.entries = model, wanted, entries
        self.before: list[tuple[Tensor, Tensor | None, Tensor]] = []
        self.norm: dict[str, float] = {}
        self.generators: dict[torch.device, torch.Generator] = {}

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Remember entries of the parameters."""
        if not self.wanted():
            return
        trained = [p.detach() for p in self.model().parameters() if p.requires_grad and p.numel()]
        share = min(1.0, self.entries / max(sum(p.numel() for p in trained), 1))
        for parameter in trained:
            index = self._drawn(parameter, share)
            self.before.append((parameter, index, _entries(parameter, index).clone()))

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Measure how far they went."""
        if not self.before:
            return
        squares = [
            (_entries(parameter, index) - old).float().square().sum() * (parameter.numel() / old.numel())
            for parameter, index, old in self.before
        ]
        self.before = []
        self.norm = {"update_norm": torch.stack([each.to(squares[0].device) for each in squares]).sum().sqrt().item()}

    def take(self) -> dict[str, float]:
        """The last norm measured, once."""
        norm, self.norm = self.norm, {}
        return norm

    def _drawn(self, parameter: Tensor, share: float) -> Tensor | None:
        """Which entries of a parameter to remember; None for all."""
        count = round(share * parameter.numel())
        if share == 1 or not parameter.is_contiguous():
            return None
        generator = self.generators.setdefault(parameter.device, torch.Generator(parameter.device))
        return torch.randint(parameter.numel(), (max(count, 1),), device=parameter.device, generator=generator)


def _entries(parameter: Tensor, index: Tensor | None) -> Tensor:
    """Entries of a parameter by their places in it; all of them for None."""
    return parameter if index is None else parameter.view(-1)[index]
