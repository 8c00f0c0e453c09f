"""Guards: what a user's code raises or prints is told as one error, and kept off standard output."""

import contextlib
import inspect
import io
import logging
import re
import traceback
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

from qlens.errors import InputError

PLACE = re.compile(r" \([^()]*, line \d+\)")
OWN = (str(Path(__file__).parent), str(Path(torch.__file__).parent))


class LossError(InputError):
    """What a user's loss raised: the loss, the exception, and the line of the user's file."""

    @classmethod
    def of(cls, name: str, error: BaseException, file: str = "") -> "LossError":
        """The error for an exception that left the loss ``name``, which is defined in ``file``."""
        frames = traceback.extract_tb(error.__traceback__)
        at = [frame for frame in frames if frame.filename == file]
        at = at or [
            frame for frame in frames if not frame.filename.startswith(OWN) and "site-packages" not in frame.filename
        ]
        where = f" ({Path(at[-1].filename).name}, line {at[-1].lineno})" if at else ""
        return cls(f"{name} raises {type(error).__name__}: {first_line(error)}{where}")


def first_line(error: BaseException) -> str:
    """What an exception says, in one line."""
    return next(iter(str(error).strip().splitlines()), "(no message)")


def numbers_of(message: str) -> list[str]:
    """The whole numbers that an error message names, without the line of the file where it was raised."""
    return re.findall(r"\d+", PLACE.sub("", message))


@contextlib.contextmanager
def blamed(name: str, file: str = "") -> Iterator[None]:
    """Whatever a user's code raises, SystemExit included, as one LossError; Ctrl-C stays what it is."""
    try:
        yield
    except (InputError, KeyboardInterrupt):
        raise
    except BaseException as error:
        raise LossError.of(name, error, file) from error


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Silence a loss that is called hundreds of times: what it prints, logs or warns would drown the answer."""
    before = logging.root.manager.disable
    with (
        contextlib.redirect_stdout(io.StringIO()),
        contextlib.redirect_stderr(io.StringIO()),
        warnings.catch_warnings(),
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
