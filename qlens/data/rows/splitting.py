"""Training and held-out rows."""

import random
from typing import Any

from qlens.core.errors import InputError


def split(rows: Any, held_out: int | float, seed: int) -> tuple[Any, Any]:
    """Split rows at random into training and held-out ones, each in their old order; the same at the same seed.

    Args:
        rows: at least two, in a list, encoded examples or a ``datasets.Dataset``.
        held_out: the number of rows held out, or their share (a float between 0 and 1).
        seed: of the choice.

    Returns:
        Training rows and held-out rows.

    Raises:
        InputError: no row would be left on one side.

    Example:
        >>> split(["a", "b", "c", "d"], held_out=1, seed=0)
        (['a', 'b', 'c'], ['d'])
    """
    count = round(held_out * len(rows)) if isinstance(held_out, float) else held_out
    if not 0 < count < len(rows):
        raise InputError(f"held_out={held_out} of {len(rows)} rows leaves nothing to train on or nothing to hold out")
    chosen = set(random.Random(seed).sample(range(len(rows)), count))
    parts = [at for at in range(len(rows)) if at not in chosen], sorted(chosen)
    if hasattr(rows, "select"):  # encoded examples, and data sets, stay what they are
        return rows.select(parts[0]), rows.select(parts[1])
    return [rows[at] for at in parts[0]], [rows[at] for at in parts[1]]
