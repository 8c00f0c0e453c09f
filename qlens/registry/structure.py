"""Structure: the kinds of logit gradient that a card may declare, by which the engine chooses its path."""

from dataclasses import dataclass
from typing import Literal

from jaxtyping import Float
from torch import Tensor

from qlens.core.errors import InputError
from qlens.core.tokens import MODELS
from qlens.core.tokens.fields import number


@dataclass(frozen=True)
class GeometricMixture:
    r"""Gradient :math:`g = s (p - t d - (1 - t) r)` with a geometric mixture :math:`r \propto p^{own}\, \pi^{other}`.

    Trust t and scale s are functions of the student's label probability and of per-token fields alone.

    Args:
        model: the model of :math:`\pi`: "teacher", "reference", "old" or "second"; None where r is uniform.
        own: exponent of the student's p; 0 where r is uniform.
        other: exponent of :math:`\pi`; 0 where r is uniform.
        value: the printed loss: "kl" is s (t NLL + (1 - t) KL(r || p)), "cross_entropy" is s (t NLL + (1 - t) CE(r, p)).
            By default "kl", and "cross_entropy" for a target without a printed loss, whose loss is s CE(Q, p).

    Raises:
        InputError: an unknown model or value, exponents that are no numbers, or exponents for a uniform r.

    Example:
        >>> GeometricMixture("teacher", own=0.5, other=0.5).other
        0.5
    """

    model: Literal["teacher", "reference", "old", "second"] | None
    own: float = 0.0
    other: float = 1.0
    value: Literal["kl", "cross_entropy"] | None = None

    def __post_init__(self):
        if self.model is not None and self.model not in MODELS:
            raise InputError(f"GeometricMixture: model must be one of {', '.join(MODELS)} or None, got {self.model!r}")
        if self.value not in ("kl", "cross_entropy", None):
            raise InputError(f"GeometricMixture: value must be 'kl' or 'cross_entropy', got {self.value!r}")
        for name in ("own", "other"):
            number(f"GeometricMixture: {name}", getattr(self, name), "a finite number")
        if self.model is None and (self.own or self.other):
            raise InputError("GeometricMixture: a uniform r has no exponents, write GeometricMixture.uniform()")

    @classmethod
    def uniform(cls, value: Literal["kl", "cross_entropy"] = "cross_entropy") -> "GeometricMixture":
        """The label mixed with the uniform distribution, as in label smoothing."""
        return cls(None, 0.0, 0.0, value)

    def logits_(self, other: Float[Tensor, "n V"], student: Float[Tensor, "n V"]) -> Float[Tensor, "n V"]:
        """log r up to a constant, in place of the other model's logits."""
        if self.other == 0:  # 0 times -inf is not 0
            other.zero_()
        elif self.other != 1:
            other.mul_(self.other)
        return other.add_(student, alpha=self.own) if self.own else other


Structure = Literal["label", "dense"] | GeometricMixture


def check_structure(name: str, structure: object, needs: tuple[str, ...]) -> Structure:
    """The declared structure, checked.

    Raises:
        InputError: another value, a mixed model that the method does not need, or "label" with negatives.
    """
    if structure == "label" and "negatives" in needs:
        raise InputError(f"{name}: negatives name entries of the vocabulary: write structure='dense'")
    if structure == "label" or structure == "dense":
        return structure  # pyright: ignore[reportReturnType]
    if not isinstance(structure, GeometricMixture):
        raise InputError(
            f"{name}: structure must be 'label' (a function of label probabilities), 'dense' (anything) or a "
            f"GeometricMixture, got {structure!r}; for a mixture of label and teacher write "
            'structure=qlens.GeometricMixture("teacher")'
        )
    if structure.model is not None and structure.model not in needs:
        raise InputError(f"{name}: structure mixes in {structure.model}: declare needs=({structure.model!r},)")
    return structure
