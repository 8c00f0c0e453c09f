"""Vocabulary factors: factors of a gradient that change with the size of the vocabulary, as 1/V or ln V."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from qlens.lens.identify.matching import RELATIONS, Match, order, written
from qlens.lens.weights.features import plain
from qlens.lens.weights.weight_law import Law

EQUAL = 1e-5  # relative difference of two factors that count as equal
FORMS: dict[str, Callable[[int], float]] = {
    "1/V": lambda v: 1 / v,
    "1/ln V": lambda v: 1 / math.log(v),
    "1/(V - 1)": lambda v: 1 / (v - 1),
    "1/sqrt(V)": lambda v: v**-0.5,
    "ln V": math.log,
    "V": float,
    "sqrt(V)": math.sqrt,
    "1/V^2": lambda v: v**-2.0,
    "1/log2(V)": lambda v: 1 / math.log2(v),
}


@dataclass(frozen=True)
class VocabularyFactor:
    """A method whose gradient a loss has, times a factor of the vocabulary's size.

    Args:
        spec: the method.
        form: how the factor depends on V, like "1/V"; "" where no known form fits.
        constant: the factor besides.
        seen: vocabulary sizes, with the factor at each.
    """

    spec: str
    form: str
    constant: float
    seen: tuple[tuple[int, float], ...]

    @classmethod
    def of(cls, spec: str, factors: Sequence[tuple[int, float]]) -> "VocabularyFactor":
        """The simplest form that fits the factors of a method at several vocabularies."""
        fits = []
        for form, of_size in FORMS.items():
            constants = [factor / of_size(size) for size, factor in factors]
            if max(constants) - min(constants) <= EQUAL * max(map(abs, constants)):
                fits.append(cls(spec, form, written(constants[0], EQUAL), tuple(factors)))
        return min(fits, key=lambda one: len(plain(one.constant)), default=cls(spec, "", 1.0, tuple(factors)))

    def order(self) -> tuple:
        """Sort key: known forms first, then simple factors."""
        factor = self.constant if self.form else self.seen[0][1]
        return not self.form, order(Match(self.spec, 0.0, factor, 0.0, RELATIONS[1]))

    def __str__(self) -> str:
        if not self.form:
            return f"{self.spec} times a factor that changes with the vocabulary: {listed(self.seen)}"
        return f"{self.spec} times {_multiplied(plain(self.constant), self.form)} ({listed(self.seen)})"


def listed(factors: Sequence[tuple[int, float]]) -> str:
    """A factor at several vocabularies, in words."""
    return ", ".join(f"{factor:.5g} at V = {size}" for size, factor in factors)


def scaled(law: Law, form: str) -> Law:
    """The weight function times a form of V."""
    return replace(law, formula=_multiplied(law.formula, form))


def _multiplied(formula: str, form: str) -> str:
    """A formula times a form of V."""
    if formula == "1":
        return form
    whole = f"({formula})" if any(mark in formula for mark in (" + ", " - ", ",", " where ")) else formula
    return f"{whole} / {form[2:]}" if form.startswith("1/") else f"{form} {whole}"
