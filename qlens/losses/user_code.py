"""Guards around users' code: its exceptions become one error, and its output is silenced."""

import contextlib
import dataclasses
import inspect
import io
import logging
import re
import sys
import traceback
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

from qlens.core.errors import InputError
from qlens.core.tokens import Tokens

PLACE = re.compile(r" \([^()]*, line \d+\)")
OWN = (str(Path(__file__).parents[1]), str(Path(torch.__file__).parent))
TOKENS_ONLY = {name for name in dir(Tokens) if not name.startswith("_")} - {*dir(torch.Tensor), *dir(dict), "logits"}
TOKENS_ONLY |= {field.name for field in dataclasses.fields(Tokens)} - {"logits"}
CHECKPOINTING = "torch.utils.checkpoint"


class LossError(InputError):
    """An exception in a user's loss, with the line of the user's file."""

    @classmethod
    def of(cls, name: str, error: BaseException, file: str = "") -> "LossError":
        """The error for an exception raised by the loss ``name``, which is defined in ``file``."""
        frames = traceback.extract_tb(error.__traceback__)
        at = [frame for frame in frames if frame.filename == file]
        at = at or [frame for frame in frames if from_outside(frame.filename)]
        where = place(at[-1]) if at else ""
        return cls(f"{name} raises {type(error).__name__}: {first_line(error)}{where}{_hint(name, error)}")


def from_outside(filename: str) -> bool:
    """Whether a file belongs to no installed package."""
    return not filename.startswith(OWN) and "site-packages" not in filename


def place(frame: traceback.FrameSummary) -> str:
    """The file and the line of a frame, in brackets."""
    return f" ({Path(frame.filename).name}, line {frame.lineno})"


def depth(error: BaseException | None, file: str) -> tuple[int, ...]:
    """The progress of the call that raised: the lines of its frames in a file, outermost first."""
    frames = traceback.extract_tb(error.__traceback__) if error is not None else []
    return tuple(frame.lineno or 0 for frame in frames if frame.filename == file)


def _inside(error: BaseException) -> bool:
    """Whether an exception was raised inside qlens, by Target.mix(t, ...) with a tensor t, say."""
    frames = traceback.extract_tb(error.__traceback__)
    return bool(frames) and frames[-1].filename.startswith(OWN[0])


def _hint(name: str, error: BaseException) -> str:
    """A hint on what to write instead, for known exceptions."""
    if isinstance(error, AttributeError) and (error.name in TOKENS_ONLY or _inside(error)):
        package = type(error.obj).__module__.partition(".")[0]
        if package in ("torch", "qlens", "transformers", "builtins") and (
            error.name in TOKENS_ONLY or not isinstance(error.obj, dict)
        ):
            return (
                f"; {error.name} is an attribute of qlens.Tokens, which a loss is given where its first parameter is "
                f"named tokens: def {name}(tokens, ...)"
            )
    if "Inference tensors cannot be saved for backward" in str(error):
        return "; write torch.no_grad() in place of torch.inference_mode()"
    return ""


class EndedError(LossError):
    """An error of the value or of the backward pass of a loss that returned."""


def first_line(error: BaseException) -> str:
    """The first line of an exception's message."""
    return next(iter(str(error).strip().splitlines()), "(no message)")


def numbers_of(message: str) -> list[str]:
    """The whole numbers in an error message, without the line number of the user's file."""
    return re.findall(r"\d+", PLACE.sub("", message))


@contextlib.contextmanager
def user_errors(name: str, file: str = "", kind: type[LossError] = LossError) -> Iterator[None]:
    """A context that turns every exception of a user's code, SystemExit included, into one error.

    Not KeyboardInterrupt, nor the exception by which torch's checkpointing ends a second forward pass.
    """
    try:
        yield
    except (InputError, KeyboardInterrupt):
        raise
    except BaseException as error:
        if type(error).__module__ == CHECKPOINTING:
            raise
        raise kind.of(name, error, file) from error


def _without_compiling() -> contextlib.AbstractContextManager:
    """Run compiled functions eagerly: hundreds of calls in other shapes would each compile anew.

    Before the first ``torch.compile`` there is nothing to do, and the import of the compiler takes seconds.
    """
    compiling = "torch._dynamo" in sys.modules
    return torch.compiler.set_stance("force_eager") if compiling else contextlib.nullcontext()


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """A context without output, logs and warnings, for losses that are called hundreds of times.

    Gradients can be taken inside, whatever the caller's mode.
    """
    before = logging.root.manager.disable
    with (
        contextlib.redirect_stdout(io.StringIO()),
        contextlib.redirect_stderr(io.StringIO()),
        warnings.catch_warnings(),
        torch.inference_mode(False),
        torch.enable_grad(),
        _without_compiling(),
    ):
        warnings.simplefilter("ignore")
        logging.disable(logging.CRITICAL)
        try:
            yield
        finally:
            logging.disable(before)


def file_of(fn: Callable) -> str:
    """The file that defines a callable; "" if it is not known."""
    target = inspect.unwrap(fn)
    target = getattr(target, "func", target)
    if not inspect.isroutine(target):
        target = getattr(type(target), "forward", None) or vars(type(target)).get("__call__")
    code = getattr(inspect.unwrap(target) if target else None, "__code__", None)
    return code.co_filename if code else ""
