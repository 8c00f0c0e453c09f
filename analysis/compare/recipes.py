"""Recipes: how each row of a comparison is trained, and the controls.

A row has one recipe, or several of which validation chooses one. A control differs from ``target_sft`` or ``sft`` in one
thing, so that a difference between the two has one cause.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch

from qlens.core.errors import InputError
from qlens.core.target import Target
from qlens.core.tokens import Tokens
from qlens.registry import Variant, get, registry, resolve
from qlens.registry.params import Share
from qlens.variants.designed.target_sft import guided

BASE = "base"
DEFAULT = (BASE, "sft", "dft", "kd", "label_smoothing", "asft_anchored", "target_sft")
WEIGHTS = (0.1, 0.25, 0.5, 0.75, 0.9)  # choices of a tuned control

Method = Variant | str | Callable


@dataclass(frozen=True)
class Recipe:
    """One way to train.

    Args:
        variant: the loss; None for the starting model.
        guide: the model used as teacher.
        equal_compute: whether to add steps worth the forward passes of a teacher.
    """

    variant: Variant | None
    guide: Literal["teacher", "base"] = "teacher"
    equal_compute: bool = False

    @property
    def spec(self) -> str:
        """Spec of the variant, with guide and compute where they differ from the default."""
        special = {"base": " guided by the base"}.get(self.guide, "") + " at equal compute" * self.equal_compute
        return "" if self.variant is None else self.variant.spec + special


@dataclass(frozen=True)
class Control:
    """A control: its recipes, and what it tests."""

    recipes: tuple[Recipe, ...]
    says: str


def shuffled_teacher(tokens: Tokens, *, eta: Share = 0.5) -> Target:
    """target_sft with the teacher's distributions permuted among tokens with the same most likely entry of the student.

    The teacher keeps its entropy and its disagreement with the student, but has no information on the token. The
    permutation follows from the number of tokens.
    """
    likely = tokens.log_probs.argmax(-1).cpu()
    permutation = torch.randperm(len(tokens), generator=torch.Generator().manual_seed(len(tokens)))
    order = torch.empty_like(permutation)
    order[likely.argsort(stable=True)] = permutation[likely[permutation].argsort(stable=True)]
    permuted = tokens.require("teacher")[order.to(tokens.labels.device)]
    return get("target_sft", eta=eta).target(tokens.replace(teacher=permuted))


def constant_trust(tokens: Tokens, *, trust: Share = 0.5, eta: Share = 0.5) -> Target:
    """target_sft's residual with a constant trust: Q = trust d + (1 - trust) guided."""
    return Target.mix(tokens, trust=trust, residual=guided(tokens, eta))


def _unlisted(target: Callable, **params: float) -> Variant:
    """A variant with a teacher that is not in the registry."""
    scope = "batch" if target is shuffled_teacher else "token"
    return registry.Method(name=target.__name__, fn=target, needs=("teacher",), scope=scope).variant(**params)


CONTROLS = {
    "target_sft_base_teacher": Control(
        (Recipe(get("target_sft"), guide="base"),),
        "target_sft guided by its own starting model: the gain without a better teacher",
    ),
    "target_sft_shuffled_teacher": Control(
        (Recipe(_unlisted(shuffled_teacher)),),
        "target_sft with the teacher's distributions permuted among tokens with the same most likely entry of the student: "
        "soft targets without information on the token",
    ),
    "target_sft_constant_trust": Control(
        tuple(Recipe(_unlisted(constant_trust, trust=trust)) for trust in WEIGHTS),
        "the guided residual with one constant trust, the best of "
        f"{', '.join(map(str, WEIGHTS))} on validation: the gain of the residual alone",
    ),
    "kd_hybrid_tuned": Control(
        tuple(Recipe(get("kd_hybrid", weight=weight)) for weight in WEIGHTS),
        f"distillation plus labels, its weight the best of {', '.join(map(str, WEIGHTS))} on validation",
    ),
    "sft_equal_compute": Control(
        (Recipe(get("sft"), equal_compute=True),),
        "SFT with more steps, worth the teacher's forward passes in target_sft",
    ),
}
"""Controls by name; tuned ones have a choice that the methods do not have."""
GROUPS = {"default": DEFAULT, "controls": tuple(CONTROLS)}
"""Groups of rows by name."""


def _check_name(variant: Variant) -> None:
    """Raise InputError if a user function has the name of a built-in row."""
    is_built_in = registry.methods().get(variant.name, variant.method) is not variant.method
    if is_built_in or variant.name in (BASE, *CONTROLS, *GROUPS):
        raise InputError(f"{variant.name!r} is the name of a built-in row: give your function another name")


def recipes(variants: Method | Sequence[Method]) -> dict[str, tuple[Recipe, ...]]:
    """Recipes by row name: ``base`` first, then in the given order, with groups expanded.

    Raises:
        InputError: two rows with one name, or an unknown name.
    """
    single = isinstance(variants, str | Variant) or callable(variants)
    listed = list(variants) if isinstance(variants, Iterable) and not single else [variants]
    if not listed:
        raise InputError("variants is empty: give at least one method, like 'sft'")
    expanded = [name for each in listed for name in (GROUPS[each] if each in tuple(GROUPS) else (each,))]
    rows: dict[str, tuple[Recipe, ...]] = {BASE: (Recipe(None),)}
    for each in expanded:
        if each == BASE:
            continue
        if isinstance(each, str) and each in CONTROLS:
            name, row = each, CONTROLS[each].recipes
        else:
            variant = resolve(each)
            if not isinstance(each, str):
                _check_name(variant)
            name = each.strip() if isinstance(each, str) and ".py:" in each else variant.spec
            row = (Recipe(variant),)
        if name in rows:
            raise InputError(f"variants has {name!r} twice: every method needs a name of its own")
        rows[name] = row
    return rows
