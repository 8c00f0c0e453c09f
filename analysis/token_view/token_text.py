"""Pieces: what single tokens stand for, as text, down to bytes that are only part of a character."""

import re
from collections.abc import Iterable, Sequence
from functools import cache
from typing import Any

BYTE = re.compile(r"<0x([0-9A-Fa-f]{2})>")
PART = re.compile("[\udc80-\udcff]")


class Pieces:
    """The text of a token by its id; a byte that is no whole character is a lone surrogate (``surrogateescape``).

    Args:
        tokenizer: whose ids they are; an id beyond its vocabulary reads ``<id>``.

    Example:
        >>> Pieces(tokenizer)[42]  # doctest: +SKIP
        ' the'
    """

    def __init__(self, tokenizer: Any):
        self._tokenizer = tokenizer
        self._special = set(tokenizer.all_special_ids)
        anchor = tokenizer("a", add_special_tokens=False, verbose=False)["input_ids"][:1]
        self._anchor = (anchor, self._decode(anchor))  # a token after another shows the space it begins with
        self._known: dict[int, str] = {}

    def __getitem__(self, token: int) -> str:
        if token not in self._known:
            self._known[token] = self._text(int(token))
        return self._known[token]

    def _text(self, token: int) -> str:
        raw = self._tokenizer.convert_ids_to_tokens(token)
        if raw is None or token in self._special:
            return f"<{token}>" if raw is None else raw
        if byte := BYTE.fullmatch(raw):
            return _from_bytes(bytes([int(byte[1], 16)]))
        anchor, before = self._anchor
        text = self._decode([*anchor, token])
        text = text[len(before) :] if text.startswith(before) else self._decode([token])
        if "\ufffd" in text and all(letter in _byte_letters() for letter in raw):
            return _from_bytes(bytes(_byte_letters()[letter] for letter in raw))
        return text

    def _decode(self, ids: Sequence[int]) -> str:
        return self._tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)


def completed(pieces: Iterable[str]) -> dict[int, str]:
    """Where parts of characters become whole: the position of the last part, and the text of all of them.

    Example:
        >>> completed(["a", "\\udcc3", "\\udca9", "b"])
        {2: 'é'}
    """
    found, open_parts = {}, b""
    for position, piece in enumerate(pieces):
        if not PART.search(piece):
            open_parts = b""
            continue
        open_parts += piece.encode("utf-8", "surrogateescape")
        text = _from_bytes(open_parts)
        if not PART.search(text):
            found[position], open_parts = text, b""
    return found


def legible(text: str) -> str:
    """The text with bytes that are no whole character as \\xNN, so that every table and file can hold it.

    Example:
        >>> print(legible("a\\udcf0"))
        a\\xf0
    """
    return text.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")


def _from_bytes(raw: bytes) -> str:
    return raw.decode("utf-8", "surrogateescape")


@cache
def _byte_letters() -> dict[str, int]:
    """The letters by which byte-level vocabularies write bytes: itself where printable, else the next free one from 256 on."""
    printable = {*range(33, 127), *range(161, 173), *range(174, 256)}
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(b): b for b in printable} | {chr(256 + n): b for n, b in enumerate(others)}
