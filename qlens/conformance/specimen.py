"""Specimen: a loss under test, called as its caller would call it, on rows or on batches of texts."""

import inspect
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn

from qlens.batching import IGNORE
from qlens.calling import LAID_OUT, Layout, call, extra_inputs, kind, on_batch, signature
from qlens.conformance.texts import VOCABULARY, Text, cast, texts
from qlens.conformance.wrapping import Around, as_it_is, watching
from qlens.errors import InputError
from qlens.lens import COARSE, carried
from qlens.tokens import Tokens
from qlens.trial_tokens import random_tokens
from qlens.variant import Variant

ROWS = 24
TOLERANCE = 1e-5  # of the largest gradient: losses may compute in float32, and mistakes are far larger
COARSE_TOLERANCE = 0.05  # in bfloat16, whose steps are 2^-8: about a dozen roundings
COUNT = "num_items_in_batch"


class Reading(NamedTuple):
    """What a call gave: the value summed, its gradient by row, the largest one on padding, the shape returned."""

    value: Tensor
    grad: Float[Tensor, "K V"]
    outside: float
    shape: tuple[int, ...]


class Specimen:
    """A loss under test.

    Args:
        variant: the loss; a method with a target of its own is read through ``variant.loss``, any other as it was written.
        dtype: what it is read in where nothing else is asked.

    Raises:
        InputError: a function of tokens that fails on the built-in probes.
    """

    def __init__(self, variant: Variant, dtype: torch.dtype = torch.float64):
        self.variant, self.dtype, self.tolerance = variant, dtype, TOLERANCE
        self.fn, self.params = (variant.method.fn, variant.params) if variant.derived else (variant.loss, {})
        self.kind = kind(self.fn)
        self.laid_out = self.kind in LAID_OUT
        groups = [name for name in ("pair", "sequence") if name in variant.needs]
        self.scope = groups[0] if groups and variant.scope == "token" else variant.scope

    @property
    def counted(self) -> bool:
        """Whether it can be told the number of predicted labels of the whole batch."""
        given = inspect.signature(self.fn.forward if isinstance(self.fn, nn.Module) else self.fn).parameters
        return COUNT in given or any(p.kind is p.VAR_KEYWORD for p in given.values())

    def tokens(self) -> Tokens:
        """Ordinary rows, every field filled."""
        return cast(random_tokens(ROWS, VOCABULARY), self.dtype)

    def texts(self, lengths: Sequence[int], prompts: Sequence[int] = (3,)) -> list[Text]:
        """Texts that predict ``lengths`` labels each, after prompts of the given lengths, in turn."""
        return texts(lengths, prompts, self.dtype)

    def read(self, tokens: Tokens, around: Around = as_it_is) -> Reading:
        """One call on rows, (N, V), in the layout that the loss wants; ``around`` wraps the function called.

        Raises:
            InputError: it returns no floating-point tensor, or one without a graph.
        """
        with torch.enable_grad():
            leaf = tokens.logits.detach().clone().requires_grad_()
            shown = tokens.replace(logits=leaf.clone())  # no leaf, so that a loss may write on it and be found out
            made = self._call(shown, around)
            return Reading(*_derived(made, leaf), 0.0, tuple(made.shape))

    def value(self, tokens: Tokens) -> Tensor:
        """The sum of what it returns for these rows, without a gradient."""
        with torch.no_grad():
            return self._call(tokens).sum()

    def _call(self, tokens: Tokens, around: Around = as_it_is) -> Any:
        """As in training: told the count, which ``call`` gives only to losses that insist."""
        told = signature(self.fn).get(COUNT)
        optional = self.laid_out and self.counted and (told is None or told.default is not told.empty)
        given = {COUNT: torch.tensor(len(tokens))} if optional else {}
        return call(around(self.fn), self.params | given, tokens, Layout())

    def read_batch(
        self,
        texts: Sequence[Text],
        count: int | None,
        side: str = "right",
        columns: int = 0,
        around: Around = as_it_is,
    ) -> Reading:
        """One call on texts padded to one width and ``columns`` more; ``count`` goes to losses that can be told it.

        Raises:
            InputError: it returns no floating-point tensor, or one without a graph.
        """
        width = max(len(text.labels) for text in texts) + columns
        draw = torch.Generator().manual_seed(width)
        table = torch.randn(len(texts), width, VOCABULARY, generator=draw, dtype=torch.float64).to(self.dtype)
        labels = torch.full((len(texts), width), IGNORE)
        real = torch.zeros_like(labels, dtype=torch.bool)
        for row, text in enumerate(texts):
            start = 0 if side == "right" else width - len(text.labels)
            at = slice(start, start + len(text.labels))
            table[row, at], labels[row, at], real[row, at] = text.logits, text.labels, True
        fields = {name: torch.cat([getattr(t.tokens, name) for t in texts]) for name in extra_inputs(self.fn)}
        if self.counted and count is not None:
            fields[COUNT] = torch.tensor(count)
        elif COUNT in signature(self.fn):
            fields[COUNT] = None
        with torch.enable_grad():
            leaf = table.requires_grad_()
            made = on_batch(around(self.fn), leaf.clone(), labels, **fields, **self.params)
            value, grad = _derived(made, leaf)
        outside = float(grad[~real].abs().max()) if bool((~real).any()) else 0.0
        return Reading(value, grad[real], outside, tuple(made.shape))


def specimen(variant: Variant) -> Specimen:
    """The loss, called once on ordinary rows to see that there is something to test; float32 where it refuses float64.

    Raises:
        InputError: it cannot be called, writes on what it needs, has no gradient, or is NaN, infinite or flat.
    """
    written: list[str] = []
    try:
        made = Specimen(variant)
        try:
            ordinary = made.read(made.tokens(), around=watching(written))
        except RuntimeError:  # a loss with float32 inside may refuse float64
            made = Specimen(variant, torch.float32)
            ordinary = made.read(made.tokens(), around=watching(written))
    except InputError as error:
        raise InputError(f"{variant.spec} cannot be checked: {error}") from error
    except Exception as error:  # anything at all may go wrong inside a user's loss
        why = f" (it writes in place on {', '.join(dict.fromkeys(written))})" if written else ""
        raise InputError(
            f"{variant.spec} fails on ordinary input{why}: {type(error).__name__}: {first_line(error)}"
        ) from error
    for what, values in (("value", ordinary.value), ("gradient", ordinary.grad)):
        if not bool(values.isfinite().all()):
            raise InputError(
                f"{variant.spec}: its {what} is NaN or infinite on ordinary logits: nothing can be checked"
            )
    if not bool(ordinary.grad.any()):
        raise InputError(f"{variant.spec}: its gradient is zero on ordinary logits: there is nothing to check")
    if carried(ordinary.grad) in COARSE:
        made.tolerance = COARSE_TOLERANCE
    return made


def first_line(error: Exception) -> str:
    """What an exception says, in one line."""
    return next(iter(str(error).strip().splitlines()), "(no message)")


def _derived(made: Any, leaf: Tensor) -> tuple[Tensor, Tensor]:
    """The value, and its gradient by the logits.

    Raises:
        InputError: there is none.
    """
    if not isinstance(made, Tensor) or not made.is_floating_point():
        raise InputError(f"it returns {type(made).__name__}, where a floating-point tensor is wanted")
    if not made.requires_grad:
        raise InputError("it returns a value without a graph: no gradient leads back to the logits")
    (grad,) = torch.autograd.grad(made.sum(), leaf, allow_unused=True)
    return made.detach().sum(), torch.zeros_like(leaf) if grad is None else grad
