"""The lab: reproducible models, scores, and a cache whose parts are complete or not used."""

import dataclasses
import shutil
import subprocess
import sys
import threading

import numpy as np
import pytest
import torch
from mini_lab import MINI, PROBLEM
from transformers import AutoModelForCausalLM, AutoTokenizer

import qlens.lab
from qlens.analysis.study import tables
from qlens.core import progress
from qlens.core.errors import InputError
from qlens.lab import Annotator, World, cache

PARTS = ("base", "teacher", "measured")


@pytest.fixture
def cached(lab_cache, tmp_path, monkeypatch):
    """A copy of that cache, in use, to be spoiled at will."""
    shutil.copytree(lab_cache, tmp_path / "cache")
    monkeypatch.setenv("QLENS_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def built_parts(monkeypatch):
    """The parts that are built from now on, in order."""
    names = []
    for part in PARTS:
        original = getattr(World, f"_make_{part}")

        def noted(self, *args, part=part, original=original):
            names.append(part)
            original(self, *args)

        monkeypatch.setattr(World, f"_make_{part}", noted)
    return names


def seals(world):
    return {part: (world.folder / part / cache.SEAL).read_text() for part in PARTS}


def test_base_and_teacher_are_reproducible_and_keep_the_random_state(lab_cache, tmp_path, monkeypatch):
    monkeypatch.setenv("QLENS_CACHE", str(lab_cache))
    before = seals(World(MINI))
    monkeypatch.setenv("QLENS_CACHE", str(tmp_path))
    torch.manual_seed(3), np.random.seed(3)
    expected = torch.rand(3), np.random.rand(3)
    torch.manual_seed(3), np.random.seed(3)
    assert seals(qlens.lab.world(MINI, progress=False)) == before
    torch.testing.assert_close(torch.rand(3), expected[0], rtol=0, atol=0)
    np.testing.assert_array_equal(np.random.rand(3), expected[1])


def test_a_second_call_builds_nothing(cached, built_parts):
    world = qlens.lab.world(MINI, progress=False)
    assert built_parts == []
    measured = world.measured
    assert set(measured) == {name for words in tables.MEASURED.values() for name in words}, (
        "each has a place in the tables"
    )
    assert measured["noise"] == np.mean([not each.clean for each in world.demonstrations])
    assert measured["noise_asked"] == MINI.noise and measured["kl_base_teacher"] > 0
    judged = [right for each in world.demonstrations for right in each.correct if right is not None]
    np.testing.assert_allclose(measured["wrong_digits"], np.mean(np.logical_not(judged)))
    assert len(judged) == (MINI.depth + 1) * MINI.demonstrations
    assert 1 < measured["wordings"] <= 4 and 0 <= measured["base_agrees"] <= 1


def test_an_interrupted_build_resumes_after_the_finished_parts(cached, built_parts, monkeypatch):
    folder = World(MINI).folder
    expected = seals(World(MINI))
    shutil.rmtree(folder / "teacher"), shutil.rmtree(folder / "measured")

    def interrupted(*args, **kwargs):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr("qlens.lab.environment.fit", interrupted)
        qlens.lab.world(MINI, progress=False)
    assert (folder / "teacher.partial").is_dir() and not (folder / "teacher").exists()
    built_parts.clear()
    assert seals(qlens.lab.world(MINI, progress=False)) == expected
    assert built_parts == ["teacher", "measured"]
    assert not list(folder.glob("*.partial"))


def spoil_weights(folder):
    path = folder / "base" / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1])


def spoil_seal(folder):
    (folder / "base" / cache.SEAL).write_text("{")


def spoil_files(folder):
    (folder / "base" / "config.json").unlink()


def unseal(folder):
    (folder / "base" / cache.SEAL).unlink()


def test_a_damaged_part_is_detected(cached, tmp_path):
    for damage in (spoil_weights, spoil_seal, spoil_files, unseal):
        folder = tmp_path / damage.__name__
        shutil.copytree(World(MINI).folder, folder)
        assert cache.whole(folder / "base")
        damage(folder)
        assert not cache.whole(folder / "base"), damage.__name__


def test_a_damaged_part_and_its_dependents_are_rebuilt(cached, built_parts):
    folder, expected = World(MINI).folder, seals(World(MINI))
    spoil_weights(folder)
    assert seals(qlens.lab.world(MINI, progress=False)) == expected
    assert built_parts == list(PARTS)


def test_other_parameters_use_another_cache_folder(cached):
    for change in ({"teach_rate": 1e-3}, {"seed": 1}, {"tutor": Annotator(slip=(0.06, 0.06, 0.06))}):
        other = World(dataclasses.replace(MINI, **change))
        assert not any(cache.whole(other.folder / part) for part in PARTS)
        assert all(cache.whole(World(MINI).folder / part) for part in PARTS)


def test_another_lab_version_uses_another_cache_folder(cached, monkeypatch):
    monkeypatch.setattr("qlens.lab.environment.VERSION", 0)
    assert not World(MINI).folder.exists()


def test_concurrent_requests_build_once(tmp_path, built_parts, monkeypatch):
    monkeypatch.setenv("QLENS_CACHE", str(tmp_path))
    threads = [threading.Thread(target=qlens.lab.world, args=(MINI, False)) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert built_parts == list(PARTS)


def test_the_lock_works_between_processes_and_ends_with_its_owner(tmp_path):
    take = f"from filelock import FileLock; lock = FileLock({str(tmp_path / 'lock')!r}); lock.acquire()"
    code = f"{take}; print(1, flush=True); input()"
    with subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as owner:
        owner.stdout.readline()
        entered = threading.Event()

        def enter():
            with cache.locked(tmp_path):
                entered.set()

        waiting = threading.Thread(target=enter)
        waiting.start()
        assert not entered.wait(0.3)
        owner.kill()
        assert entered.wait(10)
        waiting.join()


def test_the_models_are_hugging_face_folders(cached):
    world = qlens.lab.world(MINI, progress=False)
    for name, fresh in (("base", world.base()), ("teacher", world.teacher())):
        model = AutoModelForCausalLM.from_pretrained(world.folder / name)
        tokenizer = AutoTokenizer.from_pretrained(world.folder / name)
        assert tokenizer.get_vocab() == world.tokenizer.get_vocab()
        ids = tokenizer(world.test[0].prompt, return_tensors="pt")["input_ids"]
        torch.testing.assert_close(model(ids)["logits"], fresh(ids)["logits"])
        assert fresh.dtype == torch.float32 and not fresh.training
    assert world.base() is not world.base()


def test_scores_are_shares_of_k_and_the_same_for_the_same_seed(cached):
    world = qlens.lab.world(MINI, progress=False)
    model = world.base().train()
    scores = world.score(model, world.test, k=4, seed=0)
    assert scores.shape == (12,) and set(scores) <= {0, 0.25, 0.5, 0.75, 1}
    assert model.training
    np.testing.assert_array_equal(scores, world.score(model, world.test, k=4, seed=0))


def test_scores_count_right_completions(cached, monkeypatch):
    world = qlens.lab.world(MINI, progress=False)
    right = [f"so answer {problem.answer}" for problem in world.test]
    monkeypatch.setattr("qlens.lab.environment.sample", lambda *args: [[text, "so answer"] for text in right])
    np.testing.assert_array_equal(world.score(world.base(), world.test, k=2, seed=0), np.full(12, 0.5))


def test_padding_does_not_change_greedy_answers(cached):
    world = qlens.lab.world(MINI, progress=False)
    model, short, long = world.teacher(), world.test[0], PROBLEM
    options = {"do_sample": False, "max_new_tokens": 8, "pad_token_id": 0}
    alone = model.generate(**world.tokenizer(short.prompt, return_tensors="pt", return_token_type_ids=False), **options)
    both = world.tokenizer([short.prompt, long.prompt], padding=True, return_tensors="pt", return_token_type_ids=False)
    assert both["attention_mask"][0, 0] == 0
    torch.testing.assert_close(model.generate(**both, **options)[0, -8:], alone[0, -8:])


def test_nothing_to_sample_is_refused(cached):
    world = qlens.lab.world(MINI, progress=False)
    for k, count in ((0, 2), (2, 0)):
        with pytest.raises(InputError, match="k"):
            world.score(world.base(), world.test[:count], k=k, seed=0)


def test_a_cache_that_cannot_be_written_is_named(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("QLENS_CACHE", str(tmp_path / "file"))
    with pytest.raises(InputError, match="QLENS_CACHE"):
        qlens.lab.world(MINI, progress=False)


def test_the_cache_follows_qlens_cache_then_xdg_then_home(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("QLENS_CACHE", str(tmp_path / "own"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache.root() == tmp_path / "own"
    monkeypatch.delenv("QLENS_CACHE")
    assert cache.root() == tmp_path / "xdg" / "qlens"
    home = tmp_path / "home" / ".cache" / "qlens"
    home.mkdir(parents=True)
    assert cache.root() == home, "an existing cache is not built again"
    (tmp_path / "xdg" / "qlens").mkdir(parents=True)
    assert cache.root() == tmp_path / "xdg" / "qlens"
    for unset in ("", "relative"):
        monkeypatch.setenv("XDG_CACHE_HOME", unset)
        assert cache.root() == home


def test_progress_is_lines_where_there_is_no_terminal(capsys, monkeypatch):
    clock = iter(range(0, 10_000, 20))
    monkeypatch.setattr("qlens.core.progress.time.monotonic", lambda: next(clock))
    assert list(progress.track(range(5), 5, "training")) == [0, 1, 2, 3, 4]
    assert capsys.readouterr().err.splitlines() == [
        "training: 2 of 5 after 0:40, about 1:00 left",
        "training: 4 of 5 after 1:20, about 0:20 left",
        "training: 5 of 5 after 1:40",
    ]
    assert list(progress.track(range(2), 2, "training", progress=False)) == [0, 1]
    assert not capsys.readouterr().err


def test_a_build_reports_its_steps(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("QLENS_CACHE", str(tmp_path))
    qlens.lab.world(MINI)
    total = MINI.pretrain_steps + MINI.teach_steps + 1
    assert f"building mini: {total} of {total} after 0:" in capsys.readouterr().err
