"""Token view: the targets of methods at every token of a text, as an HTML page, a table, a figure or a ranking."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from html import escape
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from torch import nn
from transformers import PreTrainedTokenizerBase

from qlens.analysis.ranking.ranking import Ranking, jsonl, records
from qlens.analysis.ranking.row_texts import RowTexts
from qlens.analysis.ranking.scores import Scores
from qlens.analysis.token_view.inputs import (
    FIELDS,
    check_number,
    columns_of,
    encoded_rows,
    left_out,
    loaded_models,
    places_of,
    rows_of,
    variants_of,
)
from qlens.analysis.token_view.page import METRICS, html
from qlens.analysis.token_view.segments import REST, patterns, segment_means, segments_of, user_columns
from qlens.analysis.token_view.summary import Summary, summary_of
from qlens.analysis.token_view.token_text import TokenText, legible
from qlens.analysis.token_view.vocabulary import VocabularyTotals
from qlens.core.deprecation import renamed_arguments, warn
from qlens.core.deprecation.columns import renamed_columns
from qlens.core.display import Result, latex_table
from qlens.core.errors import InputError
from qlens.core.files import output_file, write_text
from qlens.data.compatibility import shortest_context
from qlens.data.from_text import check_fits
from qlens.registry import Variant


@dataclass(frozen=True)
class Text:
    """A row of the data: its number (from 1), its token ids, and the positions of supervised labels."""

    row: int
    ids: tuple[int, ...]
    places: tuple[int, ...]


@dataclass(frozen=True, eq=False, repr=False)
class TokenView(Result):
    """Targets of methods at every supervised token of texts; a notebook shows the page that ``save`` writes.

    Args:
        texts: the rows that were read.
        summary: of their N supervised tokens, in order.
        token_text: the text of a token by its id.
        skipped: the reason by number of each row that was left out.
        ranked: the ranking of all rows, where ``texts`` are some of them.
        columns: a row per supervised token: segment, and the columns of the data that were asked for.
        totals: sums over all rows by entry of the vocabulary.
    """

    texts: tuple[Text, ...]
    summary: Summary
    token_text: TokenText
    skipped: Mapping[int, str]
    ranked: Ranking | None = None
    columns: pd.DataFrame | None = None
    totals: VocabularyTotals | None = None

    @property
    def methods(self) -> tuple[str, ...]:
        """The methods' specs."""
        return tuple(self.summary.methods)

    @property
    def notes(self) -> list[str]:
        """Rows that were left out, by reason."""
        return left_out(self.skipped)

    @cached_property
    def table(self) -> pd.DataFrame:
        """A line per token and method: row, position (from 1), segment, label, method, and the metrics of ``Summary``.

        With two checkpoints, ``checkpoint`` is "before" or "after", and ``change`` is the total variation between them.
        """
        places = pd.DataFrame(self._places(), columns=["row", "position"])
        places = places if self.columns is None else pd.concat([places, self.columns], axis=1)
        before, after = self.summary, self.summary.after
        if after is None:
            return renamed_columns(self._lines(before, places))
        checkpoints = {"before": before, "after": after}
        frames = [self._lines(each, places.assign(checkpoint=name)) for name, each in checkpoints.items()]
        return renamed_columns(pd.concat(frames, ignore_index=True))

    def _lines(self, summary: Summary, places: pd.DataFrame) -> pd.DataFrame:
        """The lines of ``table`` of one checkpoint."""
        models = summary.models.rename(columns={"entropy": "entropy_p"})
        words = {name: [legible(self.token_text[token]) for token in models[name]] for name in ("label", "runner_up")}
        base = pd.concat([places, models.assign(**words)], axis=1)
        frames = [pd.concat([base.assign(method=name), frame], axis=1) for name, frame in summary.methods.items()]
        return pd.concat(frames, ignore_index=True)

    @cached_property
    def segments(self) -> pd.DataFrame:
        """A line per segment and method: tokens, and the means of nll and of the method's metrics.

        Example:
            >>> view.segments.pivot(index="segment", columns="method", values="label_weight")  # doctest: +SKIP
        """
        segment = pd.Series([REST] * len(self.summary)) if self.columns is None else self.columns["segment"]
        return segment_means(segment, self.summary.models["nll"], self.summary.methods)

    @cached_property
    def vocabulary(self) -> pd.DataFrame:
        """A line per method and entry that any method moves: which entries the method promotes and demotes over all rows.

        Columns: method, id, token, labels (tokens with that label), p and q (expected counts under student and target), move
        = q - p, move_label and move_other (over the tokens with that label, and over the others); most promoted first.

        Raises:
            InputError: a view without sums over the vocabulary.

        Example:
            >>> view.vocabulary.query("method == 'dft'").head()  # doctest: +SKIP
        """
        if self.totals is None:
            raise InputError("this view has no sums over the vocabulary: make it by qlens.view")
        frame = self.totals.frame()
        frame.insert(2, "token", [legible(self.token_text[int(entry)]) for entry in frame["id"]])
        order = frame["method"].map({name: number for number, name in enumerate(self.totals.moves)})
        frame = frame.assign(order=order).sort_values(["order", "move"], ascending=[True, False], ignore_index=True)
        return frame.drop(columns="order")

    def to_frame(self) -> pd.DataFrame:
        """``table``."""
        return self.table

    def to_jsonl(self) -> str:
        """JSON Lines: the lines of ``table``; NaN and infinity are null."""
        return jsonl(self.table)

    def to_dict(self) -> dict[str, Any]:
        """As JSON: methods, notes, and the lines of ``table``."""
        return {"methods": list(self.methods), "notes": self.notes, "table": records(self.table)}

    def to_latex(
        self, columns: Sequence[str] | None = None, caption: str | None = None, label: str | None = None, **options: Any
    ) -> str:
        """``table`` in LaTeX (booktabs).

        Args:
            columns: columns of ``table``; by default row, position, label, method, p_y, q_y, label_weight and kl.
            caption, label, options: as of ``qlens.core.display.latex_table``.

        Raises:
            InputError: an unknown column.
        """
        default = ["row", "position", "label", "method", "p_y", "q_y", "label_weight", "kl"]
        return latex_table(self.table, columns or default, caption, label, **options)

    def plot(self, row: int | None = None, metric: str | None = None, methods: Sequence[str] | None = None) -> Any:
        """A matplotlib figure of one row: its running text coloured by a metric, a block per method.

        Without ``metric`` the tokens stand side by side, as heat maps of label weight, entropy, KL(Q || p) and negative mass.

        Args:
            row: number of the row in the data; by default the first.
            metric: a metric's key: a column of ``table``, or "column NAME" for a column of the data.
            methods: names; by default all.

        Raises:
            InputError: no such row, metric or method.

        Example:
            >>> view.plot(row=3, metric="label_weight").savefig("row.pdf")  # doctest: +SKIP
        """
        from qlens.analysis.plots import figure_sequence

        rows = [text.row for text in self.texts]
        if row is not None and row not in rows:
            raise InputError(f"row must be one of {', '.join(map(str, rows[:10]))}, got {row}")
        if unknown := [name for name in methods or () if name not in self.methods]:
            raise InputError(f"methods: {unknown[0]!r} is none of this view's {', '.join(self.methods)}")
        at = 0 if row is None else rows.index(row)
        chosen = list(self.methods if methods is None else methods)
        if metric is not None:
            return self._running_text(at, metric, chosen)
        table = self.table[(self.table["row"] == rows[at]) & self.table["method"].isin(chosen)]
        if "checkpoint" in table:
            table = table[table["checkpoint"] == "before"]
        names = dict.fromkeys(table["position"])
        positions = table["position"].map({name: number for number, name in enumerate(names)})
        return figure_sequence(pd.DataFrame(table.assign(position=positions, token=table["label"])))

    def _running_text(self, at: int, metric: str, methods: Sequence[str]) -> Any:
        from qlens.analysis.token_view.page import metrics_of, model_metrics, scale_end
        from qlens.analysis.token_view.row_figure import figure_row

        models = model_metrics(self)
        known = {each.key: each for each in metrics_of(self, models)}
        if metric not in known:
            raise InputError(f"metric must be one of {', '.join(known)}, got {metric!r}")
        chosen = known[metric]
        text, start = self.texts[at], sum(len(each.places) for each in self.texts[:at])
        tokens = slice(start, start + len(text.places))
        frames = {name: self.summary.methods[name] for name in methods} if chosen.method else {chosen.name: models}
        values = {title: frame[metric].to_numpy(dtype=float)[tokens] for title, frame in frames.items()}
        strings = [self.token_text[token] for token in text.ids]
        high = scale_end(chosen, self.summary, models)
        return figure_row(strings, text.places, values, chosen.name, high, chosen.signed, chosen.log)

    @property
    def pieces(self) -> TokenText:
        """The old name of ``token_text``."""
        warn("TokenView.pieces", "TokenView.token_text")
        return self.token_text

    def rank(self) -> Ranking:
        """Tokens and rows in the order of their label weight, and of the models' margin; see ``Ranking``.

        Example:
            >>> view.rank().rows.query("by == 'dft'").head()  # doctest: +SKIP
        """
        return self._ranking if self.ranked is None else self.ranked

    @cached_property
    def _ranking(self) -> Ranking:
        rows, positions = zip(*self._places(), strict=True)
        models = self.summary.models.assign(row=rows, position=positions)
        ids = {text.row: text.ids for text in self.texts}
        starts = {text.row: text.places[0] for text in self.texts}
        return Ranking.of(Scores(models, self.summary.methods), RowTexts(self.token_text, ids, starts), self.notes)

    def top(self, count: int) -> "TokenView":
        """The rows among the first ``count`` of any order, or with one of its first tokens; ranked among all rows."""
        ranked = self.rank()
        selected, sizes = ranked.first(count), [len(text.places) for text in self.texts]
        tokens = np.flatnonzero(np.repeat([text.row in selected for text in self.texts], sizes))
        texts = tuple(text for text in self.texts if text.row in selected)
        columns = None if self.columns is None else self.columns.iloc[tokens].reset_index(drop=True)
        return replace(self, texts=texts, summary=self.summary[tokens], ranked=ranked, columns=columns)

    def html(self) -> str:
        """The page: one self-contained file; everything from model and data is escaped."""
        return html(self)

    def save(self, path: str | Path) -> Path:
        """Write the page to a file, atomically.

        Returns:
            the path.

        Raises:
            InputError: the folder does not exist or is not writable.
        """
        file = output_file(path, "path")
        write_text(file, self.html())
        return file

    def _repr_html_(self) -> str:
        frame = 'sandbox="allow-scripts" title="qlens token view" style="width:100%;height:44rem;border:0"'
        return f'<iframe {frame} srcdoc="{escape(self.html())}"></iframe>'

    def _places(self) -> list[tuple[int, int]]:
        """Row number and position (from 1) of every supervised token."""
        return [(text.row, place + 1) for text in self.texts for place in text.places]

    def __repr__(self) -> str:
        return f"<TokenView of {len(self.summary)} tokens in {len(self.texts)} rows: {', '.join(self.methods)}>"


@renamed_arguments(rows="max_rows")
def view(
    model: nn.Module | str | Path,
    tokenizer: PreTrainedTokenizerBase | str | Path | None,
    text: str | Sequence[Any],
    variants: Sequence[Variant | str | Callable] | None = None,
    *,
    teacher: nn.Module | str | Path | None = None,
    reference: nn.Module | str | Path | None = None,
    after: nn.Module | str | Path | None = None,
    candidates: int = 20,
    max_rows: int | None = None,
    columns: Sequence[str] = (),
    segments: Mapping[str, str] | None = None,
    top_k_teacher: int | None = None,
    progress: bool = True,
) -> TokenView:
    """Read the targets of several methods at every supervised token of a text.

    Every text goes through the models alone and is summarised a chunk at a time (``summarise``), so that a few of V entries
    per token are stored. For methods of scope "sequence" or "batch", the text is the batch.

    Args:
        model: a causal language model, or its folder.
        tokenizer: of the model, or its folder; None with a folder as ``model``.
        text: a text, or a list of texts, (prompt, completion) pairs, rows of data, or ``{"input_ids", "labels"}``.
        variants: Variants, specs or loss functions; by default sft and dft, and with a teacher target_sft and kd.
        teacher, reference: other models over the same vocabulary, or their folders, for methods that need one.
        after: another checkpoint of the model, or its folder: p, Q and all metrics of both are shown, and what moved.
        candidates: vocabulary entries stored per token; see ``summarise``.
        max_rows: stop after this many rows that can be shown; by default all.
        columns: keys of the rows that are shown as metrics, like "reward": a number, or one per token (of the row, or of its
            supervised tokens).
        segments: regular expressions of the parts of a text over which means are taken, by name; by default thinking and
            tool call by their tags, and answer, which is the rest (beside segments of your own: other).
        top_k_teacher: read methods of a teacher a second time with a teacher that is known by this many entries, as stored
            ones are; the rest of its mass follows the student's ratios.
        progress: show a bar on stderr while long texts are read.

    Returns:
        a view: a notebook shows it; ``save``, ``rank()``, ``table`` and ``plot()``. Rows longer than a model's context and
        rows without a supervised token are in ``skipped``.

    Raises:
        InputError: no row that can be shown, malformed rows, methods that lack an input or share a spec, models with
            different vocabularies, or fewer than one candidate or row.

    Source: Xie et al. 2026 (arXiv 2606.11189): Q = p - g.

    Example:
        >>> qlens.view(model, tokenizer, [("2 + 2 =", "4")], ["sft", "dft"]).save("view.html")  # doctest: +SKIP
    """
    chosen = variants_of(variants, teacher, reference, (*FIELDS, *columns_of(text)))
    limits = {"candidates": candidates, "max_rows": max_rows, "top_k_teacher": top_k_teacher}
    for name, value in limits.items():
        if value is not None:
            check_number(name, value)
    if top_k_teacher is not None and teacher is None:
        raise InputError(f"top_k_teacher={top_k_teacher} needs a teacher: give teacher=, on the command line --teacher")
    compiled = patterns(segments)
    student, tokenizer, models = loaded_models(model, tokenizer, teacher=teacher, reference=reference, after=after)
    examples, skipped = encoded_rows(text, tokenizer, shortest_context(student, *models.values()), max_rows)
    check_fits(list(examples.values()), {"model": student, **models})
    texts = tuple(Text(row, tuple(each["input_ids"]), places_of(each)) for row, each in examples.items())
    token_text, totals = TokenText(tokenizer), VocabularyTotals()
    rest = REST if segments is None else "other"
    segment = [
        name
        for text in texts
        for name in segments_of([token_text[token] for token in text.ids], text.places, compiled, rest)
    ]
    given = rows_of(text)
    values = user_columns(
        {each.row: given[each.row - 1] for each in texts},
        {each.row: each.places for each in texts},
        {each.row: len(each.ids) for each in texts},
        columns,
        [metric.key for metric in METRICS],
    )
    values.insert(0, "segment", segment)
    options = {"top_k_teacher": top_k_teacher, "totals": totals, "progress": progress}
    summary = summary_of(student, list(examples.values()), chosen, candidates, **options, **models)
    return TokenView(texts, summary, token_text, skipped, columns=values, totals=totals)
