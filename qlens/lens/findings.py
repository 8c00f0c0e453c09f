"""The study of one loss: what is found in its gradient, on the tokens shown and on the wider trial tokens."""

from collections.abc import Mapping
from dataclasses import replace
from functools import cached_property

import torch
from torch import Tensor

from qlens.core.errors import InputError
from qlens.core.tokens import Tokens
from qlens.lens.decompose.dependence import Scope, scope
from qlens.lens.decompose.mixture import Mixture
from qlens.lens.decompose.mixture_search import again, decompose
from qlens.lens.decompose.pulls import by_vocabulary, in_short, laws_of, own_of_batch
from qlens.lens.decompose.raw_logits import CLAMPED, Leak, leak
from qlens.lens.decompose.shifts import label_offset
from qlens.lens.decompose.uncoupled import piecewise_linear, uncoupled
from qlens.lens.decompose.vocabulary_factors import VocabularyFactor
from qlens.lens.explanation import Explanation
from qlens.lens.identify.naming import MATCHED, Naming
from qlens.lens.implied import read
from qlens.lens.reading import Reading, asked, models_taken, on_trials
from qlens.lens.rounding import TOLERANCE
from qlens.lens.weights.batch_gates import batch_gate
from qlens.lens.weights.centred import centred
from qlens.lens.weights.label_weights import LabelWeights, divided_by_mean, label_weights, relabelled
from qlens.lens.weights.positions import PositionWeights, unweighted
from qlens.lens.weights.thresholds import with_edges
from qlens.lens.weights.weight_law import Law
from qlens.losses.notes.seen_tokens import given_by_text, made_up_inputs, standardises
from qlens.registry import Variant, methods

LEFT = 1e-9  # 1 - p_y below which no pull is read
IDS = 64  # label ids tried on tokens of one's own


def own_spec(variant: Variant) -> str:
    """The spec of a registered loss, not to be compared with itself; a function of the same name is somebody else's."""
    return variant.spec if methods().get(variant.name) is variant.method else ""


class Study(Naming):
    """One explanation in the making: what is read on the tokens shown, and on the trial tokens where the loss takes them."""

    def __init__(self, e: Explanation, shown: Reading, own: Mapping[str, Tensor], given: Variant):
        self.e, self.variant, self.own, self.own_spec = e, e.variant, own, own_spec(e.variant)
        self.shown, self.broken, self.ids_untried = shown, 0, ""
        self.same_size: Reading | str | None = None  # the trial tokens at the vocabulary shown, read where it is needed
        self.by_vocabulary: list[VocabularyFactor] = []
        self.unweighted: list[tuple[Reading, Tensor]] = []  # without weights by position, and their rows
        wide = on_trials(self.variant, shown)
        self.trial, self.untried = (None, wide) if isinstance(wide, str) else (wide, "")
        self.given, self.numbers = given, ()

    def run(self) -> Explanation:
        """The explanation, with everything that can be found."""
        unused = self.unused()
        if "weight" in unused:  # then no method is weighted either
            self.shown = self.shown.undone(self.shown.grad, self.shown.given.unweighted())
            self.trial = self.trial and self.trial.undone(self.trial.grad, self.trial.given.unweighted())
        ids = self.label_ids()
        reach = self.scope(ids)
        if self.e.whole and reach.of == "token":  # it divides by something of its batch that no change has shown
            reach = replace(reach, of="batch", through=(*reach.through, "number"))
        kept = None if self.trial is None else self.finite(self.trial)
        if self.trial is not None and kept is not None and not bool(kept.all()):
            self.broken = int((~kept).sum())
            self.trial = self.trial[kept] if reach.of == "token" else None
        at, shifted = self.shown, 0
        if reach.of == "sequence" and reach.through == ("labels",):
            shifted = label_offset(self.variant.loss, at.given, at.grad, at.noise.rows)
        if ids is not None and reach.of != "token":
            ids = self.divided(ids, reach)
        if reach.of == "token" and not (ids or self.own_spec or self.e.whole) and self.trial is not None:
            self.trial, self.numbers = with_edges(self.variant, self.trial)
        placed, kept = self.positions(reach) if ids is None else None, None
        alone = reach.of == "token" or placed is not None or (ids is not None and ids.divided)
        shown, trial = self.alike(self.shown, ids), self.trial and self.alike(self.trial, ids)
        if placed is not None:
            shown, kept = self.unweighted[0]
            trial = self.unweighted[1][0] if len(self.unweighted) > 1 else None
        found = uncoupled(self.variant, shown, leak(shown.grad, shown.tokens, shown.noise))
        wide = None if trial is None else leak(trial.grad, trial.tokens, trial.noise)
        wide = None if trial is None else uncoupled(self.variant, trial, wide)
        seen, trial = _undone(shown, found), trial and _undone(trial, wide)
        changed = found is not None or wide is not None or ids is not None or placed is not None
        none = found is not None and (bool(found.uncoupled) or not found.cause) or ids is not None and not ids.equal
        lost = not len(seen.given)  # every label shown is clamped: nothing is left of what it would have got
        at, further = (trial, None) if lost and trial is not None else (seen, trial)
        near, partly, normal = self.identified(at, further, changed, alone, none) if len(at.given) else ([], None, None)
        if lost:
            return replace(self.e, nearest=near, scope=reach, leak=_clearer(found, wide), unused=unused,
                           tried=self.trial.tokens if self.trial is not None else None, broken=self.broken)  # fmt: skip
        gate = middle = None
        named = self.own_spec or self.sum_of is not None or (near and near[0].same)
        if reach.of == "batch" and not (alone or changed or normal or named):
            gate = batch_gate(self.variant, self.shown, self.trial, near)
            middle = None if gate is not None else centred(self.variant, self.shown, self.trial)
        if normal is not None and not normal.spec:
            seen, trial = self.unscaled(seen), trial and self.unscaled(trial)
        elif normal is not None:
            seen = seen.undone(seen.grad * (normal.constant / normal.here))
            trial = trial and trial.undone(trial.grad * (normal.constant / (normal.wide or normal.here)))
        here, there = self.models_taken(seen), trial and self.models_taken(trial)
        mixture = decompose(here.grad, here.tokens, self.own, here.noise)
        laws, beyond = self.laws(mixture, here, there, reach)
        if (
            reach.of == "batch" and not alone and normal is None
        ):  # ends that pulls seem to be held at are then those of this batch
            laws = {name: None if law is None or _has_end(law) else law for name, law in laws.items()}
            if any(law is None for law in laws.values()) and beyond.startswith("the same at"):
                beyond = (
                    f"made of the same pulls {beyond.removeprefix('the same ').rstrip('.')}; not all by a known law."
                )
        if found is not None:
            mixture = replace(mixture, index=found.rows[mixture.index])
        if kept is not None:
            mixture = replace(mixture, index=kept[mixture.index])
        if alone and not (near and near[0].same) and self.sum_of is None:
            partly = self.gated(seen, trial, mixture, laws, partly)
        if partly is not None and partly.left and mixture.explains and laws and None not in laws.values():
            partly = None  # the laws of its pulls say what it is on all tokens
        return replace(
            self.e,
            nearest=near,
            mixture=mixture,
            laws=laws,
            scope=reach,
            leak=_clearer(found, wide),
            label_weights=ids,
            shifted=shifted,
            linear=piecewise_linear(self.variant, self.shown),
            nearly=partly,
            by_vocabulary=None
            if near and near[0].same
            else min(self.by_vocabulary, key=VocabularyFactor.order, default=None),
            elsewhere=beyond,
            unused=unused,
            tried=self.trial.tokens if self.trial is not None else None,
            broken=self.broken,
            ids_untried=self.ids_untried,
            normalised=normal,
            position_weights=placed,
            gate=gate,
            centred=middle,
            two_terms=self.sum_of,
        )

    @cached_property
    def in_place(self) -> bool:
        """Whether it runs another model, whose made-up inputs stay in place as tokens move."""
        return self.variant.derived and made_up_inputs(self.variant.method.fn, self.variant.params, self.shown.given)

    @property
    def base(self) -> Reading:
        """The trial tokens, else those shown."""
        return self.shown if self.trial is None else self.trial

    def models_taken(self, at: Reading) -> Reading:
        """The same without the models that the loss does not take."""
        return at.undone(at.grad, models_taken(self.variant, at.given))

    def finite(self, at: Reading) -> Tensor:
        """Where the gradient is a number, (N,), in the loss's own precision too."""
        kept = at.grad.isfinite().all(-1)
        if self.given is self.variant:
            return kept
        return kept & read(self.given, at.given, self.given.loss).isfinite().all(-1)

    def scope(self, ids: LabelWeights | None = None) -> Scope:
        """On the probes as they are; for tokens of one's own on the trial tokens, or on some of one's own."""
        at = self.shown if self.e.on_probes else self.base
        most = max(48, MATCHED // at.given.logits.shape[1])
        some = at.given if len(at.given) <= most else at.given[:most]
        return scope(
            self.variant.loss,
            some,
            TOLERANCE,
            asked(self.variant),
            at.arithmetic,
            ids.weights if ids else None,
            self.variant.total,
            self.own_of_text(some),
            self.in_place,
        )

    def own_of_text(self, tokens: Tokens) -> tuple[str, ...]:
        """The fields of which a text has one value that concerns no other text."""
        if not self.variant.derived:
            return ()
        fn, params = self.variant.method.fn, self.variant.params
        fields = given_by_text(fn, params, tokens)
        shared = "advantage" in fields and standardises(fn, params, tokens)
        return tuple(name for name in fields if name != "advantage" or not shared)

    def label_ids(self) -> LabelWeights | None:
        """Whether label ids count, for every id of the trial tokens and for those among one's own labels."""
        if self.variant.compares_pairs or self.in_place:
            return None
        found = self._ids_at(self.base, range(min(self.base.given.logits.shape[1], 160)))
        if found is None and not (self.e.on_probes or self.own_spec) and self.trial is not None:
            found = self._ids_at(self.shown, self.shown.given.labels.unique().tolist()[:IDS])
        return found

    def _ids_at(self, at: Reading, ids: range | list[int]) -> LabelWeights | None:
        loud = at.grad.norm(dim=-1) > 1e3 * at.noise.rows
        if len(ids) < 2 or not bool(loud.any()):
            return None
        off = torch.where(loud, (at.tokens.label_probs - 0.35).abs(), torch.inf)
        try:
            return label_weights(self.variant.loss, at.given, int(off.argmin()), list(ids), at.arithmetic)
        except InputError as error:
            self.ids_untried = str(error)
            return None

    def positions(self, reach: Scope) -> PositionWeights | None:
        """How a token is weighed by its place, where nothing else of other tokens counts; the readings without it are kept."""
        if (
            "position" not in reach.through
            or set(reach.through) - {"position", "number"}
            or self.variant.compares_pairs
        ):
            return None
        found, self.unweighted = unweighted(
            self.variant, [self.shown, *([self.trial] if self.trial is not None else [])]
        )
        return found

    def divided(self, ids: LabelWeights, reach: Scope) -> LabelWeights | None:
        """Weights by label id of a loss that needs its whole batch: as divided by the batch's mean weight, else none."""
        if not ids.equal or "labels" not in reach.through:
            return None
        return divided_by_mean(ids, self.variant.loss, self.base.given, self.base.arithmetic)

    def alike(self, at: Reading, ids: LabelWeights | None) -> Reading:
        """A reading of the same tokens with one label id for all, where ids have weights: then none of these shows."""
        if ids is None or not ids.equal:
            return at
        size = at.given.logits.shape[1]
        there = {i: weight for i, weight in ids.weights.items() if i < size and weight}
        if not there:  # no id that is left has a weight
            return at
        one = min(there, key=lambda i: (there[i] != ids.usual, i))
        found = Reading.of(self.variant, relabelled(at.given, one))
        by = torch.full((len(found.given),), ids.usual / there[one], dtype=torch.float64, device=found.grad.device)
        return found if there[one] == ids.usual else found.weighted(by)

    def unscaled(self, at: Reading) -> Reading:
        """A reading whose weights the batch scales, without the factor of their law, or with 1 for the largest."""
        known = self.models_taken(at)
        found = laws_of(decompose(known.grad, known.tokens, {}, known.noise), known).get("the label")
        rest = at.tokens.rest_log_probs.exp()
        largest = (-at.tokens.gather(at.grad) / rest)[rest > LEFT].abs()
        scale = found.values.get("c") if found is not None else float(largest.max()) if len(largest) else None
        return at.undone(at.grad / scale) if scale else at

    def laws(
        self, mixture: Mixture, seen: Reading, trial: Reading | None, reach: Scope
    ) -> tuple[dict[str, Law | None], str]:
        """The law of every pull, on the trial tokens too where these are made of the same; and whether they are."""
        if trial is None:
            return laws_of(mixture, seen), self.untried
        wide = again(mixture, trial.grad, trial.tokens, trial.noise)
        where = f"V = {trial.tokens.logits.shape[1]}, on {len(trial.tokens)} wider tokens"
        if set(wide.parts) == set(mixture.parts) and wide.explains and mixture.explains:
            alone, found = laws_of(mixture, seen), laws_of(mixture, seen, wide, trial)
            if all(found[name] is not None or alone[name] is None for name in found):
                if any(law is None for law in found.values()):
                    return found, f"made of the same pulls at {where}; not all by a known law."
                return found, f"the same at {where}."
            others = laws_of(wide, trial)
            if reach.of == "token" and (by_size := by_vocabulary(mixture, seen, wide, trial, alone, others)):
                return by_size, f"the same, up to a factor that changes with the vocabulary, at {where}."
            if reach.of == "batch":
                alone = own_of_batch(mixture, seen, wide, trial, alone, others)
            return alone, f"at {where} it reads {in_short(wide, others)}."
        if not mixture.explains and not wide.explains:
            return {}, f"as here at {where}: no mixture."
        return laws_of(mixture, seen), f"at {where} it reads {in_short(wide, laws_of(wide, trial))}."

    def unused(self) -> tuple[str, ...]:
        """Fields that the loss asks for and that change neither its values nor its gradient."""
        found = []
        for name in asked(self.variant):
            value = getattr(self.base.given, name)
            if name in ("sequence", "pair", "chosen") or value is None:
                continue
            other = ~value if value.dtype == torch.bool else value.flip(0) * 1.3 + 0.2
            after = Reading.of(self.variant, self.base.given.replace(**{name: other}))
            off = (after.grad - self.base.grad).norm(dim=-1)
            still = bool((off <= TOLERANCE * after.grad.norm(dim=-1) + 2 * self.base.noise.rows).all())
            if still and bool(torch.allclose(after.losses, self.base.losses, rtol=1e-6, equal_nan=True)):
                found.append(name)
        return tuple(found)


def _undone(at: Reading, found: Leak | None) -> Reading:
    """A reading without what leaks, where that has a cause."""
    if found is None or not found.cause:
        return at
    return at[found.rows.to(at.given.logits.device)].undone(found.grad, found.tokens)


def _clearer(found: Leak | None, wide: Leak | None) -> Leak | None:
    """What leaks on the tokens shown; clamped logits as they show on the trial tokens, whose logits reach further."""
    both = found is not None and wide is not None and all(one.cause.startswith(CLAMPED) for one in (found, wide))
    return wide if both else found or wide


def _has_end(law: Law) -> bool:
    return any(end in law.values for end in ("at most", "at least"))
