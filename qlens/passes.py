"""Passes: a method's loss, and the gradients of hidden states and head, from a few rows of logits at a time."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from qlens.chunks import CACHED, Chunk, Flat, grad_, mix_, others_, smooth_
from qlens.collapse import collapsed, collapses
from qlens.heads import Head, TopK
from qlens.mixing import mixture
from qlens.registry import Variant
from qlens.target import Target
from qlens.tokens import Tokens, precision
from qlens.variant import ALONE

Observer = Callable[[Tokens, Target, Tensor], None]


class Pass:
    """One pass over the rows: logits of a chunk, g in their place, and what the products make of it.

    Args:
        variant: the method.
        labels, models, fields: of the supervised rows only; other models as logits, ``Head`` or ``TopK``.
        shape: softcap and logit_scale of the student's head.
        chunk: rows of logits at a time.
        share: what the sum of the losses is multiplied by.
        observe: called with tokens, target and losses of a few rows at a time.

    Attributes:
        selected: how many rows were trusted at all, after ``run``.
    """

    def __init__(
        self,
        variant: Variant,
        labels: Tensor,
        models: dict[str, Tensor | Head | TopK],
        fields: dict[str, Tensor],
        shape: dict,
        chunk: int,
        share: float,
        observe: Observer | None = None,
    ):
        self.variant, self.labels, self.models, self.fields = variant, labels, models, fields
        self.shape, self.chunk, self.share, self.observe = shape, chunk, share, observe
        self.narrow = collapses(variant)
        self.mixture = None if self.narrow or observe else mixture(variant)
        self.uniform: Tensor | None = None  # 1 - t of a chunk's rows, where (1 - t) u is still to be taken off
        self.buffers: dict[str, Tensor] = {}  # of whole chunks, so that no two of one kind are ever there
        self.selected = 0

    def run(self, hidden: Tensor, head: Tensor, bias: Tensor | None, wanted: tuple[bool, ...]) -> tuple[Tensor, tuple]:
        """The sum of the losses times ``share``, and the gradients of hidden, head and bias that are wanted."""
        own = Head(hidden.detach(), head.detach(), None if bias is None else bias.detach(), **self.shape)
        wide = precision(hidden.dtype)
        self.room = {"size": (self.chunk, head.shape[0]), "dtype": wide, "device": head.device}
        d_hidden = torch.empty_like(own.hidden) if wanted[0] else None
        make = torch.empty if len(self.labels) else torch.zeros  # the first chunk fills it
        d_head = make(head.shape, dtype=wide, device=head.device) if wanted[1] else None
        d_bias = torch.zeros(head.shape[0], dtype=wide, device=head.device) if wanted[2] else None
        total = torch.zeros((), dtype=wide, device=hidden.device)
        # Behind a cap, and where g is rounded to the inputs' dtype, u must be taken off entry by entry.
        flat = Flat(own) if own.softcap is None and wide == hidden.dtype and self._smoothes else None
        pushed = self._collected(own) if self.narrow and self.variant.scope not in ALONE else None
        for start in range(0, len(self.labels), self.chunk):
            rows = slice(start, min(start + self.chunk, len(self.labels)))
            z = own.logits(rows, self._buffer("logits", rows))
            bent = self._buffer("bent", rows).copy_(z) if own.softcap is not None and any(wanted) else None
            a, losses = self._turned(z, rows, pushed)
            total += losses.sum()
            if not any(wanted):
                continue
            if self.uniform is not None and flat is None:
                z -= self.uniform[:, None] / len(own.weight)
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
            if self.uniform is not None and flat is not None:
                few = None if d_hidden is None else d_hidden[rows]
                flat.sub_(a * self.uniform[:, None] / len(own.weight), h, few)
        if flat is not None and d_head is not None:
            d_head += flat.head
        if flat is not None and d_bias is not None:
            d_bias += flat.bias
        made = (
            d_hidden,
            None if d_head is None else d_head.to(head.dtype),
            None if d_bias is None else d_bias.to(head.dtype),
        )
        return self.share * total, made

    def _turned(self, z: Tensor, rows: slice, pushed: tuple[Tensor, Tensor] | None) -> tuple[Tensor, Tensor]:
        """g' in place of a chunk's logits; returns a in g = a g', and the losses, (n,)."""
        others = {} if pushed else {name: self._logits_of(name, rows, z) for name in self.models}
        if self.narrow and not self.observe:
            return self._narrow(z, rows, others, pushed)
        if self._smoothes:
            return self._smoothed(z, rows)
        turn = self._watched if self.narrow else self._mixed if self.mixture else self._dense
        step, made = max(1, CACHED // z.shape[1]), []
        for at in range(0, len(z), step):  # all of it while these rows are still near
            few = slice(at, min(at + step, len(z)))
            near = {name: logits[few] for name, logits in others.items()}
            made.append(turn(z[few], slice(rows.start + few.start, rows.start + few.stop), near, pushed))
        a, losses = (torch.cat(values) for values in zip(*made, strict=True))
        return a, losses

    def _narrow(self, z: Tensor, rows: slice, others: dict, pushed: Any) -> tuple[Tensor, Tensor]:
        """Losses of label probabilities."""
        push, rest, losses = self._labels_only(z, rows, others, pushed)
        return push * rest.exp(), losses

    def _watched(self, z: Tensor, rows: slice, others: dict, pushed: Any) -> tuple[Tensor, Tensor]:
        """The same, shown to the observer."""
        fields = {name: value[rows] for name, value in self.fields.items()}
        tokens = Chunk(logits=z.clone(), labels=self.labels[rows], **fields)
        push, rest, losses = self._labels_only(z, rows, others, pushed)
        assert self.observe is not None
        self.observe(tokens, Target.push(tokens, push), losses)
        return push * rest.exp(), losses

    def _labels_only(self, z: Tensor, rows: slice, others: dict, pushed: Any) -> tuple[Tensor, Tensor, Tensor]:
        """p_{-y} - d in place of the logits; returns the push, found on two entries, log(1 - p_y), and the losses."""
        if pushed is not None:
            rest = others_(z, self.labels[rows, None])[1]
            return pushed[0][rows], rest, pushed[1][rows]
        known = {name: self._label_log_probs(name, rows, logits) for name, logits in others.items()}
        log_p, rest = others_(z, self.labels[rows, None])
        push, losses = self._pushes(rows, log_p, rest, known)
        return push, rest, losses

    def _mixed(self, z: Tensor, rows: slice, others: dict, pushed: Any) -> tuple[Tensor, Tensor]:
        """Mixtures of the label with another model."""
        assert self.mixture is not None and self.mixture.model is not None
        y = others[self.mixture.model]
        if not isinstance(self.models[self.mixture.model], Head):
            y = y.clone()  # what was given is not ours to write on
        with torch.no_grad():
            return mix_(z, y, self.labels[rows, None], self.mixture, self._told(rows))

    @property
    def _smoothes(self) -> bool:
        return self.mixture is not None and self.mixture.model is None

    def _smoothed(self, z: Tensor, rows: slice) -> tuple[Tensor, Tensor]:
        """Mixtures of the label with the uniform distribution."""
        assert self.mixture is not None
        with torch.no_grad():
            a, self.uniform, losses = smooth_(z, self.labels[rows, None], self.mixture, self._told(rows))
        return a, losses

    def _told(self, rows: slice) -> Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]:
        """t and s of some rows, from the method itself, on two entries."""

        def told(log_p: Tensor, rest: Tensor) -> tuple[Tensor, Tensor]:
            models = {"logits": (log_p, rest)} | {name: (log_p, rest) for name in self.models}  # t and s know p_y only
            target = self._target(rows, models)[1]
            return target.trust, target.scale

        return told

    def _dense(self, z: Tensor, rows: slice, others: dict, pushed: Any) -> tuple[Tensor, Tensor]:
        """Any other method, from its loss and target as they are."""
        fields = {name: value[rows] for name, value in self.fields.items()}
        tokens = Chunk(logits=z, labels=self.labels[rows], **others, **fields)
        with torch.no_grad():
            losses, target = self.variant.loss(tokens), self.variant.target(tokens)
            self._count(target)
            if self.observe:
                self.observe(tokens, target, losses)
            return grad_(z, tokens, target), losses

    def _pushes(self, rows: slice, log_p: Tensor, rest: Tensor, others: dict) -> tuple[Tensor, Tensor]:
        """The push on the label and the loss of some rows, from the method itself, on two entries."""
        with torch.no_grad():
            tokens, target = self._target(rows, {"logits": (log_p, rest), **others})
            return target.effective_trust.nan_to_num(), self.variant.loss(tokens)

    def _target(self, rows: slice, models: dict[str, tuple[Tensor, Tensor]]) -> tuple[Tokens, Target]:
        """Tokens of two entries, from log p_y and log(1 - p_y) by model, and the method's target there."""
        log_p, rest = ({name: pair[i] for name, pair in models.items()} for i in (0, 1))
        tokens = collapsed(log_p, rest, **{name: value[rows] for name, value in self.fields.items()})
        target = self.variant.target(tokens)
        self._count(target)
        return tokens, target

    def _count(self, target: Target) -> None:
        if self.variant.denominator == "selected":
            self.selected += int((target.trust != 0).sum())

    def _collected(self, own: Head) -> tuple[Tensor, Tensor]:
        """A first pass, for sequences, batches and pairs: the push and the loss of every row."""
        found: list[list[Tensor]] = []
        for start in range(0, len(self.labels), self.chunk):
            rows = slice(start, min(start + self.chunk, len(self.labels)))
            z = own.logits(rows, self._buffer("logits", rows))
            others = [self._label_log_probs(name, rows, self._logits_of(name, rows, z)) for name in self.models]
            pairs = [others_(z, self.labels[rows, None])]
            found.append([value for pair in (*pairs, *others) for value in pair])
        if not found:
            empty = torch.zeros(0, dtype=precision(own.hidden.dtype), device=own.hidden.device)
            return empty, empty
        log_p, rest, *others = (torch.cat(values) for values in zip(*found, strict=True))
        named = {name: (others[2 * i], others[2 * i + 1]) for i, name in enumerate(self.models)}
        return self._pushes(slice(None), log_p, rest, named)

    def _label_log_probs(self, name: str, rows: slice, logits: Tensor) -> tuple[Tensor, Tensor]:
        """log q_y and log(1 - q_y) of another model."""
        own = isinstance(self.models[name], Head)  # its buffer may be written on, what was given may not
        return others_(logits if own else logits.clone(), self.labels[rows, None])

    def _logits_of(self, name: str, rows: slice, student: Tensor) -> Tensor:
        model = self.models[name]
        if isinstance(model, TopK):
            return model.logits(rows, student)
        if isinstance(model, Head):
            return model.logits(rows, self._buffer(name, rows)).to(student.dtype)
        return model[rows].to(student.dtype)

    def _buffer(self, name: str, rows: slice) -> Tensor:
        """Room for a chunk of logits, the same every time."""
        if name not in self.buffers:
            self.buffers[name] = torch.empty(**self.room)
        return self.buffers[name][: rows.stop - rows.start]


def _add_product(into: Tensor, g: Tensor, hidden: Tensor, fresh: bool) -> None:
    """into += g^T hidden, summed in into's own precision; a ``fresh`` one holds nothing yet."""
    if into.dtype == g.dtype:
        torch.addmm(into, g.T, hidden, beta=0 if fresh else 1, out=into)
    elif fresh:
        into.copy_(g.T @ hidden)
    else:
        into.add_(g.T @ hidden)
