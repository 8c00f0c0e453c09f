"""The engine: any variant's loss and its gradients from hidden states and a head, a few rows of logits at a time."""

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from qlens.core.errors import InputError, brief
from qlens.core.numerics import precision
from qlens.core.supervised import IGNORE, signed
from qlens.core.tokens import PER_TOKEN, Tokens
from qlens.core.tokens.fields import check_floats, check_ids, check_vocabulary, checked_field, number
from qlens.engine.chunked import Observer, Pass
from qlens.engine.heads import Head, TopK
from qlens.engine.row_gradients import block_rows, inputs, structure_of
from qlens.engine.verification.declarations import why_declared_whole, why_whole
from qlens.losses.leaves import Once
from qlens.registry import Variant, resolve

Model = Tensor | tuple[Tensor, Tensor] | Head | TopK
CHUNK = "a whole number of rows, at least 1, or None"
DENOMINATOR = "a finite number above 0 (1e-37 at least), or None"
ENTRIES = 22 * 2**20  # of the logits at a time, unless a chunk is given: at most 88 MiB in float32

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
    r"""The variant's printed loss from hidden states, with gradients for hidden, head and bias: :math:`g = s (p - Q)` in chunks.

    No (N, V) tensor of any model is whole where rows need no others. How the gradient is computed is chosen by the method's
    declared ``structure`` alone. Losses of label probabilities cost a softmax beyond their three matrix products, those of
    sequences, batches and pairs a product more, for a first pass that collects the labels' log-probabilities. Gradients are
    computed on the way forward and kept until ``backward``. A method of your own is verified once on a few rows of the
    batch: a structure that it has not, or a target that is not its printed loss's, is refused. Rows that depend on each other
    are computed together, their logits whole, with one log line that says so: those of a method that weighs tokens by a
    statistic of whole distributions ("mile", or scope "batch" and structure "dense"), of a loss without a target whose scope
    nobody has declared, or that turn out to although the scope is "token". A loss that sees more of a batch than its
    supervised rows, their places in the texts or the model itself, is refused: QTrainer trains it.

    Args:
        variant: as in ``explain``.
        hidden: (N, H); rows whose label is -100 are dropped before the product.
        head, bias: (V, H) and (V,); without gradient where they do not require one.
        reference, teacher, old, second: other models, constants: logits (N, V), a tuple (hidden, head), a ``Head``, or a
            ``TopK``. ``softcap`` and ``logit_scale`` hold for the heads of tuples too; a ``Head`` has its own.
        denominator: what the sum of the losses is divided by; by default the supervised rows (pairs, for losses of pairs).
        chunk: rows of logits at a time; by default as many as have 22 million entries, in nearly even parts.
        observe: called as ``observe(tokens, target, losses)`` for a few rows at a time, detached, in the order of the rows:
            what you want to know of the targets, out of the same pass. It costs what you ask of them.
        per_token_fields: weight, sequence, advantage, ... (N,), as in ``Tokens``.

    Raises:
        InputError: shapes that do not fit, a missing model; a card that does not fit the loss; logits that hold NaN; a
            second backward.

    Rounding: ``ROUNDING``, by dtype.

    Source: Xie et al. 2026 (arXiv 2606.11189), g = p - Q; the chunks follow common practice.

    Example:
        >>> hidden, head = torch.zeros(3, 2, requires_grad=True), torch.ones(4, 2)
        >>> fused_loss("sft", hidden, head, torch.tensor([0, 3, -100])).detach()
        tensor(1.3863)
    """
    fields = per_token_fields
    models = {"reference": reference, "teacher": teacher, "old": old, "second": second}
    models = {name: model for name, model in models.items() if model is not None}
    shape = {"softcap": softcap, "logit_scale": logit_scale}
    return fused_pass(variant, hidden, head, labels, bias, models, fields, shape, denominator, chunk, observe)[0]


def fused_pass(
    variant: Variant | str | Callable,
    hidden: Tensor,
    head: Tensor,
    labels: Tensor,
    bias: Tensor | None,
    models: dict[str, Model],
    fields: dict[str, Tensor],
    shape: dict,
    denominator: float | Tensor | None = None,
    chunk: int | None = None,
    observe: Observer | None = None,
) -> tuple[Tensor, Pass]:
    """``fused_loss`` and the pass that made it, which knows how many rows were trusted at all."""
    method = resolve(variant)
    _check_inputs(hidden, head, bias, labels, denominator, chunk)
    kept = (labels != IGNORE).nonzero()[:, 0]
    check_ids(labels[kept], len(head))
    given: dict = {name: _kept(name, value, kept, len(labels), shape) for name, value in models.items()}
    fields = {name: _field(name, value, kept, len(labels), len(head)) for name, value in fields.items()}
    _check(method, {**given, **fields})
    given, fields = inputs(method, given), inputs(method, fields)
    for name, model in given.items():
        _check_width(name, model, len(head))
    rows = hidden if len(kept) == len(labels) else hidden[kept]
    if torch.is_autocast_enabled(hidden.device.type):
        dtype = torch.get_autocast_dtype(hidden.device.type)
        rows, head, bias = rows.to(dtype), head.to(dtype), bias if bias is None else bias.to(dtype)
    if denominator is None:
        pairs = fields["pair"].unique().numel() if method.scope == "pair" else len(kept)
        denominator = max(pairs, 1)
    size = min(int(chunk or 0) or _even(len(kept), max(1, ENTRIES // head.shape[0])), max(len(kept), 1))
    own = Head(rows.detach(), head.detach(), None if bias is None else bias.detach(), **shape)
    labels = labels[kept].long()
    block = min(size, block_rows(head.shape[0]))
    whole = bool(
        why_whole(
            method,
            lambda index: _sample(own, labels, given, fields, index),
            len(labels),
            block,
            fields,
            torch.is_grad_enabled(),
        )
    )
    if whole:
        size = len(labels)
    structure = None
    if len(labels) and not method.built_in:
        structure = structure_of(method, _sample(own, labels, given, fields, torch.zeros(1, dtype=torch.long)))
    pass_ = Pass(method, labels, given, fields, shape, size, 1 / float(denominator), observe, whole, structure)
    return _Fused.apply(rows, head, bias, pass_, torch.is_grad_enabled()), pass_


def _sample(own: Head, labels: Tensor, models: dict, fields: dict[str, Tensor], index: Tensor) -> Tokens:
    """Tokens at some rows, with whole logits there."""
    index = index.to(labels.device)
    logits = replace(own, hidden=own.hidden[index]).logits(slice(None))
    others = {}
    for name, model in models.items():
        if isinstance(model, TopK):
            others[name] = TopK(model.ids[index], model.log_probs[index], model.tail).logits(slice(None), logits)
        elif isinstance(model, Head):
            others[name] = replace(model, hidden=model.hidden[index]).logits(slice(None)).to(logits.dtype)
        else:
            others[name] = model[index].to(precision(logits.dtype))
    return Tokens(logits=logits, labels=labels[index], **others, **{k: v[index] for k, v in fields.items()})


class _Fused(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, head: Tensor, bias: Tensor | None, pass_: Pass, grad_enabled: bool) -> Tensor:
        # torch sets needs_input_grad from requires_grad alone, under no_grad too
        wanted = tuple(needed and grad_enabled for needed in ctx.needs_input_grad[:3])
        with torch.autocast(hidden.device.type, enabled=False):
            total, ctx.made = pass_.run(hidden, head, bias, wanted)
        ctx.late = pass_.share if hidden.dtype == torch.float16 else None
        ctx.save_for_backward(hidden, head)
        return total

    @staticmethod
    def backward(ctx: Any, *upstreams: Tensor) -> tuple:
        (upstream,) = upstreams
        if ctx.made is None:
            raise InputError("fused_loss: its gradients were used up by the first backward; compute the loss again")
        made, ctx.made = ctx.made, None
        with torch.no_grad():
            if ctx.late is not None:
                made = tuple(g if g is None else g.mul_(upstream * ctx.late).half() for g in made)
            elif upstream.device.type != "cpu" or float(upstream) != 1:  # a pass over the head saved
                made = tuple(g if g is None else g.mul_(upstream.to(g.dtype)) for g in made)
        if torch.is_grad_enabled():  # create_graph=True
            made = (g if g is None else Once.apply(g, upstream, *ctx.saved_tensors) for g in made)
        return *made, None, None


def _check_inputs(hidden: Any, head: Any, bias: Any, labels: Any, denominator: Any, chunk: Any) -> None:
    """Whether the arguments of ``fused_loss`` are what they are said to be."""
    if torch._C._functorch.peek_interpreter_stack() is not None:
        raise InputError(
            "fused_loss does not run inside torch.func's transforms (grad, vmap, jvp ...): take torch.autograd.grad or backward"
        )
    check_floats("hidden", hidden, "(N, H)")
    check_floats("head", head, "(V, H)", hidden.device)
    check_vocabulary("head", len(head))
    if bias is not None and not isinstance(bias, Tensor):
        raise InputError(f"bias must be a tensor (V,) or None, got {brief(bias)}")
    if bias is not None:
        check_floats("bias", bias, "(V,)", hidden.device)
    whole = isinstance(labels, Tensor) and not labels.is_floating_point() and not labels.is_complex()
    if not whole or labels.ndim != 1 or labels.dtype == torch.bool or labels.layout != torch.strided:
        shown = f"{tuple(labels.shape)} of {labels.dtype}" if isinstance(labels, Tensor) else brief(labels)
        raise InputError(f"labels must be a dense integer tensor (N,), got {shown}")
    signed(labels)
    if labels.device != hidden.device:
        raise InputError(f"labels are on {labels.device}, but hidden on {hidden.device}: they must be on one device")
    if len(hidden) != len(labels):
        raise InputError(f"hidden has {len(hidden)} rows, but labels have {len(labels)}")
    if chunk is not None and not (number("chunk", chunk, CHUNK) >= 1 and number("chunk", chunk, CHUNK) % 1 == 0):
        raise InputError(f"chunk must be {CHUNK}, got {brief(chunk)}")
    if (
        denominator is not None
        and not number("denominator", denominator, DENOMINATOR) >= torch.finfo(torch.float32).tiny
    ):
        raise InputError(f"denominator must be {DENOMINATOR}, got {brief(denominator)}")


def _check_width(name: str, model: Tensor | Head | TopK, vocabulary: int) -> None:
    """Whether another model is over the head's vocabulary."""
    if isinstance(model, TopK):
        if len(model.ids) and not 0 <= int(model.ids.min()) <= int(model.ids.max()) < vocabulary:
            raise InputError(f"{name} names ids outside the vocabulary 0..{vocabulary - 1}")
        model.check_values(name)
        return
    width = len(model.weight) if isinstance(model, Head) else model.shape[1] if model.ndim == 2 else None
    if width != vocabulary:
        found = f"a vocabulary of {width}" if width else f"shape {tuple(model.shape)}"
        raise InputError(f"{name} has {found}, but the head's vocabulary is {vocabulary}: they must be one")


def _even(rows: int, most: int) -> int:
    """Rows a chunk, at most ``most``, so that all chunks are of nearly one size: a small product costs more a row."""
    return math.ceil(rows / math.ceil(rows / most)) if rows else 1


def _kept(name: str, model: Model, kept: Tensor, rows: int, shape: dict) -> Tensor | Head | TopK:
    """Another model at the supervised rows."""
    if isinstance(model, TopK):
        sized, made = len(model.ids), lambda: TopK(model.ids[kept], model.log_probs[kept], model.tail)
    elif isinstance(model, Head):
        sized, made = len(model.hidden), lambda: replace(model, hidden=model.hidden.detach()[kept])
    elif isinstance(model, tuple):
        if len(model) != 2 or not all(isinstance(each, Tensor) and each.ndim == 2 for each in model):
            raise InputError(
                f"{name} must be logits (N, V), a tuple (hidden, head), a Head or a TopK, got {brief(model)}"
            )
        hidden, head = model
        check_floats(f"the hidden states of {name}", hidden, "(N, H)", kept.device)
        check_floats(f"the head of {name}", head, "(V, H)", kept.device)
        sized, made = len(hidden), lambda: Head(hidden.detach()[kept], head.detach(), **shape)
    elif not isinstance(model, Tensor):
        raise InputError(f"{name} must be logits (N, V), a tuple (hidden, head), a Head or a TopK, got {brief(model)}")
    else:
        check_floats(name, model, "(N, V)", kept.device)
        sized, made = len(model), lambda: model.detach()[kept]
    if sized != rows:
        raise InputError(f"{name} has {sized} rows, but labels have {rows}")
    return made()


def _field(name: str, value: Tensor, kept: Tensor, rows: int, vocabulary: int) -> Tensor:
    if name not in PER_TOKEN and name != "negatives":
        raise InputError(
            f"fused_loss: unknown field {name!r}; per token there are {', '.join(PER_TOKEN)} and negatives"
        )
    if not isinstance(value, Tensor) or value.ndim < 1 or len(value) != rows:
        found = f"shape {tuple(value.shape)}" if isinstance(value, Tensor) else brief(value)
        raise InputError(f"{name} must be a tensor of {rows} rows, as labels have, got {found}")
    if value.requires_grad:
        raise InputError(
            f"{name} requires a gradient, and fused_loss makes none for it: give {name}.detach(), or take the plain path, "
            "Variant.loss(tokens), whose gradient reaches it"
        )
    taken = value[kept]
    return checked_field(name, taken, (len(kept),) if name in PER_TOKEN else (len(kept), vocabulary))


def fusible(variant: Variant) -> bool:
    """Whether rows can be taken a few at a time: all but batch statistics of whole distributions."""
    return not why_declared_whole(variant)


def why_whole_logits(variant: Variant) -> str:
    """Why a trainer has to hold the whole logits of a batch for a method, "" where it has not."""
    if not variant.method.scope and variant.derived:
        return (
            f"for {variant.name}: a loss of your own may look at all tokens of a batch together; if it does not, register it "
            "with scope='token'"
        )
    reason = why_declared_whole(variant)
    return reason and f"for {variant.spec}: {reason}"


def _check(variant: Variant, given: dict[str, Any]) -> None:
    needs = (*variant.needs, "pair") if variant.scope == "pair" else variant.needs  # the mean is over the pairs
    missing = [name for name in needs if name not in given]
    if missing:
        raise InputError(f"{variant.name} needs a {missing[0]}: give fused_loss({missing[0]}=...)")
