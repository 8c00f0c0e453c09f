"""Specimen: a loss under test and its calls, on rows or on batches of texts."""

import copy
import inspect
from collections.abc import Callable, Sequence
from functools import cached_property
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn

from qlens.conformance.synthetic_batches import PROMPTS, UNEQUAL, VOCABULARY, WIDE, Text, cast, cut, pad, texts
from qlens.conformance.wrappers import Around, as_it_is
from qlens.core.errors import InputError
from qlens.core.probes.trial_tokens import random_tokens
from qlens.core.tokens import Tokens
from qlens.losses import graphs
from qlens.losses.calling import Layout, call, on_batch
from qlens.losses.layout.layout_search import style_of
from qlens.losses.layout.layouts import Style
from qlens.losses.layout.names import FIELD, ROLE
from qlens.losses.layout.pairing import given_as_sums
from qlens.losses.layout.signature import Inputs, inputs
from qlens.losses.layout.trial import value_of
from qlens.losses.return_values import check_shape, loss_of
from qlens.losses.user_code import file_of, user_errors
from qlens.registry.variant import Variant

ROWS = 24  # of an ordinary call
PER_TEXT = 4  # rows of a text, where rows are given to a loss of batches
TOLERANCE = 1e-5  # share of the largest gradient: losses may compute in float32, and mistakes are far larger
COARSE_TOLERANCE = 0.05  # in bfloat16, whose steps are 2^-8: about a dozen roundings
COUNT = "num_items_in_batch"


class IncompleteGroup(InputError):
    """A batch whose number of texts is no multiple of the groups that a loss takes."""


class Reading(NamedTuple):
    """A call: the sum of the value, its gradient (K, V), the largest gradient on padding, the shape returned, and whether the
    value had a graph."""

    value: Tensor
    grad: Float[Tensor, "K V"]
    outside: float
    shape: tuple[int, ...]
    graph: bool = True


class Specimen:
    """A loss under test.

    Args:
        variant: the loss; a method with a target of its own is called through ``variant.loss``, any other as it is written.
        dtype: of the logits, unless a rule asks for another.
        vocabulary: number of columns of the logits.

    Attributes:
        tolerance: share of the largest gradient that counts as rounding.
        digits: the dtype that it computes in, by the digits of its gradient.
        prompts: whether texts begin with a prompt labelled -100.

    Raises:
        InputError: a function of tokens that fails on the built-in probes.
    """

    def __init__(self, variant: Variant, dtype: torch.dtype = torch.float64, vocabulary: int = VOCABULARY):
        self.variant, self.dtype, self.vocabulary = variant, dtype, vocabulary
        self.tolerance, self.digits = TOLERANCE, dtype
        self.fn, self.params = (variant.method.fn, variant.params) if variant.derived else (variant.loss, {})
        self.takes: Inputs = inputs(self.fn)
        self.kind = self.takes.kind
        groups = ["pair"] if variant.compares_pairs else [] if "sequence" not in variant.needs else ["sequence"]
        self.declared = groups[0] if groups and variant.scope == "token" else variant.scope
        self.prompts = True
        self._cache: dict[tuple, Any] = {}

    @cached_property
    def style(self) -> Style:
        """The layout in which it is called."""
        return style_of(self.fn, self.params, self.tokens())

    @property
    def laid_out(self) -> bool:
        """Whether it sees batches of texts, (B, T)."""
        return self.style.laid_out

    @property
    def group(self) -> int:
        """Number of texts that every batch has to hold a multiple of."""
        return self.style.group

    @property
    def labels_from_ids(self) -> bool:
        """Whether it reads its labels from ``input_ids``, and never looks at ``labels``."""
        label_names = [name for name, role in self.takes.required.items() if role == "labels"]
        return self.style.ids or (self.style.clean and any(ROLE.get(name) == "input ids" for name in label_names))

    @cached_property
    def roles(self) -> dict[str, str]:
        """The role of every parameter that is filled."""
        return self.takes.required | self.takes.optional

    @cached_property
    def fields(self) -> tuple[str, ...]:
        """The fields of Tokens that its inputs are made from, besides logits and labels."""
        if not self.variant.derived or self.kind == "tokens":
            return tuple(self.variant.needs)
        return tuple(dict.fromkeys(FIELD[role] for role in self.roles.values() if role in FIELD))

    @property
    def count(self) -> str:
        """The parameter for the number of predicted labels of the whole batch; "" if there is none."""
        return next((name for name, role in self.roles.items() if role == "count"), "")

    @property
    def attends(self) -> bool:
        """Whether it takes an attention mask, by which it may select tokens instead of by labels."""
        return self.laid_out and "attention mask" in self.roles.values()

    def without_prompts(self) -> "Specimen":
        """The same loss, on texts of which every token is learned."""
        other = copy.copy(self)
        other.prompts, other._cache = False, {}
        return other

    def with_vocabulary(self, vocabulary: int) -> "Specimen":
        """The same loss, on logits of another width."""
        other = Specimen(self.variant, self.dtype, vocabulary)
        other.tolerance, other.digits, other.prompts = self.tolerance, self.digits, self.prompts
        return other

    @property
    def nothing(self) -> float:
        """Share of the largest gradient up to which an entry counts as zero."""
        return min(max(1e-12, 8 * torch.finfo(self.digits).eps), 1e-3)

    @cached_property
    def counted(self) -> bool:
        """Whether it takes the number of predicted labels of the whole batch."""
        if self.count:
            return True
        parameters = inspect.signature(self.fn.forward if isinstance(self.fn, nn.Module) else self.fn).parameters
        return self.kind in ("outputs", "model") and any(p.kind is p.VAR_KEYWORD for p in parameters.values())

    @cached_property
    def scope(self) -> str:
        """What a token's gradient depends on: as declared, or found by changing logits and labels of batches."""
        if self.declared != "token" or not self.laid_out:
            return self.declared
        from qlens.conformance.rules.coupling import coupling

        return coupling(self)

    def tokens(self, rows: int = ROWS) -> Tokens:
        """Ordinary rows with every field."""
        return self.cached(
            ("rows", rows), lambda: self._weighted(cast(random_tokens(rows, self.vocabulary), self.dtype))
        )

    def texts(self, lengths: Sequence[int], prompts: Sequence[int] = (3,)) -> list[Text]:
        """Texts that predict ``lengths`` labels each, after prompts of the given lengths, in turn; whole groups of texts.

        A third of these lengths at wide vocabularies. Without prompts all of a text but its first token is learned, as always
        for a loss that reads its labels from ``input_ids``.
        """
        if self.vocabulary > WIDE:
            lengths, prompts = ([-(-n // 3) for n in each] for each in (lengths, prompts))
        if self.labels_from_ids or not self.prompts:
            lengths = [n + prompts[i % len(prompts)] - 1 for i, n in enumerate(lengths)]
            prompts = (1,)
        lengths = [lengths[i % len(lengths)] for i in range(-(-len(lengths) // self.group) * self.group)]
        key = ("texts", tuple(lengths), tuple(prompts))
        return self.cached(
            key,
            lambda: [
                text._replace(tokens=self._weighted(text.tokens))
                for text in texts(lengths, prompts, self.dtype, self.vocabulary)
            ],
        )

    def _weighted(self, tokens: Tokens) -> Tokens:
        """The tokens with weights, where the loss takes weights itself."""
        if "weight" not in self.roles.values():
            return tokens
        ramp = torch.linspace(0.5, 1.5, len(tokens), dtype=torch.float64) if len(tokens) > 1 else torch.ones(1)
        return tokens.replace(weight=ramp.to(tokens.logits.dtype))

    def cached(self, key: tuple, make: Callable[[], Any]) -> Any:
        """A cached value: random logits of a wide vocabulary take longer than the loss."""
        if key not in self._cache:
            self._cache[key] = make()
        return self._cache[key]

    def unequal(self) -> list[Text]:
        """Eight texts of unequal lengths."""
        return self.texts(UNEQUAL, PROMPTS)

    def read(self, tokens: Tokens, around: Around = as_it_is, per_text: int = PER_TEXT) -> Reading:
        """One call on rows, (N, V), in the layout of the loss; ``around`` wraps the function called.

        A loss of batches gets them as texts of ``per_text`` rows, with their count.

        Raises:
            InputError: it returns no floating-point tensor, or one without a graph.
        """
        if self.laid_out:
            shown = self.in_groups(tokens, per_text)
            reading = self.read_batch(shown, sum(len(text.tokens) for text in shown), around=around)
            rows = torch.cat([torch.arange(len(text.labels)) < len(text.labels) - 1 for text in shown])
            return reading._replace(grad=reading.grad[rows][: len(tokens)])
        with torch.enable_grad():
            leaf = tokens.logits.detach().clone().requires_grad_()
            shown = _copy(tokens, leaf.clone())  # no leaf, so that a loss can modify it, which is detected

            def run() -> Any:
                return call(around(self.fn), self.params, shown, Layout(), style=self.style)

            reading = self.reading(run(), leaf, run)
        if self.variant.derived and not given_as_sums(self.fn):
            check_shape(torch.empty(reading.shape, device="meta"), len(tokens), self.variant.spec)
        return reading

    def in_groups(self, tokens: Tokens, per_text: int) -> list[Text]:
        """The rows as texts of at most ``per_text`` rows; further texts of the same rows make up the last group."""
        lengths = range(per_text, 0, -1)
        whole = (n for n in lengths if -(-len(tokens) // n) % self.group == 0)
        length = next(whole, per_text)
        texts = cut(tokens, length)
        if missing := -len(texts) % self.group:
            texts += cut(tokens[torch.arange(missing * length) % len(tokens)], length)
        return texts

    def value(self, tokens: Tokens) -> Tensor:
        """The sum of its values for these rows."""
        if self.laid_out:
            return self.read(tokens).value
        return value_of(self.fn, self.params, tokens, self.style).sum()

    def _graded(self, returned: Any, call_again: Callable[[], Any], logits: Tensor) -> tuple[Tensor, bool]:
        """The loss in what a call on these logits returned, with a graph, and whether it had one itself."""
        result = loss_of(returned, self.variant.spec)
        return graphs.checked(result, self.variant.spec, call_again, logits).value, result.value.requires_grad

    def reading(self, returned: Any, leaf: Tensor, call_again: Callable[[], Any] | None = None) -> Reading:
        """The value that a call returned, and its gradient by the logits; ``call_again`` repeats the call.

        Raises:
            InputError: it is no floating-point tensor, or one other than zero without a graph.
        """
        losses, graph = self._graded(returned, call_again or (lambda: returned), leaf)
        return Reading(*self._derived(losses, leaf), 0.0, tuple(losses.shape), graph)

    def _derived(self, losses: Tensor, leaf: Tensor) -> tuple[Tensor, Tensor]:
        """The value, and its gradient by the logits.

        Raises:
            InputError: the backward pass raises.
        """
        with user_errors(self.variant.spec, file_of(self.fn)):
            (grad,) = torch.autograd.grad(losses.sum(), leaf, allow_unused=True)
        if grad is None:
            raise InputError("it returns a value whose graph does not lead back to the logits")
        return losses.detach().sum(), grad

    def read_batch(
        self,
        texts: Sequence[Text],
        count: int | None,
        side: str = "right",
        columns: int = 0,
        around: Around = as_it_is,
        attended: bool = True,
    ) -> Reading:
        """One call on texts padded to one width and ``columns`` more; ``count`` goes to losses that take it.

        The attention mask is 1 on texts if they are ``attended``, and 0 on padding.

        Raises:
            InputError: it returns no floating-point tensor, or one without a graph.
        """
        if len(texts) % self.group:
            raise IncompleteGroup(f"it takes texts in groups of {self.group}, and is tried on {len(texts)}")
        padded = pad(texts, side, columns, self.vocabulary)
        name = self.count or COUNT
        count_argument = {}
        if self.counted and count is not None:
            count_argument[name] = torch.tensor(count)
        elif self.count:
            count_argument[name] = None
        real = padded.real
        with torch.enable_grad():
            leaf = padded.logits.requires_grad_()
            mask = real.long() * attended
            logits = leaf.clone()

            def run() -> Any:
                fn, rows = around(self.fn), padded.rows
                return on_batch(
                    fn, logits, padded.labels, rows, self.params, self.style, mask, padded.ids, **count_argument
                )

            losses, graph = self._graded(run(), run, logits)
            value, grad = self._derived(losses, leaf)
        padding = ~real
        if self.labels_from_ids:  # the position before a text's first token learns it
            padding[:, :-1] &= ~real[:, 1:]
        outside = float(grad[padding].abs().max()) if bool(padding.any()) else 0.0
        return Reading(value, grad[real], outside, tuple(losses.shape), graph)


def _copy(tokens: Tokens, logits: Tensor) -> Tokens:
    """The tokens with these logits, every other field a copy that a loss may modify."""
    fields = {name: value.clone() for name, value in tokens.fields().items() if name != "logits"}
    return Tokens(logits=logits, **fields)
