"""The errors qlens raises for a user's mistake; the command line turns each into one line and exit code 2."""

import difflib
from collections.abc import Iterable


class InputError(ValueError):
    """Something handed to qlens does not fit; the message names it, its value and what would be right."""


class UnknownName(InputError, KeyError):
    """A name that is not there; the message suggests near ones."""

    __str__ = Exception.__str__  # KeyError would print the message in quotes

    @classmethod
    def among(cls, kind: str, name: str, known: Iterable[str]) -> "UnknownName":
        """The error for ``name``, with near names and the full sorted list."""
        known = sorted(known)
        near = difflib.get_close_matches(name, known, n=3, cutoff=0.5)
        hint = f" Did you mean {' or '.join(near)}?" if near else ""
        return cls(f"unknown {kind} {name!r}.{hint} Known: {', '.join(known)}.")


class ParameterError(InputError, TypeError):
    """A method's parameter is unknown, of the wrong type or out of range."""
