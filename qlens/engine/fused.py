"""Fused loss: a method's loss and its gradients from hidden states and a head, a chunk of logits at a time."""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from qlens.core.errors import InputError
from qlens.engine.accumulation import Gradients, NeedsGradient
from qlens.engine.chunked import Observer, chunked_pass
from qlens.engine.fused_inputs import (
    Model,
    check_arguments,
    check_needs,
    check_width,
    rows_at,
    sample_tokens,
    supervised_field,
    supervised_model,
    supervised_rows,
)
from qlens.engine.heads import Head
from qlens.engine.row_inputs import RowInputs, chunk_rows, shown_inputs, tile_rows
from qlens.engine.structures import effective_structure
from qlens.engine.verification.declarations import why_declared_whole, why_whole
from qlens.losses.leaves import Once
from qlens.registry import Variant, resolve

ROUNDING = {torch.float64: 1e-10, torch.float32: 2e-5, torch.bfloat16: 1e-2}
"""How far gradients may be from the float64 path on the same logits, as a share of max(1, the largest), by the inputs' dtype.

Logits are the product of hidden and head in their own dtype; from there on everything is float32 at least, and so values
are within 2e-5 of themselves, and of a nat per row."""


def fused_loss(
    variant: Variant | str | Callable,
    hidden: Float[Tensor, "N H"],
    head: Float[Tensor, "V H"],
    labels: Int[Tensor, " N"],
    *,
    bias: Float[Tensor, " V"] | None = None,
    reference: Model | None = None,
    teacher: Model | None = None,
    old: Model | None = None,
    second: Model | None = None,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    denominator: float | Tensor | None = None,
    chunk: int | None = None,
    observe: Observer | None = None,
    **per_token_fields: Tensor,
) -> Tensor:
    r"""A method's printed loss from hidden states, with gradients for hidden, head and bias: :math:`g = s (p - Q)` in chunks.

    No (N, V) tensor of any model is held where rows do not depend on each other. The method's declared ``structure`` alone
    chooses how the gradient is computed. Losses of label probabilities cost a softmax beyond their three matrix products;
    those of sequences, batches and pairs one product more, for a first pass that collects the labels' log-probabilities.
    Gradients are computed in the forward pass and kept until ``backward``.

    A user's method is verified once on a few rows of the batch: a wrong structure, or a target that is not its printed
    loss's, is refused. Rows that depend on each other are computed together, their logits whole, and a log line says so:
    those of a method that weighs tokens by a statistic of whole distributions ("mile", or scope "batch" and structure
    "dense"), of a loss without a target and without a declared scope, or that turn out to depend on each other although the
    scope is "token". A loss that needs more of a batch than its supervised rows (their places in the texts, or the model
    itself) is refused: QTrainer trains it.

    Args:
        variant: as in ``explain``.
        hidden: (N, H); rows whose label is -100 are dropped before the product.
        head, bias: (V, H) and (V,); without gradient where they do not require one.
        labels: (N,), with -100 where nothing is learned.
        reference, teacher, old, second: other models, constants: logits (N, V), a tuple (hidden, head), a ``Head``, or a
            ``TopK``. ``softcap`` and ``logit_scale`` hold for the heads of tuples too; a ``Head`` has its own.
        softcap, logit_scale: c and s of the student's logits, see ``Head``.
        denominator: what the sum of the losses is divided by; by default the supervised rows (pairs, for losses of pairs).
        chunk: rows of logits at a time; by default as many as have 22 million entries on a CPU, or 512 MiB or the bytes
            of the head on another device, in nearly even parts.
        observe: called as ``observe(tokens, target, losses)`` for a few rows at a time, detached, in the order of the rows;
            for statistics of the targets out of the same pass.
        per_token_fields: weight, sequence, advantage, ... (N,), as in ``Tokens``.

    Returns:
        The loss in nats, a scalar. Rounding: ``ROUNDING``, by dtype.

    Raises:
        InputError: shapes that do not fit, a missing model; a card that does not fit the loss; logits that hold NaN; a
            second backward.

    Source: Xie et al. 2026 (arXiv 2606.11189), g = p - Q; the chunks follow common practice.

    Example:
        >>> hidden, head = torch.zeros(3, 2, requires_grad=True), torch.ones(4, 2)
        >>> fused_loss("sft", hidden, head, torch.tensor([0, 3, -100])).detach()
        tensor(1.3863)
    """
    models = {"reference": reference, "teacher": teacher, "old": old, "second": second}
    return fused_pass(
        resolve(variant),
        hidden,
        head,
        labels,
        bias=bias,
        models={name: model for name, model in models.items() if model is not None},
        fields=per_token_fields,
        shape={"softcap": softcap, "logit_scale": logit_scale},
        denominator=denominator,
        chunk=chunk,
        observe=observe,
    )


def fused_pass(
    variant: Variant,
    hidden: Tensor,
    head: Tensor,
    labels: Tensor,
    *,
    bias: Tensor | None,
    models: dict[str, Model],
    fields: dict[str, Tensor],
    shape: dict,
    denominator: float | Tensor | None = None,
    chunk: int | None = None,
    observe: Observer | None = None,
    mean_over_selected: bool = False,
) -> Tensor:
    """``fused_loss`` with the other models and fields as dictionaries.

    Args:
        shape: softcap and logit_scale.
        mean_over_selected: whether the loss of a method with ``denominator`` "selected" is raised by the supervised over the
            selected rows, those with a trust other than 0.
    """
    check_arguments(hidden, head, bias, labels, denominator, chunk)
    vocabulary = len(head)
    index = supervised_rows(labels, vocabulary)
    supervised: dict = {name: supervised_model(name, m, index, len(labels), shape) for name, m in models.items()}
    fields = {name: supervised_field(name, v, index, len(labels), vocabulary) for name, v in fields.items()}
    check_needs(variant, {**supervised, **fields})
    supervised, fields = shown_inputs(variant, supervised), shown_inputs(variant, fields)
    for name, model in supervised.items():
        check_width(name, model, vocabulary)
    hidden = rows_at(hidden, index)
    if torch.is_autocast_enabled(hidden.device.type):
        dtype = torch.get_autocast_dtype(hidden.device.type)
        hidden, head, bias = hidden.to(dtype), head.to(dtype), None if bias is None else bias.to(dtype)
    rows = len(index)
    if denominator is None:
        denominator = max(fields["pair"].unique().numel() if variant.scope == "pair" else rows, 1)
    needs_gradient = NeedsGradient(*(_wants_gradient(each) for each in (hidden, head, bias)))
    student = Head(hidden.detach(), head.detach(), None if bias is None else bias.detach(), **shape)
    inputs = RowInputs(
        variant=variant,
        structure=variant.structure,
        labels=labels[index].long(),
        models=supervised,
        fields=fields,
        tile=tile_rows(vocabulary, hidden.device),
        gradients=any(needs_gradient),
        refuse_parameters=any(needs_gradient),
    )
    chunk = min(int(chunk or 0) or chunk_rows(inputs, student), max(rows, 1))
    tile, sample = min(chunk, inputs.tile), partial(sample_tokens, inputs, student)
    if why_whole(variant, sample, rows, tile, fields, torch.is_grad_enabled()):
        chunk, inputs = rows, replace(inputs, tile=rows)
    if rows and not variant.built_in:
        inputs = replace(inputs, structure=effective_structure(variant, sample(torch.zeros(1, dtype=torch.long))))
    with torch.autocast(hidden.device.type, enabled=False):
        total, gradients, selected = chunked_pass(
            inputs, student, chunk, 1 / float(denominator), needs_gradient, observe
        )
    factor = 1 / float(denominator) if hidden.dtype == torch.float16 else None
    loss = _WithGradients.apply(hidden, head, bias, total, gradients, factor)
    if mean_over_selected and variant.denominator == "selected":
        return loss * (rows / max(selected, 1))
    return loss


class _WithGradients(torch.autograd.Function):
    """A loss whose gradients by hidden states, head and bias are known; ``factor`` is still missing in them, if given.

    They are rounded to the inputs' dtype in the backward pass, together with the upstream factor.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        head: Tensor,
        bias: Tensor | None,
        total: Tensor,
        gradients: Gradients,
        factor: float | None,
    ) -> Tensor:
        ctx.gradients, ctx.factor = gradients, factor
        ctx.save_for_backward(hidden, head)
        return total.clone()

    @staticmethod
    def backward(ctx: Any, *upstreams: Tensor) -> tuple:
        (upstream,) = upstreams
        if ctx.gradients is None:
            raise InputError("fused_loss: its gradients were used up by the first backward; compute the loss again")
        gradients, ctx.gradients = ctx.gradients, None
        with torch.no_grad():
            factor = upstream if ctx.factor is None else upstream * ctx.factor
            if factor.device.type == "cpu" and float(factor) == 1:
                factor = None  # saves a pass over the head
            dtype = ctx.saved_tensors[0].dtype
            gradients = tuple(g if g is None else _scaled(g, factor, dtype) for g in gradients)
        if torch.is_grad_enabled():  # create_graph=True
            gradients = tuple(g if g is None else Once.apply(g, upstream, *ctx.saved_tensors) for g in gradients)
        return *gradients, None, None, None


def _scaled(g: Tensor, factor: Tensor | None, dtype: torch.dtype) -> Tensor:
    """factor g in another dtype, rounded once; g is used up."""
    if factor is None:
        return g.to(dtype)
    if g.dtype == dtype:
        return g.mul_(factor.to(dtype))
    return torch.mul(g, factor, out=torch.empty_like(g, dtype=dtype))


def _wants_gradient(value: Tensor | None) -> bool:
    return value is not None and value.requires_grad and torch.is_grad_enabled()


def fusible(variant: Variant) -> bool:
    """Whether rows can be taken a few at a time: all but batch statistics of whole distributions."""
    return not why_declared_whole(variant)


def why_whole_logits(variant: Variant) -> str:
    """Why a trainer has to hold the whole logits of a batch for a method, "" where it has not."""
    if not variant.method.scope and variant.derived:
        return (
            f"for {variant.name}: a loss of your own may look at all tokens of a batch together; if it does not, "
            "register it with scope='token'"
        )
    reason = why_declared_whole(variant)
    return reason and f"for {variant.spec}: {reason}"
