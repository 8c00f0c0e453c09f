"""Rows that cannot be used: the error, with a short reason to count by."""

from typing import Any

from qlens.core.errors import InputError


class BadRow(InputError):
    """A row of data that cannot be used.

    Args:
        reason: a few words, the same for all rows of this kind; reports count by it.
        detail: what is wrong with this row and what would be right.
    """

    def __init__(self, reason: str, detail: str):
        super().__init__(detail)
        self.reason, self.detail = reason, detail

    def at(self, where: str) -> "BadRow":
        """The same error with the row's place before it."""
        error = BadRow(self.reason, self.detail)
        error.args = (f"{where}: {self.detail}",)
        return error


def check_text(value: Any, name: str) -> str:
    """A value that must be text which can be written in UTF-8.

    Raises:
        BadRow: not a string, or one with half of a surrogate pair; ``name`` begins the message.
    """
    if not isinstance(value, str):
        raise BadRow("wrong types", f"{name} must be a string, got {type(value).__name__}")
    if not value.isascii():
        try:
            value.encode()
        except UnicodeEncodeError as error:
            at = error.start
            raise BadRow(
                "no valid text", f"{name} is no text: it has half of a surrogate pair, {value[at]!r}, at character {at}"
            ) from None
    return value
