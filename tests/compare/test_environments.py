"""Environments of a comparison: the lab, or the user's model and data."""

import numpy as np
import torch
from mini_lab import MINI
from tiny_models import letters, llama

import qlens
from qlens.analysis.compare.environments import LabSource, open_environment
from qlens.analysis.compare.evaluation import held_out_tokens
from qlens.analysis.compare.user_source import UserSource
from qlens.lab import Setting
from qlens.lab.setting import Annotator


def test_truth_labels_align_with_the_digits(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("QLENS_CACHE", str(tmp_path_factory.mktemp("cache")))
    ground = open_environment(LabSource(MINI))
    tokens = list(held_out_tokens(ground.start(), ground.held_out))
    labels = torch.cat([each.labels for each in tokens])
    assert len(labels) == len(ground.correct)
    words = np.array(ground.tokenizer.convert_ids_to_tokens(labels.tolist()))
    assert all(word.isdigit() for word in words[~np.isnan(ground.correct)])
    world = qlens.lab.World(MINI)
    completions = [each.completion for each in world.demonstrations[-len(ground.held_out) :]]
    assert " ".join(words) == " ".join(f"{text} <eos>" for text in completions)
    operations = {"plus": lambda a, b: a + b, "minus": lambda a, b: a - b, "times": lambda a, b: a * b}
    for at in np.flatnonzero(~np.isnan(ground.correct)):
        a, operation, b = words[at - 4 : at - 1]
        if operation in operations:
            assert ground.correct[at] == (operations[operation](int(a), int(b)) % MINI.modulus == int(words[at]))
        else:
            assert words[at - 1] == "answer"


def test_rows_beyond_the_smaller_context_are_dropped_and_counted(compare, user_files, tmp_path, capsys):
    study = compare("sft", seeds=1, progress=True)
    output = capsys.readouterr()
    says = "40 examples of 41 rows of question/answer; dropped 1: too long, more than 32 tokens"
    assert says in output.err.replace("\n", " ") and not output.out
    assert "held-out NLL after 2 of 2 jobs" in output.err and "Report: " in output.err
    assert study.config["noted"]["settings"]["words"]["dropped"] == 1
    llama(1, context=17).save_pretrained(tmp_path / "short")
    letters().save_pretrained(tmp_path / "short")
    ground = open_environment(UserSource.of(str(user_files["model"]), str(user_files["data"]), str(tmp_path / "short")))
    assert ground.metadata["context"] == 17 and ground.metadata["dropped"] > 1


def test_held_out_rows_are_fixed_and_disjoint_from_training(user_files):
    grounds = [
        open_environment(UserSource.of(str(user_files["model"]), str(user_files["data"]), None, steps=steps))
        for steps in (1, 2)
    ]
    assert grounds[0].held_out == grounds[1].held_out and len(grounds[0].held_out) == 8
    assert not any(example in grounds[0].train for example in grounds[0].held_out)
    assert len(grounds[0].train) + len(grounds[0].held_out) == 40


def test_a_custom_setting_is_compared(tmp_path_factory, tmp_path, monkeypatch):
    monkeypatch.setenv("QLENS_CACHE", str(tmp_path_factory.mktemp("cache")))
    tiny = dict(depth=2, demonstrations=60, validation=4, test=6, width=16, layers=1, heads=2, k=2)
    quick = dict(corpus_rows=80, pretrain_steps=4, teach_steps=2, pretrain_batch=8, steps=1, batch_size=4)
    mini = Setting(name="mini", corpus=Annotator(), tutor=Annotator(), noise=0.5, **tiny, **quick)
    study = qlens.compare(["sft", "kd"], settings=mini, seeds=2, jobs=1, progress=False, out=tmp_path / "run")
    assert study.config["metric"]["name"] == "avg@2" and study.config["noted"]["settings"]["mini"]["base"] <= 1
    table = study.table()
    assert table["method"].tolist() == ["base", "sft", "kd"] and set(table["n"]) == {"2 x 6"}
    assert study.results["score"].isin([0, 0.5, 1]).all()
    ground = open_environment(LabSource(mini))
    assert len(ground.held_out) == 12 and len(ground.train) == 48
    assert "mini" in study.to_latex() and study.plot().axes
    assert (study.table()["pass_at_k"] >= study.table()["mean"]).all()
    subjects = ("prior knowledge: ", "error 0.5; measured share", "ambiguity: ", "teacher: ")
    assert all(subject in str(study) for subject in subjects)
    counts = study.label_auroc()[["good", "noisy"]].sum(axis=1)
    assert set(counts) == {12 * 3}, "two results and an answer for each of 12 held-out demonstrations"
