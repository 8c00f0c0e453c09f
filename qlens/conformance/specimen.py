"""Specimen: a loss under test, called as its caller would call it, on rows or on batches of texts."""

import inspect
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn

from qlens.batching import IGNORE
from qlens.calling import Layout, call, kind, on_batch, signature
from qlens.calling import written as writes
from qlens.conformance.texts import VOCABULARY, Text, cast, texts
from qlens.conformance.wrapping import Around, as_it_is, watching
from qlens.errors import InputError
from qlens.guards import blamed
from qlens.layouts import Style, token_ids
from qlens.lens import COARSE, carried
from qlens.results import loss_of
from qlens.styles import style_of
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
        groups = [name for name in ("pair", "sequence") if name in variant.needs]
        self.scope = groups[0] if groups and variant.scope == "token" else variant.scope

    @property
    def style(self) -> Style:
        """How it is called."""
        return style_of(self.fn, self.params, self.tokens())

    @property
    def laid_out(self) -> bool:
        """Whether it sees batches of texts, (B, T)."""
        return self.style.laid_out

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
            made = loss_of(self._call(shown, around), self.variant.spec).value
            return Reading(*_derived(made, leaf), 0.0, tuple(made.shape))

    def value(self, tokens: Tokens) -> Tensor:
        """The sum of what it returns for these rows, without a gradient."""
        with torch.no_grad():
            return loss_of(self._call(tokens), self.variant.spec).value.sum()

    def _call(self, tokens: Tokens, around: Around = as_it_is) -> Any:
        """As in training: told the count, which ``call`` gives only to losses that insist."""
        told = signature(self.fn).get(COUNT)
        optional = self.laid_out and self.counted and (told is None or told.default is not told.empty)
        given = {COUNT: torch.tensor(len(tokens))} if optional else {}
        return call(around(self.fn), self.params | given, tokens, Layout(), style=self.style)

    def read_batch(
        self,
        texts: Sequence[Text],
        count: int | None,
        side: str = "right",
        columns: int = 0,
        around: Around = as_it_is,
        attended: bool = False,
    ) -> Reading:
        """One call on texts padded to one width and ``columns`` more; ``count`` goes to losses that can be told it.

        The attention mask is 1 on all of a text; a loss that takes its labels from input_ids knows supervised labels by it
        alone, so that it is 0 on all others, unless the whole text is ``attended``.

        Raises:
            InputError: it returns no floating-point tensor, or one without a graph.
        """
        width = max(len(text.labels) for text in texts) + columns
        draw = torch.Generator().manual_seed(width)
        table = torch.randn(len(texts), width, VOCABULARY, generator=draw, dtype=torch.float64).to(self.dtype)
        labels = torch.full((len(texts), width), IGNORE)
        real = torch.zeros_like(labels, dtype=torch.bool)
        ids = torch.zeros_like(labels)
        for row, text in enumerate(texts):
            start = 0 if side == "right" else width - len(text.labels)
            at = slice(start, start + len(text.labels))
            table[row, at], labels[row, at], real[row, at] = text.logits, text.labels, True
            ids[row, at] = token_ids((1000 * text.logits.double().abs().sum(-1)).long(), VOCABULARY)  # a text's own
        rows = Tokens(
            **{name: torch.cat([t.tokens.fields()[name] for t in texts]) for name in texts[0].tokens.fields()}
        )
        given: dict[str, Any] = {}
        if self.counted and count is not None:
            given[COUNT] = torch.tensor(count)
        elif COUNT in signature(self.fn):
            given[COUNT] = None
        with torch.enable_grad():
            leaf = table.requires_grad_()
            wrapped = around(self.fn)
            seen = labels != IGNORE if self.style.ids and not attended else real
            made = on_batch(wrapped, leaf.clone(), labels, rows, self.params, self.style, seen.long(), ids, **given)
            made = loss_of(made, self.variant.spec).value
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
        except InputError as error:  # a loss with float32 inside may refuse float64
            if not isinstance(error.__cause__, RuntimeError):
                raise
            made = Specimen(variant, torch.float32)
            ordinary = made.read(made.tokens(), around=watching(written))
    except InputError as error:
        names = ", ".join(dict.fromkeys(_written(variant, written)))
        why = f" (it writes in place on {names})" if names else ""
        raise InputError(f"{variant.spec} cannot be checked{why}: {error}") from error
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


def _written(variant: Variant, seen: list[str]) -> list[str]:
    """What a loss that fails writes on: as seen in a call, or in one on plain rows."""
    if seen:
        return seen
    try:
        return list(writes(variant.method.fn, variant.params, Specimen(variant).tokens(), Style()))
    except InputError:
        return []


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
    with blamed("its backward pass"):
        (grad,) = torch.autograd.grad(made.sum(), leaf, allow_unused=True)
    return made.detach().sum(), torch.zeros_like(leaf) if grad is None else grad
