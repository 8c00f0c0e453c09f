"""Chat templates: code of a model's folder, run in bounded time and length."""

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
    """What the chat template, which is code of the model's folder, writes; in bounded time and length.

    Raises:
        InputError: it fails, refuses the turns, does not end, or writes what is no text; ``where`` begins the message.
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
        said = f"{type(error).__name__}: {error}"
        raise InputError(f"{where}: the chat template fails on these turns: {said}") from error
    if len(text) > CHARACTERS:
        raise InputError(f"{where}: the chat template writes {len(text)} characters: at most {CHARACTERS} are read")
    check_text(text, f"{where}: what the chat template writes")
    return text


def check_text(value: Any, name: str) -> None:
    """Whether a value is text that can be written in UTF-8.

    Raises:
        InputError: no string, or half of a surrogate pair in it; ``name`` begins the message.
    """
    if not isinstance(value, str):
        raise InputError(f"{name} must be a string, got {type(value).__name__}")
    if (
        not value.isascii()
        and (lone := next((at for at, c in enumerate(value) if "\ud800" <= c <= "\udfff"), None)) is not None
    ):
        raise InputError(f"{name} is no text: it has half of a surrogate pair, {value[lone]!r}, at character {lone}")


class TimeUp(BaseException):
    """The time is over; no Exception, so that code inside cannot catch it by accident."""


@contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    """Raise ``TimeUp`` in this thread if the block takes longer. Python code is interrupted, a single call of C is not."""
    thread, lock, over = ctypes.c_ulong(threading.get_ident()), threading.Lock(), threading.Event()

    def interrupt() -> None:
        with lock:
            if not over.is_set():
                ctypes.pythonapi.PyThreadState_SetAsyncExc(thread, ctypes.py_object(TimeUp))

    timer = threading.Timer(seconds, interrupt)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()
        with lock:  # after this, nothing comes too late
            over.set()


@functools.lru_cache(maxsize=64)
def check_template(template: str) -> None:
    """Whether a chat template can be interrupted: powers, which no template needs, may take a single call for ever.

    Raises:
        InputError: it raises to a power, or is no template.
    """
    try:
        found = any(kind == "operator" and value == "**" for _, kind, value in Environment().lex(template))
    except TemplateSyntaxError as error:
        raise InputError(f"the chat template is none: line {error.lineno}: {error.message}") from error
    if found:
        raise InputError("the chat template raises to a power (**), which may take for ever: leave it out")
