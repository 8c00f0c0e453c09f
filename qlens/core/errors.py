"""Errors of invalid input; the command line prints each on one line and exits with code 2."""

import difflib
from collections.abc import Iterable
from typing import Any


class InputError(ValueError):
    """An invalid argument; the message names it, its value and what would be right."""


class UnknownName(InputError, KeyError):
    """An unknown name; the message suggests similar ones."""

    __str__ = Exception.__str__  # KeyError would print the message in quotes

    @classmethod
    def among(cls, kind: str, name: str, names: Iterable[str]) -> "UnknownName":
        """The error for ``name``, with near names and the full sorted list."""
        names = sorted(names)
        near = difflib.get_close_matches(name[:100], names, n=3, cutoff=0.5)
        hint = f" Did you mean {' or '.join(near)}?" if near else ""
        return cls(f"unknown {kind} {brief(name)}.{hint} Known: {', '.join(names) or 'none'}.")


class UnknownReduction(InputError):
    """A loss with an unknown reduction, which cannot be undone."""


class ParameterError(InputError, TypeError):
    """A method's parameter is unknown, of the wrong type or out of range."""


def brief(value: Any, most: int = 80) -> str:
    """The repr of a value for a message, cut in the middle where it is longer than ``most`` characters.

    Example:
        >>> brief("x" * 100, most=20)
        "'xxxxxxx...xxxxxxx'"
    """
    if isinstance(value, int) and abs(value) >= 10**100:
        return f"a whole number of {value.bit_length()} bits"  # longer ones have no repr
    text = repr(value[: 2 * most] if isinstance(value, str | bytes | list | tuple) else value)
    if isinstance(value, str | bytes) and len(value) > 2 * most:
        ends: Any = value
        text = repr(ends[:most] + ends[-most:])
    text = " ".join(text.split()) if "\n" in text else text  # of an array, say
    half = (most - 3) // 2
    return text if len(text) <= most else f"{text[:half]}...{text[-half:]}"


def one_line(text: str, most: int = 1000) -> str:
    """A message on one line: white space as single spaces, what cannot be printed as an escape, cut at ``most``.

    Example:
        >>> one_line("no file\\n  'a\\x07'")
        "no file 'a\\\\x07'"
    """
    words = " ".join(str(text)[: 4 * most].split())
    plain = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in words)
    return plain if len(plain) <= most else plain[: most - 3] + "..."
