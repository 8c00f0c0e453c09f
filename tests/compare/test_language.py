"""Language and data of the lab: an exact verifier, disjoint prompts, noise as requested."""

import dataclasses

import numpy as np
import pytest
from mini_lab import MINI, PROBLEM

import qlens.lab
from qlens.core.errors import InputError, UnknownName
from qlens.data.examples import encode
from qlens.lab import SETTINGS, Annotator, World
from qlens.lab.language import SPLITS, compute, split_of
from qlens.lab.models import longest

VERDICTS = [
    ("first 7 plus 5 is 2 , then 2 minus 3 makes 9 , now 9 times 3 gives 7 , so answer 7", True),
    ("first 7 plus 5 is 4 , hence answer 7", True),  # only the answer counts
    ("thus the answer 7 ", True),
    ("first 7 plus 5 is 2 , then 2 minus 3 makes 9 , now 9 times 3 gives 7 , so answer 8", False),
    ("", False),
    ("7", False),
    ("so answer", False),
    ("so answer answer 7", False),
    ("so answer 7 7", False),
    ("so answer 77", False),
    ("so answer 7 , then", False),
    ("so answer 2 , so answer 7", False),
    ("so answer 7 , so answer 7", False),
    ("so unanswer 7", False),
    ("so answer is 7", False),
    ("so answer \u0667", False),
]


def test_the_verifier_is_exact():
    world = World(MINI)
    for completion, right in VERDICTS:
        assert world.verify(PROBLEM, completion) is right, completion


def test_problems_are_computed_from_left_to_right_modulo_the_modulus():
    assert PROBLEM.prompt == "7 plus 5 minus 3 times 3 ?"
    assert PROBLEM.answer == 7
    assert [compute(operation, 3, 5, 6) for operation in ("plus", "minus", "times")] == [2, 4, 3]


@pytest.mark.parametrize("setting", [MINI, SETTINGS["clean-labels"]], ids=lambda setting: setting.name)
def test_the_splits_share_no_prompt(setting):
    world = World(setting)
    parts = {role: {row["prompt"] for row in world._rows(role)} for role in ("corpus", "tutor")}
    parts |= {name: {each.prompt for each in getattr(world, name)} for name in ("demonstrations", "validation", "test")}
    assert len(set().union(*parts.values())) == sum(map(len, parts.values()))
    assert {name: {split_of(prompt) for prompt in prompts} for name, prompts in parts.items()} == {
        n: {n} for n in SPLITS
    }
    for name in ("demonstrations", "validation", "test"):
        assert len(parts[name]) == len(getattr(world, name)) == getattr(setting, name)


def test_environments_depend_on_the_setting_and_seed():
    first, second, other = World(MINI), World(MINI), World(dataclasses.replace(MINI, seed=5))
    assert first.demonstrations == second.demonstrations and first.test == second.test
    assert first.demonstrations != other.demonstrations and first.test != other.test
    assert first.folder == second.folder != other.folder


def test_clean_rows_are_correct_and_the_noise_share_is_as_set():
    noisy = World(dataclasses.replace(SETTINGS["strong-prior"], scribe=Annotator(), noise=0.4))
    dirty = [each for each in noisy.demonstrations if not each.clean]
    assert len(dirty) / len(noisy.demonstrations) == pytest.approx(0.4, abs=0.03)
    right = [noisy.verify(each.problem, each.completion) for each in noisy.demonstrations if each.clean]
    assert all(right)
    lucky = [noisy.verify(each.problem, each.completion) for each in dirty]  # a wrong step may still end right
    assert 0 < np.mean(lucky) < 0.2
    spotless = World(dataclasses.replace(MINI, scribe=Annotator(), noise=0.0))
    assert all(each.clean for each in spotless.demonstrations)


def test_the_wording_is_not_unique():
    for name in SETTINGS:
        demonstrations = World(SETTINGS[name]).demonstrations
        assert len({each.completion.split()[0] for each in demonstrations}) > 2
        assert len({each.completion.split()[-3] for each in demonstrations}) > 2


def test_every_word_round_trips_through_the_tokenizer():
    for name in SETTINGS:
        world = World(SETTINGS[name])
        texts = [each.completion for each in world.demonstrations[:200]] + [each.prompt for each in world.test]
        ids = world.tokenizer(texts)["input_ids"]
        assert not any(world.tokenizer.unk_token_id in row for row in ids)
        assert world.tokenizer.batch_decode(ids) == texts
        assert max(len(row) for row in ids) < longest(world.setting)
        row = {"prompt": texts[-1], "completion": texts[0]}
        assert encode([row], world.tokenizer, None).examples[0]["input_ids"] == [
            *ids[-1],
            *ids[0],
            world.tokenizer.eos_token_id,
        ]


def test_an_unknown_setting_names_near_ones():
    with pytest.raises(UnknownName, match="strong-pior.*Did you mean.*strong-prior"):
        qlens.lab.world("strong-pior")


def test_an_invalid_setting_is_refused():
    for change in ({"noise": 1.5}, {"modulus": 12}, {"depth": 1}, {"test": 10**6}, {"name": "../a"}):
        with pytest.raises(InputError, match=next(iter(change))):
            dataclasses.replace(MINI, **change)


def test_an_invalid_annotator_is_refused():
    for change in ({"slip": (0.0, -0.1, 0.0)}, {"false": (0.0, 0.0, 2.0)}, {"wording": 0.0}):
        with pytest.raises(InputError, match=next(iter(change))):
            Annotator(**change)
