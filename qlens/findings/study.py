"""The study of one loss: what is found in its gradient, on the tokens shown and on the wider trial tokens."""

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor

from qlens import matching, params
from qlens.explanation import Explanation
from qlens.findings import identify
from qlens.findings.features import Seen
from qlens.findings.labels import LabelWeights, label_weights
from qlens.findings.laws import Law, law
from qlens.findings.leaks import Leak, leak
from qlens.findings.mixtures import Mixture, again, decompose
from qlens.findings.nearly import Nearly, nearly
from qlens.findings.noise import TOLERANCE
from qlens.findings.reading import Reading, asked, models_taken, on_trials
from qlens.findings.scope import Scope, scope
from qlens.findings.shifts import label_offset
from qlens.findings.uncoupled import piecewise_linear, uncoupled
from qlens.lens import read
from qlens.registry import Variant, get, methods
from qlens.tokens import spread

MATCHED = 400_000  # entries of the logits: on more, methods are compared on some of the tokens only
FITTED = 28  # tokens on which parameters are fitted
LIKELY = 8  # nearest methods that may be it on most tokens, beside all at their defaults
FACTOR = 1e-3  # relative difference of two factors that are one
IDS = 64  # label ids tried on tokens of one's own


def own_spec(variant: Variant) -> str:
    """The spec of a registered loss, not to be compared with itself; a function of the same name is somebody else's."""
    return variant.spec if methods().get(variant.name) is variant.method else ""


class Study:
    """One explanation in the making: what is read on the tokens shown, and on the trial tokens where the loss takes them."""

    def __init__(self, e: Explanation, shown: Reading, own: Mapping[str, Tensor], given: Variant):
        self.e, self.variant, self.own, self.own_spec = e, e.variant, own, own_spec(e.variant)
        self.shown, self.broken, self.ids_untried = shown, 0, ""
        wide = on_trials(self.variant, shown)
        self.trial, self.untried = (None, wide) if isinstance(wide, str) else (wide, "")
        self.given = given

    def run(self) -> Explanation:
        """The explanation, with everything that can be found."""
        unused = self.unused()
        if "weight" in unused:  # then no method is weighted either
            self.shown = self.shown.undone(self.shown.grad, self.shown.given.unweighted())
            self.trial = self.trial and self.trial.undone(self.trial.grad, self.trial.given.unweighted())
        reach = self.scope()
        kept = None if self.trial is None else self.finite(self.trial)
        if self.trial is not None and kept is not None and not bool(kept.all()):
            self.broken = int((~kept).sum())
            self.trial = self.trial[kept] if reach.of == "token" else None
        at, shifted = self.shown, 0
        if reach.of == "sequence" and reach.through == ("labels",):
            shifted = label_offset(self.variant.loss, at.given, at.grad, at.noise.rows)
        ids = self.label_ids() if reach.of == "token" else None
        found = leak(self.shown.grad, self.shown.tokens, self.shown.noise)
        wide = None if self.trial is None else leak(self.trial.grad, self.trial.tokens, self.trial.noise)
        found = uncoupled(self.variant, self.shown, found)
        wide = None if self.trial is None else uncoupled(self.variant, self.trial, wide)
        seen, trial = _undone(self.shown, found, ids), self.trial and _undone(self.trial, wide, ids)
        here, there = self.models_taken(seen), trial and self.models_taken(trial)
        mixture = decompose(here.grad, here.tokens, self.own, here.noise)
        laws, elsewhere = self.laws(mixture, here, there)
        if reach.of == "batch":  # ends that pulls seem to be held at are then those of this batch
            laws = {name: None if found is None or _has_end(found) else found for name, found in laws.items()}
        if found is not None:
            mixture = replace(mixture, index=found.rows[mixture.index])
        changed = found is not None or wide is not None or ids is not None
        none = found is not None and (bool(found.uncoupled) or not found.cause) or ids is not None and not ids.equal
        near, partly = self.identified(seen, trial, changed, reach.of == "token", none)
        return replace(
            self.e,
            nearest=near,
            mixture=mixture,
            laws=laws,
            scope=reach,
            leak=found or wide,
            label_weights=ids,
            shifted=shifted,
            linear=piecewise_linear(self.variant, self.shown),
            nearly=partly,
            elsewhere=elsewhere,
            unused=unused,
            tried=self.trial.tokens if self.trial is not None else None,
            broken=self.broken,
            ids_untried=self.ids_untried,
        )

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

    def scope(self) -> Scope:
        """On the probes as they are; for tokens of one's own on the trial tokens, or on some of one's own."""
        at = self.shown if self.e.on_probes else self.base
        most = max(48, MATCHED // at.given.logits.shape[1])
        some = at.given if len(at.given) <= most else at.given[:most]
        return scope(self.variant.loss, some, TOLERANCE, asked(self.variant), at.arithmetic)

    def label_ids(self) -> LabelWeights | None:
        """Whether label ids count, for every id of the trial tokens and for those among one's own labels."""
        if "pair" in self.variant.needs:
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
        except Exception as error:  # a loss may be made for just these rows
            self.ids_untried = f"{type(error).__name__}: {str(error).partition(chr(10))[0][:100]}"
            return None

    def laws(self, mixture: Mixture, seen: Reading, trial: Reading | None) -> tuple[dict[str, Law | None], str]:
        """The law of every pull, on the trial tokens too where these are made of the same; and whether they are."""
        if trial is None:
            return _laws(mixture, seen), self.untried
        wide = again(mixture, trial.grad, trial.tokens, trial.noise)
        where = f"V = {trial.tokens.logits.shape[1]}, on {len(trial.tokens)} wider tokens"
        if set(wide.parts) == set(mixture.parts) and wide.explains and mixture.explains:
            alone, found = _laws(mixture, seen), _laws(mixture, seen, wide, trial)
            if all(found[name] is not None or alone[name] is None for name in found):
                return found, f"the same at {where}."
            others = _laws(wide, trial)
            return alone, f"at {where} it reads {_in_short(wide, others)}."
        if not mixture.explains and not wide.explains:
            return {}, f"as here at {where}: no mixture."
        return _laws(mixture, seen), f"at {where} it reads {_in_short(wide, _laws(wide, trial))}."

    def identified(
        self, seen: Reading, trial: Reading | None, changed: bool, alone: bool, none: bool
    ) -> tuple[list[matching.Match], Nearly | None]:
        """The registered methods nearest first, and the one that a loss of each token ``alone`` is on most, if none on all.

        No parameters are searched where it is known that ``none`` is it: raw logits or ids count in an unknown way.
        """
        base = seen if trial is None else trial
        some = self.thinned(base, MATCHED, changed)
        few = self.few(some, changed)
        near = self.on_all(matching.nearest(few.grad, few.tokens, self.own_spec, few.noise), some)
        partly = None
        if alone and not (self.own_spec or (near and near[0].same)):
            likely = [match.spec for match in near[:LIKELY]] + list(methods())
            partly = nearly(some, self.variant.loss, list(dict.fromkeys(likely)))
        if not (none or self.own_spec or (near and near[0].same) or (partly is not None and partly.exact)):
            fits = identify.search(few.grad, few.tokens, params.parse(self.own_spec)[0], noise=few.noise)
            near = self.on_all([*fits, *near], some)
            if alone and fits and not near[0].same:
                partly = nearly(some, self.variant.loss, [fit.spec for fit in fits]) or partly
        if trial is not None:
            near = self.confirmed(near, seen, changed, alone)
        return near, None if near and near[0].same else partly

    def on_all(self, near: list[matching.Match], some: Reading) -> list[matching.Match]:
        """Matches found on a few tokens, compared on all."""
        again = [matching.at(get(match.spec), some.grad, some.tokens, some.noise) for match in near]
        return matching.ranked([match for match in again if match is not None])

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
                here = replace(here, relation=matching.RELATIONS[2])
            kept.append(here)
        return matching.ranked(kept)

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


def _undone(at: Reading, found: Leak | None, ids: LabelWeights | None) -> Reading:
    """A reading without what leaks, where that has a cause, and without the weights of label ids."""
    if ids is not None and ids.equal:
        weight = ids.of(at.given.labels)
        at = at.undone(at.grad / torch.where(weight == 0, 1.0, weight)[:, None])
        if found is not None and found.cause:
            found = replace(found, grad=found.grad / torch.where(weight == 0, 1.0, weight)[found.rows, None])
    if found is None or not found.cause:
        return at
    rows = found.rows.to(at.given.logits.device)
    return at[rows].undone(found.grad, found.tokens)


def _laws(
    mixture: Mixture, seen: Reading, wide: Mixture | None = None, trial: Reading | None = None
) -> dict[str, Law | None]:
    """The law of every pull of a mixture that explains the gradient, on further tokens too where these are given."""
    if not mixture.explains:
        return {}
    found = {}
    for name in mixture.parts:
        first, *further = [
            Seen(torch.where(m.unique, m.parts[name], torch.nan), at.tokens[m.index], _noise(m, at))
            for m, at in ((mixture, seen), (wide, trial))
            if m is not None and at is not None
        ]
        found[name] = law(first.pull, first.tokens, TOLERANCE, first.noise, further)
    return found


def _noise(mixture: Mixture, at: Reading) -> Tensor:
    """The rounding of a gradient, larger where less is known of its pulls, (N,): a law divides it by 1 - p_y."""
    rows, tokens = at.noise.rows[mixture.index].cpu(), at.tokens[mixture.index]
    return rows if mixture.noise is None else rows.maximum(mixture.noise * tokens.rest_log_probs.exp().cpu())


def _has_end(law: Law) -> bool:
    return any(end in law.values for end in ("at most", "at least"))


def _in_short(mixture: Mixture, laws: Mapping[str, Law | None]) -> str:
    if not mixture.explains:
        return "as no mixture"
    formulas = {name: law.formula if law else "(...)" for name, law in laws.items()}
    return " + ".join(f"{formulas[name]} of {name}" for name in mixture.parts)
