"""Old names of a frame's columns."""

from typing import Any

import pandas as pd

from qlens.core.deprecation import warn

OLD_COLUMNS = {
    "trust": "label_weight",
    "trust_low": "label_weight_low",
    "trust_high": "label_weight_high",
    "rival": "runner_up",
    "p_rival": "p_runner_up",
    "q_rest": "q_runner_up",
    "other_grad": "runner_up_grad",
    "suspicion": "negative_margin",
    "worst": "negative_margin_max",
    "doubt": "negative_margin_student",
    "teacher_doubt": "negative_margin_teacher",
    "room": "p_other",
    "ignored": "q_other",
    "pull": "label_gradient",
}
"""Old names of the columns of all frames, with the new ones; some are current names of frames that lack the new one."""


def old_columns(frame: pd.DataFrame) -> dict[str, str]:
    """The old names of a frame's columns, as far as they are free, with the new ones.

    Example:
        >>> old_columns(pd.DataFrame({"label_weight": [0.5], "p_y": [0.1]}))
        {'trust': 'label_weight'}
    """
    return {old: new for old, new in OLD_COLUMNS.items() if new in frame.columns and old not in frame.columns}


def renamed_columns(frame: pd.DataFrame) -> pd.DataFrame:
    """A frame whose columns can also be read by their old names (``OLD_COLUMNS``), with a warning.

    Example:
        >>> renamed_columns(pd.DataFrame({"label_weight": [0.5]}))["label_weight"].sum()
        np.float64(0.5)
    """
    with_old = _WithOldColumns(frame)
    with_old.attrs = {**frame.attrs, "old_columns": old_columns(frame)}
    return with_old


def current_columns(frame: pd.DataFrame) -> pd.DataFrame:
    """A frame whose columns have the current names, read from a file of an earlier version, for example.

    Example:
        >>> list(current_columns(pd.DataFrame({"trust": [0.5]})))
        ['label_weight']
    """
    old = {old: new for old, new in OLD_COLUMNS.items() if old in frame.columns and new not in frame.columns}
    return frame.rename(columns=old) if old else frame


class _WithOldColumns(pd.DataFrame):
    """A frame that knows the old names of its columns by ``attrs["old_columns"]``."""

    @property
    def _constructor(self) -> type[pd.DataFrame]:
        return pd.DataFrame

    def __getitem__(self, key: Any) -> Any:
        new = self.attrs.get("old_columns", {}).get(key) if isinstance(key, str) else None
        if new is not None:
            warn(f"column {key!r}", repr(new))
        return super().__getitem__(key if new is None else new)
