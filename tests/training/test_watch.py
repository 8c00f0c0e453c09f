"""Watch: it does not change the run, its records match the targets, and they are saved and resumed."""

import random

import numpy as np
import pandas as pd
import pytest
import torch
import torch.nn.functional as F
from cases import case
from pandas.testing import assert_frame_equal
from tiny_models import letters, llama, parameters, rows, trainer_in
from transformers import Trainer

import qlens
from qlens import InputError, Watch
from qlens.data.from_text import tokens_from_examples

PROBES = rows(6, seed=3)


def drawing(logits, labels):
    """A loss that draws from every source of chance there is."""
    noise = torch.rand(1) + random.random() + np.random.rand()
    return (1 + noise) * F.cross_entropy(logits, labels, reduction="none")


def dropping(seed=0):
    """A model whose every step draws from torch."""
    model = llama(seed)
    model.config.attention_dropout = 0.3
    for layer in model.model.layers:
        layer.self_attn.attention_dropout = 0.3
    return model


def run(folder, watch=None, kind=qlens.QTrainer, steps=6, model=None, resume=None, **overrides):
    options = dict(variant="dft", kind=kind, model=model or dropping(), steps=steps, examples=rows(24)) | overrides
    trainer = trainer_in(folder, **options)
    if watch is not None:
        trainer.add_callback(watch)
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def test_watching_changes_no_bit_of_the_run(tmp_path):
    for kind in (qlens.QTrainer, Trainer):
        watch = Watch([drawing, "target_sft", "profit@random"], PROBES, teacher=llama(1), every=1)
        ends = [run(tmp_path / f"{kind.__name__}{i}", w, kind) for i, w in enumerate((None, watch))]
        assert torch.equal(*(parameters(each.model) for each in ends)), kind
        assert [e.get("loss") for e in ends[0].state.log_history] == [e.get("loss") for e in ends[1].state.log_history]
        assert sorted(watch.frame["step"].unique()) == list(range(7))


def test_watching_keeps_training_modes(tmp_path):
    runs = []
    for number, watch in enumerate((None, Watch("sft", PROBES, every=1))):
        model, modes = dropping(), []

        def note(model, *args, modes=modes):
            if torch.is_grad_enabled():  # a step of training, not a look
                modes.append([module.training for module in model.modules()])

        model.register_forward_pre_hook(note)
        run(tmp_path / str(number), watch, model=model, steps=3)
        runs.append(modes)
    assert runs[0] == runs[1] and len(runs[0]) == 3
    plain = llama().train()
    plain.model.norm.eval()
    Watch("sft", PROBES).record(plain, 0)
    assert plain.training and plain.lm_head.training and not plain.model.norm.training


def test_watch_records_match_the_targets(tmp_path):
    model, teacher = llama(), llama(1)
    before = tokens_from_examples(model, PROBES, teacher=teacher)
    teacher.save_pretrained(tmp_path / "teacher")
    watch = Watch(["kd", "gem", "dft"], PROBES, tokenizer=letters(), teacher=tmp_path / "teacher", every=4, tokens=9)
    run(tmp_path, watch, model=model, steps=6)
    after = tokens_from_examples(model, PROBES, teacher=teacher)
    rows_watched = torch.linspace(0, len(before) - 1, 9).long()
    frame = watch.frame
    assert frame.groupby("variant", sort=False)["step"].unique().map(list).to_dict() == {
        name: [0, 4, 6] for name in ("kd", "gem", "dft")
    }
    for name in ("kd", "gem", "dft"):
        start, end = (qlens.get(name).target(tokens[rows_watched]).at("unit") for tokens in (before, after))
        for step, target, tokens in ((0, start, before[rows_watched]), (6, end, after[rows_watched])):
            records = frame[(frame["variant"] == name) & (frame["step"] == step)]
            assert records["label"].tolist() == tokens.labels.tolist()
            expected = {"label_weight": target.label_weight, "trust": target.label_weight}
            expected |= {"negative_mass": target.negative_mass, "p_y": tokens.label_probs}
            expected |= {"drift": (target.q - start.q).abs().sum(1) / 2, "kl": target.kl, "reshape": target.reshape}
            for column, value in expected.items():
                np.testing.assert_allclose(
                    records[column], value.double(), atol=2e-6, rtol=1e-5, err_msg=f"{name} {column}"
                )
    last = frame[frame["step"] == 6].groupby("variant")
    assert last["drift"].max()["kd"] < 1e-6 < 1e-3 < last["drift"].max()["dft"], "a fixed teacher stays where it is"
    assert last["negative_mass"].max()["gem"] > 0.01 and last["drift_kl"].count()["gem"] < 9, "a signed Q has no KL"
    assert frame["text"].iloc[0] == letters().decode([frame["label"].iloc[0]])


def test_a_resumed_run_continues_its_records(tmp_path):
    def watch():
        return Watch(["dft", "kd"], PROBES, tokenizer=letters(), teacher=llama(1), every=2)

    saved = dict(save_strategy="steps", save_steps=3, save_only_model=False)
    whole, first, second = watch(), watch(), watch()
    run(tmp_path / "whole", whole, **saved)
    run(tmp_path / "cut", first, steps=6, **saved)
    assert_frame_equal(pd.read_csv(tmp_path / "cut" / "watch.csv"), first.frame)
    run(tmp_path / "cut", second, resume=str(tmp_path / "cut" / "checkpoint-3"), model=dropping(5), **saved)
    assert not second.frame.duplicated(["step", "variant", "token"]).any()
    assert_frame_equal(second.frame, whole.frame, rtol=1e-4, atol=1e-5)
    first_steps = [frame[frame["step"] <= 3] for frame in (second.frame, first.frame)]
    assert_frame_equal(*first_steps, check_exact=True)
    other = Watch("dft", PROBES, every=2)
    with pytest.raises(InputError, match=r"watch.csv is of other variants or examples: give Watch\(name="):
        run(tmp_path / "cut", other, resume=str(tmp_path / "cut" / "checkpoint-3"), **saved)
    anew = Watch("dft", PROBES, every=100)
    run(tmp_path / "cut", anew, steps=2)
    assert anew.frame["step"].unique().tolist() == [0, 2], "a new run begins anew"


def test_a_run_that_stops_early_is_recorded_to_its_end(tmp_path):
    class Stop(qlens.training.watch.TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            control.should_training_stop = state.global_step == 3

    watch = Watch("dft", PROBES, every=5)
    trainer = trainer_in(tmp_path, "dft", steps=6, examples=rows(24))
    trainer.add_callback(watch)
    trainer.add_callback(Stop())
    trainer.train()
    assert watch.frame["step"].unique().tolist() == [0, 3]


def test_mistakes_are_named():
    for arguments, message in [
        (dict(variants="kd"), r"kd needs a teacher: give Watch\(teacher="),
        (dict(variants="cft"), "cft needs 'critical', which Watch has no source for"),
        (dict(variants=[]), "variants is empty"),
        (dict(variants=["dft", "dft"]), "variants has a name twice: dft, dft"),
        (dict(examples=[]), "examples must be a non-empty list"),
        (dict(examples=["a text"]), r"give Watch\(tokenizer="),
        (dict(every=0), "every must be a whole number of at least 1, got 0"),
        (dict(tokens=2.5), "tokens must be a whole number of at least 1, got 2.5"),
    ]:
        with case(arguments, message):
            options = dict(variants="dft", examples=PROBES) | arguments
            with pytest.raises(InputError, match=message):
                Watch(options.pop("variants"), options.pop("examples"), **options)


def test_the_model_itself_is_refused_as_teacher(tmp_path):
    model = llama()
    with pytest.raises(InputError, match="teacher is the model being trained"):
        run(tmp_path, Watch("kd", PROBES, teacher=model), model=model)
    with pytest.raises(InputError, match="outside the vocabulary of the teacher 0..6"):
        run(tmp_path, Watch("kd", PROBES, teacher=llama(vocab=7)), model=llama())


def test_rows_of_text_are_encoded():
    watch = Watch("dft", ["a text", {"prompt": "two", "completion": "three"}], tokenizer=letters())
    watch.record(llama(), 0)
    assert watch.frame["text"].str.cat() == "a textthree</s>"


def test_a_method_that_does_not_exist_is_refused_before_the_run():
    examples = rows(4)
    for variants, says in (
        ("dfft", "dfft.*Did you mean dft"),
        (["sft", "dfft"], "dfft.*Did you mean dft"),
        ("sft(alpha=2)", "sft has no parameter 'alpha'"),
        (3, "a loss is a Variant, a spec string or a callable, got int"),
        (["dft", "dft"], "a name twice"),
        ("kd", "teacher"),
    ):
        with pytest.raises(InputError, match=says):
            Watch(variants, examples)
    for nothing in ([], [{"input_ids": [3], "labels": [3]}]):
        with pytest.raises(InputError, match="examples"):
            Watch("sft", nothing)
