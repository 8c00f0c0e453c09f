"""The chunk loop: a method's loss, and the gradients of hidden states and head, from a few rows of logits at a time."""

from collections.abc import Callable

import torch
from torch import Tensor

from qlens.core.errors import InputError
from qlens.core.numerics import precision
from qlens.core.target import Target
from qlens.core.tokens import Tokens
from qlens.engine.finite_values import refuse_rows
from qlens.engine.heads import Head, TopK
from qlens.engine.kernels import Flat, others_
from qlens.engine.row_gradients import GradientKernels, slices
from qlens.registry import Variant
from qlens.registry.structure import Structure

Observer = Callable[[Tokens, Target, Tensor], None]


class Pass:
    """One pass over the supervised rows.

    Args:
        variant: the method; its declared structure alone decides how its gradient is computed.
        labels, models, fields: of the supervised rows only; other models as logits, ``Head`` or ``TopK``.
        shape: softcap and logit_scale of the student's head.
        chunk: rows of logits at a time.
        share: what the sum of the losses is multiplied by.
        observe: called with tokens, target and losses of a few rows at a time, all of them copies.
        whole: whether rows may depend on each other, so that a chunk of all rows is not cut any further.
        structure: by which the gradient is computed; the declared one by default.

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
        whole: bool = False,
        structure: Structure | None = None,
    ):
        self.variant, self.labels, self.models, self.fields = variant, labels, models, fields
        self.structure = structure
        self.shape, self.chunk, self.share, self.observe, self.whole = shape, chunk, share, observe, whole
        self.buffers: dict[str, Tensor] = {}  # of whole chunks, so that no two of one kind are ever there
        self.selected = 0

    def run(self, hidden: Tensor, head: Tensor, bias: Tensor | None, wanted: tuple[bool, ...]) -> tuple[Tensor, tuple]:
        """The sum of the losses times ``share``, and the gradients of hidden, head and bias that are wanted.

        Those of float16 are in float32 and without ``share``.
        """
        own = Head(hidden.detach(), head.detach(), None if bias is None else bias.detach(), **self.shape)
        wide = precision(hidden.dtype)
        self.room = {"size": (self.chunk, head.shape[0]), "dtype": wide, "device": head.device}
        # In float16 a share would underflow before a scaler's upstream gradient raises it: both come in at the end.
        late = hidden.dtype == torch.float16
        share = 1.0 if late else self.share
        d_hidden = torch.empty_like(own.hidden, dtype=wide if late else None) if wanted[0] else None
        make = torch.empty if len(self.labels) else torch.zeros  # the first chunk fills it
        d_head = make(head.shape, dtype=wide, device=head.device) if wanted[1] else None
        d_bias = torch.zeros(head.shape[0], dtype=wide, device=head.device) if wanted[2] else None
        total = torch.zeros((), dtype=wide, device=hidden.device)
        kernels = GradientKernels(
            self.variant,
            self.labels,
            self.models,
            self.fields,
            head.shape[0],
            self.whole,
            any(wanted),
            self.structure,
        )
        # Behind a cap, and where g is rounded to the inputs' dtype, u must be subtracted entry by entry.
        flat = Flat(own) if kernels.is_uniform and own.softcap is None and wide == hidden.dtype else None
        if kernels.collects:
            self._collect(own, kernels)
        for rows in slices(len(self.labels), self.chunk):
            z = own.logits(rows, self._buffer("logits", rows))
            bent = self._buffer("bent", rows).copy_(z) if own.softcap is not None and any(wanted) else None
            others = {} if kernels.collects else {name: self._logits_of(name, rows, z) for name in self.models}
            seen = self._copies(z, rows, others, kernels) if self.observe else None
            replay = self.variant.replay(z.device) if self.observe else None
            scale, losses, push = kernels.kernel(z, rows, others)
            total += losses.sum()
            kernels.infinite[rows] |= losses.isnan()
            if seen is not None and replay is not None:
                with replay.again():  # a method that draws numbers shows those it was trained by, and draws no others
                    self._show(seen, losses, push, kernels.block)
            if not any(wanted):
                continue
            if kernels.uniform is not None and flat is None:
                z -= kernels.uniform[:, None] / len(own.weight)
            if bent is not None:
                z *= own.slope_(bent)
            # What is the same for a whole row is folded into the small sides of the products: g = a g', a scalar a row.
            a = share * own.logit_scale * scale[:, None]
            g, h = z.to(hidden.dtype), own.hidden[rows]
            if d_bias is not None:
                d_bias += (z.T @ a)[:, 0]
            if d_hidden is not None and late:
                torch.mul(g @ own.weight, a, out=d_hidden[rows])
            elif d_hidden is not None:
                torch.mm(g, own.weight, out=d_hidden[rows]).mul_(a)
            if d_head is not None:
                _add_product(d_head, g, (h * a).to(h.dtype), fresh=rows.start == 0)
            if kernels.uniform is not None and flat is not None:
                few = None if d_hidden is None else d_hidden[rows]
                flat.sub_(a * kernels.uniform[:, None] / len(own.weight), h, few)
        if not self.variant.built_in and d_hidden is not None:
            sums = d_hidden.sum(-1, dtype=wide)
            kernels.infinite |= sums.isnan() if late else ~sums.isfinite()
        elif not self.variant.built_in and d_head is not None:  # hidden states that are constants
            kernels.infinite |= ~d_head.sum().isfinite()
        self.selected, invalid, unknown = torch.stack(
            [kernels.selected, kernels.invalid, kernels.infinite.any().long()]
        ).tolist()
        if invalid:
            raise InputError(f"the logits hold NaN, +inf or nothing but -inf in {invalid} rows")
        if unknown:
            self._refuse_models(own)
            refuse_rows(self.variant.spec, kernels.infinite, "loss or its gradient (its target or scale)")
        if flat is not None and d_head is not None:
            d_head += flat.head
        if flat is not None and d_bias is not None:
            d_bias += flat.bias
        if late:
            return self.share * total, (d_hidden, d_head, d_bias)
        gradients = (
            d_hidden,
            None if d_head is None else d_head.to(head.dtype),
            None if d_bias is None else d_bias.to(head.dtype),
        )
        return self.share * total, gradients

    def _collect(self, own: Head, kernels: GradientKernels) -> None:
        """The first pass, for sequences, batches and pairs: the label probabilities of every row."""
        chunks: list[list[Tensor]] = []
        for rows in slices(len(self.labels), self.chunk):
            z = own.logits(rows, self._buffer("logits", rows))
            others = [kernels.label_log_probs(name, rows, self._logits_of(name, rows, z)) for name in self.models]
            pairs = [others_(z, self.labels[rows, None])]
            chunks.append([value for pair in (*pairs, *others) for value in pair])
        if chunks:
            log_p, rest, *others = (torch.cat(values) for values in zip(*chunks, strict=True))
            named = {name: (others[2 * i], others[2 * i + 1]) for i, name in enumerate(self.models)}
            kernels.collect(log_p, rest, named)

    def _refuse_models(self, own: Head) -> None:
        """Name the model whose logits made the loss NaN, if one did."""
        for name in self.models:
            bad = 0
            for rows in slices(len(self.labels), self.chunk):
                logits = self._logits_of(name, rows, own.logits(rows, self._buffer("logits", rows)))
                bad += int((~logits.amax(-1).isfinite()).sum())
            if bad:
                raise InputError(f"{name} holds NaN, +inf or nothing but -inf in {bad} rows")

    def _copies(self, z: Tensor, rows: slice, others: dict[str, Tensor], kernels: GradientKernels) -> Tokens:
        """A chunk's tokens on memory of their own, for the observer: the pass writes on its buffers."""
        known = others if kernels.structure != "label" else {}
        copies = {name: value.clone() for name, value in {"logits": z, **known}.items()}
        return Tokens.unchecked(labels=self.labels[rows], **copies, **kernels.fields_of(rows))

    def _show(self, seen: Tokens, losses: Tensor, push: Tensor | None, block: int) -> None:
        """Call the observer on a chunk, a block at a time; the training's own numbers are not touched."""
        assert self.observe is not None
        for few in slices(len(seen), block):
            tokens = seen[few]
            with torch.no_grad():
                target = Target.push(tokens, push[few]) if push is not None else self.variant.target(tokens)
            self.observe(tokens, target, losses[few])

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
