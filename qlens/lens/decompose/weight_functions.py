"""Weight functions: the formula that the weight of every part of a decomposition follows, on one or two readings."""

from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from qlens.lens.decompose.mixture import Mixture
from qlens.lens.decompose.vocabulary_factors import FORMS, listed, scaled
from qlens.lens.reading import Reading
from qlens.lens.rounding import TOLERANCE
from qlens.lens.weights.features import WeightReading
from qlens.lens.weights.weight_law import Law, law

Laws = dict[str, Law | None]
CLIPS = {"low", "high", "at most", "at least"}  # names of the numbers of a threshold


@dataclass(frozen=True)
class _Decomposed:
    """A reading with its decomposition."""

    mixture: Mixture
    at: Reading

    @cached_property
    def laws(self) -> Laws:
        """The weight functions fitted on this reading alone."""
        return laws_of(self.mixture, self.at)

    @property
    def size(self) -> int:
        return self.at.inputs.logits.shape[1]

    @property
    def constant(self) -> float:
        """The factor of the first weight function that has one; 0 where none has."""
        return next((law.values["c"] for law in self.laws.values() if law and law.values.get("c")), 0.0)


def compare_laws(mixture: Mixture, shown: Reading, wide: Mixture, trial: Reading, scope: str) -> tuple[Laws, str]:
    """The weight functions on the tokens shown, also fitted on the trial tokens where the parts are the same; and a remark.

    Args:
        mixture: the decomposition on the tokens shown.
        shown: the gradient on these.
        wide: the decomposition on the trial tokens.
        trial: the gradient on these.
        scope: what a token's gradient depends on: "token", "sequence", "pair" or "batch".
    """
    where = f"V = {trial.tokens.logits.shape[1]}, on {len(trial.tokens)} further tokens"
    if not mixture.explains and not wide.explains:
        return {}, f"as here at {where}: no decomposition fits."
    here, there = (_Decomposed(m, at) for m, at in ((mixture, shown), (wide, trial)))
    if set(wide.parts) == set(mixture.parts) and wide.explains and mixture.explains:
        both = laws_of(mixture, shown, wide, trial)
        if all(both[name] is not None or here.laws[name] is None for name in both):
            if any(law is None for law in both.values()):
                return both, f"the same parts at {where}; not all of their weights have a known formula."
            return both, f"the same at {where}."
        if scope == "token" and (by_size := _by_vocabulary(here, there)):
            return by_size, f"the same, up to a factor that changes with the vocabulary, at {where}."
        laws = _without_own_thresholds(here, there) if scope == "batch" else dict(here.laws)
        return laws, f"at {where} the decomposition is {_in_short(there)}."
    return dict(here.laws), f"at {where} the decomposition is {_in_short(there)}."


def laws_of(
    mixture: Mixture,
    shown: Reading,
    wide: Mixture | None = None,
    trial: Reading | None = None,
    factors: tuple[float, float] = (1.0, 1.0),
) -> Laws:
    """The weight function of every part of a decomposition, fitted on the trial tokens too where these are given.

    Args:
        mixture: the decomposition on the tokens shown.
        shown: the gradient on these.
        wide: the decomposition on the trial tokens, of the same parts.
        trial: the gradient on these.
        factors: what the weights on the tokens shown and on the trial tokens are divided by.
    """
    if not mixture.explains:
        return {}
    laws = {}
    for name in mixture.parts:
        first, *further = [
            WeightReading(
                torch.where(m.unique, m.parts[name] / by, torch.nan), at.tokens[m.index], _noise(m, at) / abs(by)
            )
            for (m, at), by in zip(((mixture, shown), (wide, trial)), factors, strict=True)
            if m is not None and at is not None
        ]
        laws[name] = law(first.pull, first.tokens, TOLERANCE, first.noise, further)
    return laws


def has_threshold(law: Law | None) -> bool:
    """Whether a weight function holds on one side of a threshold only."""
    return law is not None and bool(CLIPS & set(law.values)) and " values, " not in law.formula


def _by_vocabulary(here: _Decomposed, there: _Decomposed) -> Laws | None:
    """The weight functions that all parts share up to one factor of the vocabulary's size; None where there are none."""
    if here.size == there.size or any(law is None for law in (*here.laws.values(), *there.laws.values())):
        return None
    fitting = []
    for form, of_size in FORMS.items():
        laws = laws_of(here.mixture, here.at, there.mixture, there.at, (of_size(here.size), of_size(there.size)))
        if None not in laws.values():
            fitting.append({name: law and scaled(law, form) for name, law in laws.items()})
    if fitting:
        return min(fitting, key=lambda laws: sum(len(law.formula) for law in laws.values() if law))
    laws = _up_to_factors(here, there)
    if laws is None:
        return None
    factors = listed([(here.size, here.constant), (there.size, there.constant)])
    return {
        name: law and replace(law, formula=f"{law.formula} times a factor that changes with the vocabulary: {factors}")
        for name, law in laws.items()
    }


def _without_own_thresholds(here: _Decomposed, there: _Decomposed) -> Laws:
    """The weight functions of one batch, without those whose thresholds other tokens do not share, up to a factor."""
    if not any(map(has_threshold, here.laws.values())):
        return dict(here.laws)
    common_laws = _up_to_factors(here, there)
    if common_laws is not None and any(map(has_threshold, common_laws.values())):
        return dict(here.laws)
    return {name: None if has_threshold(law) else law for name, law in here.laws.items()}


def _up_to_factors(here: _Decomposed, there: _Decomposed) -> Laws | None:
    """The weight functions that all parts share once each reading is divided by a factor of its own; else None."""
    if not (here.constant and there.constant):
        return None
    laws = laws_of(here.mixture, here.at, there.mixture, there.at, (here.constant, there.constant))
    return None if None in laws.values() else laws


def _noise(mixture: Mixture, at: Reading) -> Tensor:
    """The rounding of a gradient, larger where its parts nearly coincide, (N,)."""
    rows, tokens = at.noise.rows[mixture.index].cpu(), at.tokens[mixture.index]
    return rows if mixture.noise is None else rows.maximum(mixture.noise * tokens.rest_log_probs.exp().cpu())


def _in_short(part: _Decomposed) -> str:
    """A decomposition in one line."""
    mixture = part.mixture
    if not mixture.explains:
        return "unknown: none fits"
    return " + ".join(f"{_formula(mixture, part.laws.get(name), name)} of {name}" for name in mixture.parts)


def _formula(mixture: Mixture, law: Law | None, name: str) -> str:
    """A weight function, or the range of the weights where none is known."""
    if law is not None:
        return law.formula
    weights = mixture.parts[name][mixture.sure]
    return (
        f"{float(weights.min()):.4g} to {float(weights.max()):.4g} (no known formula)"
        if len(weights)
        else "an unknown weight"
    )
