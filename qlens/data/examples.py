"""Encoding: rows of text as supervised examples of token ids and labels."""

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from transformers import PreTrainedTokenizerBase

from qlens.core.display import table_html
from qlens.core.errors import InputError
from qlens.core.progress import bar
from qlens.data.encoding.compact import Examples
from qlens.data.encoding.encoder import encoder_of
from qlens.data.encoding.lengths import check_lengths
from qlens.data.encoding.preview import Preview, preview
from qlens.data.encoding.report import DROPPED, Report
from qlens.data.encoding.rows_encoding import RowsEncoding
from qlens.data.rows import BadRow, Columns, load_rows, read_row, row_of

if TYPE_CHECKING:
    import pandas as pd

SHOWN = 2000  # rows from which on the progress is shown


@dataclass(frozen=True)
class Encoded:
    """Encoded rows.

    Attributes:
        examples: dicts of ``input_ids`` and ``labels``, and columns, ready for ``train_dataset`` and ``collate``.
        report: which columns were ignored and which rows dropped or truncated, by reason and place.
    """

    examples: Examples
    report: Report = field(compare=False)
    tokenizer: Any = field(compare=False, repr=False)

    @property
    def dropped(self) -> int:
        """The number of rows that were dropped."""
        return self.report.count(DROPPED)

    def preview(self, count: int = 3) -> Preview:
        """The first examples as text; what is learned is between ⟦ and ⟧."""
        return preview(self.examples, self.tokenizer, count)

    def __len__(self) -> int:
        return len(self.examples)

    def __repr__(self) -> str:
        counts = self._counts()
        dropped = f", {self.dropped} rows dropped (.report says why)" if self.dropped else ""
        return (
            f"<Encoded: {len(self)} examples, {counts['tokens']} tokens, {counts['supervised']} of them supervised{dropped}; "
            "use .examples, dicts of input_ids and labels>"
        )

    def _repr_html_(self) -> str:
        return table_html("Encoded", self._counts()) + self.report._repr_html_()

    def _counts(self) -> dict[str, int]:
        """Numbers of examples, tokens, supervised tokens and dropped rows."""
        tokens, supervised = self.examples.counts()
        return {
            "examples": len(self), "tokens": int(tokens.sum()), "supervised": int(supervised.sum()), "dropped": self.dropped
        }  # fmt: skip

    def to_dict(self) -> dict[str, Any]:
        """The examples and the number of dropped rows."""
        return {"examples": list(self.examples), "dropped": self.dropped}

    def to_frame(self) -> "pd.DataFrame":
        """A row per example: its number of tokens and of supervised tokens."""
        import pandas as pd

        tokens, supervised = self.examples.counts()
        return pd.DataFrame({"tokens": tokens, "supervised": supervised})


def encode(
    rows: Any,
    tokenizer: PreTrainedTokenizerBase,
    max_length: int | None = None,
    *,
    split: str | None = None,
    prompt_column: str | None = None,
    completion_column: str | tuple[str, str] | None = None,
    on_long: str = "drop",
    on_bad: str | None = None,
    progress: bool = True,
) -> Encoded:
    """Token ids, labels and columns of rows; labels are -100 except on completions and assistant turns.

    A row has one of the shapes of ``qlens.data.rows.SHAPES``: messages, ShareGPT conversations, prompt/completion,
    question/answer, problem/solution (each a string or turns), Alpaca's instruction/input/output, chosen/rejected (two
    examples with the columns chosen and pair) or text. Turns may have tool calls, thinking (reasoning_content) and parts of
    text; ``tools`` and ``system`` go to the chat template. weight, critical, advantage, hint, chosen and pair are kept; the
    report names the other columns as ignored.

    With a chat template the text is exactly what the template writes (a prompt and a completion are a user and an assistant
    turn), and every assistant turn is supervised from the end of its generation prompt up to its end token. Without one:
    ``BOS prompt \\n completion EOS``; of messages, ``turn \\n`` for other roles and ``turn EOS`` for the assistant. A text row is
    ``BOS text``, every token but the first supervised. Turns after the last assistant's are left out. A prompt has the same
    tokens as when it stands alone. An empty think block of the template is not supervised (``qlens.data.chat_templates``).

    All rows must have one shape and the same columns, since a file of several is most often a mistake.

    Args:
        rows: dicts, texts or (prompt, completion) pairs, a ``datasets.Dataset``, or a path (``qlens.data.load_rows``).
        tokenizer: of the model.
        max_length: most tokens of a row. None: no limit.
        split: as in ``load_rows``.
        prompt_column, completion_column: the columns of the prompt and of what is learned, where the shape does not say;
            completion_column alone is a column of messages or text, and two names are the chosen and the rejected answer.
        on_long: what becomes of rows longer than ``max_length``: "drop", "truncate_left" (keeps the end), "truncate_right", or
            "error".
        on_bad: what becomes of rows that cannot be used (malformed, empty, of another shape): "error", the default, or "drop".
        progress: whether progress is shown on standard error, from 2000 rows on.

    Returns:
        An ``Encoded``; its ``examples`` are a ``train_dataset``, its ``report`` counts what was dropped.

    Raises:
        InputError: a row that cannot be used with ``on_bad="error"``, a row too long with ``on_long="error"``, or no row left.

    Example:
        >>> encoded = encode([{"prompt": "2 + 2 =", "completion": "4"}], tokenizer)  # doctest: +SKIP
        >>> print(encoded.report, encoded.preview(1), sep="\\n")                      # doctest: +SKIP
    """
    check_lengths(max_length, on_long)
    encoder = encoder_of(tokenizer)
    loaded = load_rows(rows, split, prompt_column, completion_column, on_bad)
    if not len(loaded):
        raise InputError("rows is empty: nothing to encode")
    encoding = RowsEncoding(loaded, encoder, max_length, on_long)
    with bar(len(loaded), "Encode rows", "rows", progress=progress and len(loaded) >= SHOWN) as advance:
        encoding.run(advance)
    return Encoded(encoding.examples(), encoding.report, tokenizer)


def example(
    row: Any,
    tokenizer: PreTrainedTokenizerBase,
    where: str,
    columns: Columns = Columns(),  # noqa: B008  immutable
) -> dict[str, Any]:
    """Token ids, labels and columns of one row as in ``encode``, of any length; its labels may all be -100.

    Raises:
        InputError: a row that cannot be used, or one with two answers; ``where`` begins the message.
    """
    try:
        samples = read_row(row_of(row), columns).samples
        if len(samples) > 1:
            raise BadRow("a pair", "a row of two answers, chosen and rejected: encode the rows first, by qlens.encode")
        (sample,) = encoder_of(tokenizer)(samples)
        if isinstance(sample, BadRow):
            raise sample
    except BadRow as error:
        raise error.at(where) from error.__cause__
    return Examples.of([sample])[0]


def singles(rows: Any, tokenizer: PreTrainedTokenizerBase) -> Any:
    """Rows as they are, or encoded where each holds two answers, chosen and rejected."""
    try:
        pairs = len(rows) and len(read_row(row_of(rows[0]), getattr(rows, "columns", Columns())).samples) > 1
    except BadRow:  # whoever reads the rows says so
        pairs = False
    return encode(rows, tokenizer).examples if pairs else rows
