"""Texts of a ranking: labels, what precedes them, and how rows begin, decoded for what is shown alone."""

from collections.abc import Mapping, Sequence
from typing import Any

from qlens.analysis.token_view.token_text import legible

CONTEXT, TEXT = 24, 60  # letters shown of the context of a token, and of a row
PARTS = 4  # of a character, at most, that are tokens of their own


class RowTexts:
    """Texts of rows and of their tokens.

    Args:
        token_text: the text of a token by its id.
        ids: the token ids of a row, by its number.
        starts: the index of its first supervised token, by its number.
    """

    def __init__(self, token_text: Any, ids: Mapping[int, Sequence[int]], starts: Mapping[int, int]):
        self.token_text, self.ids, self.starts = token_text, ids, starts

    def token(self, token: int) -> str:
        """The text of a token."""
        return legible(self.token_text[token])

    def context(self, row: int, position: int) -> str:
        """The letters before a token, by its position from 1."""
        before = self.ids[row][max(0, position - 1 - CONTEXT) : position - 1]
        return legible("".join(self.token_text[int(token)] for token in before))[-CONTEXT:]

    def text(self, row: int) -> str:
        """The first letters of a row's supervised part."""
        text = ""
        for token in self.ids[row][self.starts[row] :]:
            text += self.token_text[int(token)]
            if len(text) >= PARTS * (TEXT + 1):
                break
        return legible(text)[:TEXT]
