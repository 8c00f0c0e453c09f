"""Reading: the gradient of a loss on some tokens, with its precision and rounding error."""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from qlens.core.autograd import gradient
from qlens.core.errors import InputError, UnknownReduction
from qlens.core.numerics import spread
from qlens.core.probes import VOCABULARY, WIDE, probes, trials
from qlens.core.scales import carried
from qlens.core.tokens import MODELS, Tokens
from qlens.lens.implied import read
from qlens.lens.rounding import COARSEST_MOVES, MOVES, Noise, coarser, moves, rounding, traced
from qlens.losses import calling
from qlens.losses.layout.layout_search import in_whole_groups
from qlens.losses.layout.names import FIELD
from qlens.losses.layout.signature import roles_taken
from qlens.losses.layout.trial import holds_rows
from qlens.losses.notes.effective_tokens import effective_tokens, with_own_teacher
from qlens.losses.reduction import unreduced
from qlens.losses.replay import why_calls_differ
from qlens.losses.user_code import first_line, numbers_of
from qlens.registry.variant import Variant

SAME = 1e-6  # relative difference of two calls, in float64, beyond which a loss is random
MOST = 2**26  # logits up to which tokens are read in float64
LARGE = 2**20  # logits beyond which fewer moved gradients measure the rounding
FEW = 57  # tokens on which the reduction is first searched
NAMED = 4  # vocabularies tried that an error message names


@dataclass(frozen=True, eq=False)
class Reading:
    """The gradient of an unreduced loss on tokens.

    Args:
        inputs: the tokens as the loss receives them.
        grad: its gradient, (N, V), in float64.
        noise: its rounding error.
        precision: of the gradient, the coarser of the loss's operations and of its digits.
        arithmetic: precision of the loss's operations on the logits.
        own: the coarser of ``precision`` and of the constants that enter the loss.
        losses: values in nats, (N,).
    """

    inputs: Tokens
    grad: Float[Tensor, "N V"]
    noise: Noise
    precision: torch.dtype
    arithmetic: torch.dtype
    own: torch.dtype
    losses: Float[Tensor, " N"]

    @classmethod
    def of(cls, variant: Variant, tokens: Tokens) -> "Reading":
        """Read a loss, twice to detect randomness.

        Raises:
            InputError: it fails, or two calls on the same tokens differ.
        """
        try:
            tokens = prepared(variant, tokens)
            grad = read(variant, tokens, variant.loss)
            losses, arithmetic, constants = traced(variant.loss, tokens)  # after ``read``, which finds the layout
            if not variant.built_in:  # a state that other tokens leave behind changes the next call
                with contextlib.suppress(InputError):  # it may fail on these logits
                    read(variant, tokens.with_logits(tokens.logits / 2), variant.loss)
            second_grad = read(variant, tokens, variant.loss)
            precision = coarser(arithmetic, carried(grad))
            finite = bool(grad.isfinite().all() and grad.any())
            difference = float((grad - second_grad).norm() / grad.norm()) if finite else 0.0
            if difference > max(SAME, 10 * torch.finfo(precision).eps):
                why = why_calls_differ(lambda: read(variant, tokens, variant.loss), tokens.logits.device)
                raise InputError(f"{variant.spec} {why.format(f' by {difference:.2g} of the gradient')}")
            number = (MOVES if grad.numel() <= LARGE else COARSEST_MOVES) if finite else 0
            moved_grads = [read(variant, other, variant.loss) for other in moves(tokens, arithmetic, number)]
        except InputError:
            raise
        except Exception as error:  # a user's loss may raise anything
            raise InputError(f"{variant.spec} raised {type(error).__name__}: {error}") from error
        noise = rounding(grad, tokens, arithmetic, moved_grads, constants)
        return cls(tokens, grad.double(), noise, precision, arithmetic, coarser(precision, constants), losses)

    @cached_property
    def tokens(self) -> Tokens:
        """The tokens in float64, from which everything but the loss is computed; of a few tokens all is computed once."""
        return self.inputs.in_float64()

    @property
    def finite(self) -> bool:
        """Whether the gradient is finite everywhere."""
        return bool(self.grad.isfinite().all())

    @property
    def zero_rows(self) -> Tensor:
        """The tokens whose gradient is zero up to rounding, (N,)."""
        return self.grad.norm(dim=-1) <= self.noise.rows

    def __getitem__(self, rows: Any) -> "Reading":
        """The reading of some rows."""
        some = {name: getattr(self, name)[rows] for name in ("inputs", "grad", "noise", "losses")}
        return replace(self, **some)

    def reread(self, variant: Variant, rows: Any) -> "Reading":
        """The reading of some rows as a batch of their own, with the outputs that a teacher of the loss has for that batch."""
        few = prepared(variant, self.inputs[rows])
        return replace(self[rows], inputs=few, grad=gradient(variant.loss, few).double())

    def weighted(self, weights: Float[Tensor, " N"]) -> "Reading":
        """The reading times a weight per row."""
        size = weights.abs()
        noise = Noise(self.noise.rows * size, self.noise.sums * size)
        return replace(self, grad=self.grad * weights[:, None], noise=noise)

    def with_gradient(self, grad: Float[Tensor, "N V"], tokens: Tokens | None = None) -> "Reading":
        """The same reading with another gradient, and other tokens if given."""
        return replace(self, grad=grad, inputs=self.inputs if tokens is None else tokens)


def prepared(variant: Variant, tokens: Tokens) -> Tokens:
    """The tokens as the loss sees them: with the outputs of a teacher of its own, in the positions of its batches."""
    if not variant.derived:
        return tokens
    with getattr(variant, "arithmetic", contextlib.nullcontext)():  # a teacher in the precision of the loss
        tokens = with_own_teacher(variant.method.fn, variant.params, tokens)
    return effective_tokens(variant.method.fn, variant.params, tokens)


def whole_where_needed(variant: Variant, tokens: Tokens | None) -> tuple[Variant, str]:
    """The loss, read as a whole batch where its reduction cannot be found, with the reason; else the loss itself and "".

    Args:
        variant: the loss.
        tokens: the tokens it will be read on; None for the probes.

    Raises:
        InputError: its reduction cannot be found, and it holds values of its own for these tokens.
    """
    at = probes() if tokens is None else tokens
    if len(at) > FEW and not (variant.compares_pairs or holds_rows(variant.method.fn, at)):
        at = at[spread(len(at), FEW).to(at.logits.device)]
    try:
        gradient(variant.loss, adapt_tokens(at, variant))
    except UnknownReduction as error:
        if holds_rows(variant.method.fn, at):  # it cannot be called twice on these rows at once either
            raise
        return unreduced.whole(variant), str(error).partition(" Return the")[0]
    except Exception:  # reading the loss raises it again
        return variant, ""
    return variant, ""


def on_probes(variant: Variant) -> Reading:
    """A reading on the built-in probes, whose logits are rounded to the loss's precision so that no cast changes them.

    Raises:
        InputError: the loss fails at every vocabulary tried.
    """
    return rounded_to_precision(variant, before_casts(variant))


def before_casts(variant: Variant) -> Reading:
    """A reading on the built-in probes: in float64 where the loss allows, at a vocabulary that it takes.

    Raises:
        InputError: the loss fails at every vocabulary tried.
    """
    failed: InputError | None = None
    sizes, tried_sizes = [VOCABULARY, WIDE], []
    while sizes:
        size = sizes.pop(0)
        tried_sizes.append(size)
        for dtype in (torch.float64, torch.float32):
            try:
                return Reading.of(variant, adapt_tokens(probes(dtype, vocabulary=size), variant))
            except InputError as error:
                if error.__cause__ is None or isinstance(error.__cause__, SystemExit):  # refused before it ran
                    raise
                failed = failed or error
                if size in (VOCABULARY, WIDE):
                    candidates = list(_sizes(first_line(error.__cause__), tried_sizes + sizes))
                    sizes += candidates[: NAMED - len(tried_sizes) + 1]
    assert failed is not None
    at = ", ".join(map(str, tried_sizes))
    raise InputError(
        f"{failed} (tried at vocabularies {at}; on tokens of your own: explain(loss, tokens))"
    ) from failed.__cause__


def on_trials(variant: Variant, shown: Reading, sizes: tuple[int, ...] = ()) -> Reading | str:
    """A reading on the trial tokens, at the first vocabulary that works; or the reason why there is none.

    Vocabularies are those of ``sizes``, else the trial tokens' own and that of the tokens shown.
    """
    size = shown.inputs.logits.shape[1]
    dtype = torch.float64 if shown.inputs.logits.dtype == torch.float64 else torch.float32
    failed = ""
    for vocabulary in sizes or dict.fromkeys((WIDE, size) if size <= 2**12 else (WIDE,)):
        try:
            reading = rounded_to_precision(
                variant, Reading.of(variant, adapt_tokens(trials(dtype, vocabulary=vocabulary), variant))
            )
        except InputError as error:
            failed = failed or f"at V = {vocabulary} {first_line(error)[:140]}"
            continue
        if failed:
            failed = f"{failed}; the findings hold at V = {vocabulary}"
        finite_rows = reading.grad.isfinite().all(-1) & reading.tokens.logits.isfinite().all(-1)
        if not bool(finite_rows.any() and reading.grad[finite_rows].any()):
            failed = failed or f"at V = {vocabulary} the gradient is zero or not finite"
            continue
        return reading
    return failed


def requested_fields(variant: Variant) -> tuple[str, ...]:
    """The fields of Tokens that a loss asks for, with ``weight`` where it takes weights itself."""
    fn = variant.method.fn
    takes = calling.kind(fn) != "tokens" and calling.takes(fn, "weight") and "weight" not in variant.needs
    return (*variant.needs, *(("weight",) if takes else ()))


def fields_taken(variant: Variant) -> frozenset[str] | None:
    """The fields of Tokens that a loss of logits and labels can depend on, by its signature; None for other kinds of losses."""
    fn = variant.method.fn
    if not variant.derived or calling.kind(fn) != "logits":
        return None
    roles = roles_taken(fn)
    return frozenset({"weight", "sequence", "pair", "chosen", *variant.needs, *(FIELD[r] for r in roles if r in FIELD)})


def models_taken(variant: Variant, tokens: Tokens) -> Tokens:
    """The tokens without the models that a loss of logits does not take, which cannot be part of its target."""
    fn = variant.method.fn
    if calling.kind(fn) != "logits":
        return tokens
    used = {name for name in MODELS for role in roles_taken(fn) if name in role or FIELD.get(role) == name}
    unused = {name: None for name in MODELS if name not in used and getattr(tokens, name) is not None}
    return tokens.replace(**unused) if unused else tokens


def adapt_tokens(tokens: Tokens, variant: Variant) -> Tokens:
    """Built-in tokens adapted to a loss: in whole groups of texts, and with weights where the loss asks for them."""
    if variant.derived:
        tokens = in_whole_groups(variant.method.fn, variant.params, tokens)
    if "weight" not in requested_fields(variant):
        return tokens
    weights = torch.tensor([1.0, 0.5, 2.0, 0.25, 1.5, 3.0, 0.7], dtype=tokens.logits.dtype)
    return tokens.replace(weight=weights[torch.arange(len(tokens)) % 7].to(tokens.logits.device))


def on_own_tokens(variant: Variant, tokens: Tokens) -> Reading:
    """A reading of a user's tokens, with all logits in float64 where the loss and memory allow it."""
    if tokens.logits.numel() <= MOST and tokens.logits.dtype != torch.float64:
        try:
            return Reading.of(variant, tokens.with_precision(torch.float64))
        except InputError as error:
            if not isinstance(error.__cause__, RuntimeError):
                raise
    return Reading.of(variant, tokens.upcast())


def rounded_to_precision(variant: Variant, reading: Reading) -> Reading:
    """A reading on tokens whose logits are exact in the loss's precision."""
    if reading.precision == torch.float64 or not reading.finite:
        return reading
    exact = reading.inputs.with_precision(reading.precision).with_precision(torch.float32)
    return Reading.of(variant, exact)


def _sizes(message: str, excluded: list[int]) -> Iterator[int]:
    """Numbers in an error message that may be the vocabulary of the loss."""
    for text in reversed(numbers_of(message)):
        if text and len(text) < 7 and 3 <= int(text) <= 300_000 and int(text) not in excluded:
            yield int(text)
