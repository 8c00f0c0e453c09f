"""Rows that are too long: dropped, truncated at an end, or refused."""

from dataclasses import replace

import numpy as np

from qlens.core.errors import InputError, brief
from qlens.data.encoding.encoder import EncodedSample
from qlens.data.rows.bad_rows import BadRow

ON_LONG = ("drop", "truncate_left", "truncate_right", "error")
LONG = "too long"


def check_lengths(max_length: int | None, on_long: str) -> None:
    """Check the arguments of ``shortened``.

    Raises:
        InputError: ``max_length`` below 2, or another choice than ``ON_LONG``.
    """
    if max_length is not None and (not isinstance(max_length, int) or max_length < 2):
        raise InputError(f"max_length must be at least 2, got {brief(max_length)}")
    if on_long not in ON_LONG:
        raise InputError(f"on_long must be one of {', '.join(map(repr, ON_LONG))}, got {brief(on_long)}")


def shortened(sample: EncodedSample, max_length: int, on_long: str, bos: int | None) -> EncodedSample:
    """The last or the first ``max_length`` tokens of a sample; BOS stays at its beginning.

    Raises:
        BadRow: no token that is left is learned.
    """
    keep = np.arange(len(sample.ids))
    if on_long == "truncate_right":
        keep = keep[:max_length]
    else:
        keep = keep[-max_length:]
        if sample.ids[0] == bos:
            keep[0] = 0
    learned = sample.learned[keep]
    learned[0] = False
    if not learned.any():
        raise BadRow(
            "truncated to nothing",
            f"of its {len(sample.ids)} tokens no learned one is among the {max_length} that {on_long} keeps",
        )
    columns = {
        name: [values[at] for at in keep] if isinstance(values, list | tuple) else values
        for name, values in sample.columns.items()
    }
    return replace(sample, ids=sample.ids[keep], learned=learned, columns=columns)
