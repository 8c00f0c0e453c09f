"""Old names of a frame's columns."""

from typing import Any

import pandas as pd

from qlens.core.deprecation import warn


def renamed_columns(frame: pd.DataFrame, **names: str) -> pd.DataFrame:
    """A frame whose columns can also be read by their old names, with a warning.

    Args:
        frame: a frame with the new names.
        names: the new name of each old one.

    Example:
        >>> renamed_columns(pd.DataFrame({"label_weight": [0.5]}), trust="label_weight")["label_weight"].sum()
        np.float64(0.5)
    """
    with_old = _WithOldColumns(frame)
    with_old.attrs = {**frame.attrs, "old_columns": names}
    return with_old


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
