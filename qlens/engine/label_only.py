"""Structure "label": losses that are functions of label probabilities alone, evaluated on the two entries {label, rest}."""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from qlens.core.target import Target
from qlens.core.tokens import Tokens
from qlens.engine.heads import Head
from qlens.engine.kernels.plain import label_gradient_
from qlens.engine.kernels.raw import raw_label_log_probs
from qlens.engine.kernels.raw_logits import RawLogits
from qlens.engine.row_inputs import RowGradients, RowInputs

SUREST = -700.0  # of log(1 - p_y) where a label weight is read: float64 holds its inverse
IMPOSSIBLE = -1e29  # log(1 - p_y) below this means that no other token is possible
Logits = Tensor | RawLogits
LogProbs = tuple[Tensor, Tensor]  # log p_y and log(1 - p_y), (n,) each


class TwoEntryResult(NamedTuple):
    """The label weights a in g = a (p - d) and the losses of some rows; counts and flags as in ``RowGradients``."""

    label_weight: Float[Tensor, " n"]
    losses: Float[Tensor, " n"]
    selected: Tensor
    invalid: Tensor
    not_finite: Bool[Tensor, " n"] | None


def label_gradients(inputs: RowInputs, rows: slice, z: Logits, other_logits: dict[str, Logits]) -> RowGradients:
    """Overwrite a chunk's logits with g' = p_{-y} - d, where p_{-y} is p without the label, renormalised.

    Args:
        inputs: the batch.
        rows: which of its rows the chunk holds.
        z: their logits, (n, V); of raw logits their values are overwritten.
        other_logits: the other models' logits at these rows.
    """
    other_log_probs = {name: label_log_probs(inputs, name, rows, logits) for name, logits in other_logits.items()}
    log_p, log_rest = label_gradient_(z, inputs.labels[rows, None])
    result = evaluate(inputs, rows, (log_p, log_rest), other_log_probs)
    return RowGradients(
        scale=_row_scale(result.label_weight, log_rest),
        losses=result.losses.to(log_rest),
        selected=result.selected,
        invalid=result.invalid,
        not_finite=result.not_finite,
        label_weight=_as_field(result.label_weight, log_rest),
    )


def collected_label_gradients(collected: TwoEntryResult) -> Callable[..., RowGradients]:
    """``label_gradients`` for a method whose rows depend on each other, from the label weights of all rows."""
    none = torch.zeros_like(collected.selected)

    def gradients(inputs: RowInputs, rows: slice, z: Logits, other_logits: dict[str, Logits]) -> RowGradients:
        _, log_rest = label_gradient_(z, inputs.labels[rows, None])
        first = rows.start == 0  # the counts are of all rows
        return RowGradients(
            scale=_row_scale(collected.label_weight[rows], log_rest),
            losses=collected.losses[rows].to(log_rest),
            selected=collected.selected if first else none,
            invalid=collected.invalid if first else none,
            not_finite=None if collected.not_finite is None else collected.not_finite[rows],
            label_weight=_as_field(collected.label_weight[rows], log_rest),
        )

    return gradients


def label_log_probs(inputs: RowInputs, name: str, rows: slice, logits: Logits) -> LogProbs:
    """log q_y and log(1 - q_y) of another model at some rows, (n,) each."""
    if isinstance(logits, RawLogits):
        return raw_label_log_probs(logits, inputs.labels[rows])
    writable = isinstance(inputs.models[name], Head)  # computed into a buffer; logits that were passed in are not
    return label_gradient_(logits if writable else logits.clone(), inputs.labels[rows, None])


def evaluate(inputs: RowInputs, rows: slice, student: LogProbs, other_log_probs: dict[str, LogProbs]) -> TwoEntryResult:
    """Label weight and loss of some rows, from the method itself on two entries."""
    replay = inputs.variant.replay(student[0].device)
    with torch.no_grad():
        tokens, target = two_entry_target(inputs, rows, {"logits": student, **other_log_probs})
        with replay.again():
            losses = inputs.losses(tokens)
        label_weight = target.label_weight  # NaN where the label is the only possible token
        return TwoEntryResult(
            label_weight.nan_to_num(),
            losses,
            inputs.selected(target),
            student[0].isnan().sum(),
            inputs.not_finite(torch.where(target.rest > 0, label_weight, 0.0)),
        )


def two_entry_target(inputs: RowInputs, rows: slice, models: dict[str, LogProbs]) -> tuple[Tokens, Target]:
    """Tokens of two entries by model, and the method's target there, in float64.

    In float32 the label weight 1 / (1 - p_y) of some methods would overflow where the label is sure by 88 nats; see
    ``SUREST``. The losses have no such limit, and so the tokens returned have none.
    """
    fields = inputs.fields_at(rows)
    log_p = {name: _float64(pair[0]) for name, pair in models.items()}
    exact, limited = (
        {name: _at_least(_float64(pair[1]), least) for name, pair in models.items()} for least in (-math.inf, SUREST)
    )
    return two_entry_tokens(log_p, exact, **fields), inputs.variant.target(two_entry_tokens(log_p, limited, **fields))


def two_entry_tokens(
    log_p: dict[str, Float[Tensor, " N"]], log_rest: dict[str, Float[Tensor, " N"]], **fields: Any
) -> Tokens:
    """Tokens with two entries: the label (entry 0) and everything else.

    Args:
        log_p: log p_y by model, (N,); the student is "logits".
        log_rest: log(1 - p_y) by model, (N,).
        fields: per-token fields, (N,).

    Example:
        >>> half = torch.tensor([0.5]).log()
        >>> two_entry_tokens({"logits": half}, {"logits": half}).label_probs
        tensor([0.5000])
    """
    models = {name: torch.stack([value, log_rest[name]], -1) for name, value in log_p.items()}
    labels = torch.zeros(len(models["logits"]), dtype=torch.long, device=models["logits"].device)
    return Tokens.unchecked(labels=labels, **models, **fields)


def _float64(values: Tensor) -> Tensor:
    """In float64, where the device has it."""
    return values if values.device.type == "mps" else values.double()


def _at_least(log_rest: Tensor, least: float) -> Tensor:
    """log(1 - p_y), no less than ``least`` where other tokens are possible at all."""
    return torch.where(log_rest > IMPOSSIBLE, log_rest.clamp(min=least), log_rest)


def _row_scale(label_weight: Tensor, log_rest: Tensor) -> Tensor:
    """a (1 - p_y) of every row, from a in float64, in the dtype of log(1 - p_y)."""
    return (label_weight * _at_least(log_rest.to(label_weight.dtype), SUREST).exp()).to(log_rest.dtype)


def _as_field(label_weight: Tensor, like: Tensor) -> Tensor:
    return label_weight.to(like.dtype).nan_to_num()
