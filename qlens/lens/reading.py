"""Readings: a loss's gradient at some tokens, with the precision it was computed in and the rounding it holds."""

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
from qlens.core.probes import VOCABULARY, WIDE, probes, trials
from qlens.core.scales import carried
from qlens.core.tokens import MODELS, Tokens, spread
from qlens.lens.implied import read
from qlens.lens.rounding import COARSEST_MOVES, MOVES, Noise, coarser, moves, rounding, traced
from qlens.losses import calling
from qlens.losses.layout.layout_search import in_whole_groups
from qlens.losses.layout.names import FIELD
from qlens.losses.layout.signature import inputs
from qlens.losses.notes.seen_tokens import as_given, supplied
from qlens.losses.reduction import unreduced
from qlens.losses.replay import why_calls_differ
from qlens.losses.user_code import first_line, numbers_of
from qlens.registry.variant import Variant

SAME = 1e-6  # two calls of one loss differ by no more, in float64
MOST = 2**26  # logits read in float64; more are read in the precision they are given in
LARGE = 2**20  # logits from which on fewer moved gradients measure the rounding
FEW = 57  # tokens on which a reduction is looked for first
NAMED = 4  # vocabularies tried that a loss's error message names


@dataclass(frozen=True, eq=False)
class Reading:
    """The gradient of an unreduced loss at tokens.

    Args:
        given: the tokens as the loss saw them.
        grad: its gradient, (N, V), in float64.
        noise: the rounding in it.
        precision: of the gradient: the coarser of the loss's operations and of what its digits show.
        arithmetic: of the loss's operations on the way from the logits.
        own: the coarsest of the gradient's precision and of the constants that enter it.
        losses: its values, (N,).
    """

    given: Tokens
    grad: Float[Tensor, "N V"]
    noise: Noise
    precision: torch.dtype
    arithmetic: torch.dtype
    own: torch.dtype
    losses: Float[Tensor, " N"]

    @classmethod
    def of(cls, variant: Variant, tokens: Tokens) -> "Reading":
        """One reading; two where the loss may be random.

        Raises:
            InputError: it fails, or two calls on the same tokens differ; what it raised is named.
        """
        try:
            if variant.derived:
                with getattr(
                    variant, "arithmetic", contextlib.nullcontext
                )():  # a teacher in a closure, as the loss sees it
                    tokens = supplied(variant.method.fn, variant.params, tokens)
                tokens = as_given(variant.method.fn, variant.params, tokens)
            grad = read(variant, tokens, variant.loss)
            losses, arithmetic, constants = traced(variant.loss, tokens)  # by now it is known how the loss is called
            if not variant.built_in:  # a state that other tokens leave behind shows in the next call
                with contextlib.suppress(InputError):  # on logits that nobody showed it, it may fail
                    read(variant, tokens.with_logits(tokens.logits / 2), variant.loss)
            again = read(variant, tokens, variant.loss)
            precision = coarser(arithmetic, carried(grad))
            finite = bool(grad.isfinite().all() and grad.any())
            off = float((grad - again).norm() / grad.norm()) if finite else 0.0
            if off > max(SAME, 10 * torch.finfo(precision).eps):
                why = why_calls_differ(lambda: read(variant, tokens, variant.loss), tokens.logits.device)
                raise InputError(f"{variant.spec} {why.format(f' by {off:.2g} of the gradient')}")
            number = (MOVES if grad.numel() <= LARGE else COARSEST_MOVES) if finite else 0
            moved = [read(variant, other, variant.loss) for other in moves(tokens, arithmetic, number)]
        except InputError:
            raise
        except Exception as error:  # anything at all may go wrong inside a user's loss
            raise InputError(f"{variant.spec} raised {type(error).__name__}: {error}") from error
        noise = rounding(grad, tokens, arithmetic, moved, constants)
        return cls(tokens, grad.double(), noise, precision, arithmetic, coarser(precision, constants), losses)

    @cached_property
    def tokens(self) -> Tokens:
        """The tokens in float64: what everything but the loss is computed from."""
        return self.given.with_precision(torch.float64)

    @property
    def finite(self) -> bool:
        """Whether the gradient is a number everywhere."""
        return bool(self.grad.isfinite().all())

    @property
    def silent(self) -> Tensor:
        """The tokens without a gradient beyond rounding, (N,)."""
        return self.grad.norm(dim=-1) <= self.noise.rows

    def __getitem__(self, rows: Any) -> "Reading":
        """The chosen rows of it, not read anew."""
        some = {name: getattr(self, name)[rows] for name in ("given", "grad", "noise", "losses")}
        return replace(self, **some)

    def anew(self, variant: Variant, rows: Any) -> "Reading":
        """The chosen rows, read as a batch of their own."""
        few = self.given[rows]
        return replace(self[rows], grad=gradient(variant.loss, few).double())

    def weighted(self, weights: Float[Tensor, " N"]) -> "Reading":
        """Times a weight for every row."""
        size = weights.abs()
        noise = Noise(self.noise.rows * size, self.noise.sums * size)
        return replace(self, grad=self.grad * weights[:, None], noise=noise)

    def undone(self, grad: Float[Tensor, "N V"], tokens: Tokens | None = None) -> "Reading":
        """With something taken off the gradient, and the tokens as the rest of the loss sees them."""
        return replace(self, grad=grad, given=self.given if tokens is None else tokens)


def whole_where_needed(variant: Variant, tokens: Tokens | None) -> tuple[Variant, str]:
    """A loss, left as it is where its reduction cannot be found because it needs its batch; and why, "" where it can.

    Args:
        variant: the loss.
        tokens: where it is going to be read; None for the probes.
    """
    at = probes() if tokens is None else tokens
    if len(at) > FEW and not variant.compares_pairs:
        at = at[spread(len(at), FEW).to(at.logits.device)]
    try:
        gradient(variant.loss, fed(at, variant))
    except UnknownReduction as error:
        return unreduced.whole(variant), str(error).partition(" Return the")[0]
    except Exception:  # whatever else it raises, it raises again where it is read
        return variant, ""
    return variant, ""


def on_probes(variant: Variant) -> Reading:
    """A reading on the built-in probes in the loss's own precision; the logits are rounded to it, so that no cast changes them.

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
    sizes, tried = [VOCABULARY, WIDE], []
    while sizes:
        size = sizes.pop(0)
        tried.append(size)
        for dtype in (torch.float64, torch.float32):
            try:
                return Reading.of(variant, fed(probes(dtype, vocabulary=size), variant))
            except InputError as error:
                if error.__cause__ is None or isinstance(error.__cause__, SystemExit):  # refused, not tried
                    raise
                failed = failed or error
                if size in (VOCABULARY, WIDE):
                    sizes += [n for n in _sizes(first_line(error.__cause__), tried + sizes)][: NAMED - len(tried) + 1]
    assert failed is not None
    at = ", ".join(map(str, tried))
    raise InputError(
        f"{failed} (tried at vocabularies {at}; on tokens of your own: explain(loss, tokens))"
    ) from failed.__cause__


def on_trials(variant: Variant, shown: Reading, sizes: tuple[int, ...] = ()) -> Reading | str:
    """A reading on the wider trial tokens, at their own vocabulary or else at the one shown, or at the first of ``sizes``
    that works; or why there is none.
    """
    size = shown.given.logits.shape[1]
    dtype = torch.float64 if shown.given.logits.dtype == torch.float64 else torch.float32
    failed = ""
    for vocabulary in sizes or dict.fromkeys((WIDE, size) if size <= 2**12 else (WIDE,)):
        try:
            found = rounded_to_precision(
                variant, Reading.of(variant, fed(trials(dtype, vocabulary=vocabulary), variant))
            )
        except InputError as error:
            failed = failed or f"at V = {vocabulary} {str(error).partition(chr(10))[0][:140]}"
            continue
        if failed:
            failed = f"{failed}; what is said holds at V = {vocabulary}"
        kept = found.grad.isfinite().all(-1) & found.tokens.logits.isfinite().all(-1)
        if not bool(kept.any() and found.grad[kept].any()):
            failed = failed or f"at V = {vocabulary} the gradient is zero or not finite"
            continue
        return found
    return failed


def asked(variant: Variant) -> tuple[str, ...]:
    """The fields of Tokens that a loss asks for, weights among them where it takes them itself."""
    fn = variant.method.fn
    takes = calling.kind(fn) != "tokens" and calling.takes(fn, "weight") and "weight" not in variant.needs
    return (*variant.needs, *(("weight",) if takes else ()))


def models_taken(variant: Variant, tokens: Tokens) -> Tokens:
    """The tokens without other models that a loss of logits does not take: it cannot send probability there."""
    fn = variant.method.fn
    if calling.kind(fn) != "logits":
        return tokens
    wanted = inputs(fn)
    roles = [*wanted.required.values(), *wanted.optional.values()]
    taken = {name for name in MODELS for role in roles if name in role or FIELD.get(role) == name}
    left = {name: None for name in MODELS if name not in taken and getattr(tokens, name) is not None}
    return tokens.replace(**left) if left else tokens


def fed(tokens: Tokens, variant: Variant) -> Tokens:
    """Made-up tokens with weights, where the loss asks for them, in whole groups of texts."""
    if variant.derived:
        tokens = in_whole_groups(variant.method.fn, variant.params, tokens)
    if "weight" not in asked(variant):
        return tokens
    weights = torch.tensor([1.0, 0.5, 2.0, 0.25, 1.5, 3.0, 0.7], dtype=tokens.logits.dtype)
    return tokens.replace(weight=weights[torch.arange(len(tokens)) % 7].to(tokens.logits.device))


def on_own_tokens(variant: Variant, tokens: Tokens) -> Reading:
    """A reading of a user's tokens: all models' logits in float64, where the loss allows that and memory does."""
    if tokens.logits.numel() <= MOST and tokens.logits.dtype != torch.float64:
        try:
            return Reading.of(variant, tokens.with_precision(torch.float64))
        except InputError as error:
            if not isinstance(error.__cause__, RuntimeError):
                raise
    return Reading.of(variant, tokens.upcast())


def rounded_to_precision(variant: Variant, found: Reading) -> Reading:
    """The same on tokens whose logits the loss's own precision holds exactly."""
    if found.precision == torch.float64 or not found.finite:
        return found
    exact = found.given.with_precision(found.precision).with_precision(torch.float32)
    return Reading.of(variant, exact)


def _sizes(message: str, tried: list[int]) -> Iterator[int]:
    """Numbers in an error message that may be the vocabulary which a loss is made for."""
    for text in reversed(numbers_of(message)):
        if text and len(text) < 7 and 3 <= int(text) <= 300_000 and int(text) not in tried:
            yield int(text)
