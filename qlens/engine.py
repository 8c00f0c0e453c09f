"""The engine: any variant's loss and its gradients from hidden states and a head, a few rows of logits at a time."""

from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.autograd.function import once_differentiable

from qlens.batching import IGNORE
from qlens.chunks import CACHED, Chunk, grad_, softmax_
from qlens.collapse import collapsed, collapses, push_of
from qlens.errors import InputError
from qlens.heads import Head, TopK
from qlens.registry import Variant, resolve
from qlens.tokens import PER_TOKEN, precision

Model = Tensor | tuple[Tensor, Tensor] | TopK
ENTRIES = 20 * 2**20  # of the logits at a time, unless a chunk is given: 80 MiB in float32
ALONE = ("token", "parameters")  # scopes of methods whose gradient at a token needs no other token


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
    **per_token_fields: Tensor,
) -> Tensor:
    r"""The variant's printed loss from hidden states, with gradients for hidden, head and bias: :math:`g = s (p - Q)` in chunks.

    No (N, V) tensor of any model is ever whole. Losses of label probabilities alone cost a softmax beyond their three matrix
    products, those of sequences, batches and pairs a product more, for a first pass that collects the labels'
    log-probabilities. Gradients are made on the way forward and kept until ``backward``.

    Args:
        variant: as in ``explain``.
        hidden: (N, H); rows whose label is -100 are dropped before the product.
        head, bias: (V, H) and (V,); without gradient where they do not require one.
        reference, teacher, old, second: other models, constants: logits (N, V), a tuple (hidden, head), or a ``TopK``.
            ``softcap`` and ``logit_scale`` hold for the heads of tuples too.
        denominator: what the sum of the losses is divided by; by default the supervised rows (pairs, for losses of pairs).
        chunk: rows of logits at a time.
        per_token_fields: weight, sequence, advantage, ... (N,), as in ``Tokens``.

    Raises:
        InputError: shapes that do not fit, a missing model, or a batch statistic that needs more than label
            probabilities; a second backward.

    Source: Xie et al. 2026 (arXiv 2606.11189), g = p - Q; the chunks follow common practice.

    Example:
        >>> hidden, head = torch.zeros(3, 2, requires_grad=True), torch.ones(4, 2)
        >>> fused_loss("sft", hidden, head, torch.tensor([0, 3, -100])).detach()
        tensor(1.3863)
    """
    method = resolve(variant)
    shape = {"softcap": softcap, "logit_scale": logit_scale}
    kept = (labels != IGNORE).nonzero()[:, 0]
    models = {"reference": reference, "teacher": teacher, "old": old, "second": second}
    given = {name: _kept(name, value, kept, len(labels), shape) for name, value in models.items() if value is not None}
    fields = {name: _field(name, value, kept, len(labels)) for name, value in per_token_fields.items()}
    _check(method, {**given, **fields})
    given = {name: model for name, model in given.items() if name in method.needs}  # nobody looks at the others
    fields = {name: value for name, value in fields.items() if name in (*method.needs, "weight", "sequence", "pair")}
    if len(hidden) != len(labels):
        raise InputError(f"hidden has {len(hidden)} rows, but labels have {len(labels)}")
    rows = hidden if len(kept) == len(labels) else hidden[kept]
    if torch.is_autocast_enabled(hidden.device.type):
        dtype = torch.get_autocast_dtype(hidden.device.type)
        rows, head, bias = rows.to(dtype), head.to(dtype), bias if bias is None else bias.to(dtype)
    if denominator is None:
        pairs = fields["pair"].unique().numel() if method.scope == "pair" else len(kept)
        denominator = max(pairs, 1)
    share = 1 / float(denominator)
    size = chunk or max(1, ENTRIES // head.shape[0])
    return _Fused.apply(rows, head, bias, _Pass(method, labels[kept].long(), given, fields, shape, size, share))


class _Fused(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, head: Tensor, bias: Tensor | None, pass_: "_Pass") -> Tensor:
        with torch.autocast(hidden.device.type, enabled=False):
            total, ctx.made = pass_.run(hidden, head, bias, ctx.needs_input_grad)
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple:  # pyright: ignore[reportIncompatibleMethodOverride]
        if ctx.made is None:
            raise InputError("fused_loss: its gradients were used up by the first backward; compute the loss again")
        made, ctx.made = ctx.made, None
        if upstream.device.type == "cpu" and float(upstream) == 1:  # a pass over the head saved
            return *made, None
        return *(g if g is None else g.mul_(upstream.to(g.dtype)) for g in made), None


class _Pass:
    """One pass over the rows: logits of a chunk, g in their place, and what the products make of it."""

    def __init__(
        self, variant: Variant, labels: Tensor, models: dict, fields: dict, shape: dict, chunk: int, share: float
    ):
        self.variant, self.labels, self.models, self.fields = variant, labels, models, fields
        self.shape, self.chunk, self.share = shape, chunk, share
        self.narrow = collapses(variant)
        self.buffers: dict[str, Tensor] = {}  # of other models' logits, so that no two chunks are ever there

    def run(self, hidden: Tensor, head: Tensor, bias: Tensor | None, wanted: tuple[bool, ...]) -> tuple[Tensor, tuple]:
        """The sum of the losses, and the gradients that are wanted."""
        own = Head(hidden.detach(), head.detach(), None if bias is None else bias.detach(), **self.shape)
        wide = precision(hidden.dtype)
        d_hidden = torch.empty_like(own.hidden) if wanted[0] else None
        make = torch.empty if len(self.labels) else torch.zeros  # the first chunk fills it
        d_head = make(head.shape, dtype=wide, device=head.device) if wanted[1] else None
        d_bias = torch.zeros(head.shape[0], dtype=wide, device=head.device) if wanted[2] else None
        total = torch.zeros((), dtype=wide, device=hidden.device)
        pushed = self._collected(own) if self.narrow and self.variant.scope not in ALONE else None
        buffer = torch.empty(min(self.chunk, len(self.labels)), head.shape[0], dtype=wide, device=head.device)
        for start in range(0, len(self.labels), self.chunk):
            rows = slice(start, start + self.chunk)
            z = own.logits(rows, buffer)
            bent = z.clone() if own.softcap is not None else None
            a, losses = self._narrow(z, rows, pushed) if self.narrow else self._dense(z, rows)
            total += losses.sum()
            if bent is not None:
                z *= own.slope_(bent)
            # What is the same for a whole row is folded into the small sides of the products: g = a g', a scalar a row.
            a = self.share * own.logit_scale * a[:, None]
            g, h = z.to(hidden.dtype), own.hidden[rows]
            if d_bias is not None:
                d_bias += (z.T @ a)[:, 0]
            if d_hidden is not None:
                torch.mm(g, own.weight, out=d_hidden[rows]).mul_(a)
            if d_head is not None:
                _add_product(d_head, g, (h * a).to(h.dtype), fresh=start == 0)
        made = (
            d_hidden,
            None if d_head is None else d_head.to(head.dtype),
            None if d_bias is None else d_bias.to(head.dtype),
        )
        return self.share * total, made

    def _narrow(self, z: Tensor, rows: slice, pushed: tuple[Tensor, Tensor] | None) -> tuple[Tensor, Tensor]:
        """p - d in place of the logits, for losses of label probabilities; returns a in g = a (p - d), and the losses."""
        labels = self.labels[rows, None]
        if pushed is None and self.models:
            others = {name: self._label_log_probs(name, rows, z) for name in self.models}
        else:
            others = {}
        log_p, rest = softmax_(z, labels)
        if pushed is None:
            a, losses = self._pushes(rows, log_p, rest, others)
        else:
            a, losses = pushed[0][rows], pushed[1][rows]
        z.scatter_(1, labels, -rest.exp()[:, None])
        return a, losses

    def _pushes(self, rows: slice, log_p: Tensor, rest: Tensor, others: dict) -> tuple[Tensor, Tensor]:
        """a and the loss of some rows, from the method itself, on two entries."""
        probs = {"logits": log_p} | {name: pair[0] for name, pair in others.items()}
        rests = {"logits": rest} | {name: pair[1] for name, pair in others.items()}
        tokens = collapsed(probs, rests, **{name: value[rows] for name, value in self.fields.items()})
        with torch.no_grad():
            return push_of(self.variant, tokens).nan_to_num(), self.variant.loss(tokens)

    def _collected(self, own: Head) -> tuple[Tensor, Tensor]:
        """A first pass, for sequences, batches and pairs: a and the loss of every row."""
        found: list[list[Tensor]] = []
        for start in range(0, len(self.labels), self.chunk):
            rows = slice(start, start + self.chunk)
            z = own.logits(rows)
            others = [self._label_log_probs(name, rows, z) for name in self.models]
            pairs = [softmax_(z, self.labels[rows, None])]
            found.append([value for pair in (*pairs, *others) for value in pair])
        if not found:
            empty = torch.zeros(0, dtype=precision(own.hidden.dtype), device=own.hidden.device)
            return empty, empty
        log_p, rest, *others = (torch.cat(values) for values in zip(*found, strict=True))
        named = {name: (others[2 * i], others[2 * i + 1]) for i, name in enumerate(self.models)}
        return self._pushes(slice(None), log_p, rest, named)

    def _label_log_probs(self, name: str, rows: slice, like: Tensor) -> tuple[Tensor, Tensor]:
        """log q_y and log(1 - q_y) of another model."""
        logits = self._logits_of(name, rows, like)
        own = isinstance(self.models[name], Head)  # its buffer may be written on, what was given may not
        return softmax_(logits if own else logits.clone(), self.labels[rows, None])

    def _dense(self, z: Tensor, rows: slice) -> tuple[Tensor, Tensor]:
        """g' in place of the logits for any other method, a few rows at a time; returns a in g = a g', and the losses."""
        step, scales, losses = max(1, CACHED // z.shape[1]), [], []
        others = {name: self._logits_of(name, rows, z) for name in self.models}
        for start in range(0, len(z), step):
            some = slice(start, start + step)
            fields = {name: value[rows][some] for name, value in self.fields.items()}
            models = {name: logits[some] for name, logits in others.items()}
            tokens = Chunk(logits=z[some], labels=self.labels[rows][some], **models, **fields)
            with torch.no_grad():
                losses.append(self.variant.loss(tokens))
                scales.append(grad_(z[some], tokens, self.variant.target(tokens)))
        return torch.cat(scales), torch.cat(losses)

    def _logits_of(self, name: str, rows: slice, student: Tensor) -> Tensor:
        model = self.models[name]
        if isinstance(model, TopK):
            return model.logits(rows, student)
        if isinstance(model, Head):
            if name not in self.buffers:
                self.buffers[name] = torch.empty(min(self.chunk, len(self.labels)), student.shape[1]).to(student)
            return model.logits(rows, self.buffers[name])
        return model[rows].to(student.dtype)


def _add_product(into: Tensor, g: Tensor, hidden: Tensor, fresh: bool) -> None:
    """into += g^T hidden, summed in into's own precision; a ``fresh`` one holds nothing yet."""
    if into.dtype == g.dtype:
        torch.addmm(into, g.T, hidden, beta=0 if fresh else 1, out=into)
    elif fresh:
        into.copy_(g.T @ hidden)
    else:
        into.add_(g.T @ hidden)


def _kept(name: str, model: Model, kept: Tensor, rows: int, shape: dict) -> Tensor | Head | TopK:
    """Another model at the supervised rows."""
    if isinstance(model, TopK):
        sized, made = len(model.ids), lambda: TopK(model.ids[kept], model.log_probs[kept], model.tail)
    elif isinstance(model, tuple):
        hidden, head = model
        sized, made = len(hidden), lambda: Head(hidden.detach()[kept], head.detach(), **shape)
    else:
        sized, made = len(model), lambda: model.detach()[kept]
    if sized != rows:
        raise InputError(f"{name} has {sized} rows, but labels have {rows}")
    return made()


def _field(name: str, value: Tensor, kept: Tensor, rows: int) -> Tensor:
    if name not in PER_TOKEN and name != "negatives":
        raise InputError(
            f"fused_loss: unknown field {name!r}; per token there are {', '.join(PER_TOKEN)} and negatives"
        )
    if len(value) != rows:
        raise InputError(f"{name} has {len(value)} rows, but labels have {rows}")
    return value[kept]


def _check(variant: Variant, given: dict[str, Any]) -> None:
    missing = [name for name in variant.needs if name not in given]
    if missing:
        raise InputError(f"{variant.name} needs a {missing[0]}: give fused_loss({missing[0]}=...)")
    if variant.scope not in ALONE and not collapses(variant):
        raise InputError(
            f"{variant.spec} weighs tokens by a statistic of the {variant.scope} that needs whole distributions: "
            "use the plain path"
        )
