"""Operations that show that a loss was called with rows (N,) but written for (B, T), or the other way round."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor
from torch.overrides import TorchFunctionMode

REDUCTIONS = ("sum", "mean", "amax", "amin", "nansum", "nanmean", "cumsum", "logsumexp")


class Flattened(TorchFunctionMode):
    """Records whether values are broadcast, (N, 1) by (N,) to (N, N), or reduced over the rows as over a text.

    Attributes:
        detected: whether values were broadcast or reduced so.
        expanded: whether any result was larger than both operands, as of one text and a tensor of the loss's own.

    Args:
        rows: number of rows N if the loss takes rows, else None. A reduction over the last dimension of (N,) is written for
            (B, T), with one value per text.
    """

    def __init__(self, rows: int | None):
        super().__init__()
        self.rows = rows
        self.detected = self.expanded = False

    def __torch_function__(
        self, func: Callable, types: Sequence[type], args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        operands = [x for x in (*args, *kwargs.values()) if isinstance(x, Tensor)]
        name = getattr(func, "__name__", "")
        if (
            isinstance(result, Tensor)
            and len(operands) > 1
            and "matmul" not in name
            and name not in ("mm", "bmm", "einsum")
        ):
            self.detected |= _crossed(result, operands)
            self.expanded |= result.numel() > max(x.numel() for x in operands)
        if name in REDUCTIONS and operands and self.rows is not None and operands[0].shape == (self.rows,):
            self.detected |= kwargs.get("dim", args[1] if len(args) > 1 else None) in (-1, (-1,), [-1])
        return result


def _crossed(result: Tensor, operands: Sequence[Tensor]) -> bool:
    """Whether a result is larger than its operands and has one size twice, which none of them has."""
    if result.numel() <= max(x.numel() for x in operands):
        return False
    twice = {size for size in result.shape if size > 1 and result.shape.count(size) > 1}
    return any(all(x.shape.count(size) < 2 for x in operands) for size in twice)
