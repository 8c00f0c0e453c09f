"""Logit gradients of one chunk, in place of its logits: one function per declared structure."""

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from qlens.core.autograd import slope_of
from qlens.core.numerics import precision
from qlens.core.target import Target
from qlens.core.tokens import MODELS, Tokens
from qlens.engine.heads import Head, TopK
from qlens.engine.kernels import CACHED, Chunk, grad_, mix_, others_, smooth_
from qlens.engine.label_only import collapsed
from qlens.losses.leaves import refuse_learned
from qlens.losses.reduction.unreduced import value_alone
from qlens.registry import Variant
from qlens.registry.structure import GeometricMixture, Structure
from qlens.registry.variant import ALONE

SUREST = -700.0  # of log(1 - p_y) where a push is read: float64 holds its inverse
IMPOSSIBLE = -1e29  # of log(1 - p_y): less stands for no other token at all
Kernel = Callable[[Tensor, slice, dict[str, Tensor]], "RowGradients"]


class RowGradients(NamedTuple):
    """What a kernel returns beside g' in place of the logits, g = scale g': a number per row each, (n,).

    ``push`` is a in g = a (p - d) for methods of label probabilities alone, None for others.
    """

    scale: Tensor
    losses: Tensor
    push: Tensor | None = None


class GradientKernels:
    """The kernels of one method over the rows of one batch.

    Args:
        variant: the method; its declared structure alone decides which kernel is used.
        labels, models, fields: of the supervised rows only; other models as logits, ``Head`` or ``TopK``.
        vocabulary: V.
        whole: whether rows may depend on each other, so that a chunk of all rows is not cut any further.
        wanted: whether gradients are wanted, or the losses alone.
        structure: by which the gradient is computed, see ``structure_of``; the declared one by default.
        trains: whether a loss with a parameter of its own is refused; by default where gradients are wanted.

    Attributes:
        uniform: 1 - t of a chunk's rows, (n,), where (1 - t) / V is still to be subtracted from every entry; else None.
        pushed: push and loss of every row, where they need other rows; set by ``collect``.
        selected: how many rows were trusted at all, for methods that divide by these.
        invalid: how many rows of logits hold NaN or +inf, a scalar.
        infinite: rows whose trust, scale or push is not finite, (N,); of a user's own methods only.
    """

    def __init__(
        self,
        variant: Variant,
        labels: Tensor,
        models: dict[str, Tensor | Head | TopK],
        fields: dict[str, Tensor],
        vocabulary: int,
        whole: bool = False,
        wanted: bool = True,
        structure: Structure | None = None,
        trains: bool | None = None,
    ):
        self.variant, self.labels, self.models, self.fields = variant, labels, models, fields
        self.structure, self.wanted = structure or variant.structure, wanted
        self.trains = wanted if trains is None else trains
        self.block = len(labels) if whole else block_rows(vocabulary)
        self.uniform: Tensor | None = None
        self.pushed: tuple[Tensor, Tensor] | None = None
        self.selected = torch.zeros((), dtype=torch.long, device=labels.device)
        self.invalid = torch.zeros((), dtype=torch.long, device=labels.device)
        self.infinite = torch.zeros(len(labels), dtype=torch.bool, device=labels.device)

    @property
    def kernel(self) -> Kernel:
        """The function that turns a chunk of logits into gradients, by the declared structure alone."""
        if isinstance(self.structure, GeometricMixture):
            return self._uniform if self.structure.model is None else self._mixture
        return self._label if self.structure == "label" else self._dense

    @property
    def is_uniform(self) -> bool:
        """Whether the label is mixed with the uniform distribution."""
        return isinstance(self.structure, GeometricMixture) and self.structure.model is None

    @property
    def collects(self) -> bool:
        """Whether a first pass has to collect the label probabilities of all rows."""
        return self.structure == "label" and self.variant.scope not in ALONE

    def collect(self, log_p: Tensor, rest: Tensor, others: dict[str, tuple[Tensor, Tensor]]) -> None:
        """Compute push and loss of every row from log p_y and log(1 - p_y) of all, of the student and of other models."""
        self.pushed = self._pushes(slice(None), log_p, rest, others)

    def label_log_probs(self, name: str, rows: slice, logits: Tensor) -> tuple[Tensor, Tensor]:
        """log q_y and log(1 - q_y) of another model, (n,) each."""
        own = isinstance(self.models[name], Head)  # its buffer may be written on, what was given may not
        return others_(logits if own else logits.clone(), self.labels[rows, None])

    def fields_of(self, rows: slice) -> dict[str, Tensor]:
        """The per-token fields of some rows."""
        return {name: value[rows] for name, value in self.fields.items()}

    def _label(self, z: Tensor, rows: slice, others: dict[str, Tensor]) -> RowGradients:
        """Losses of label probabilities: g' = p_{-y} - d, the push found on two entries."""
        if self.pushed is not None:
            rest, (push, losses) = others_(z, self.labels[rows, None])[1], self.pushed
            return RowGradients(_row_scale(push[rows], rest), losses[rows].to(z), _finite(push[rows], z))
        label_log_probs = {name: self.label_log_probs(name, rows, logits) for name, logits in others.items()}
        log_p, rest = others_(z, self.labels[rows, None])
        push, losses = self._pushes(rows, log_p, rest, label_log_probs)
        return RowGradients(_row_scale(push, rest), losses.to(z), _finite(push, z))

    def _mixture(self, z: Tensor, rows: slice, others: dict[str, Tensor]) -> RowGradients:
        """Geometric mixtures of label, student and one other model: g' = p - t d - (1 - t) r."""
        assert isinstance(self.structure, GeometricMixture) and self.structure.model is not None
        y = others[self.structure.model]
        owned = isinstance(self.models[self.structure.model], Head)  # another's logits are not ours to write on
        parts = []
        for few in slices(len(z), self.block):
            at = slice(rows.start + few.start, rows.start + few.stop)
            with torch.no_grad():
                near = y[few] if owned else y[few].clone()
                parts.append(mix_(z[few], near, self.labels[at, None], self.structure, self._trust_and_scale(at)))
        return RowGradients(*(torch.cat(values) for values in zip(*parts, strict=True)))

    def _uniform(self, z: Tensor, rows: slice, others: dict[str, Tensor]) -> RowGradients:
        """Mixtures of the label with the uniform distribution: g' = p - t d, the uniform part left to ``uniform``."""
        assert isinstance(self.structure, GeometricMixture)
        with torch.no_grad():
            trust_and_scale = self._trust_and_scale(rows)
            scale, self.uniform, losses = smooth_(z, self.labels[rows, None], self.structure, trust_and_scale)
        return RowGradients(scale, losses)

    def _dense(self, z: Tensor, rows: slice, others: dict[str, Tensor]) -> RowGradients:
        """Any other method, by autograd of its loss or by its target, whichever it has."""
        self.invalid += (~z.amax(-1).isfinite()).sum()
        parts = []
        for few in slices(len(z), self.block):
            at = slice(rows.start + few.start, rows.start + few.stop)
            near = {name: logits[few] for name, logits in others.items()}
            tokens = Chunk.unchecked(logits=z[few], labels=self.labels[at], **near, **self.fields_of(at))
            alone = self.variant.is_loss_alone(tokens)
            parts.append(self._by_autograd(z[few], tokens) if alone else self._by_target(z[few], tokens, at))
        return RowGradients(*(torch.cat(values) for values in zip(*parts, strict=True)))

    def _by_autograd(self, z: Tensor, tokens: Tokens) -> tuple[Tensor, Tensor]:
        """g in place of the logits, from a loss that has no target beside it."""
        ones = torch.ones_like(z[:, 0])
        selects = self.variant.denominator == "selected"
        if not self.wanted and not selects:
            with torch.no_grad():
                return ones, self.variant.loss(tokens)
        with torch.enable_grad(), value_alone():
            leaf = z.detach().requires_grad_()
            losses = self.variant.loss(tokens.with_logits(leaf))
            refuse_learned(self.variant.spec, losses, leaf)
            grad = slope_of(losses, leaf)
        if selects:
            self._count(Target.from_grad(tokens, grad))
        z.copy_(grad)
        return ones, losses.detach()

    def _by_target(self, z: Tensor, tokens: Chunk, rows: slice) -> tuple[Tensor, Tensor]:
        """g' in place of the logits, from the explicit target."""
        replay = self.variant.replay(z.device)
        with torch.no_grad():
            losses = self._losses(tokens)
            with replay.again():  # a method that draws numbers has one target and loss
                target = self.variant.target(tokens)
            self._count(target)
            self._note_infinite(rows, target.scale, target.constructed, target.pushed)
            return grad_(z, tokens, target), losses

    def _losses(self, tokens: Tokens) -> Tensor:
        """The losses of rows without a graph; a user's are computed with one, in which a parameter of their own shows."""
        with torch.set_grad_enabled(self.trains and not self.variant.built_in):
            losses = self.variant.loss(tokens)
        refuse_learned(self.variant.spec, losses)
        return losses

    def _trust_and_scale(self, rows: slice) -> Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]:
        """t and s of some rows, from the method itself, on two entries: functions of log p_y and log(1 - p_y)."""

        def trust_and_scale(log_p: Tensor, rest: Tensor) -> tuple[Tensor, Tensor]:
            models = {"logits": (log_p, rest)} | {name: (log_p, rest) for name in self.models}
            target = self._target(rows, models)[1]
            self._note_infinite(rows, target.trust, target.scale)
            return target.trust.to(log_p), target.scale.to(log_p)

        return trust_and_scale

    def _pushes(self, rows: slice, log_p: Tensor, rest: Tensor, others: dict) -> tuple[Tensor, Tensor]:
        """The push on the label and the loss of some rows, from the method itself, on two entries."""
        replay = self.variant.replay(log_p.device)
        with torch.no_grad():
            tokens, target = self._target(rows, {"logits": (log_p, rest), **others})
            with replay.again():
                losses = self._losses(tokens)
            push = target.label_weight  # NaN where the label is the only possible token
            self._note_infinite(rows, torch.where(target.rest > 0, push, 0.0))
            return push.nan_to_num(), losses

    def _target(self, rows: slice, models: dict[str, tuple[Tensor, Tensor]]) -> tuple[Tokens, Target]:
        """Tokens of two entries, from log p_y and log(1 - p_y) by model, and the method's target there, in float64.

        In float32 the push 1 / (1 - p_y) of some methods would overflow where the label is sure by 88 nats; see ``SUREST``.
        """
        self.invalid += models["logits"][0].isnan().sum()
        fields, made = self.fields_of(rows), []
        for least in (-math.inf, SUREST):
            log_p = {name: _wide(pair[0]) for name, pair in models.items()}
            rest = {name: _clamped(_wide(pair[1]), least) for name, pair in models.items()}
            made.append(collapsed(log_p, rest, **fields))
        target = self.variant.target(made[1])
        self._count(target)
        return made[0], target

    def _note_infinite(self, rows: slice, *values: Tensor | None) -> None:
        """Note the rows at which one of a user's values, (n,) each, is NaN or infinite."""
        if self.variant.built_in:
            return
        for value in values:
            if value is not None:
                self.infinite[rows] |= ~value.isfinite()

    def _count(self, target: Target) -> None:
        if self.variant.denominator == "selected":
            self.selected += (target.trust != 0).sum()


def structure_of(variant: Variant, tokens: Tokens) -> Structure:
    """The structure by which gradient and loss are computed: the declared one, but "dense" for a mixture that is a loss alone.

    A mixture's trust and scale are read from the target, and a loss alone has none.

    Args:
        variant: the method.
        tokens: at least one row, with the fields that it needs.
    """
    declared = variant.structure
    if variant.built_in or not isinstance(declared, GeometricMixture):
        return declared
    if variant.is_loss_alone(tokens):
        return "dense"
    alone = declared.value is None and variant.method.printed is None
    return replace(declared, value="cross_entropy") if alone else declared


def _wide(values: Tensor) -> Tensor:
    """In float64, where the device has it."""
    return values if values.device.type == "mps" else values.double()


def _clamped(rest: Tensor, least: float) -> Tensor:
    """log(1 - p_y), no less than ``least`` where other tokens are possible at all."""
    return torch.where(rest > IMPOSSIBLE, rest.clamp(min=least), rest)


def _row_scale(push: Tensor, rest: Tensor) -> Tensor:
    """a (1 - p_y) of every row, from a in float64, in the precision of log(1 - p_y)."""
    return (push * _clamped(rest.to(push.dtype), SUREST).exp()).to(rest.dtype)


def _finite(push: Tensor, like: Tensor) -> Tensor:
    return push.to(like.dtype).nan_to_num()


def block_rows(vocabulary: int) -> int:
    """Rows of logits that are worked on at a time."""
    return max(1, CACHED // vocabulary)


def inputs(variant: Variant, given: dict[str, Any]) -> dict[str, Any]:
    """Those of the given models and per-token fields that a method is shown.

    qlens' own methods need no more than they declare; a user's method may look at anything.
    """
    if not variant.built_in:
        return given
    return {name: value for name, value in given.items() if name in (*variant.needs, "weight", "sequence", "pair")}


def by_structure(variant: Variant, tokens: Tokens) -> tuple[Tensor, Tensor]:
    """The logit gradient, (N, V), and the losses, (N,), of a method as its declared structure says, of all rows together."""
    given = inputs(
        variant, {name: value for name, value in tokens.fields().items() if name not in ("logits", "labels")}
    )
    fields = {name: value for name, value in given.items() if name not in MODELS}
    z = tokens.logits.detach().clone().to(precision(tokens.logits.dtype))
    models: dict[str, Any] = {name: value.detach().to(z.dtype) for name, value in given.items() if name in MODELS}
    structure = structure_of(variant, tokens)
    kernels = GradientKernels(
        variant, tokens.labels.long(), models, fields, z.shape[1], whole=True, structure=structure, trains=False
    )
    rows = slice(0, len(z))
    if kernels.collects:
        others = {name: kernels.label_log_probs(name, rows, logits) for name, logits in models.items()}
        kernels.collect(*others_(z.clone(), kernels.labels[:, None]), others)
    scale, losses, _ = kernels.kernel(z, rows, models)
    if kernels.uniform is not None:
        z -= kernels.uniform[:, None] / z.shape[1]
    grad = scale[:, None] * z
    grad[kernels.infinite] = torch.nan  # a kernel may put another number for what is none
    return grad, losses


def slices(rows: int, size: int) -> list[slice]:
    """Consecutive slices of so many rows."""
    return [slice(start, min(start + size, rows)) for start in range(0, rows, max(size, 1))]
