"""Guards: what a user's code raises or prints is told as one error, and kept off standard output."""

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


class LossError(InputError):
    """What a user's loss raised: the loss, the exception, and the line of the user's file."""

    @classmethod
    def of(cls, name: str, error: BaseException, file: str = "") -> "LossError":
        """The error for an exception that left the loss ``name``, which is defined in ``file``."""
        frames = traceback.extract_tb(error.__traceback__)
        at = [frame for frame in frames if frame.filename == file]
        at = at or [frame for frame in frames if from_outside(frame.filename)]
        where = place(at[-1]) if at else ""
        return cls(f"{name} raises {type(error).__name__}: {first_line(error)}{where}{_hint(name, error)}")


def from_outside(filename: str) -> bool:
    """Whether a file is the user's own: none of qlens, torch or another installed package."""
    return not filename.startswith(OWN) and "site-packages" not in filename


def place(frame: traceback.FrameSummary) -> str:
    """The file and the line of a frame, in brackets."""
    return f" ({Path(frame.filename).name}, line {frame.lineno})"


def depth(error: BaseException | None, file: str) -> tuple[int, ...]:
    """How far into a file an exception's call had come: the lines of its frames there, outermost first."""
    frames = traceback.extract_tb(error.__traceback__) if error is not None else []
    return tuple(frame.lineno or 0 for frame in frames if frame.filename == file)


def _inside(error: BaseException) -> bool:
    """Whether an exception was raised inside qlens, by Target.mix(t, ...) with a tensor t, say."""
    frames = traceback.extract_tb(error.__traceback__)
    return bool(frames) and frames[-1].filename.startswith(OWN[0])


def _hint(name: str, error: BaseException) -> str:
    """What to write instead, where the exception tells."""
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
    """A loss that ran to its end: what went wrong is its value or its backward pass, not how it was called."""


def first_line(error: BaseException) -> str:
    """What an exception says, in one line."""
    return next(iter(str(error).strip().splitlines()), "(no message)")


def numbers_of(message: str) -> list[str]:
    """The whole numbers that an error message names, without the line of the file where it was raised."""
    return re.findall(r"\d+", PLACE.sub("", message))


@contextlib.contextmanager
def blamed(name: str, file: str = "", kind: type[LossError] = LossError) -> Iterator[None]:
    """Whatever a user's code raises, SystemExit included, as one error of this kind; Ctrl-C stays what it is."""
    try:
        yield
    except (InputError, KeyboardInterrupt):
        raise
    except BaseException as error:
        raise kind.of(name, error, file) from error


def _without_compiling() -> contextlib.AbstractContextManager:
    """Run compiled functions eagerly: hundreds of calls in other shapes would each compile anew.

    Before the first ``torch.compile`` there is nothing to do, and the import of the compiler takes seconds.
    """
    compiling = "torch._dynamo" in sys.modules
    return torch.compiler.set_stance("force_eager") if compiling else contextlib.nullcontext()


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Silence a loss that is called hundreds of times: what it prints, logs or warns would drown the answer.

    Inside, gradients can be taken, whatever mode the caller is in.
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
    """The file that a callable is written in; "" where it cannot be told."""
    found = inspect.unwrap(fn)
    found = getattr(found, "func", found)
    if not inspect.isroutine(found):
        found = getattr(type(found), "forward", None) or vars(type(found)).get("__call__")
    code = getattr(inspect.unwrap(found) if found else None, "__code__", None)
    return code.co_filename if code else ""
