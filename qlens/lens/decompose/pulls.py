"""Pulls: the laws that the pulls of a mixture follow, on several readings and up to a factor of the vocabulary's size."""

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor

from qlens.lens.decompose.mixture import Mixture
from qlens.lens.decompose.vocabulary_factors import FORMS, listed, scaled
from qlens.lens.reading import Reading
from qlens.lens.rounding import TOLERANCE
from qlens.lens.weights.features import Seen
from qlens.lens.weights.weight_law import Law, law


def by_vocabulary(
    mixture: Mixture,
    seen: Reading,
    wide: Mixture,
    trial: Reading,
    alone: Mapping[str, Law | None],
    others: Mapping[str, Law | None],
) -> dict[str, Law | None] | None:
    """The laws that all pulls follow up to one factor of the vocabulary's size; None where they follow none."""
    sizes = [at.given.logits.shape[1] for at in (seen, trial)]
    if sizes[0] == sizes[1] or any(found is None for found in (*alone.values(), *others.values())):
        return None
    fitting = []
    for form, at in FORMS.items():
        found = laws_of(mixture, seen, wide, trial, (at(sizes[0]), at(sizes[1])))
        if None not in found.values():
            fitting.append({name: law and scaled(law, form) for name, law in found.items()})
    if fitting:
        return min(fitting, key=lambda laws: sum(len(law.formula) for law in laws.values() if law))
    common = _up_to_factors(mixture, seen, wide, trial, alone, others)
    if common is None:
        return None
    found, factors = common
    said = listed(list(zip(sizes, factors, strict=True)))
    return {
        name: law and replace(law, formula=f"{law.formula} times a factor that changes with the vocabulary: {said}")
        for name, law in found.items()
    }


def own_of_batch(
    mixture: Mixture,
    seen: Reading,
    wide: Mixture,
    trial: Reading,
    alone: Mapping[str, Law | None],
    others: Mapping[str, Law | None],
) -> dict[str, Law | None]:
    """The laws of one batch, without those whose thresholds other tokens do not share, be it up to a factor."""
    if not any(map(has_threshold, alone.values())):
        return dict(alone)
    common = _up_to_factors(mixture, seen, wide, trial, alone, others)
    if common is not None and any(map(has_threshold, common[0].values())):
        return dict(alone)
    return {name: None if has_threshold(law) else law for name, law in alone.items()}


def has_threshold(law: Law | None) -> bool:
    """Whether a law holds on one side of a threshold only."""
    ends = {"low", "high", "at most", "at least"}
    return law is not None and bool(ends & set(law.values)) and " values, " not in law.formula


def _up_to_factors(
    mixture: Mixture,
    seen: Reading,
    wide: Mixture,
    trial: Reading,
    alone: Mapping[str, Law | None],
    others: Mapping[str, Law | None],
) -> tuple[dict[str, Law | None], tuple[float, float]] | None:
    """The laws that all pulls share on both once each reading's are divided by a factor of its own, and these; or None."""
    factors = [
        next((law.values["c"] for law in laws.values() if law and law.values.get("c")), 0.0) for laws in (alone, others)
    ]
    if not all(factors):
        return None
    found = laws_of(mixture, seen, wide, trial, (factors[0], factors[1]))
    return None if None in found.values() else (found, (factors[0], factors[1]))


def laws_of(
    mixture: Mixture,
    seen: Reading,
    wide: Mixture | None = None,
    trial: Reading | None = None,
    factors: tuple[float, float] = (1.0, 1.0),
) -> dict[str, Law | None]:
    """The law of every pull of a mixture that explains the gradient, on further tokens too where these are given.

    The pulls of the first and of the further tokens are divided by ``factors``.
    """
    if not mixture.explains:
        return {}
    found = {}
    for name in mixture.parts:
        first, *further = [
            Seen(torch.where(m.unique, m.parts[name] / by, torch.nan), at.tokens[m.index], _noise(m, at) / abs(by))
            for (m, at), by in zip(((mixture, seen), (wide, trial)), factors, strict=True)
            if m is not None and at is not None
        ]
        found[name] = law(first.pull, first.tokens, TOLERANCE, first.noise, further)
    return found


def _noise(mixture: Mixture, at: Reading) -> Tensor:
    """The rounding of a gradient, larger where less is known of its pulls, (N,): a law divides it by 1 - p_y."""
    rows, tokens = at.noise.rows[mixture.index].cpu(), at.tokens[mixture.index]
    return rows if mixture.noise is None else rows.maximum(mixture.noise * tokens.rest_log_probs.exp().cpu())


def in_short(mixture: Mixture, laws: Mapping[str, Law | None]) -> str:
    """A mixture in one line: the law of every pull, and toward what it is."""
    if not mixture.explains:
        return "as no mixture"
    return " + ".join(f"{_formula(mixture, laws.get(name), name)} of {name}" for name in mixture.parts)


def _formula(mixture: Mixture, found: Law | None, name: str) -> str:
    """A pull's law, or its ends where no law is known."""
    if found is not None:
        return found.formula
    known = mixture.parts[name][mixture.sure]
    return (
        f"{float(known.min()):.4g} to {float(known.max()):.4g} (by no known law)" if len(known) else "an unknown part"
    )
