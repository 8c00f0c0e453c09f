"""Segments and user columns of rows: which part of a text a token lies in, and values that the data has for it."""

import re
from collections.abc import Collection, Mapping, Sequence
from itertools import accumulate
from numbers import Real
from typing import Any

import numpy as np
import pandas as pd
import torch

from qlens.core.errors import InputError, brief

SEGMENTS = {"thinking": r"<think>.*?(?:</think>|\Z)", "tool call": r"<tool_call>.*?(?:</tool_call>|\Z)"}
REST = "answer"  # the text outside of all segments, by default; "other" beside a user's own
RESERVED = ("row", "position", "segment", "checkpoint", "method", "label", "runner_up", "change", "total")
MEANS = ("label_weight", "q_y", "reshape", "kl", "entropy", "negative_mass")


def patterns(segments: Mapping[str, str] | None) -> dict[str, re.Pattern[str]]:
    """Compiled regular expressions by the segment's name; by default ``SEGMENTS``.

    Raises:
        InputError: no mapping of names to regular expressions.
    """
    chosen = SEGMENTS if segments is None else segments
    if not isinstance(chosen, Mapping):
        raise InputError(
            f"segments must map names to regular expressions, got {brief(chosen)}: write segments={{'answer': '####.*'}}"
        )
    compiled = {}
    for name, pattern in chosen.items():
        try:
            compiled[str(name)] = re.compile(pattern, re.DOTALL)
        except (re.error, TypeError) as error:
            raise InputError(f"segments: {name!r} has no regular expression: {brief(pattern)} ({error})") from None
    return compiled


def segments_of(
    strings: Sequence[str], places: Sequence[int], compiled: Mapping[str, re.Pattern[str]], rest: str = REST
) -> list[str]:
    """The segment of each of some tokens: the first whose pattern matches the character that the token begins with.

    Args:
        strings: the text of every token of a row.
        places: positions of the tokens in question, from 0.
        compiled: the patterns, as of ``patterns``.
        rest: the name of the text outside of all segments.

    Example:
        >>> segments_of(["<think>", "hm", "</think>", "4"], [1, 3], patterns(None))
        ['thinking', 'answer']
    """
    text, starts = "".join(strings), [0, *accumulate(map(len, strings))]
    segment = np.full(len(text) + 1, rest, dtype=object)
    for name, pattern in reversed(list(compiled.items())):  # so that the first of two that match wins
        for match in pattern.finditer(text):
            segment[match.start() : match.end()] = name
    return [segment[starts[place]] for place in places]


def user_columns(
    rows: Mapping[int, Any],
    places: Mapping[int, Sequence[int]],
    lengths: Mapping[int, int],
    columns: Sequence[str],
    metrics: Collection[str],
) -> pd.DataFrame:
    """Values of the data's own keys at every supervised token.

    Args:
        rows: rows of data by number; a key holds a number, or one per token of the row or per supervised token.
        places: positions of the supervised tokens by row.
        lengths: the numbers of tokens by row.
        columns: the keys.
        metrics: names that are taken.

    Returns:
        A column per key; NaN where a row lacks it or has None.

    Raises:
        InputError: no row has a key, or its values are not numbers or are too many or too few.
    """
    if isinstance(columns, str) or not all(isinstance(name, str) for name in columns):
        raise InputError(f"columns must be a list of keys of the data, got {brief(columns)}: write columns=['reward']")
    frame = {}
    for name in columns:
        if name in (*RESERVED, *metrics):
            raise InputError(
                f"columns: {name!r} is a column of the view itself: give that key another name in the data"
            )
        if not any(isinstance(row, Mapping) and name in row for row in rows.values()):
            keys = sorted({str(key) for row in rows.values() if isinstance(row, Mapping) for key in row})
            raise InputError(f"columns: no row has {name!r}; the rows have {', '.join(keys) or 'no keys'}")
        frame[name] = np.concatenate([_values(rows[n], name, f"row {n}", places[n], lengths[n]) for n in places])
    return pd.DataFrame(frame, index=range(sum(map(len, places.values()))))


def _values(row: Any, name: str, where: str, places: Sequence[int], length: int) -> np.ndarray:
    """The values of a key at the supervised tokens of a row."""
    value = row.get(name) if isinstance(row, Mapping) else None
    if value is None:
        return np.full(len(places), np.nan)
    if isinstance(value, Real):
        return np.full(len(places), float(value))
    values = value.tolist() if isinstance(value, (np.ndarray, torch.Tensor)) else value
    if not isinstance(values, Sequence) or isinstance(values, str) or not all(isinstance(x, Real) for x in values):
        raise InputError(f"columns: {where}: {name} must be a number, or a list of one per token, got {brief(value)}")
    if len(values) not in (length, len(places)):
        raise InputError(
            f"columns: {where}: {name} has {len(values)} values, but the row has {length} tokens, {len(places)} of them "
            "supervised"
        )
    numbers = np.array(values, dtype=float)
    return numbers[list(places)] if len(values) == length else numbers


def segment_means(segment: pd.Series, nll: pd.Series, methods: Mapping[str, pd.DataFrame]) -> pd.DataFrame:
    """A line per segment and method: tokens, and the means of nll and ``MEANS`` over the tokens where they are defined."""
    frames = []
    for name, frame in methods.items():
        groups = frame[list(MEANS)].assign(nll=nll.to_numpy()).groupby(segment.to_numpy(), sort=False)
        means = groups.mean()
        means.insert(0, "tokens", groups.size())
        frames.append(means.rename_axis("segment").reset_index().assign(method=name))
    means = pd.concat(frames, ignore_index=True)
    return means[["segment", "method", "tokens", "nll", *MEANS]]
