"""Chat templates, which are code of a model's folder, run with a limit on time and length."""

import ctypes
import functools
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from jinja2 import Environment, TemplateError, TemplateSyntaxError
from transformers import PreTrainedTokenizerBase

from qlens.core.errors import InputError

SECONDS, CHARACTERS = 5.0, 10_000_000  # for a chat template to write a conversation
FAULTS = (ArithmeticError, AttributeError, LookupError, MemoryError, RuntimeError, TypeError, ValueError)


def rendered(turns: list[dict[str, str]], tokenizer: PreTrainedTokenizerBase, prompt: bool, where: str) -> str:
    """The text that a tokenizer's chat template writes for some turns.

    Raises:
        InputError: the template fails, refuses the turns, does not end, or writes no valid text; ``where`` begins the message.
    """
    if isinstance(tokenizer.chat_template, str):
        check_template(tokenizer.chat_template)
    try:
        with time_limit(SECONDS):
            text = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=prompt)
    except TimeUp:
        raise InputError(f"{where}: the chat template has not ended after {SECONDS} seconds") from None
    except TemplateError as error:
        raise InputError(f"{where}: the chat template refuses these turns: {error}") from error
    except FAULTS as error:
        message = f"{type(error).__name__}: {error}"
        raise InputError(f"{where}: the chat template fails on these turns: {message}") from error
    if len(text) > CHARACTERS:
        raise InputError(f"{where}: the chat template writes {len(text)} characters: at most {CHARACTERS} are read")
    check_text(text, f"{where}: what the chat template writes")
    return text


def check_text(value: Any, name: str) -> None:
    """Check that a value is text that can be written in UTF-8.

    Raises:
        InputError: not a string, or one with half of a surrogate pair; ``name`` begins the message.
    """
    if not isinstance(value, str):
        raise InputError(f"{name} must be a string, got {type(value).__name__}")
    if (
        not value.isascii()
        and (lone := next((at for at, c in enumerate(value) if "\ud800" <= c <= "\udfff"), None)) is not None
    ):
        raise InputError(f"{name} is no text: it has half of a surrogate pair, {value[lone]!r}, at character {lone}")


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
