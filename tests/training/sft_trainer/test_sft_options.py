"""Options of an SFTConfig and of QSFTTrainer: refused where they compete with the method, honoured elsewhere."""

import pytest
from tiny_models import llama, parameters
from torch.testing import assert_close

import qlens
from qlens.core.errors import InputError


def test_what_competes_with_the_variant_is_refused_with_what_to_write(train, words):
    for options, message in (
        (dict(loss_type="dft"), r"loss_type='dft'\) competes with variant: give variant='dft' and leave loss_type out"),
        (dict(label_smoothing_factor=0.1), r"use variant='label_smoothing\(epsilon=...\)'"),
    ):
        with pytest.raises(InputError, match=message):
            train("qlens", words, steps=0, variant="sft", **options)
    with pytest.raises(InputError, match="compute_loss_func and variant both define the loss"):
        qlens.QSFTTrainer(llama(), train_dataset=words, variant="sft", compute_loss_func=lambda *args: 0)
    with pytest.raises(InputError, match="train_dataset has images"):
        train("qlens", [{**row, "n": 1, "images": []} for row in words], steps=0, variant="sft")


def test_models_that_cannot_be_read_are_named(train, words, tmp_path):
    with pytest.raises(InputError, match="model folder .*nowhere.* is not there"):
        train("qlens", words, steps=0, model=tmp_path / "nowhere", variant="sft")
    folder = tmp_path / "model"
    llama().save_pretrained(folder)
    (folder / "model.safetensors").unlink()
    with pytest.raises(InputError, match="model .* cannot be read: .*safetensors"):
        train("qlens", words, steps=0, model=str(folder), variant="sft")


def test_a_run_is_resumed_bit_for_bit(train, words, tmp_path):
    options = dict(steps=4, batch=2, variant="psft", save_strategy="steps", save_steps=2, old_every=3)
    whole = parameters(train("qlens", words, **options).model)
    resumed = train("qlens", words, **options | dict(steps=0), max_steps=4)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert_close(parameters(resumed.model), whole, rtol=0, atol=0)


@pytest.mark.filterwarnings("ignore::FutureWarning")  # of the old name
def test_activations_are_checkpointed_under_both_names(train, make, words):
    plain = parameters(train("qlens", words, variant="dft").model)
    assert_close(parameters(train("qlens", words, variant="dft", activation_checkpointing=True).model), plain)
    ends = []
    for options in ({}, dict(activation_checkpointing=True), dict(gradient_checkpointing=True)):
        trainer = make("target_sft", teacher=llama(1), fused=True, **options)
        trainer.train()
        ends.append(parameters(trainer.model))
    assert_close(ends[1], ends[0]), assert_close(ends[2], ends[0])


def test_a_teacher_may_be_a_path_and_evaluation_prepares_its_rows(train, words, tmp_path):
    llama(1, context=256).save_pretrained(tmp_path / "teacher")
    from datasets import Dataset

    ends = []
    for teacher in (llama(1, context=256), tmp_path / "teacher", str(tmp_path / "teacher")):
        trainer = train("qlens", words, variant="target_sft", teacher=teacher, fused=True)
        ends.append(parameters(trainer.model))
        assert trainer.evaluate(Dataset.from_list(words[:2]))["eval_nll"] > 0
    assert_close(ends[1], ends[0]), assert_close(ends[2], ends[0])
