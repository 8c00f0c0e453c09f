"""Exact: a loss computed in float64 whatever it casts to, so that its gradient has no rounding of its own."""

import contextlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map

from qlens.core.autograd import gradient
from qlens.core.errors import InputError
from qlens.core.tokens import Tokens
from qlens.lens.reading import MOST, Reading, before_casts, on_own_tokens, rounded_to_precision
from qlens.lens.rounding import TOLERANCE, coarser, traced
from qlens.losses.reduction.unreduced import Whole, whole
from qlens.registry.variant import Variant

COARSER = (torch.float32, torch.bfloat16, torch.float16)
SHARE = 0.8  # share of tokens on which a loss and its float64 version must agree up to rounding
SLACK = 3.0  # factor on the expected rounding error


@dataclass(frozen=True)
class OwnPrecision:
    """The precision of a loss and the error of its gradient against the same loss in float64.

    Args:
        dtype: the coarsest type that it computes in.
        usual: relative error of the gradient, median over tokens.
        largest: the largest relative error.
    """

    dtype: torch.dtype
    usual: float
    largest: float


class Exact(Variant):
    """A variant whose loss is computed in float64: casts to a coarser type, and constants made in one, keep their digits.

    Its gradient has no rounding but float64's. Nothing else of the variant changes.
    """

    @classmethod
    def of(cls, variant: Variant) -> "Exact":
        """The same variant in float64."""
        exact = cls(variant.method, variant.params)
        return whole(exact) if isinstance(variant.unreduced, Whole) else exact

    def arithmetic(self) -> contextlib.AbstractContextManager:
        """A context in which everything is computed in float64."""
        return float64()

    def loss(self, tokens: Tokens) -> Tensor:
        return _attached(super().loss, tokens)

    def total(self, tokens: Tokens) -> Tensor:
        return _attached(super().total, tokens)


@contextmanager
def float64() -> Iterator["_Float64"]:
    """Context in which torch computes in float64, and casts to a coarser dtype have no effect."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        with _Python(), _Float64() as mode:
            yield mode
    finally:
        torch.set_default_dtype(before)


def _attached(loss: Callable[[Tokens], Tensor], tokens: Tokens) -> Tensor:
    """The loss computed in float64, with a graph whose backward pass is computed in float64 too."""
    if not (torch.is_grad_enabled() and tokens.logits.requires_grad):
        with float64():
            return loss(tokens)
    with float64():
        leaf = tokens.logits.detach().requires_grad_()
        values = loss(tokens.with_logits(leaf))
    return _Attach.apply(tokens.logits, leaf, values) if values.requires_grad else values


class _Attach(torch.autograd.Function):
    """Attach values computed from a separate leaf to the logits."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, leaf: Tensor, values: Tensor) -> Tensor:
        ctx.graph = leaf, values
        return values.detach()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        leaf, values = ctx.graph
        with float64():
            (grad,) = torch.autograd.grad(values, leaf, grads[0], retain_graph=True)
        return grad, None, None


class _Python(TorchFunctionMode):
    """Create tensors in float64 where code asks for a coarser dtype, so that constants are not rounded."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if kwargs.get("dtype") in COARSER and func in (torch.tensor, torch.as_tensor, torch.asarray):
            kwargs = kwargs | {"dtype": torch.float64}
        return func(*args, **kwargs)


class _Float64(TorchDispatchMode):
    """Every operation in float64, except in-place writes; random numbers are drawn in their own dtype."""

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """Skip the wrapper for torch.compile, whose import takes seconds; nothing is compiled in this mode."""
        return False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        aliases = any(value.alias_info is not None for value in (*func._schema.arguments, *func._schema.returns))
        if aliases:  # views and in-place writes
            return func(*args, **kwargs)
        args = tree_map(_wide, args)
        if torch.Tag.nondeterministic_seeded in func.tags:
            return tree_map(_wide, func(*args, **kwargs))
        kwargs = {name: _wide(value) for name, value in kwargs.items()}
        return tree_map(_wide, func(*args, **kwargs))


def _wide(value: Any) -> Any:
    """A floating-point tensor or dtype in float64; any other value unchanged."""
    if isinstance(value, Tensor):
        return value.double() if value.dtype in COARSER else value
    return torch.float64 if value in COARSER else value


def read_exactly(variant: Variant, tokens: Tokens | None) -> tuple[Variant, Reading, OwnPrecision | None]:
    """Read a loss on tokens or on the probes, in float64 where its own gradient agrees with that up to rounding.

    Returns:
        The variant to analyse, its reading, and its own precision; None for the last where it is read as it is.
    """
    reading = before_casts(variant) if tokens is None else on_own_tokens(variant, tokens)
    exact = _in_float64(variant, reading)
    if exact is not None:
        return exact
    return variant, rounded_to_precision(variant, reading) if tokens is None else reading, None


def _in_float64(variant: Variant, reading: Reading) -> tuple[Variant, Reading, OwnPrecision] | None:
    """The reading in float64; None where the loss computes in float64 itself, or has another gradient there."""
    if reading.own == torch.float64 or not reading.finite or not bool(reading.grad.any()):
        return None
    if reading.inputs.logits.numel() > MOST:
        return None
    exact = Exact.of(variant)
    try:
        exact_reading = Reading.of(exact, reading.inputs.with_precision(torch.float64))
    except InputError:  # it requires its own dtype
        return None
    if not exact_reading.finite:
        return None
    error, size = (reading.grad - exact_reading.grad).norm(dim=-1), exact_reading.grad.norm(dim=-1)
    agree = error <= SLACK * reading.noise.rows + TOLERANCE * size
    if float(agree.double().mean()) < SHARE:
        return None
    finite = reading.noise.rows.isfinite()  # at logits moved by rounding the loss may be NaN
    relative_error = error / torch.where(finite, size.maximum(reading.noise.rows), size).clamp(min=1e-300)
    return exact, exact_reading, OwnPrecision(reading.own, float(relative_error.median()), float(relative_error.max()))


def without_casts(variant: Variant, tokens: Tokens) -> Variant:
    """The loss in float64 where it casts to a coarser dtype and agrees with that up to rounding; else the loss itself."""
    if isinstance(variant, Exact):
        return variant
    exact = Exact.of(variant)
    try:
        _, arithmetic, constants = traced(variant.loss, tokens)
        own = coarser(arithmetic, constants)
        if own == torch.float64:
            return variant
        before, after = (gradient(one.loss, tokens).double() for one in (variant, exact))
    except Exception:  # the caller meets and reports the same error
        return variant
    alike = (before - after).norm() <= 100 * torch.finfo(own).eps * after.norm()
    return exact if bool(alike) else variant
