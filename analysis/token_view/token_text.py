"""Text of single tokens, down to bytes that are only part of a character."""

import re
from collections.abc import Iterable, Sequence
from functools import cache
from typing import Any

from transformers.convert_slow_tokenizer import bytes_to_unicode

BYTE = re.compile(r"<0x([0-9A-Fa-f]{2})>")
PART = re.compile("[\udc80-\udcff]")


class TokenText:
    """Text of tokens by id, with the space that they begin with; part of a character is a lone surrogate.

    Args:
        tokenizer: of the ids; an id beyond its vocabulary reads ``<id>``.

    Attributes:
        special: ids of the special tokens.

    Example:
        >>> TokenText(tokenizer)[42]  # doctest: +SKIP
        ' the'
    """

    def __init__(self, tokenizer: Any):
        self._tokenizer = tokenizer
        self.special = frozenset(tokenizer.all_special_ids)
        anchor = tokenizer("a", add_special_tokens=False, verbose=False)["input_ids"][:1]
        self._anchor = (anchor, self._decode(anchor))  # decoded after another token, a token keeps its leading space
        self._cache: dict[int, str] = {}

    def __getitem__(self, token: int) -> str:
        if token not in self._cache:
            self._cache[token] = self._text(int(token))
        return self._cache[token]

    def _text(self, token: int) -> str:
        raw = self._tokenizer.convert_ids_to_tokens(token)
        if raw is None or token in self.special:
            return f"<{token}>" if raw is None else raw
        if byte := BYTE.fullmatch(raw):
            return _from_bytes(bytes([int(byte[1], 16)]))
        anchor, before = self._anchor
        text = self._decode([*anchor, token])
        text = text[len(before) :] if text.startswith(before) else self._decode([token])
        if "\ufffd" in text and all(letter in _byte_of_letter() for letter in raw):
            return _from_bytes(bytes(_byte_of_letter()[letter] for letter in raw))
        return text

    def _decode(self, ids: Sequence[int]) -> str:
        return self._tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)


def completed(parts: Iterable[str]) -> dict[int, str]:
    """Characters split over several tokens: their text by the position of their last token.

    Example:
        >>> completed(["a", "\\udcc3", "\\udca9", "b"])
        {2: 'é'}
    """
    characters, open_parts = {}, b""
    for position, part in enumerate(parts):
        if not PART.search(part):
            open_parts = b""
            continue
        open_parts += part.encode("utf-8", "surrogateescape")
        text = _from_bytes(open_parts)
        if not PART.search(text):
            characters[position], open_parts = text, b""
    return characters


def legible(text: str) -> str:
    """Text with parts of characters as \\xNN, for tables and files.

    Example:
        >>> print(legible("a\\udcf0"))
        a\\xf0
    """
    return text.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")


def _from_bytes(raw: bytes) -> str:
    return raw.decode("utf-8", "surrogateescape")


@cache
def _byte_of_letter() -> dict[str, int]:
    """The byte that a letter of a byte-level vocabulary stands for."""
    return {letter: byte for byte, letter in bytes_to_unicode().items()}
