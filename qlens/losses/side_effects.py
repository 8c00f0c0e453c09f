"""Modules that run during a call of a loss: other models, layers of its own, passes of the stub model."""

import contextlib
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook


@dataclass
class ModuleCalls:
    """The modules that ran during a call.

    Args:
        models: classes of modules that ran on inputs without a gradient of the student.
        layers: classes of modules with weights that ran on the student's outputs.
        passes: number of forward passes of the student.
        hidden: whether its hidden states were requested.
        logits: outputs of the other models, (B, T, V).
        started: classes of the modules that started, whether or not they returned.
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
def recorded_modules(own: Any = None) -> Iterator[ModuleCalls]:
    """A context that records the modules that run, but those of ``own``, the loss itself."""
    calls = ModuleCalls()
    own_modules = {id(part) for part in own.modules()} if isinstance(own, nn.Module) else set()
    running: list[int] = []  # only outermost modules are recorded

    def begin(module: nn.Module, args: Any) -> None:
        if id(module) not in own_modules:
            own_part = _is_stub(module) or type(module).__module__.startswith(("torch.nn.", "qlens."))
            calls.started += [] if running or own_part else [type(module).__name__]
            running.append(id(module))

    def note(module: nn.Module, args: Any, keywords: Any, output: Any) -> None:
        if id(module) in own_modules:
            return
        running.pop()
        if _is_stub(module):
            calls.passes += int(module.adapted)  # without its adapter it is the reference
            calls.hidden |= bool(keywords.get("output_hidden_states"))
        elif not running and not type(module).__module__.startswith("qlens."):
            _sort(calls, module, [x for x in (*args, *keywords.values()) if isinstance(x, Tensor)], output)

    before = register_module_forward_pre_hook(begin)
    after = register_module_forward_hook(note, with_kwargs=True)
    try:
        yield calls
    finally:
        before.remove()
        after.remove()


def _sort(calls: ModuleCalls, module: nn.Module, tensors: list[Tensor], output: Any) -> None:
    """Record a module as another model or as a layer on the student; torch's losses and functions are neither."""
    weights = any(True for _ in module.parameters())
    name = type(module).__name__
    if any(x.requires_grad for x in tensors):
        if weights and name not in calls.layers:
            calls.layers.append(name)
    elif tensors and (weights or not type(module).__module__.startswith("torch.nn.modules")):
        calls.models += [name] if name not in calls.models else []
        logits = getattr(output, "logits", output)
        calls.logits += [logits.detach()] if isinstance(logits, Tensor) and logits.is_floating_point() else []
