"""Noticing: what else a loss does while it runs, which the gradient of the logits alone would not tell."""

import contextlib
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook


@dataclass
class Seen:
    """What ran during a call: other models, layers with weights of their own, forward passes of the stub model.

    Args:
        models: classes of modules that ran on inputs which carry no gradient of the student.
        layers: classes of modules with weights of their own that ran on what the student gave.
        passes: how often the student's model ran.
        hidden: whether its hidden states were asked for.
        logits: what the other models gave, (B, T, V).
        started: classes of the modules that began to run, whether or not they came to an end.
    """

    models: list[str] = field(default_factory=list)
    layers: list[str] = field(default_factory=list)
    passes: int = 0
    hidden: bool = False
    logits: list[Tensor] = field(default_factory=list)
    started: list[str] = field(default_factory=list)


def _is_stub(module: nn.Module) -> bool:
    """Whether a module is the stub model, which is imported, with transformers, only for losses that take a model."""
    stubs = sys.modules.get("qlens.losses.stubs.stub_model")
    return stubs is not None and isinstance(module, stubs.StubModel)


@contextlib.contextmanager
def watched(own: Any = None) -> Iterator[Seen]:
    """Watch the modules that run; ``own`` is the loss itself, whose parts are its own business."""
    seen = Seen()
    spared = {id(part) for part in own.modules()} if isinstance(own, nn.Module) else set()
    running: list[int] = []  # modules inside others are the others' business

    def begin(module: nn.Module, given: Any) -> None:
        if id(module) not in spared:
            own_part = _is_stub(module) or type(module).__module__.startswith(("torch.nn.", "qlens."))
            seen.started += [] if running or own_part else [type(module).__name__]
            running.append(id(module))

    def note(module: nn.Module, given: Any, keywords: Any, made: Any) -> None:
        if id(module) in spared:
            return
        running.pop()
        if _is_stub(module):
            seen.passes += int(module.adapted)  # without its adapter it is the reference
            seen.hidden |= bool(keywords.get("output_hidden_states"))
        elif not running and not type(module).__module__.startswith("qlens."):
            _sort(seen, module, [x for x in (*given, *keywords.values()) if isinstance(x, Tensor)], made)

    before = register_module_forward_pre_hook(begin)
    after = register_module_forward_hook(note, with_kwargs=True)
    try:
        yield seen
    finally:
        before.remove()
        after.remove()


def _sort(seen: Seen, module: nn.Module, tensors: list[Tensor], made: Any) -> None:
    """Note a module as another model, or as a layer on top of the student; torch's losses and functions are neither."""
    weights = any(True for _ in module.parameters())
    name = type(module).__name__
    if any(x.requires_grad for x in tensors):
        if weights and name not in seen.layers:
            seen.layers.append(name)
    elif tensors and (weights or not type(module).__module__.startswith("torch.nn.modules")):
        seen.models += [name] if name not in seen.models else []
        logits = getattr(made, "logits", made)
        seen.logits += [logits.detach()] if isinstance(logits, Tensor) and logits.is_floating_point() else []
