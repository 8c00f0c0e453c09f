"""The token view: what each target wants of each token of a text, as one HTML page, a table, or a ranking."""

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from html import escape
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from torch import nn
from transformers import PreTrainedTokenizerBase

from qlens.analysis.token_view.page import html
from qlens.analysis.token_view.ranking import Ranking, jsonl, rank
from qlens.analysis.token_view.summary import Summary, summary_of
from qlens.analysis.token_view.token_text import TokenText, legible
from qlens.core.errors import InputError
from qlens.core.files import output_file, write_text
from qlens.core.supervised import IGNORE
from qlens.data.collator import COLUMNS
from qlens.data.compatibility import check_model, check_same_vocabulary, shortest_context
from qlens.data.examples import example
from qlens.data.from_text import check_fits, row_of
from qlens.registry import Variant, resolve

DEFAULT, WITH_TEACHER = ("sft", "dft"), ("target_sft", "kd")
CARRIED = ("old", "second", "sequence", "negatives")  # what a text and its model give of themselves
CONTEXT, TEXT = 24, 60  # letters shown of what comes before a token, and of a row


@dataclass(frozen=True)
class Text:
    """A row of the data: its number there (from 1), its token ids, and at which places of them a label is supervised."""

    row: int
    ids: tuple[int, ...]
    places: tuple[int, ...]


@dataclass(frozen=True, eq=False)
class TokenView:
    """What methods' targets want of every supervised token of texts; a notebook shows it as the page that ``save`` writes.

    Args:
        texts: the rows that were read.
        summary: of their N supervised tokens, in order.
        pieces: the text of a token by its id.
        skipped: rows that were not read, by number, and why.
        ranked: of all rows, where these are a choice of them.
    """

    texts: tuple[Text, ...]
    summary: Summary
    pieces: TokenText
    skipped: Mapping[int, str]
    ranked: Ranking | None = None

    @property
    def methods(self) -> tuple[str, ...]:
        """The methods' specs."""
        return tuple(self.summary.methods)

    @property
    def notes(self) -> list[str]:
        """What a reader should know: the rows that were left out, and why."""
        said = []
        for why in dict.fromkeys(self.skipped.values()):
            rows = [row for row, reason in self.skipped.items() if reason == why]
            more = f" and {len(rows) - 10} more" if len(rows) > 10 else ""
            said.append(f"left out, {why}: row {', '.join(map(str, rows[:10]))}{more}")
        return said

    @cached_property
    def table(self) -> pd.DataFrame:
        """A line per token and method: row, position (from 1), label, method, and the figures that ``summarise`` defines."""
        models = self.summary.models.rename(columns={"entropy": "entropy_p"})
        places = pd.DataFrame(self._places(), columns=["row", "position"])
        words = {name: [legible(self.pieces[token]) for token in models[name]] for name in ("label", "rival")}
        base = pd.concat([places, models.assign(**words)], axis=1)
        frames = [pd.concat([base.assign(method=name), frame], axis=1) for name, frame in self.summary.methods.items()]
        return pd.concat(frames, ignore_index=True)

    def to_jsonl(self) -> str:
        """JSON Lines: the lines of ``table``; what is NaN or infinite is null."""
        return jsonl(self.table)

    def rank(self) -> Ranking:
        """Tokens and rows by how little the targets trust their labels; see ``Ranking`` for the scores.

        Example:
            >>> view.rank().rows.query("by == 'dft'").head()  # doctest: +SKIP
        """
        return self._ranking if self.ranked is None else self.ranked

    @cached_property
    def _ranking(self) -> Ranking:
        places, models = self._places(), self.summary.models
        strings = {text.row: [self.pieces[token] for token in text.ids] for text in self.texts}
        ends = [(row, position - 1) for row, position in places]
        shown = {text.row: legible("".join(strings[text.row][text.places[0] :]))[:TEXT] for text in self.texts}
        return rank(
            self.summary,
            rows=[row for row, _ in places],
            positions=[position for _, position in places],
            pieces=[legible(self.pieces[token]) for token in models["label"]],
            rivals=[legible(self.pieces[token]) for token in models["rival"]],
            contexts=[legible("".join(strings[row][max(0, at - CONTEXT) : at]))[-CONTEXT:] for row, at in ends],
            texts=shown,
            notes=self.notes,
        )

    def top(self, count: int) -> "TokenView":
        """The rows among the first so many of any order, or with one of its first so many tokens; ranked among all rows."""
        ranked = self.rank()
        wanted, sizes = ranked.first(count), [len(text.places) for text in self.texts]
        kept = np.repeat([text.row in wanted for text in self.texts], sizes)
        texts = tuple(text for text in self.texts if text.row in wanted)
        return replace(self, texts=texts, summary=self.summary[np.flatnonzero(kept)], ranked=ranked)

    def html(self) -> str:
        """The page: one self-contained file that asks nothing of any other; everything from model and data is inert in it."""
        return html(self)

    def save(self, path: str | Path) -> Path:
        """Write the page to a file, whole or not at all.

        Raises:
            InputError: there is no such folder, or nothing can be written to it.
        """
        place = output_file(path, "path")
        write_text(place, self.html())
        return place

    def _repr_html_(self) -> str:
        frame = 'sandbox="allow-scripts" title="qlens token view" style="width:100%;height:44rem;border:0"'
        return f'<iframe {frame} srcdoc="{escape(self.html())}"></iframe>'

    def _places(self) -> list[tuple[int, int]]:
        """Of every supervised token the number of its row, and its position in it, from 1."""
        return [(text.row, place + 1) for text in self.texts for place in text.places]

    def __repr__(self) -> str:
        return f"<TokenView of {len(self.summary)} tokens in {len(self.texts)} rows: {', '.join(self.methods)}>"


def view(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    text: str | Sequence[Any],
    variants: Sequence[Variant | str | Callable] | None = None,
    *,
    teacher: nn.Module | None = None,
    reference: nn.Module | None = None,
    candidates: int = 20,
    rows: int | None = None,
) -> TokenView:
    """What the targets of several methods want of every supervised token of a text.

    Every text goes through the models by itself and is summarised a chunk at a time (``summarise``), so that of V entries
    per token a few are kept. Methods whose scope is sequence or batch are given the logits of a whole text; it is their batch.

    Args:
        model, tokenizer: a causal language model, and what made its vocabulary.
        text: a text, or a list of texts, (prompt, completion) pairs, rows of data, or ``{"input_ids", "labels"}``.
        variants: Variants, specs or loss functions; by default sft and dft, and with a teacher target_sft and kd.
        teacher, reference: other models over the same vocabulary; methods that pull toward one need it.
        candidates: how many tokens of the vocabulary are kept per position; see ``summarise``.
        rows: read no further once so many can be shown; by default all.

    Rows longer than a model's context, and rows without a supervised token, are left out and said to be (``skipped``).

    Raises:
        InputError: nothing to show, malformed rows, methods that need what is not there or that share a spec, models
            whose vocabularies differ, or fewer than one candidate or row.

    Source: Xie et al. 2026 (arXiv 2606.11189): Q = p - g.

    Example:
        >>> qlens.view(model, tokenizer, [("2 + 2 =", "4")], ["sft", "dft"]).save("view.html")  # doctest: +SKIP
    """
    chosen = _variants(variants, teacher, reference, (*CARRIED, *_columns(text)))
    for name, value in (("candidates", candidates), ("rows", 1 if rows is None else rows)):
        if not isinstance(value, int) or value < 1:
            raise InputError(f"{name} must be a whole number of at least 1, got {value!r}")
    others = {name: other for name, other in (("teacher", teacher), ("reference", reference)) if other is not None}
    check_model(model, "model")
    for name, other in others.items():
        check_same_vocabulary(model, other, name)
    examples, skipped = _read(text, tokenizer, shortest_context(model, *others.values()), rows)
    check_fits(list(examples.values()), {"model": model, **others})
    texts = tuple(
        Text(
            row,
            tuple(made["input_ids"]),
            tuple(at for at, label in enumerate(made["labels"]) if at and label != IGNORE),
        )
        for row, made in examples.items()
    )
    summary = summary_of(model, list(examples.values()), chosen, candidates, **others)
    return TokenView(texts, summary, TokenText(tokenizer), skipped)


def _columns(text: Any) -> list[str]:
    """The columns that all rows of data carry."""
    rows = (
        [text]
        if isinstance(text, Mapping)
        else text
        if isinstance(text, Sequence) and not isinstance(text, str)
        else []
    )
    return [name for name in COLUMNS if rows and all(isinstance(row, Mapping) and name in row for row in rows)]


def _variants(given: Any, teacher: Any, reference: Any, carried: Collection[str]) -> list[Variant]:
    """The methods, all of them different and with what they need."""
    if given is None:
        given = DEFAULT + WITH_TEACHER * (teacher is not None)
    chosen = [resolve(each) for each in ([given] if isinstance(given, (str, Variant)) or callable(given) else given)]
    if not chosen:
        raise InputError("variants is empty: give at least one method, like 'sft'")
    specs = [variant.spec for variant in chosen]
    for variant in chosen:
        if specs.count(variant.spec) > 1:
            raise InputError(f"variants: {variant.spec} is given twice")
        for need in variant.needs:
            there = {"teacher": teacher, "reference": reference}
            if need in there and there[need] is None:
                raise InputError(f"variants: {variant.spec} needs a {need}: give {need}=, on the command line --{need}")
            if need not in (*there, *carried):
                raise InputError(f"variants: {variant.spec} needs {need!r}, which a text does not carry")
    return chosen


def _read(text: Any, tokenizer: Any, limit: int | None, most: int | None) -> tuple[dict[int, dict], dict[int, str]]:
    """The rows as examples, and those that cannot be shown with the reason; both by their number, from 1."""
    rows = [text] if isinstance(text, (str, Mapping)) else text
    if not isinstance(rows, Sequence) or not len(rows):
        raise InputError("text must be a text, or a non-empty list of texts, pairs or rows of data")
    kept, skipped = {}, {}
    for number, row in enumerate(rows, 1):
        encoded = isinstance(row, Mapping) and {"input_ids", "labels"} <= set(row)
        made = row if encoded else example(row_of(row), tokenizer, f"row {number}")
        if limit is not None and len(made["input_ids"]) > limit:
            skipped[number] = f"longer than the context of {limit} tokens"
        elif all(label == IGNORE for label in made["labels"][1:]):
            skipped[number] = "no supervised token"
        else:
            kept[number] = made
        if len(kept) == most:
            break
    if not kept:
        why = "; ".join(f"row {row}: {why}" for row, why in list(skipped.items())[:3])
        raise InputError(f"text: none of its {len(rows)} rows can be shown ({why})")
    return kept, skipped
