"""compute_loss of a Trainer's class, built around a stub model, with the tokens' models in place of its other models."""

import functools
import inspect
import sys
import tempfile
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import TrainingArguments
from transformers.modeling_outputs import CausalLMOutput

from qlens.core.errors import InputError
from qlens.losses.stubs.stub_model import StubConfig, StubModel
from qlens.losses.user_code import first_line, quiet

TEACHERS = {
    "teacher_model": "teacher", "teacher": "teacher", "ref_model": "reference", "reference_model": "reference",
    "base_model": "reference", "anchor_model": "reference", "old_model": "old", "ema_model": "old",
}  # fmt: skip
"""Arguments of a Trainer that take another model, and the field of Tokens with its logits."""


class Companion(nn.Module):
    """A model whose logits on the student's texts are a field of the tokens.

    Args:
        field: "teacher", "reference" or "old".
        logits: its logits, (B, T, V); by default taken from the student, a ``StubModel``.
    """

    def __init__(self, field: str, logits: Tensor | None = None):
        super().__init__()
        self.logits = logits
        self.field, self.config = field, StubConfig()
        self.student: StubModel | None = None

    def forward(self, input_ids: Tensor | None = None, *args: Any, **kwargs: Any) -> CausalLMOutput:
        """Logits (B, T, V)."""
        if self.logits is not None:
            return CausalLMOutput(logits=self.logits)  # pyright: ignore[reportArgumentType]
        assert self.student is not None and self.student.other is not None
        return CausalLMOutput(logits=self.student.other(self.field))  # pyright: ignore[reportArgumentType]


def trainer_loss(trainer: type) -> Callable:
    """compute_loss of a Trainer's class, built around a stub model.

    Raises:
        InputError: it cannot be built from a model, arguments and another model; the message names the line to write.
    """
    companions: dict[str, Companion] = {}
    with tempfile.TemporaryDirectory() as folder, quiet():
        built = _built(trainer, folder, companions)
    printing = ("PrinterCallback", "ProgressCallback")
    handler = built.callback_handler
    handler.callbacks = [callback for callback in handler.callbacks if type(callback).__name__ not in printing]

    @functools.wraps(built.compute_loss)
    def compute_loss(model: Any, *args: Any, **kwargs: Any) -> Any:
        built.model = built.model_wrapped = model
        for companion in companions.values():  # no part of it, as a module's attribute would be
            object.__setattr__(companion, "student", model)
        try:
            return built.compute_loss(model, *args, **kwargs)
        except AttributeError as error:
            if isinstance(error.obj, TrainingArguments):
                raise InputError(_lacks(trainer, error.name)) from error
            raise
        finally:
            for companion in companions.values():
                object.__setattr__(companion, "student", None)

    compute_loss.__name__ = f"{trainer.__name__}.compute_loss"
    compute_loss.stand_ins = tuple(companions)  # pyright: ignore[reportFunctionMemberAccess, reportAttributeAccessIssue]
    return compute_loss


def _built(trainer: type, folder: str, companions: dict[str, Companion]) -> Any:
    names = [name for name in inspect.signature(trainer).parameters if name in TEACHERS]
    arguments = _arguments(trainer)
    while True:
        companions |= {name: Companion(TEACHERS[name]) for name in names if name not in companions}
        try:
            args = arguments(folder, report_to=[], use_cpu=True, disable_tqdm=True)
            return trainer(model=StubModel(torch.zeros(1, 2, 4)), args=args, **companions)
        except Exception as error:  # a user's class may raise anything
            missing = str(error.args[0]) if isinstance(error, KeyError) and error.args else ""
            if missing in TEACHERS and missing not in names:  # taken out of **kwargs
                names.append(missing)
                continue
            if isinstance(error, AttributeError) and isinstance(error.obj, TrainingArguments):
                raise InputError(_lacks(trainer, error.name)) from error
            raise InputError(
                f"{trainer.__name__} could not be built from a model and its arguments ({type(error).__name__}: "
                f"{first_line(error)}): give the compute_loss of an instance, in a file: "
                f"loss = {trainer.__name__}(model=..., args=..., ...).compute_loss"
            ) from error


def _arguments(trainer: type) -> type:
    """The class of a Trainer's arguments: as annotated, or the one of its own file, or TrainingArguments."""
    annotated = inspect.signature(trainer).parameters.get("args")
    classes = [annotated.annotation] if annotated is not None else []
    classes += [
        value for value in vars(sys.modules.get(trainer.__module__)).values()
        if inspect.isclass(value) and value.__module__ == trainer.__module__
    ] if trainer.__module__ in sys.modules else []  # fmt: skip
    return next((c for c in classes if inspect.isclass(c) and issubclass(c, TrainingArguments)), TrainingArguments)


def _lacks(trainer: type, name: str) -> str:
    return (
        f"{trainer.__name__} reads args.{name}, which TrainingArguments do not have: give it a value, in the file of the "
        f"trainer: transformers.TrainingArguments.{name} = ..."
    )
