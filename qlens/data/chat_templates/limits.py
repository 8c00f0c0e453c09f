"""Limits on chat templates, which are code of a model's folder: time, length, and no powers."""

import ctypes
import functools
import threading
from collections.abc import Iterator
from contextlib import contextmanager

from jinja2 import Environment, TemplateSyntaxError

from qlens.core.errors import InputError

SECONDS, CHARACTERS = 5.0, 10_000_000  # for a chat template to write a conversation
FAULTS = (ArithmeticError, AttributeError, LookupError, MemoryError, RuntimeError, TypeError, ValueError)


class TimeUp(BaseException):
    """The time limit is over; not an Exception, so that ``except Exception`` inside does not catch it."""


@contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    """Raise ``TimeUp`` in this thread if the block takes longer. Python code is interrupted, a single call of C is not."""
    thread, lock, done = ctypes.c_ulong(threading.get_ident()), threading.Lock(), threading.Event()

    def interrupt() -> None:
        with lock:
            if not done.is_set():
                ctypes.pythonapi.PyThreadState_SetAsyncExc(thread, ctypes.py_object(TimeUp))

    timer = threading.Timer(seconds, interrupt)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()
        with lock:  # no interrupt after this
            done.set()


@functools.lru_cache(maxsize=64)
def check_template(template: str) -> None:
    """Check that a chat template can be interrupted: it has no powers (**), a single call of which may never end.

    Raises:
        InputError: it has a power, or is not a template.
    """
    try:
        powers = any(kind == "operator" and value == "**" for _, kind, value in Environment().lex(template))
    except TemplateSyntaxError as error:
        raise InputError(f"the chat template is none: line {error.lineno}: {error.message}") from error
    if powers:
        raise InputError("the chat template raises to a power (**), which may take for ever: leave it out")
