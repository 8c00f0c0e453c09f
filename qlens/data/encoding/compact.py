"""Compact examples: token ids and labels of many rows in a few arrays, read as dicts of lists."""

from collections.abc import Collection, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from qlens.core.supervised import IGNORE
from qlens.data.encoding.encoder import EncodedSample

if TYPE_CHECKING:
    import datasets


class Examples(Sequence):
    """Encoded rows: ``examples[i]`` is a dict of ``input_ids`` and ``labels``, lists, and of columns.

    A token takes five bytes, where a Python list takes sixteen and more. Slices and ``select`` share the arrays. It is a
    ``train_dataset`` as it is; ``to_dataset`` makes a ``datasets.Dataset`` of it.

    Args:
        ids: the token ids of all rows, one after the other.
        learned: which of them are labels.
        ends: where each row ends.
        columns: a value, or a list of one per token, for every row.
        order: the rows of these that there are.
    """

    def __init__(
        self,
        ids: np.ndarray,
        learned: np.ndarray,
        ends: np.ndarray,
        columns: dict[str, list[Any]],
        order: np.ndarray | None = None,
    ):
        self._ids, self._learned, self._ends, self._columns = ids, learned, ends, columns
        self._order = np.arange(len(ends)) if order is None else order

    @classmethod
    def of(cls, samples: Sequence[EncodedSample]) -> "Examples":
        """The examples of encoded samples, which all have the same columns."""
        names = samples[0].columns if samples else {}
        return cls(
            np.concatenate([sample.ids for sample in samples]) if samples else np.zeros(0, np.int32),
            np.concatenate([sample.learned for sample in samples]) if samples else np.zeros(0, bool),
            np.cumsum([len(sample.ids) for sample in samples], dtype=np.int64),
            {name: [sample.columns[name] for sample in samples] for name in names},
        )

    @classmethod
    def joined(cls, parts: Sequence["Examples"], names: Collection[str]) -> "Examples":
        """The examples of parts one after the other, with the columns of these names; None where a part has no such one."""
        sizes = [len(part._ids) for part in parts]
        shifts = np.cumsum([0, *sizes])[:-1]
        return cls(
            np.concatenate([np.zeros(0, np.int32), *(part._ids for part in parts)]),
            np.concatenate([np.zeros(0, bool), *(part._learned for part in parts)]),
            np.concatenate([np.zeros(0, np.int64), *(p._ends + by for p, by in zip(parts, shifts, strict=True))]),
            {
                name: [each for part in parts for each in part._columns.get(name, [None] * len(part._ends))]
                for name in sorted(names)
            },
        )

    def __len__(self) -> int:
        return len(self._order)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return Examples(self._ids, self._learned, self._ends, self._columns, self._order[index])
        row = int(self._order[index])
        ids, learned = self._row(row)
        labels = np.where(learned, ids, IGNORE)
        return {"input_ids": ids.tolist(), "labels": labels.tolist()} | {
            name: values[row] for name, values in self._columns.items()
        }

    def _row(self, row: int) -> tuple[np.ndarray, np.ndarray]:
        where = slice(self._ends[row - 1] if row else 0, self._ends[row])
        return self._ids[where], self._learned[where]

    def select(self, indices: Sequence[int]) -> "Examples":
        """The examples of these numbers, in this order."""
        order = self._order[np.asarray(indices, dtype=np.int64)]
        return Examples(self._ids, self._learned, self._ends, self._columns, order)

    def counts(self) -> tuple[np.ndarray, np.ndarray]:
        """The number of tokens and of learned tokens of every example."""
        starts = np.concatenate([[0], self._ends[:-1]]).astype(np.int64)
        sums = np.concatenate([[0], np.cumsum(self._learned, dtype=np.int64)])
        return (self._ends - starts)[self._order], (sums[self._ends] - sums[starts])[self._order]

    def to_dataset(self) -> "datasets.Dataset":
        """A ``datasets.Dataset`` with the columns input_ids, labels and those of the data."""
        import datasets
        import pyarrow as pa

        rows = [self._row(row) for row in self._order]
        ids = np.concatenate([np.zeros(0, np.int32), *(ids for ids, _ in rows)])
        learned = np.concatenate([np.zeros(0, bool), *(learned for _, learned in rows)])
        ends = np.cumsum([0, *(len(ids) for ids, _ in rows)])
        lists = pa.ListArray if ends[-1] < 2**31 else pa.LargeListArray
        ends = pa.array(ends, pa.int32() if lists is pa.ListArray else pa.int64())
        table = {"input_ids": lists.from_arrays(ends, pa.array(ids, pa.int64()))}
        table["labels"] = lists.from_arrays(ends, pa.array(np.where(learned, ids, IGNORE), pa.int64()))
        table |= {name: pa.array([values[row] for row in self._order]) for name, values in self._columns.items()}
        return datasets.Dataset(pa.table(table))

    def __eq__(self, other: Any) -> bool:
        return isinstance(other, Sequence) and len(self) == len(other) and all(map(dict.__eq__, self, other))

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        return f"<Examples: {len(self)} dicts of {', '.join(['input_ids', 'labels', *self._columns])}>"
