"""Evaluation sets without a loss, refused before the first step of training."""

import functools

import pytest
import torch
from tiny_models import VOCAB, rows, trainer_in, without_labels

from qlens.core.errors import InputError
from qlens.data.collator import collate


@pytest.fixture
def make(tmp_path):
    """Trainers that evaluate after two of four steps."""
    return functools.partial(trainer_in, tmp_path, steps=4, eval_strategy="steps", eval_steps=2)


def test_evaluation_sets_without_a_loss_are_refused_before_the_first_step(make):
    good = rows(4)
    unlabelled = [{"input_ids": row["input_ids"]} for row in good]
    masked = [{**row, "labels": [-100] * len(row["labels"])} for row in good]
    outside = [{**row, "labels": [VOCAB] * len(row["labels"])} for row in good]
    weighted = [{**row, "weight": float("nan")} for row in good]
    whole = [{**row, "advantage": 1.0} for row in good]
    cases = [
        (dict(eval_dataset=unlabelled), r"\(eval\): example 0 of the batch needs input_ids and labels"),
        (dict(eval_dataset=masked), r"\(eval\) has no supervised token"),
        (dict(eval_dataset={"a": good, "b": masked}), r"\(eval_b\) has no supervised token"),
        (dict(eval_dataset=outside), r"\(eval\): .*outside the vocabulary"),
        (dict(eval_dataset=weighted), r"\(eval\): weight holds NaN"),
        (dict(eval_dataset=good, variant="reinforce", examples=whole), r"\(eval\): reinforce needs 'advantage'"),
    ]
    for arguments, message in cases:
        trainer = make(**arguments)
        with pytest.raises(InputError, match=message):
            trainer.train()
        assert trainer.state.global_step == 0
    trainer = make(eval_dataset=masked, eval_on_start=True, eval_strategy="no")
    with pytest.raises(InputError, match="has no supervised token"):
        trainer.train()


def test_a_collator_without_labels_is_refused(make):
    trainer = make(eval_dataset=rows(4))
    trainer.data_collator = without_labels
    with pytest.raises(InputError, match=r"the evaluation set \(eval\): the batch has no labels"):
        trainer.train()


def test_checking_the_evaluation_set_changes_no_draw(make):
    def collator(examples):
        return {name: value + 0 * torch.rand(1).long() for name, value in collate(examples).items()}

    after = []
    for evaluates in ("no", "epoch"):
        trainer = make(eval_dataset=rows(4), data_collator=collator, eval_strategy=evaluates)
        torch.manual_seed(0)
        trainer._check_evaluations()
        after.append(torch.rand(1).item())
    assert after[0] == after[1]


def test_an_unused_evaluation_set_is_not_checked(make):
    trainer = make(eval_dataset=[{"input_ids": [1, 2], "labels": [-100, -100]}], eval_strategy="no")
    trainer.train()
    assert trainer.state.global_step == 4
