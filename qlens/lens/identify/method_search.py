"""Method search: the registered methods that have the gradient of a loss, nearest first."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from qlens.core.numerics import spread
from qlens.lens.decompose.mixture import Mixture
from qlens.lens.decompose.vocabulary_factors import EQUAL, VocabularyFactor
from qlens.lens.identify import matching, parameter_search
from qlens.lens.identify.batch_factors import BatchFactor, on_other_batches
from qlens.lens.identify.near_identity import NearMatch, gate, near_match
from qlens.lens.identify.other_batches import BatchReading, read_other_batches
from qlens.lens.identify.two_terms import TwoTerms, two_terms
from qlens.lens.reading import Reading, on_trials
from qlens.lens.rounding import TOLERANCE
from qlens.lens.weights.weight_law import Law
from qlens.registry import Variant, get, methods, params

COMPARED = 400_000  # entries of the logits on which methods are compared; of more tokens, some are taken
FITTED = 28  # tokens on which parameters are fitted
LIKELY = 8  # nearest methods tried as near matches, besides all methods at their defaults
HALF = 0.5  # share of tokens with a method's gradient from which on its parameters are fitted on all tokens
REFINED = 3  # methods fitted so
FACTOR = 1e-3  # relative difference of two factors that count as equal
SMALL_VOCABULARY = 2**12  # up to which the trial tokens are also read at the vocabulary shown


@dataclass(frozen=True)
class Identification:
    """The outcome of a search: methods nearest first, the method on most tokens, the method times a factor of the batch."""

    nearest: list[matching.Match]
    near_match: NearMatch | None = None
    batch_factor: BatchFactor | None = None


class MethodSearch:
    """The search for registered methods, on the tokens shown and on the trial tokens.

    Args:
        variant: the loss.
        own_spec: its spec if it is registered, which is not compared with itself; else "".
        shown: its gradient on the tokens shown.

    Attributes:
        trial: its gradient on the trial tokens, where it takes them.
        numbers: values that a threshold of the loss may have.
        vocabulary_factors: methods that have the gradient up to a factor of the vocabulary's size.
        two_terms: the two terms that add up to the loss, where no one method is it.
        fields: fields of Tokens that the loss takes; methods that need another are not fitted. None: unknown.
    """

    def __init__(self, variant: Variant, own_spec: str, shown: Reading):
        self.variant, self.own_spec, self.shown = variant, own_spec, shown
        self.trial: Reading | None = None
        self.numbers: tuple[float, ...] = ()
        self.vocabulary_factors: list[VocabularyFactor] = []
        self.two_terms: TwoTerms | None = None
        self.fields: frozenset[str] | None = None
        self._same_size: Reading | str | None = None  # the trial tokens at the vocabulary shown

    @cached_property
    def other_batches(self) -> list[BatchReading]:
        """The gradient on other batches, read once."""
        return read_other_batches(self.variant, self.shown, self.trial)

    def identify(
        self, reading: Reading, trial: Reading | None, changed: bool, per_token: bool, unknown: bool
    ) -> Identification:
        """The registered methods, nearest first.

        Args:
            reading: the gradient on the tokens shown, raw logits and weights removed.
            trial: the same on the trial tokens.
            changed: whether raw logits or weights were removed.
            per_token: whether a token's gradient depends on that token alone.
            unknown: whether raw logits or label ids count in an unknown way, so that no parameters are searched.
        """
        base = reading if trial is None else trial
        some = self.thinned(base, COMPARED, changed)
        few = self.few(some, changed)
        matches = matching.nearest(few.grad, few.tokens, self.own_spec, few.noise, every=True)
        near, partial = self.on_all(matches, some), None
        further = None if trial is None else self.thinned(reading, COMPARED, changed)
        settled = bool(self.own_spec) or _same(near)
        if per_token and not settled:
            likely = [match.spec for match in near[:LIKELY]] + list(methods())
            partial = near_match(some, self.variant.loss, list(dict.fromkeys(likely)), further)
            likely = ([partial.spec] if partial is not None else []) + [m.spec for m in near if m.share > HALF]
            if not unknown and (exact_match := self.refined(likely, some)):
                return Identification(self.settled([exact_match, *near], reading, trial, changed, per_token))
        if not (unknown or settled or (partial is not None and partial.exact)):
            fits, close = parameter_search.search_with_near(
                few.grad, few.tokens, params.parse(self.own_spec)[0], noise=few.noise, fields=self.fields
            )
            near = matching.simplest([*self.on_all(fits, some), *near])
            # a few tokens determine a threshold only roughly: it is fitted again on all of them
            specs = [fit.spec for fit in fits]
            if per_token and fits and not _same(near) and (exact_match := self.refined(specs, some)):
                near = [exact_match, *near]
            close = specs + close
            if per_token and close and not _same(near):
                partial = near_match(some, self.variant.loss, close, further) or partial
        near = self.settled(near, reading, trial, changed, per_token)
        factor = None
        if not (per_token or self.own_spec or changed):
            near, factor = on_other_batches(near, self.variant, reading, trial, self.other_batches)
        matched = _same(near)
        skip_sums = unknown or self.own_spec or factor or (matched and not near[0].odd)
        if not skip_sums and (per_token or further is not None):
            self.two_terms = two_terms(few, [some] if further is None else [some, further])
            if matched and self.two_terms is not None and self.two_terms.odd:
                self.two_terms = None
        if matched or self.two_terms is not None or (partial is not None and not partial.conclusive):
            partial = None
        return Identification(near, partial, factor)

    def possible(self, spec: str) -> bool:
        """Whether a method needs only fields that the loss takes."""
        return self.fields is None or set(get(spec).needs) <= self.fields

    def refined(self, specs: Sequence[str], some: Reading) -> matching.Match | None:
        """The first of some methods that has the gradient on all tokens once its parameters are fitted on them, or None."""
        matches = (
            parameter_search.refined(spec, some.grad, some.tokens, some.noise, self.numbers)
            for spec in list(dict.fromkeys(filter(self.possible, specs)))[:REFINED]
        )
        return next((match for match in matches if match is not None), None)

    def settled(
        self, near: list[matching.Match], reading: Reading, trial: Reading | None, changed: bool, per_token: bool
    ) -> list[matching.Match]:
        """The matches found on the trial tokens, compared again on the tokens shown."""
        return matching.ranked(near) if trial is None else self.confirmed(near, reading, changed, per_token)

    def gated(
        self,
        reading: Reading,
        trial: Reading | None,
        mixture: Mixture,
        laws: Mapping[str, Law | None],
        partial: NearMatch | None,
    ) -> NearMatch | None:
        """The method that equals the loss where its only weight function holds, with no gradient elsewhere; else ``partial``."""
        base, law = reading if trial is None else trial, laws.get("the label")
        if self.own_spec or set(mixture.parts) != {"the label"} or law is None or not law.where:
            return partial
        return gate(base, self.variant.loss, law)

    def on_all(self, near: list[matching.Match], some: Reading) -> list[matching.Match]:
        """Matches on a few tokens, compared on all tokens: the simplest of every method, and those that agree on some."""
        simplest = {match.spec for match in matching.simplest(near)}
        likely = [match.spec for match in near if match.share > HALF / 2 or match.spec in simplest]
        grads = (
            (spec, other) for spec in likely if (other := matching.method_gradient(get(spec), some.tokens)) is not None
        )
        return matching.simplest(matching.compare(grads, some.grad, some.noise))

    def few(self, some: Reading, changed: bool) -> Reading:
        """A few dozen tokens on which parameters are fitted, without extreme p_y where tokens are independent."""
        order = torch.randperm(len(some.inputs), generator=torch.Generator().manual_seed(0)).to(
            some.inputs.logits.device
        )
        middle = _moderate(some)
        if changed and int(middle.sum()) >= FITTED:
            return some[order[middle[order]][:FITTED].sort().values]
        rows = order[: 2 * FITTED].sort().values
        return some[rows] if changed else self.reread(some, rows)

    def reread(self, some: Reading, rows: Tensor) -> Reading:
        """Some rows read as a batch of their own; without extreme p_y where their gradient does not depend on the batch."""
        few = some.reread(self.variant, rows)
        distance = (few.grad - some.grad[rows]).norm(dim=-1)
        if bool((distance <= TOLERANCE * few.grad.norm(dim=-1) + 4 * few.noise.rows).all()):
            middle = _moderate(few)
            return few[middle.nonzero()[:FITTED, 0]] if int(middle.sum()) >= FITTED // 2 else few
        return few

    def thinned(self, at: Reading, most: int, changed: bool) -> Reading:
        """Fewer tokens where their logits have more than ``most`` entries; read again unless logits or weights were removed."""
        if at.grad.numel() <= most:
            return at
        rows = spread(len(at.inputs), max(8, most // at.grad.shape[1])).to(at.inputs.logits.device)
        return at[rows] if changed else at.reread(self.variant, rows)

    def confirmed(
        self, near: list[matching.Match], reading: Reading, changed: bool, per_token: bool
    ) -> list[matching.Match]:
        """Methods that have the gradient on the trial tokens, compared on the tokens shown.

        The factor is that of the tokens shown; where tokens are independent it must be the same on both.
        """
        some = self.thinned(reading, COMPARED, changed)
        equal = FACTOR + 2 * torch.finfo(reading.precision).eps  # factors read in half precision have three digits
        confirmed = []
        for match in near:
            here = matching.at(get(match.spec), some.grad, some.tokens, some.noise) if match.same else match
            if here is None:
                continue
            same = match.same and here.same and per_token
            if same and abs(here.factor - match.factor) > equal * abs(match.factor):
                if (factor := self.vocabulary_factor(here, match.factor)) is not None:
                    self.vocabulary_factors.append(factor)
                here = replace(here, relation=matching.RELATIONS[2])
            confirmed.append(here)
        return matching.ranked(confirmed)

    def vocabulary_factor(self, here: matching.Match, wide: float) -> VocabularyFactor | None:
        """A method's factors on the tokens shown and on the trial tokens, where their vocabularies explain them; else None."""
        assert self.trial is not None
        sizes = [at.inputs.logits.shape[1] for at in (self.shown, self.trial)]
        if sizes[0] == sizes[1]:
            return None
        if self._same_size is None:
            small = sizes[0] <= SMALL_VOCABULARY
            self._same_size = on_trials(self.variant, self.shown, (sizes[0],)) if small else ""
        if isinstance(self._same_size, Reading):
            at = self._same_size
            match = matching.at(get(here.spec), at.grad, at.tokens, at.noise)
            if match is None or not match.same or abs(match.factor - here.factor) > EQUAL * abs(here.factor):
                return None
        return VocabularyFactor.of(here.spec, ((sizes[0], here.factor), (sizes[1], wide)))


def _same(near: Sequence[matching.Match]) -> bool:
    return bool(near) and near[0].same


def _moderate(at: Reading) -> Tensor:
    """The tokens with a gradient and p_y away from 0 and 1, (N,)."""
    p = at.tokens.label_probs
    return (p > 1e-5) & (p < 0.9999) & ~at.zero_rows
