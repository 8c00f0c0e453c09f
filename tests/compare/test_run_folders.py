"""A run folder is bound to its configuration, code, versions, data and learning rates."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from mini_lab import MINI

import qlens
from qlens import InputError
from qlens.analysis.compare import config
from qlens.analysis.compare.learning_rates import Choice
from qlens.analysis.compare.recipes import recipes
from qlens.analysis.compare.run_folder import code, versions
from qlens.training.fitting import fit


def test_a_folder_of_another_configuration_is_refused_naming_the_key(compare, tmp_path):
    compare(seeds=2)
    before = (tmp_path / "run" / "config.json").read_bytes()
    for change, message in (
        ({"steps": 4}, r"settings.words.steps was 3, now 4"),
        ({"seeds": [0, 5]}, r"seeds was \[0, 1\], now \[0, 5\]"),
        ({"variants": ["dft"]}, r"methods.target_sft was .*now .missing"),
        ({"learning_rate": 0.5}, r"learning_rate was 0.001, now 0.5"),
    ):
        with pytest.raises(InputError, match=message):
            compare(**change)
        assert (tmp_path / "run" / "config.json").read_bytes() == before


def test_folders_of_another_version_or_of_changed_data_are_refused(compare, user_files, tmp_path, monkeypatch):
    data = tmp_path / "words.jsonl"
    data.write_bytes(user_files["data"].read_bytes())
    compare("dft", data=data, seeds=1)
    data.write_text(data.read_text(encoding="utf-8").replace("ban", "pan"), encoding="utf-8")
    with pytest.raises(InputError, match="words.jsonl has changed since"):
        compare("dft", data=data, seeds=1)
    with monkeypatch.context() as patch, pytest.raises(InputError, match=r"versions\.torch was .*9\.9\.9"):
        patch.setattr("qlens.analysis.compare.config.versions", lambda: versions() | {"torch": "9.9.9"})
        compare("dft", data=data, seeds=1)
    with monkeypatch.context() as patch, pytest.raises(InputError, match=r"code was .*, now .edited"):
        patch.setattr("qlens.analysis.compare.config.code", lambda: "edited")
        compare("dft", data=data, seeds=1)
    strange = tmp_path / "strange"
    strange.mkdir()
    (strange / "thesis.txt").write_text("precious", encoding="utf-8")
    with pytest.raises(InputError, match="no run folder"):
        compare(out=strange)
    assert [path.name for path in strange.iterdir()] == ["thesis.txt"]


def test_the_code_digest_changes_with_any_edited_file(tmp_path, monkeypatch):
    before, package = code(), tmp_path / "variants"
    shutil.copytree(Path(qlens.variants.__path__[0]).resolve(), package)
    monkeypatch.setattr(qlens.variants, "__path__", [str(package)])
    assert code() == before
    with (package / "dft.py").open("a") as file:
        file.write("#")
    assert code() != before


def test_the_code_digest_does_not_depend_on_the_hash_seed(tmp_path, monkeypatch):
    (tmp_path / "own.py").write_text(
        "def f(logits, labels):\n    return -logits[:, 0] if labels in {'a', 'b'} else 0\n"
    )
    look = "from qlens.analysis.compare import config, recipes; print(config._code(recipes.recipes('own.py:f')['own.py:f']))"
    environment = os.environ | {"PYTHONHASHSEED": "1"}
    command = [sys.executable, "-c", look]
    other = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=True).stdout
    monkeypatch.chdir(tmp_path)
    here = f"{config._code(recipes('own.py:f')['own.py:f'])}\n"
    assert hash("a") != int(subprocess.run([sys.executable, "-c", "print(hash('a'))"], env=environment, capture_output=True,
                                           text=True, check=True).stdout)  # fmt: skip
    assert other == here and "code " in here


def test_jobs_train_at_the_chosen_learning_rates(tmp_path_factory, tmp_path, monkeypatch):
    monkeypatch.setenv("QLENS_CACHE", str(tmp_path_factory.mktemp("cache")))
    rates_used = {}

    def spied(model, examples, **options):
        rates_used[options["variant"].spec, options["steps"]] = options["learning_rate"]
        return fit(model, examples, **options)

    monkeypatch.setattr("qlens.analysis.compare.jobs.fit", spied)
    monkeypatch.setattr("qlens.analysis.compare.comparison.settle_all", chosen_by_hand)

    def compare():
        return qlens.compare(
            ["sft", "dft", "sft_equal_compute"],
            settings=MINI,
            seeds=1,
            steps=3,
            jobs=1,
            progress=False,
            out=tmp_path / "run",
        )

    study = compare()
    rates = study.rates[study.rates["chosen"]].set_index("method")["learning_rate"]
    assert rates_used == {("sft", 3): 0.01, ("dft", 3): 0.02, ("sft", 4): 0.03}
    assert rates[["sft", "dft", "sft_equal_compute"]].tolist() == [0.01, 0.02, 0.03]
    record = tmp_path / "run" / "jobs" / "mini--dft--0.json"
    assert json.loads(record.read_text())["made_with"] == {"recipe": "dft", "learning_rate": 0.02, "reads": True}
    rates_used.clear()
    record.write_text(record.read_text().replace("0.02", "0.5", 1))  # as if a search had chosen otherwise
    compare()
    assert rates_used == {("dft", 3): 0.02}, "what was made at another rate is made again"


def chosen_by_hand(rows, sources, learning_rate, lr_grid):
    """Every method another rate."""
    rates = {"base": 0.0, "sft": 0.01, "dft": 0.02, "sft_equal_compute": 0.03}
    return {
        ("mini", name): Choice(recipe=among[0], learning_rate=rates[name], origin="given", scores={})
        for name, among in rows.items()
    }


def test_the_default_folder_is_named_by_the_configuration(compare, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for _ in range(2):
        compare("sft", seeds=1, out=None)
    compare("sft", seeds=1, out=None, steps=1)
    assert len(list((tmp_path / "runs").iterdir())) == 2


def test_a_refusal_names_the_file_that_has_changed(compare, user_files, tmp_path):
    shutil.copytree(user_files["model"], tmp_path / "model")
    loss = tmp_path / "own_loss.py"
    loss.write_text("def f(logits, labels):\n    return -logits.log_softmax(-1).gather(1, labels[:, None]).mean()\n")
    arguments = {"model": tmp_path / "model", "teacher": None, "seeds": 1}
    compare(f"{loss}:f", **arguments)
    weights = tmp_path / "model" / "model.safetensors"
    before, size = weights.read_bytes(), weights.stat().st_size
    middle = bytearray(before)
    middle[size // 2] ^= 1  # as a merged adapter changes layers, but neither the beginning nor the end
    weights.write_bytes(bytes(middle))
    with pytest.raises(InputError, match=r"the file \S+/model.safetensors has changed since"):
        compare(f"{loss}:f", **arguments)
    weights.write_bytes(before)
    loss.write_text(loss.read_text() + "# another\n")
    with pytest.raises(InputError, match=r"the file \S+/own_loss.py has changed since"):
        compare(f"{loss}:f", **arguments)
