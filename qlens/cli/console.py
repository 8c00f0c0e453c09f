"""Console: every error of the command line as one line on stderr and an exit code."""

import os
import sys
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import typer

from qlens.core.errors import InputError, brief, one_line
from qlens.core.files import from_here

USAGE, FAULT, INTERRUPTED = 2, 3, 130
"""Exit codes of usage errors, faults of the program and Ctrl-C. 1 is a verb's own: a check or a job failed."""
TRACEBACK = "QLENS_TRACEBACK"
CLICK: Any = typer.BadParameter.__mro__[2]  # the base of usage errors, from click or from typer's own copy of it


def run(app: Callable[..., Any], arguments: Sequence[str]) -> int:
    """The exit code of a command; an error is one line on stderr, with its traceback where QLENS_TRACEBACK is set.

    0: done. 1: a check or a job failed. 2: the input does not fit, or a path cannot be used. 3: a fault of the program.
    """
    try:
        _check_text(arguments)
        with from_here():
            code = app(list(arguments), standalone_mode=False) if arguments else _help(app)
        sys.stdout.flush()
        if code == INTERRUPTED:
            raise KeyboardInterrupt
        return code if isinstance(code, int) else 0
    except CLICK as error:
        verb = getattr(getattr(error, "ctx", None), "info_name", None)
        command = f"qlens {verb}" if verb in arguments else "qlens"
        message = error.format_message().rstrip(".")
        return _report(error, f"{message} ({command} --help lists what there is)", USAGE)
    except InputError as error:
        return _report(error, str(error), USAGE)
    except BrokenPipeError:  # the reader of the output closed it
        _abandon_output()
        return 1
    except OSError as error:
        _abandon_output()
        where = f"{error.filename}: " if error.filename is not None else "a file or the output: "
        return _report(error, f"{where}{error.strerror or error}", USAGE)
    except (KeyboardInterrupt, typer.Abort) as error:
        return _report(error, "interrupted", INTERRUPTED)
    except SystemExit as error:
        if isinstance(error.__context__, BrokenPipeError):  # rich ends the program where the reader closed its output
            return 1
        return _report(error, f"code that was run ended the program by sys.exit({error.code!r})", USAGE)
    except BaseException as error:  # a Rust panic is no Exception
        frame = traceback.extract_tb(error.__traceback__)[-1]
        where = f"{Path(frame.filename).name}, line {frame.lineno}"
        message = (
            f"{type(error).__name__} in {where}: {error}; a fault of the program: {TRACEBACK}=1 shows the traceback"
        )
        return _report(error, message, FAULT)


def _help(app: Callable[..., Any]) -> int:
    """Without arguments: the help, and the code of a usage error."""
    app(["--help"], standalone_mode=False)
    return USAGE


def _check_text(arguments: Sequence[str]) -> None:
    """Refuse arguments that are no text."""
    for argument in arguments:
        if "\0" in argument:
            raise InputError(f"argument {brief(argument)} holds a NUL character")
        if not argument.isascii() and any("\ud800" <= letter <= "\udfff" for letter in argument):
            raise InputError(f"argument {brief(argument)} holds bytes that are not UTF-8 text")


def _report(error: BaseException, message: str, code: int) -> int:
    if os.environ.get(TRACEBACK):
        traceback.print_exception(error)
    print(f"qlens: {one_line(message)}", file=sys.stderr)
    return code


def _abandon_output() -> None:
    """Keep the interpreter from flushing at exit the output that could not be written."""
    try:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except (OSError, ValueError):  # an output without a file behind it has nothing to flush
        return
