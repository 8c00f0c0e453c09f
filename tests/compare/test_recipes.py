"""Recipes: what each control changes, and nothing else."""

import pytest
import torch
from numpy.testing import assert_allclose
from tiny_models import letters, llama

import qlens
from qlens import InputError
from qlens.analysis.compare.environments import Environment
from qlens.analysis.compare.evaluation import HeldOut
from qlens.analysis.compare.recipes import BASE, CONTROLS, DEFAULT, WEIGHTS, Recipe, recipes
from qlens.testing import CONTRACT, check_variant, random_tokens

RECIPES = [(name, recipe) for name, control in CONTROLS.items() for recipe in control.recipes]


def test_every_control_keeps_the_contract():
    for name, recipe in RECIPES:
        assert len(check_variant(recipe.variant)) == len(CONTRACT), (name, recipe.spec)
        assert CONTROLS[name].says


def test_a_shuffled_teacher_permutes_the_teachers_rows():
    tokens = random_tokens(64, 6)
    (recipe,) = CONTROLS["target_sft_shuffled_teacher"].recipes
    target, plain = recipe.variant.target(tokens), qlens.get("target_sft").target(tokens)
    assert_allclose(target.trust, plain.trust)
    # guided ~ sqrt(p teacher), so guided^2 / p is the teacher again, up to a factor
    teacher = torch.softmax(2 * target.residual.log() - tokens.log_probs, -1)
    dealt = {tuple(row) for row in teacher.mul(1e6).round().long().tolist()}
    own = {tuple(row) for row in tokens.log_probs_of("teacher").exp().mul(1e6).round().long().tolist()}
    assert len(dealt & own) > 60, "every distribution must be one of the teacher's"
    assert ((target.q - plain.q).abs().sum(-1) > 1e-3).float().mean() > 0.5, "and most elsewhere than they were"


def test_a_shuffled_teacher_permutes_within_equal_argmax_tokens():
    tokens = random_tokens(200, 5)
    marked = torch.eye(5)[tokens.log_probs.argmax(-1)].mul(
        20
    )  # a teacher that depends on the student's most likely entry alone
    target = CONTROLS["target_sft_shuffled_teacher"].recipes[0].variant.target(tokens.replace(teacher=marked))
    assert_allclose(target.q, qlens.get("target_sft").target(tokens.replace(teacher=marked)).q)


def test_constant_trust_changes_the_trust_alone():
    tokens = random_tokens(64, 24)
    plain = qlens.get("target_sft").target(tokens)
    for weight, recipe in zip(WEIGHTS, CONTROLS["target_sft_constant_trust"].recipes, strict=True):
        target = recipe.variant.target(tokens)
        assert_allclose(target.trust, weight)
        assert_allclose(target.residual, plain.residual, atol=1e-8)


def environment(student, teacher):
    return Environment(
        train=[], held_out=HeldOut([]), start=lambda: student, reference=lambda: student,
        teacher=None if teacher is None else lambda: teacher, score=lambda m, s: None, validate=lambda m, s: None,
        monitor=lambda m, s: None, tokenizer=letters(), steps=150, batch_size=1, learning_rate=1e-3, correct=None, metadata={},
    )  # fmt: skip


def test_models_and_steps_of_a_recipe():
    student, teacher = llama(0), llama(1)
    here = environment(student, teacher)
    guided, alone = Recipe(qlens.get("target_sft")), Recipe(qlens.get("target_sft"), guide="base")
    assert here.models(guided, ("teacher",), student) == {"teacher": teacher}
    assert here.models(alone, ("teacher", "reference"), student) == {"teacher": student, "reference": student}
    assert here.models(guided, (), student) == {}
    longer = Recipe(qlens.get("sft"), equal_compute=True)
    assert (here.steps_of(guided), here.steps_of(longer), here.steps_of(Recipe(None))) == (150, 200, 0)
    with pytest.raises(InputError, match="sft_equal_compute needs a teacher"):
        environment(student, None).steps_of(longer)


def test_a_user_function_with_a_built_in_name_is_refused():
    def dft(logits, labels):
        return -logits.log_softmax(-1).gather(1, labels[:, None])[:, 0]

    for name in ("dft", "base", "kd_hybrid_tuned", "controls"):
        dft.__name__ = name
        with pytest.raises(InputError, match=f"'{name}' is the name of a built-in row"):
            recipes([dft])
    dft.__name__ = "mine"
    assert list(recipes([dft, qlens.get("dft")])) == [BASE, "mine", "dft"]


def test_groups_expand_and_duplicates_are_refused():
    assert tuple(recipes(["default", "controls"])) == (*DEFAULT, *CONTROLS)
    assert tuple(recipes("dft")) == (BASE, "dft")
    tuned = [recipe.spec for recipe in recipes("kd_hybrid_tuned")["kd_hybrid_tuned"]]
    assert tuned == ["kd_hybrid" if weight == 0.5 else f"kd_hybrid(weight={weight})" for weight in WEIGHTS]
    specs = {(name, r.spec) for name, among in recipes(["default", "controls"]).items() for r in among}
    assert ("target_sft_base_teacher", "target_sft guided by the base") in specs
    assert ("sft_equal_compute", "sft at equal compute") in specs
    with pytest.raises(InputError, match="'dft' twice"):
        recipes(["default", "dft"])
