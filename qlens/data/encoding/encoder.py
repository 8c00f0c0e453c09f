"""Encoder: samples of rows as token ids and what of them is learned."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from qlens.core.errors import InputError, brief
from qlens.data.chat_templates import ChatTemplate, LearnedText
from qlens.data.encoding.plain_text import joined, whole
from qlens.data.encoding.tokenizing import TextTokenizer
from qlens.data.rows.bad_rows import BadRow
from qlens.data.rows.samples import Sample

ENDLESS = "no end token is learned: the chat template writes none after the assistant's last turn"


@dataclass(slots=True)
class EncodedSample:
    """A sample as tokens.

    Args:
        ids: token ids, (T,).
        learned: which of them are labels, (T,); never the first, which nothing predicts.
        columns: of the row.
        way: how what is learned was found.
        notes: what of the row is written otherwise.
    """

    ids: np.ndarray
    learned: np.ndarray
    columns: dict[str, Any]
    way: str
    notes: list[str]


class Encoder:
    """A tokenizer with its chat template, for samples.

    Args:
        tokenizer: of the model.

    Raises:
        InputError: no loaded tokenizer, or a chat template that is none.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase):
        self.tokens = TextTokenizer(tokenizer)
        self.template = ChatTemplate(tokenizer) if tokenizer.chat_template else None
        self.bos, self.eos = tokenizer.bos_token_id, tokenizer.eos_token_id

    def __call__(self, samples: Sequence[Sample]) -> list[EncodedSample | BadRow]:
        """Every sample as tokens, or why it is none."""
        return self.tokenized(samples, self.texts(samples))

    def texts(self, samples: Sequence[Sample]) -> list[list[LearnedText] | BadRow]:
        """The texts of every sample, or why there are none; runs the chat template."""
        results: list[list[LearnedText] | BadRow] = [[] for _ in samples]
        chats = [at for at, sample in enumerate(samples) if sample.turns and self.template]
        if self.template is not None:
            for at, text in zip(chats, self.template.texts([samples[at] for at in chats]), strict=True):
                results[at] = text if isinstance(text, BadRow) else [text]
        for at, sample in enumerate(samples):
            if not (sample.turns and self.template):
                results[at] = joined(sample) if sample.turns else whole(sample)
        return results

    def tokenized(
        self, samples: Sequence[Sample], results: Sequence[list[LearnedText] | BadRow]
    ) -> list[EncodedSample | BadRow]:
        """The samples of these texts as tokens; may run in another thread than ``texts``."""
        tokenized = iter(self.tokens([text for texts in results if isinstance(texts, list) for text in texts]))
        encoded: list[EncodedSample | BadRow] = []
        for texts, sample in zip(results, samples, strict=True):
            if isinstance(texts, BadRow):
                encoded.append(texts)
                continue
            parts = [(text, next(tokenized)) for text in texts]
            bad = next((part for _, part in parts if isinstance(part, BadRow)), None)
            encoded.append(bad or self._sample(sample, parts))
        return encoded

    def _sample(self, sample: Sample, parts: list[tuple[LearnedText, Any]]) -> EncodedSample | BadRow:
        """The parts of a sample as one, with BOS and EOS."""
        ids, spans, notes = list[int](), list[tuple[int, int]](), list(parts[0][0].notes)
        for text, (own, learned) in parts:
            if text.begins and self.bos is not None and own[:1] != [self.bos]:
                ids.append(self.bos)
            spans += [(len(ids) + start, len(ids) + end) for start, end in learned]
            ids += own
            if text.ends and self.eos is not None:
                if text.spans and text.spans[-1][1] == len(text.text):
                    spans.append((len(ids), len(ids) + 1))
                ids.append(self.eos)
        mask = np.zeros(len(ids), dtype=bool)
        for start, end in spans:
            mask[max(start, 1) : end] = True
        if sample.turns and self.template is not None and spans and spans[-1][1]:
            if ids[spans[-1][1] - 1] not in self.tokens.added:
                notes.append(ENDLESS)
        for name, values in sample.columns.items():
            if isinstance(values, Sequence) and len(values) != len(ids):
                return BadRow(
                    "columns of another length", f"{name} has {len(values)} values, but the row has {len(ids)} tokens"
                )
        return EncodedSample(np.array(ids, dtype=np.int32), mask, sample.columns, parts[0][0].way, notes)


_RECENT: list[tuple[Any, str, Encoder]] = []  # a few tokenizers, so that rows may come one at a time


def encoder_of(tokenizer: Any) -> Encoder:
    """The encoder of a tokenizer, made once as long as its template and tokens stay the same.

    Raises:
        InputError: no loaded tokenizer, or a chat template that is none.
    """
    if not isinstance(tokenizer, PreTrainedTokenizerBase):
        raise InputError(
            f"tokenizer must be a loaded tokenizer, got {brief(tokenizer)}: load it by AutoTokenizer.from_pretrained(FOLDER)"
        )
    state = repr((tokenizer.chat_template, tokenizer.special_tokens_map, len(tokenizer)))
    for known, then, encoder in _RECENT:
        if known is tokenizer and then == state:
            return encoder
    encoder = Encoder(tokenizer)
    _RECENT.append((tokenizer, state, encoder))
    del _RECENT[:-4]
    return encoder
