"""Naming: the registered methods that have the gradient of a loss, nearest first."""

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from qlens.core.numerics import spread
from qlens.lens.decompose.mixture import Mixture
from qlens.lens.decompose.vocabulary_factors import EQUAL, VocabularyFactor
from qlens.lens.identify import matching, parameter_search
from qlens.lens.identify.batch_statistics import Normalised, elsewhere
from qlens.lens.identify.near_identity import Nearly, gate, nearly
from qlens.lens.identify.two_terms import TwoTerms, two_terms
from qlens.lens.reading import Reading, on_trials
from qlens.lens.rounding import TOLERANCE
from qlens.lens.weights.weight_law import Law
from qlens.registry import Variant, get, methods, params

MATCHED = 400_000  # entries of the logits: on more, methods are compared on some of the tokens only
FITTED = 28  # tokens on which parameters are fitted
LIKELY = 8  # nearest methods that may be it on most tokens, beside all at their defaults
HALF = 0.5  # methods that have the gradient on such a share of the tokens are fitted on all
REFINED = 3  # so many of them
FACTOR = 1e-3  # relative difference of two factors that are one
FEW_ENTRIES = 2**12  # vocabulary up to which the trial tokens are read at the one shown, too


class Naming:
    """The search for registered methods, on the tokens shown and on the trial tokens."""

    variant: Variant
    own_spec: str
    shown: Reading
    trial: Reading | None
    by_vocabulary: list[VocabularyFactor]
    same_size: Reading | str | None
    numbers: tuple[float, ...]
    sum_of: TwoTerms | None = None  # the two terms that add up to a loss which no one method is

    def identified(
        self, seen: Reading, trial: Reading | None, changed: bool, alone: bool, none: bool
    ) -> tuple[list[matching.Match], Nearly | None, Normalised | None]:
        """The registered methods nearest first, the one that a loss of each token ``alone`` is on most, if none on all, and
        the one that another loss is times a factor of the batch.

        No parameters are searched where it is known that ``none`` is it: raw logits or ids count in an unknown way.
        """
        base = seen if trial is None else trial
        some = self.thinned(base, MATCHED, changed)
        few = self.few(some, changed)
        near = self.on_all(matching.nearest(few.grad, few.tokens, self.own_spec, few.noise, every=True), some)
        partly, further = None, None if trial is None else self.thinned(seen, MATCHED, changed)
        if alone and not (self.own_spec or (near and near[0].same)):
            likely = [match.spec for match in near[:LIKELY]] + list(methods())
            partly = nearly(some, self.variant.loss, list(dict.fromkeys(likely)), further)
        if alone and not (none or self.own_spec or (near and near[0].same)):
            likely = ([partly.spec] if partly is not None else []) + [
                match.spec for match in near if match.share > HALF
            ]
            if found := self.refined(likely, some):
                return self.settled([found, *near], seen, trial, changed, alone), None, None
        if not (none or self.own_spec or (near and near[0].same) or (partly is not None and partly.exact)):
            fits, close = parameter_search.searched(
                few.grad, few.tokens, params.parse(self.own_spec)[0], noise=few.noise
            )
            near = self.on_all([*fits, *near], some)
            # the few tokens leave a threshold open: it is fitted on all, from where the other numbers are right
            if alone and fits and not near[0].same and (found := self.refined([fit.spec for fit in fits], some)):
                near = [found, *near]
            close = [fit.spec for fit in fits] + close
            if alone and close and not near[0].same:
                partly = nearly(some, self.variant.loss, close, further) or partly
        near = self.settled(near, seen, trial, changed, alone)
        normal = None
        if not (alone or self.own_spec or changed):
            near, normal = elsewhere(near, self.variant, seen, trial)
        named = bool(near and near[0].same)
        if not (none or self.own_spec or normal or (named and not near[0].odd)) and (alone or further is not None):
            self.sum_of = two_terms(few, [some] if further is None else [some, further])
            if named and self.sum_of is not None and self.sum_of.odd:
                self.sum_of = None
        if named or self.sum_of is not None or (partly is not None and not partly.telling):
            partly = None
        return near, partly, normal

    def refined(self, specs: Sequence[str], some: Reading) -> matching.Match | None:
        """The first of some methods that has the gradient on all tokens once its parameters are fitted there, or None."""
        tried = (
            parameter_search.refined(spec, some.grad, some.tokens, some.noise, self.numbers)
            for spec in list(dict.fromkeys(specs))[:REFINED]
        )
        return next((match for match in tried if match is not None), None)

    def settled(
        self, near: list[matching.Match], seen: Reading, trial: Reading | None, changed: bool, alone: bool
    ) -> list[matching.Match]:
        """The matches as they compare on the tokens shown, where they were read on the trial tokens."""
        return matching.ranked(near) if trial is None else self.confirmed(near, seen, changed, alone)

    def gated(
        self,
        seen: Reading,
        trial: Reading | None,
        mixture: Mixture,
        laws: Mapping[str, Law | None],
        partly: Nearly | None,
    ) -> Nearly | None:
        """The method that a loss is on some tokens by the exact law of its only pull, 0 on the others; else ``partly``."""
        base, found = seen if trial is None else trial, laws.get("the label")
        if self.own_spec or set(mixture.parts) != {"the label"} or found is None or not found.where:
            return partly
        return gate(base, self.variant.loss, found)

    def on_all(self, near: list[matching.Match], some: Reading) -> list[matching.Match]:
        """Matches found on a few tokens, compared on all."""
        again = [matching.at(get(match.spec), some.grad, some.tokens, some.noise) for match in near]
        return matching.simplest([match for match in again if match is not None])

    def few(self, some: Reading, changed: bool) -> Reading:
        """A few dozen tokens on which parameters are fitted: without the extremes, where tokens stand alone."""
        order = torch.randperm(len(some.given), generator=torch.Generator().manual_seed(0)).to(some.given.logits.device)
        p = some.tokens.label_probs
        middle = (p > 1e-5) & (p < 0.9999) & ~some.silent
        if changed and int(middle.sum()) >= FITTED:
            return some[order[middle[order]][:FITTED].sort().values]
        rows = order[: 2 * FITTED].sort().values
        return some[rows] if changed else self.read_anew(some, rows)

    def read_anew(self, some: Reading, rows: Tensor) -> Reading:
        """Fewer tokens as a batch of their own, with the extremes left out where the gradient stays the same."""
        few = some.anew(self.variant, rows)
        if bool(
            ((few.grad - some.grad[rows]).norm(dim=-1) <= TOLERANCE * few.grad.norm(dim=-1) + 4 * few.noise.rows).all()
        ):
            p = few.tokens.label_probs
            middle = (p > 1e-5) & (p < 0.9999) & ~few.silent
            return few[middle.nonzero()[:FITTED, 0]] if int(middle.sum()) >= FITTED // 2 else few
        return few

    def thinned(self, at: Reading, most: int, changed: bool) -> Reading:
        """Fewer tokens, if their logits have more than so many entries: read anew, unless something was taken off them."""
        if at.grad.numel() <= most:
            return at
        rows = spread(len(at.given), max(8, most // at.grad.shape[1])).to(at.given.logits.device)
        return at[rows] if changed else at.anew(self.variant, rows)

    def confirmed(self, near: list[matching.Match], seen: Reading, changed: bool, alone: bool) -> list[matching.Match]:
        """Methods that have the gradient on the trial tokens, as they compare on those shown.

        The factor is that of the tokens shown; where every token stands ``alone`` it must be the same on both.
        """
        some = self.thinned(seen, MATCHED, changed)
        equal = FACTOR + 2 * torch.finfo(seen.precision).eps  # factors read in half precision have three digits
        kept = []
        for match in near:
            here = matching.at(get(match.spec), some.grad, some.tokens, some.noise) if match.same else match
            if here is None:
                continue
            if match.same and here.same and alone and abs(here.factor - match.factor) > equal * abs(match.factor):
                self.by_vocabulary += [f for f in [self.vocabulary_factor(here, match.factor)] if f is not None]
                here = replace(here, relation=matching.RELATIONS[2])
            kept.append(here)
        return matching.ranked(kept)

    def vocabulary_factor(self, here: matching.Match, wide: float) -> VocabularyFactor | None:
        """A method's factors here and on the trial tokens as those of two vocabularies, if these are what makes them differ."""
        assert self.trial is not None
        sizes = [at.given.logits.shape[1] for at in (self.shown, self.trial)]
        if sizes[0] == sizes[1]:
            return None
        if self.same_size is None:
            self.same_size = on_trials(self.variant, self.shown, (sizes[0],)) if sizes[0] <= FEW_ENTRIES else ""
        if isinstance(self.same_size, Reading):
            one = self.same_size
            there = matching.at(get(here.spec), one.grad, one.tokens, one.noise)
            if there is None or not there.same or abs(there.factor - here.factor) > EQUAL * abs(here.factor):
                return None
        return VocabularyFactor.of(here.spec, ((sizes[0], here.factor), (sizes[1], wide)))
