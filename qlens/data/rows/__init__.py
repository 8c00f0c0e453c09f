"""Rows of data: where they come from, which shapes they may have, and what there is to learn in one.

Read ``sources`` (files, folders, data sets: ``json_files`` and ``tables``), then ``shapes`` (the table of shapes), ``samples``
(what is learned of a row) and ``turns`` (how turns of conversations are written); ``bad_rows`` is the error of a row, and
``splitting`` holds rows out.
"""

from qlens.data.rows.bad_rows import BadRow
from qlens.data.rows.samples import Sample
from qlens.data.rows.shapes import SHAPES, Columns, Reading, Row, ignored_keys, read_row, row_of, unused_keys
from qlens.data.rows.sources import Rows, load_rows, local_files
from qlens.data.rows.splitting import split

__all__ = [
    "SHAPES", "BadRow", "Columns", "Reading", "Row", "Rows", "Sample", "ignored_keys", "load_rows", "local_files", "read_row",
    "row_of", "split", "unused_keys",
]  # fmt: skip
