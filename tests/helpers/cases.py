"""Cases: loops over cases in one test, whose failures name the case."""

import contextlib
from collections.abc import Iterator
from typing import Any


@contextlib.contextmanager
def case(*values: Any) -> Iterator[None]:
    """Name the case in whatever its block raises."""
    try:
        yield
    except BaseException as error:
        named = ", ".join(getattr(value, "__name__", None) or repr(value)[:120] for value in values)
        error.add_note(f"in the case {named}")
        raise
