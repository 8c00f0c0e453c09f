"""What a method is compared on: the lab's world, or a model and data of one's own."""

import numpy as np
import torch
from mini_lab import MINI
from tiny import letters, llama

import qlens
from qlens.analysis.compare.environments import Lab, Real, open_ground
from qlens.analysis.compare.evaluation import held_tokens
from qlens.lab import Setting
from qlens.lab.setting import Author


def test_truth_stands_at_the_digits_it_judges(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("QLENS_CACHE", str(tmp_path_factory.mktemp("cache")))
    ground = open_ground(Lab(MINI))
    tokens = list(held_tokens(ground.start(), ground.held))
    labels = torch.cat([each.labels for each in tokens])
    assert len(labels) == len(ground.truth)
    words = np.array(ground.tokenizer.convert_ids_to_tokens(labels.tolist()))
    assert all(word.isdigit() for word in words[~np.isnan(ground.truth)])
    world = qlens.lab.World(MINI)
    shown = [each.completion for each in world.demonstrations[-len(ground.held) :]]
    assert " ".join(words) == " ".join(f"{text} <eos>" for text in shown)
    known = {"plus": lambda a, b: a + b, "minus": lambda a, b: a - b, "times": lambda a, b: a * b}
    for at in np.flatnonzero(~np.isnan(ground.truth)):
        a, operation, b = words[at - 4 : at - 1]
        if operation in known:
            assert ground.truth[at] == (known[operation](int(a), int(b)) % MINI.modulus == int(words[at]))
        else:
            assert words[at - 1] == "answer"


def test_rows_beyond_the_smaller_context_are_dropped_and_counted(compare, own, tmp_path, capsys):
    study = compare("sft", seeds=1, progress=True)
    said = capsys.readouterr()
    assert "1 of 41 rows exceed the context of 32" in said.err.replace("\n", " ") and not said.out
    assert study.config["noted"]["settings"]["words"]["dropped"] == 1
    llama(1, context=17).save_pretrained(tmp_path / "short")
    letters().save_pretrained(tmp_path / "short")
    ground = open_ground(Real.of(str(own["model"]), str(own["data"]), str(tmp_path / "short")))
    assert ground.noted["context"] == 17 and ground.noted["dropped"] > 1


def test_held_out_rows_are_the_same_whatever_else_and_never_trained_on(own):
    grounds = [open_ground(Real.of(str(own["model"]), str(own["data"]), None, steps=steps)) for steps in (1, 2)]
    assert grounds[0].held == grounds[1].held and len(grounds[0].held) == 8
    assert not any(example in grounds[0].train for example in grounds[0].held)
    assert len(grounds[0].train) + len(grounds[0].held) == 40


def test_a_lab_of_ones_own_is_compared_too(tmp_path_factory, tmp_path, monkeypatch):
    monkeypatch.setenv("QLENS_CACHE", str(tmp_path_factory.mktemp("cache")))
    tiny = dict(depth=2, demonstrations=60, validation=4, test=6, width=16, layers=1, heads=2, k=2)
    quick = dict(pretrain_steps=4, teach_steps=2, pretrain_batch=8, steps=2, batch_size=4)
    mini = Setting(name="mini", corpus=Author(), tutor=Author(), noise=0.5, **tiny, **quick)
    study = qlens.compare(["sft", "kd"], settings=mini, seeds=2, jobs=1, progress=False, out=tmp_path / "run")
    assert study.config["metric"]["name"] == "avg@2" and study.config["noted"]["settings"]["mini"]["base"] <= 1
    table = study.table()
    assert table["method"].tolist() == ["base", "sft", "kd"] and set(table["n"]) == {"2 x 6"}
    assert study.results["score"].isin([0, 0.5, 1]).all()
    ground = open_ground(Lab(mini))
    assert len(ground.held) == 12 and len(ground.train) == 48
    assert "mini" in study.to_latex() and study.plot().axes
    assert (study.table()["pass_at_k"] >= study.table()["mean"]).all()
    assert all(sense in str(study) for sense in ("known: ", "noisy: errors asked for 0.5", "not unique: ", "missing: "))
    counts = study.truths()[["good", "noisy"]].sum(axis=1)
    assert set(counts) == {12 * 3}, "two results and an answer for each of 12 held-out demonstrations"
