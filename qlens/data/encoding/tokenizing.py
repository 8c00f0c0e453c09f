"""Tokenizing: token ids of texts in batches, and the tokens at which spans of characters begin and end.

A prompt has the tokens that it has at inference, when nothing follows it. Whether that holds in the whole text is seen from the
last added token before the border, such as "<|im_start|>", since no token reaches across one: what is between the two is
tokenized alone and compared. Where it differs, the text is cut at the border and its parts are tokenized.
"""

from collections.abc import Sequence
from typing import Any

from transformers import PreTrainedTokenizerBase

from qlens.data.chat_templates import LearnedText
from qlens.data.rows.bad_rows import BadRow

SHORT, KEPT = 64, 20_000  # characters of tails that are remembered, and how many of them

Tokenized = tuple[list[int], list[tuple[int, int]]]  # ids, and the spans that are learned


class TextTokenizer:
    """A tokenizer for texts with learned spans.

    Args:
        tokenizer: fast or slow; no special tokens are added to what a text holds.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase):
        self.tokenizer: Any = tokenizer
        self.added = frozenset(self.tokenizer.added_tokens_encoder.values())
        self._tails: dict[str, list[int]] = {}
        self._direct: bool | None = None

    def __call__(self, texts: Sequence[LearnedText]) -> list[Tokenized | BadRow]:
        """Token ids and learned spans of tokens, or why a text cannot be cut into them."""
        if not texts:
            return []
        self._direct = None  # somebody may have changed the tokenizer
        batch, encodings = self._batch([text.text for text in texts])
        borders = [[at for span in text.spans for at in span] for text in texts]
        places = [
            self._places(text.text, ids, encoding, own)
            for text, ids, encoding, own in zip(texts, batch, encodings, borders, strict=True)
        ]
        self._remember({tail for own in places for _, tail in own if tail})
        results: list[Tokenized | BadRow] = []
        for text, ids, own, place in zip(texts, batch, borders, places, strict=True):
            index = [self._index(ids, *each) for each in place]
            if None in index:
                try:
                    ids, index = self._cut(text.text, ids, own, index)
                except BadRow as error:
                    results.append(error)
                    continue
            results.append((ids, [(index[at], index[at + 1]) for at in range(0, len(index), 2)]))
        if len(self._tails) > KEPT:
            self._tails.clear()
        return results

    def ids(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids of texts, as they stand."""
        if not texts:
            return []
        if self._is_direct(texts[:2]):
            return [
                each.ids for each in self.tokenizer.backend_tokenizer.encode_batch_fast(texts, add_special_tokens=False)
            ]
        return self._called(texts)["input_ids"]

    def _batch(self, texts: Sequence[str]) -> tuple[list[list[int]], Sequence[Any]]:
        """Token ids of texts, and their encodings; None from tokenizers in Python."""
        if self._is_direct(texts[:2]):
            encodings = self.tokenizer.backend_tokenizer.encode_batch(texts, add_special_tokens=False)
            return [encoding.ids for encoding in encodings], encodings
        batch = self._called(texts)
        return batch["input_ids"], batch.encodings or [None] * len(texts)

    def _called(self, texts: Sequence[str]) -> Any:
        return self.tokenizer(
            list(texts),
            add_special_tokens=False,
            return_attention_mask=False,
            return_token_type_ids=False,
            verbose=False,
        )

    def _is_direct(self, texts: Sequence[str]) -> bool:
        """Whether the tokenizer does no more than its backend, seen at the first texts; the call also takes truncation off."""
        if self._direct is None:
            called = self._called(texts)["input_ids"]
            backend = getattr(self.tokenizer, "backend_tokenizer", None) if self.tokenizer.is_fast else None
            self._direct = backend is not None and called == [
                each.ids for each in backend.encode_batch(list(texts), add_special_tokens=False)
            ]
        return self._direct

    def _places(self, text: str, ids: list[int], encoding: Any, borders: Sequence[int]) -> list[tuple[int, str]]:
        """For every border the token of the last added token before it, and the text from there on; "" where there is none."""
        places = []
        for border in borders:
            if border in (0, len(text)):
                places.append((0 if border == 0 else len(ids), ""))
                continue
            before = self._anchor(ids, encoding, border)
            start = 0 if before == 0 else encoding.token_to_chars(before)[0]
            places.append((before, text[start:border]))
        return places

    def _anchor(self, ids: list[int], encoding: Any, border: int) -> int:
        """The last added token that ends at a border or before it; 0 if there is none."""
        if encoding is None:
            return 0
        at, token = border - 1, None
        while at >= 0 and token is None:  # white space that counts to no token
            token = encoding.char_to_token(at)
            at -= 1
        if token is None:
            return 0
        while token > 0 and (ids[token] not in self.added or encoding.token_to_chars(token)[1] > border):
            token -= 1
        return token

    def _remember(self, tails: set[str]) -> None:
        missing = [tail for tail in tails if tail not in self._tails]
        self._tails |= dict(zip(missing, self.ids(missing), strict=True))

    def _index(self, ids: list[int], start: int, tail: str) -> int | None:
        """The token at which a border lies, None where the tail is tokenized otherwise by itself."""
        if not tail:
            return start
        own = self._tails[tail] if len(tail) <= SHORT else self._tails.pop(tail, None) or self.ids([tail])[0]
        return start + len(own) if ids[start : start + len(own)] == own else None

    def _cut(
        self, text: str, ids: list[int], borders: Sequence[int], index: Sequence[int | None]
    ) -> tuple[list[int], list[int]]:
        """Ids and border tokens of a text that is cut at the borders which no token keeps.

        Raises:
            BadRow: the parts have tokens that do not spell the text.
        """
        cuts = [0, *(border for border, at in zip(borders, index, strict=True) if at is None), len(text)]
        parts = [text[a:b] for a, b in zip(cuts, cuts[1:], strict=False)]
        joined, starts = list[int](), list[int]()
        for part in self.ids(parts):
            starts.append(len(joined))
            joined += part
        if self._spelled(joined) != self._spelled(ids):
            raise BadRow(
                "tokens across a border",
                "the tokens of its turns cannot be separated: some reach across a border between them",
            )
        found = []
        for border in borders:
            if border in cuts:
                found.append((starts + [len(joined)])[cuts.index(border)])
                continue
            part = max(at for at, cut in enumerate(cuts) if cut < border)
            before = self.ids([text[cuts[part] : border]])[0]
            if joined[starts[part] : starts[part] + len(before)] != before:
                raise BadRow("tokens across a border", "the tokens of its turns cannot be separated")
            found.append(starts[part] + len(before))
        return joined, found

    def _spelled(self, ids: list[int]) -> str:
        return self.tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
