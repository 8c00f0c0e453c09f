"""Rows as examples, a chunk at a time, with every row that is left out counted."""

from array import array
from collections import Counter, deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np

from qlens.core.errors import InputError
from qlens.data.encoding.compact import Examples
from qlens.data.encoding.encoder import EncodedSample, Encoder
from qlens.data.encoding.lengths import LONG, shortened
from qlens.data.encoding.report import DROPPED, NOTED, TRUNCATED, Report
from qlens.data.rows import BadRow, Reading, Rows, read_row, row_of, unused_keys

CHUNK = 512  # rows that are encoded together
Readings = dict[int, tuple[Reading, str]]
OTHER_SHAPE, OTHER_COLUMNS = "another shape than most rows", "other columns than most rows"


class RowsEncoding:
    """Examples of rows, and the report on them.

    Args:
        rows: the data.
        encoder: of the tokenizer.
        max_length, on_long: as in ``qlens.data.encode``.
    """

    def __init__(self, rows: Rows, encoder: Encoder, max_length: int | None, on_long: str):
        self.rows, self.encoder = rows, encoder
        self.max_length, self.on_long, self.on_bad = max_length, on_long, rows.on_bad
        self.report, self._ignored = Report(), set[str]()
        self.report.rows = len(rows)
        self._chunks: list[Examples] = []
        self._layouts: list[tuple[str, frozenset[str]]] = []
        self._layout_of, self._row_of = array("q"), array("q")  # of every example
        self._shortest: int | None = None
        self._first_bad: tuple[int, BadRow] | None = None

    def run(self, advance: Callable[[int], None]) -> None:
        """Encode all rows; templates are run while the chunk before is tokenized on the other cores.

        Args:
            advance: is called with the number of rows of every chunk.

        Raises:
            InputError: a row cannot be used, and bad rows are errors.
        """
        with ThreadPoolExecutor(1) as thread:
            running = deque[tuple[range, Readings, Future]]()
            for start in range(0, len(self.rows), CHUNK):
                chunk = range(start, min(start + CHUNK, len(self.rows)))
                readings = {at: reading for at in chunk if (reading := self._read(at)) is not None}
                samples = [sample for reading, _ in readings.values() for sample in reading.samples]
                texts = self.encoder.texts(samples)
                self._finish(running, advance)
                running.append((chunk, readings, thread.submit(self.encoder.tokenized, samples, texts)))
            self._finish(running, advance)
        if self._first_bad is not None:
            self._refuse(len(self.rows))

    def _finish(self, running: "deque[tuple[range, Readings, Future]]", advance: Callable[[int], None]) -> None:
        """Keep the chunk that is being tokenized, if there is one."""
        if running:
            chunk, readings, future = running.popleft()
            self._add(readings, future.result())
            advance(len(chunk))
            if self._first_bad is not None:
                self._refuse(min(chunk.stop + CHUNK, len(self.rows)))

    def _add(self, readings: Readings, results: Sequence[EncodedSample | BadRow]) -> None:
        """Keep the samples of a chunk."""
        encoded, samples = iter(results), list[EncodedSample]()
        for at, (reading, shape) in readings.items():
            own = [next(encoded) for _ in reading.samples]
            try:
                fitting = self._fitting(at, own)
            except BadRow as error:
                self._bad(at, error)
                continue
            if fitting:
                for sample in fitting:
                    if len(fitting) > 1:
                        sample.columns.setdefault("pair", at)
                    samples.append(sample)
                self._keep(at, reading, shape, fitting)
        self._chunks.append(_with_all_columns(samples))

    def _read(self, at: int) -> tuple[Reading, str] | None:
        """A row as it is read, with the shape it should share with the others; None if it cannot be."""
        try:
            row = self.rows[at]
            reading = read_row(row_of(row), self.rows.columns)
        except BadRow as error:
            self._bad(at, error)
            return None
        if isinstance(row, dict):
            self._ignored |= unused_keys(row, reading)
        return reading, "" if isinstance(row, str | tuple | list) else reading.shape

    def _fitting(self, at: int, encoded: Sequence[EncodedSample | BadRow]) -> list[EncodedSample]:
        """The samples of a row within ``max_length``; none where the row is dropped for it.

        Raises:
            BadRow: one cannot be encoded, or nothing of it is learned.
        """
        samples = []
        for sample in encoded:
            if isinstance(sample, BadRow):
                raise sample
            if not sample.learned.any():
                raise BadRow("nothing learned", "no token of it would be supervised")
            samples.append(sample)
        longest = max(len(sample.ids) for sample in samples)
        self._shortest = min(longest, self._shortest or longest)
        if self.max_length is None or longest <= self.max_length:
            return samples
        if self.on_long == "error":
            raise InputError(
                f"{self.rows.where(at)}: {longest} tokens, more than max_length={self.max_length}; on_long='drop', "
                "'truncate_left' or 'truncate_right' takes the data without it or shortens it"
            )
        if self.on_long == "drop":
            self.report.add(DROPPED, f"{LONG}, more than {self.max_length} tokens", self.rows.where(at, short=True))
            return []
        bos, most = self.encoder.bos, self.max_length
        short = [shortened(each, most, self.on_long, bos) if len(each.ids) > most else each for each in samples]
        side = self.on_long.removeprefix("truncate_")
        self.report.add(TRUNCATED, f"at the {side} to {most} tokens", self.rows.where(at, short=True))
        return short

    def _keep(self, at: int, reading: Reading, shape: str, samples: Sequence[EncodedSample]) -> None:
        layout = (shape, frozenset(samples[0].columns))
        first = next((each for each, _ in self._layouts if each), shape)
        if self.on_bad == "error" and self._layouts:
            if shape and shape != first:
                problem = f"a row of {shape}, but the rows before are of {first}"
                return self._bad(at, BadRow("another shape", problem))
            if other := layout[1] ^ self._layouts[0][1]:
                return self._bad(
                    at, BadRow("other columns", f"column {sorted(other)[0]!r} must be in every row or in none")
                )
        if layout not in self._layouts:
            self._layouts.append(layout)
        self._layout_of.extend([self._layouts.index(layout)] * len(samples))
        self._row_of.extend([at] * len(samples))
        self.report.shapes[reading.shape] += 1
        self.report.ways[samples[0].way] += 1
        for note in dict.fromkeys(note for sample in samples for note in sample.notes):
            self.report.add(NOTED, note, self.rows.where(at, short=True))

    def _bad(self, at: int, error: BadRow) -> None:
        self.report.add(DROPPED, error.reason, self.rows.where(at, short=True))
        if self.on_bad == "error" and (self._first_bad is None or at < self._first_bad[0]):
            self._first_bad = at, error

    def _refuse(self, start: int) -> None:
        """Raise the error of the first bad row, with the number of those that can be told by reading the rest."""
        for at in range(start, len(self.rows)):
            self._read(at)
        assert self._first_bad is not None
        counts = {
            reason: n for (what, reason), n in self.report.counts.items() if what == DROPPED and LONG not in reason
        }
        total, drop = sum(counts.values()), "on_bad='drop' (--on-bad drop) leaves"
        reasons = ", ".join(f"{count} {self.report.reason(DROPPED, reason)}" for reason, count in counts.items())
        advice = f"{total} of {len(self.rows)} rows cannot be used: {reasons}; {drop} them out"
        advice = f"{drop} the row out" if total == 1 else advice
        at, error = self._first_bad
        raise InputError(f"{error.at(self.rows.where(at))}; {advice}") from error.__cause__

    def examples(self) -> Examples:
        """All examples; rows of another layout than most are dropped.

        Raises:
            InputError: none is left.
        """
        layout_of = np.asarray(self._layout_of)
        shapes = Counter(self._layouts[at][0] for at in layout_of if self._layouts[at][0])
        shape = shapes.most_common(1)[0][0] if shapes else ""
        columns = Counter(self._layouts[at][1] for at in layout_of if self._layouts[at][0] in (shape, ""))
        names = columns.most_common(1)[0][0] if columns else frozenset()
        for at in dict.fromkeys(
            self._row_of[i] for i, each in enumerate(layout_of) if self._layouts[each][0] not in (shape, "")
        ):
            self.report.add(DROPPED, OTHER_SHAPE, self.rows.where(at, short=True))
        fits = np.array([each in (shape, "") and own == names for each, own in self._layouts], dtype=bool)
        other = [self._layouts[each][0] in (shape, "") and not fits[each] for each in layout_of]
        for at in dict.fromkeys(self._row_of[i] for i, each in enumerate(other) if each):
            self.report.add(DROPPED, OTHER_COLUMNS, self.rows.where(at, short=True))
        examples = Examples.joined(self._chunks, names)
        if len(self._layouts) > 1:
            examples = examples.select(np.flatnonzero(fits[layout_of]))
        self.report.examples, self.report.ignored = len(examples), sorted(self._ignored)
        if not len(examples):
            self._nothing_left()
        return examples

    def _nothing_left(self) -> None:
        reasons = {reason for what, reason in self.report.counts if what == DROPPED}
        if all(LONG in reason for reason in reasons):
            raise InputError(
                f"max_length={self.max_length} drops all {len(self.rows)} rows: the shortest has {self._shortest} tokens"
            )
        raise InputError(f"all {len(self.rows)} rows are dropped: {self.report.line().partition('; ')[2]}")


def _with_all_columns(samples: Sequence[EncodedSample]) -> Examples:
    """Compact examples of samples; columns that only some have are None elsewhere."""
    names = dict.fromkeys(name for sample in samples for name in sample.columns)
    if any(len(sample.columns) < len(names) for sample in samples):
        for sample in samples:
            sample.columns.update({name: None for name in names if name not in sample.columns})
    return Examples.of(samples)
