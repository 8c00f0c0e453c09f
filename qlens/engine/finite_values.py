"""Refusal of losses and gradients that are not finite although all logits are."""

import torch
from jaxtyping import Bool
from torch import Tensor

from qlens.core.errors import InputError

SHOWN = 5  # rows that a message names
ADVICE = (
    "0 / 0, log(0), or a square root at 0 gives it, also inside the branch that torch.where does not take: clamp the value "
    "before, for example p.clamp_min(1e-30).log()"
)


def refuse_rows(name: str, rows: Bool[Tensor, " N"], what: str = "loss or its gradient") -> None:
    """Refuse a method whose values are not finite in some rows of a batch.

    Args:
        name: of the method.
        rows: mask of these supervised rows, (N,).
        what: the values, as the message names them.

    Raises:
        InputError: there is such a row; the first ones are named.
    """
    if not bool(rows.any()):
        return
    wrong = rows.nonzero()[:, 0].tolist()
    more = ", ..." if len(wrong) > SHOWN else ""
    listed = ", ".join(map(str, wrong[:SHOWN])) + more
    raise InputError(
        f"{name}: its {what} is NaN or infinite in supervised row{'s' if len(wrong) > 1 else ''} {listed} ({len(wrong)} of "
        f"{len(rows)}, counted from 0), where all logits are finite: {ADVICE}"
    )


def refuse_total(name: str, total: Tensor, logits: Tensor | None = None) -> None:
    """Refuse a loss of a whole batch that is NaN; where the logits are NaN too, the message says so.

    Args:
        name: of the method.
        total: its value, a scalar.
        logits: of the model; None where they are not known.

    Raises:
        InputError: it is NaN.
    """
    if not bool(total.isnan()):
        return
    if logits is not None and not bool(logits.detach().amax(-1).isfinite().all()):
        raise InputError(f"{name}: the model's logits hold NaN, +inf or nothing but -inf: its weights are damaged")
    raise InputError(f"{name}: its loss of this batch is NaN: {ADVICE}")


def watch_gradient(name: str, rows: Tensor) -> None:
    """Refuse, in the backward pass, a gradient by the logits (N, V) that is not finite; float16 may overflow to infinity.

    Raises:
        InputError: in the backward pass; the first rows are named.
    """

    def check(grad: Tensor) -> None:
        sums = grad.sum(-1, dtype=torch.promote_types(grad.dtype, torch.float32)).flatten()
        refuse_rows(name, sums.isnan() if grad.dtype == torch.float16 else ~sums.isfinite(), "gradient")

    if rows.requires_grad:
        rows.register_hook(check)
