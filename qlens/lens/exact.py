"""Exact: a loss computed in float64 whatever it casts to, so that what it teaches is read without its rounding."""

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
SHARE = 0.8  # of the tokens on which a loss and its float64 version must agree up to the loss's rounding
SLACK = 3.0  # times the rounding that is expected


@dataclass(frozen=True)
class OwnPrecision:
    """What the precision that a loss computes in makes of its gradient, beside the same loss in float64.

    Args:
        dtype: the coarsest type that it computes in.
        usual: the relative distance of the two gradients, median over tokens.
        largest: the largest.
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
        """The same variant in float64, its reduction left as it is where it is read whole."""
        made = cls(variant.method, variant.params)
        return whole(made) if isinstance(variant.unreduced, Whole) else made

    def arithmetic(self) -> contextlib.AbstractContextManager:
        """Within it, everything is computed as the loss is."""
        return float64()

    def loss(self, tokens: Tokens) -> Tensor:
        return _attached(super().loss, tokens)

    def total(self, tokens: Tokens) -> Tensor:
        return _attached(super().total, tokens)


@contextmanager
def float64() -> Iterator["_Float64"]:
    """Within it, torch computes every floating-point operation in float64, and casts to a coarser type do nothing."""
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
    """Values that depend on a leaf of their own, as values of the logits."""

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
    """Asks for float64 where Python code asks for a coarser type, so that constants are not rounded on the way."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if kwargs.get("dtype") in COARSER and func in (torch.tensor, torch.as_tensor, torch.asarray):
            kwargs = kwargs | {"dtype": torch.float64}
        return func(*args, **kwargs)


class _Float64(TorchDispatchMode):
    """Every operation in float64. What is random is drawn in its own type, and what is written in place keeps its type."""

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """Nothing is compiled here: without a wrapper for the compiler, whose import takes seconds."""
        return False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        aliases = any(given.alias_info is not None for given in (*func._schema.arguments, *func._schema.returns))
        if aliases:  # views and what is written in place
            return func(*args, **kwargs)
        args = tree_map(_wide, args)
        if torch.Tag.nondeterministic_seeded in func.tags:
            return tree_map(_wide, func(*args, **kwargs))
        kwargs = {name: _wide(value) for name, value in kwargs.items()}
        return tree_map(_wide, func(*args, **kwargs))


def _wide(value: Any) -> Any:
    """A floating-point tensor or type in float64; anything else as it is."""
    if isinstance(value, Tensor):
        return value.double() if value.dtype in COARSER else value
    return torch.float64 if value in COARSER else value


def read_exactly(variant: Variant, tokens: Tokens | None) -> tuple[Variant, Reading, OwnPrecision | None]:
    """A loss read on tokens, or on the probes: in float64 where its own gradient is that up to rounding.

    Returns:
        the variant to study, its reading, and what its own precision makes of the gradient; None where it is read as it is.
    """
    found = before_casts(variant) if tokens is None else on_own_tokens(variant, tokens)
    exact = _in_float64(variant, found)
    if exact is not None:
        return exact
    return variant, rounded_to_precision(variant, found) if tokens is None else found, None


def _in_float64(variant: Variant, found: Reading) -> tuple[Variant, Reading, OwnPrecision] | None:
    """The same reading without the rounding of the loss; None where it has none, or is another function without it."""
    if found.own == torch.float64 or not found.finite or not bool(found.grad.any()):
        return None
    if found.given.logits.numel() > MOST:
        return None
    exact = Exact.of(variant)
    try:
        read = Reading.of(exact, found.given.with_precision(torch.float64))
    except InputError:  # it insists on its own type; it is read in that
        return None
    if not read.finite:
        return None
    off, size = (found.grad - read.grad).norm(dim=-1), read.grad.norm(dim=-1)
    agree = off <= SLACK * found.noise.rows + TOLERANCE * size
    if float(agree.double().mean()) < SHARE:
        return None
    told = found.noise.rows.isfinite()  # moved by rounding, the loss may be no number
    distance = off / torch.where(told, size.maximum(found.noise.rows), size).clamp(min=1e-300)
    return exact, read, OwnPrecision(found.own, float(distance.median()), float(distance.max()))


def without_casts(variant: Variant, tokens: Tokens) -> Variant:
    """A loss computed in float64 where it casts to a coarser type, and is the same up to rounding; else the loss as it is."""
    if isinstance(variant, Exact):
        return variant
    exact = Exact.of(variant)
    try:
        _, arithmetic, constants = traced(variant.loss, tokens)
        own = coarser(arithmetic, constants)
        if own == torch.float64:
            return variant
        before, after = (gradient(one.loss, tokens).double() for one in (variant, exact))
    except Exception:  # whatever is wrong with the loss, its caller meets it too, and says it
        return variant
    alike = (before - after).norm() <= 100 * torch.finfo(own).eps * after.norm()
    return exact if bool(alike) else variant
