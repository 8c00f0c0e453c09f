"""Recipes: how each row of a comparison is trained, and the controls that tell why a method wins.

A method's name stands for one recipe, or for several of which validation chooses one. Of a control's recipe, one thing is
changed against ``target_sft`` or ``sft``, so that a difference between the two can have one cause only.
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
WEIGHTS = (0.1, 0.25, 0.5, 0.75, 0.9)  # what a tuned control may choose from

Method = Variant | str | Callable


@dataclass(frozen=True)
class Recipe:
    """One way to train.

    Args:
        variant: the loss; None leaves the start as it is.
        guide: who is put in the teacher's place.
        equal_compute: whether to take as many steps as the teacher's forward passes of a guided method would pay for.
    """

    variant: Variant | None
    guide: Literal["teacher", "base"] = "teacher"
    equal_compute: bool = False

    @property
    def spec(self) -> str:
        """The variant's, with what else is special."""
        special = {"base": " guided by the base"}.get(self.guide, "") + " at equal compute" * self.equal_compute
        return "" if self.variant is None else self.variant.spec + special


@dataclass(frozen=True)
class Control:
    """A control: its recipes, and what a win over it (or no win) says."""

    recipes: tuple[Recipe, ...]
    says: str


def shuffled_teacher(tokens: Tokens, *, eta: Share = 0.5) -> Target:
    """target_sft whose teacher's distributions are dealt out among the tokens where the student expects the same word.

    The teacher stays as soft, as grammatical and as often at odds with the student as it is, but knows nothing of the
    token at hand. The order is fixed by the number of tokens; a word expected only once keeps its own.
    """
    expected = tokens.log_probs.argmax(-1).cpu()
    drawn = torch.randperm(len(tokens), generator=torch.Generator().manual_seed(len(tokens)))
    order = torch.empty_like(drawn)
    order[expected.argsort(stable=True)] = drawn[
        expected[drawn].argsort(stable=True)
    ]  # the same words, in another order
    dealt = tokens.require("teacher")[order.to(tokens.labels.device)]
    return get("target_sft", eta=eta).target(tokens.replace(teacher=dealt))


def constant_trust(tokens: Tokens, *, trust: Share = 0.5, eta: Share = 0.5) -> Target:
    """target_sft's residual, with the same trust in every label: Q = trust d + (1 - trust) guided."""
    return Target.mix(tokens, trust=trust, residual=guided(tokens, eta))


def _unlisted(target: Callable, **given: float) -> Variant:
    """A variant that needs a teacher and stays out of the registry."""
    scope = "batch" if target is shuffled_teacher else "token"
    return registry.Method(name=target.__name__, fn=target, needs=("teacher",), scope=scope).variant(**given)


CONTROLS = {
    "target_sft_base_teacher": Control(
        (Recipe(get("target_sft"), guide="base"),),
        "target_sft guided by its own start: what is left without a better teacher's knowledge",
    ),
    "target_sft_shuffled_teacher": Control(
        (Recipe(_unlisted(shuffled_teacher)),),
        "target_sft with the teacher's distributions dealt out at random among the tokens where the student expects the "
        "same word: softness without knowledge of the token",
    ),
    "target_sft_constant_trust": Control(
        tuple(Recipe(_unlisted(constant_trust, trust=trust)) for trust in WEIGHTS),
        "the guided residual under one constant trust, the best of "
        f"{', '.join(map(str, WEIGHTS))} on validation: is it the trust in p_y, or the residual?",
    ),
    "kd_hybrid_tuned": Control(
        tuple(Recipe(get("kd_hybrid", weight=weight)) for weight in WEIGHTS),
        f"distillation plus labels, its weight the best of {', '.join(map(str, WEIGHTS))} on validation",
    ),
    "sft_equal_compute": Control(
        (Recipe(get("sft"), equal_compute=True),),
        "plain SFT with more steps, for as many forward passes as the teacher's take in target_sft",
    ),
}
"""The controls by name; tuned ones are given a choice that the methods do not have."""
GROUPS = {"default": DEFAULT, "controls": tuple(CONTROLS)}
"""Names that stand for several."""


def _check_name(variant: Variant) -> None:
    """A function of one's own must not pass for what already has its name."""
    taken = registry.methods().get(variant.name, variant.method) is not variant.method
    if taken or variant.name in (BASE, *CONTROLS, *GROUPS):
        raise InputError(f"{variant.name!r} is the name of a built-in row: give your function another name")


def recipes(variants: Method | Sequence[Method]) -> dict[str, tuple[Recipe, ...]]:
    """The recipes of all rows by the rows' names: ``base`` first, then as given; groups are spelled out.

    Raises:
        InputError: a name stands for two different rows, or nothing by that name.
    """
    single = isinstance(variants, str | Variant) or callable(variants)
    listed = list(variants) if isinstance(variants, Iterable) and not single else [variants]
    if not listed:
        raise InputError("variants is empty: give at least one method, like 'sft'")
    spelled = [name for each in listed for name in (GROUPS[each] if each in tuple(GROUPS) else (each,))]
    rows: dict[str, tuple[Recipe, ...]] = {BASE: (Recipe(None),)}
    for each in spelled:
        if each == BASE:
            continue
        if isinstance(each, str) and each in CONTROLS:
            name, found = each, CONTROLS[each].recipes
        else:
            variant = resolve(each)
            if not isinstance(each, str):
                _check_name(variant)
            name = each.strip() if isinstance(each, str) and ".py:" in each else variant.spec
            found = (Recipe(variant),)
        if name in rows:
            raise InputError(f"variants has {name!r} twice: every method needs a name of its own")
        rows[name] = found
    return rows
