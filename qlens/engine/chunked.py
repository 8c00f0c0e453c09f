"""Chunked forward and backward pass over supervised rows."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from qlens.core.errors import InputError
from qlens.core.numerics import precision
from qlens.core.target import Target
from qlens.core.tokens import Tokens
from qlens.engine.accumulation import Gradients, GradientSums, NeedsGradient
from qlens.engine.finite_values import refuse_rows
from qlens.engine.heads import Head, TopK
from qlens.engine.kernels.plain import label_gradient_
from qlens.engine.kernels.raw_logits import RawLogits, uses_triton
from qlens.engine.label_only import Logits, TwoEntryResult, collected_label_gradients, evaluate, label_log_probs
from qlens.engine.row_inputs import RowInputs, slices
from qlens.engine.structures import gradient_function

Observer = Callable[[Tokens, Target, Tensor], None]


class ChunkedResult(NamedTuple):
    """The sum of the losses times ``factor``; the gradients; and the number of rows with a trust other than 0."""

    total: Tensor
    gradients: Gradients
    selected: int


@torch.no_grad()
def chunked_pass(
    inputs: RowInputs,
    head: Head,
    chunk: int,
    factor: float,
    needs_gradient: NeedsGradient,
    observe: Observer | None = None,
) -> ChunkedResult:
    """Loss and gradients of supervised rows, a chunk of logits at a time.

    Args:
        inputs: the method and its inputs at N supervised rows.
        head: the student's hidden states at these rows, and its head; detached.
        chunk: rows of logits at a time.
        factor: what the sum of the losses is multiplied by.
        needs_gradient: which gradients are computed; those of float16 are float32 and without ``factor``.
        observe: called with tokens, target and losses of a few rows at a time, all of them copies.

    Raises:
        InputError: logits, a loss or a gradient that are not finite.
    """
    rows_total, variant = len(inputs.labels), inputs.variant
    raw, wide = uses_triton(inputs.structure, head.hidden), precision(head.hidden.dtype)
    buffers = Buffers(chunk, head, raw)
    sums = GradientSums(
        head, rows_total, needs_gradient, factor, uniform=inputs.mixes_uniform and not raw, chunks=rows_total > chunk
    )
    gradients = gradient_function(inputs.structure)
    if inputs.needs_all_rows and rows_total:
        gradients = collected_label_gradients(_collect(inputs, head, chunk, buffers))
    total = torch.zeros((), dtype=wide, device=head.hidden.device)
    selected = torch.zeros((), dtype=torch.long, device=inputs.labels.device)
    invalid = torch.zeros_like(selected)
    not_finite = torch.zeros(rows_total, dtype=torch.bool, device=inputs.labels.device)
    for rows in slices(rows_total, chunk):
        z = buffers.logits("logits", head, rows)
        capped = None
        if isinstance(z, Tensor) and head.softcap is not None and any(needs_gradient):
            capped = buffers.take("capped", rows, wide).copy_(z)
        other_logits = {} if inputs.needs_all_rows else _other_logits(inputs, rows, z, buffers)
        copies = _copies(inputs, rows, z, other_logits) if observe else None
        replay = variant.replay(head.hidden.device) if observe else None
        result = gradients(inputs, rows, z, other_logits)
        total += result.losses.sum()
        selected += result.selected
        invalid += result.invalid
        not_finite[rows] |= result.losses.isnan()
        if result.not_finite is not None:
            not_finite[rows] |= result.not_finite
        if observe is not None and copies is not None and replay is not None:
            with replay.again():  # a method that draws numbers shows those it was trained by, and draws no others
                _show(observe, inputs, copies, result.losses, result.label_weight)
        if any(needs_gradient):
            values = z.values if isinstance(z, RawLogits) else z
            sums.add(rows, values, result.scale, result.uniform, capped)
    if not variant.built_in:
        not_finite |= sums.not_finite()
    selected, invalid, damaged = torch.stack([selected, invalid, not_finite.any().long()]).tolist()  # one wait
    if invalid:
        raise InputError(f"the logits hold NaN, +inf or nothing but -inf in {invalid} rows")
    if damaged:
        _refuse_models(inputs, head, chunk)
        refuse_rows(variant.spec, not_finite, "loss or its gradient (its target or scale)")
    return ChunkedResult(factor * total, sums.result(), selected)


class Buffers:
    """Memory for chunks of logits, (chunk, V), allocated once per name; ``raw``: for raw logits."""

    def __init__(self, chunk: int, head: Head, raw: bool):
        self.size, self.device, self.raw = (chunk, len(head.weight)), head.weight.device, raw
        self.buffers: dict[str, Tensor] = {}

    def take(self, name: str, rows: slice, dtype: torch.dtype) -> Tensor:
        """Memory for the logits of some rows, the same at every call."""
        if name not in self.buffers:
            self.buffers[name] = torch.empty(self.size, dtype=dtype, device=self.device)
        return self.buffers[name][: rows.stop - rows.start]

    def logits(self, name: str, head: Head, rows: slice) -> Logits:
        """A head's logits of some rows in the buffer of this name."""
        if self.raw:
            return RawLogits(head.products(rows, self.take(name, rows, head.hidden.dtype)), head)
        return head.logits(rows, self.take(name, rows, precision(head.hidden.dtype)))


def _collect(inputs: RowInputs, head: Head, chunk: int, buffers: Buffers) -> TwoEntryResult:
    """A first pass over all rows: the label probabilities of every model, and the label weights that follow from them."""
    chunks: list[list[Tensor]] = []
    for rows in slices(len(inputs.labels), chunk):
        z = buffers.logits("logits", head, rows)
        other_logits = _other_logits(inputs, rows, z, buffers)
        pairs = [label_log_probs(inputs, name, rows, logits) for name, logits in other_logits.items()]
        student = label_gradient_(z, inputs.labels[rows, None])  # last: it overwrites z
        chunks.append([value for pair in (student, *pairs) for value in pair])
    log_p, log_rest, *values = (torch.cat(parts) for parts in zip(*chunks, strict=True))
    by_model = {name: (values[2 * i], values[2 * i + 1]) for i, name in enumerate(inputs.models)}
    return evaluate(inputs, slice(None), (log_p, log_rest), by_model)


def _other_logits(inputs: RowInputs, rows: slice, student: Logits, buffers: Buffers) -> dict[str, Logits]:
    return {name: _logits_of(inputs, name, rows, student, buffers) for name in inputs.models}


def _logits_of(inputs: RowInputs, name: str, rows: slice, student: Logits, buffers: Buffers) -> Logits:
    """Another model's logits at some rows: raw as the student's, or in the dtype of the student's."""
    model = inputs.models[name]
    if isinstance(model, Head):
        logits = buffers.logits(name, model, rows)
        return logits.to(student.dtype) if isinstance(logits, Tensor) else logits
    if isinstance(student, RawLogits):
        return RawLogits(
            model.logits(rows, student.finished()) if isinstance(model, TopK) else model[rows].contiguous()
        )
    return model.logits(rows, student) if isinstance(model, TopK) else model[rows].to(student.dtype)


def _copies(inputs: RowInputs, rows: slice, z: Logits, other_logits: dict[str, Logits]) -> Tokens:
    """A chunk's tokens on memory of their own, for the observer: the structure functions overwrite the buffers."""
    models = other_logits if inputs.structure != "label" else {}
    copies = {
        name: value.finished() if isinstance(value, RawLogits) else value.clone()
        for name, value in {"logits": z, **models}.items()
    }
    return Tokens.unchecked(labels=inputs.labels[rows], **copies, **inputs.fields_at(rows))


def _show(observe: Observer, inputs: RowInputs, tokens: Tokens, losses: Tensor, label_weight: Tensor | None) -> None:
    """Call the observer on a chunk, a tile at a time."""
    for rows in slices(len(tokens), inputs.tile):
        tile = tokens[rows]
        if label_weight is not None:
            target = Target.push(tile, label_weight[rows])
        else:
            target = inputs.variant.target(tile)
        observe(tile, target, losses[rows])


def _refuse_models(inputs: RowInputs, head: Head, chunk: int) -> None:
    """Name the model whose logits made the loss NaN, if one did."""
    buffers = Buffers(chunk, head, raw=False)
    for name in inputs.models:
        damaged = 0
        for rows in slices(len(inputs.labels), chunk):
            student = buffers.logits("logits", head, rows)
            damaged += int((~_logits_of(inputs, name, rows, student, buffers).amax(-1).isfinite()).sum())
        if damaged:
            raise InputError(f"{name} holds NaN, +inf or nothing but -inf in {damaged} rows")
