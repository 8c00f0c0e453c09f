"""Models and tokenizers from disk, and whether they fit together."""

import shutil
from pathlib import Path

import pytest
import torch
from tiny import CHARACTERS, letters, llama

from qlens import sources
from qlens.errors import InputError


def test_tokenizers_are_compared_piece_by_piece():
    swapped = CHARACTERS[:5] + ["b", "a"] + CHARACTERS[7:]
    sources.check_same_tokenizer(letters(), letters(special=False))
    with pytest.raises(InputError, match="differ in 2: 'a' is 5 in one and 6 in the other"):
        sources.check_same_tokenizer(letters(), letters(order=swapped))
    with pytest.raises(InputError, match="32 and 33 pieces and differ in 1: 'é' is absent in one and 32"):
        sources.check_same_tokenizer(letters(), letters(order=[*CHARACTERS, "é"]))


@pytest.fixture
def folder(tmp_path):
    """A model and its tokenizer on disk."""
    llama().save_pretrained(tmp_path / "model")
    letters().save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def test_models_and_tokenizers_come_back_as_saved(folder):
    model = sources.load_model(str(folder), dtype="bfloat16")
    assert model.dtype == torch.bfloat16 and not model.training
    torch.testing.assert_close(sources.load_model(folder).lm_head.weight, llama().lm_head.weight)
    sources.check_same_tokenizer(sources.load_tokenizer(folder), letters())
    assert sources.context_length(model) == 32 and sources.vocabulary_size(model) == len(CHARACTERS)
    assert not any(p.requires_grad for p in sources.freeze(model).parameters())


@pytest.mark.parametrize(
    ("break_it", "message"),
    [
        (lambda folder: shutil.rmtree(folder), "model folder .* is not there"),
        (lambda folder: [file.unlink() for file in folder.iterdir()], "model folder .* is empty"),
        (lambda folder: (folder / "config.json").unlink(), "has no config.json"),
        (lambda folder: (folder / "config.json").write_text("{"), "cannot be read: .*not a valid JSON"),
        (lambda folder: (folder / "model.safetensors").unlink(), "cannot be read: .*model.safetensors"),
        (lambda folder: (folder / "model.safetensors").write_bytes(b"x"), "cannot be read: SafetensorError"),
        (lambda folder: _pickle_only(folder), "cannot be read: .*model.safetensors"),
        (lambda folder: _lose_a_weight(folder), "lacks 1 weights, lm_head.weight among them"),
    ],
    ids=["missing", "empty", "config", "bad config", "weights", "bad weights", "pickle", "a weight"],
)
def test_unreadable_model_folders(folder, break_it, message):
    break_it(folder)
    with pytest.raises(InputError, match=message):
        sources.load_model(folder)


def _pickle_only(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    torch.save(llama().state_dict(), folder / "pytorch_model.bin")


def _lose_a_weight(folder: Path) -> None:
    from safetensors.torch import load_file, save_file

    weights = load_file(folder / "model.safetensors")
    del weights["lm_head.weight"]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def test_unreadable_tokenizers_dtypes_devices_and_names(folder, monkeypatch):
    (folder / "tokenizer.json").write_text("{")
    with pytest.raises(InputError, match="tokenizer .* cannot be read"):
        sources.load_tokenizer(folder)
    with pytest.raises(InputError, match="dtype must be a floating-point type .* got 'int8'"):
        sources.load_model(folder, dtype="int8")
    with pytest.raises(InputError, match="device 'nope' cannot be used"):
        sources.load_model(folder, device="nope")
    with pytest.raises(InputError, match="model folder './nope' is not there"):
        sources.load_model("./nope")

    def offline(*args, **options):
        raise OSError("offline")

    monkeypatch.setattr(sources.AutoTokenizer, "from_pretrained", offline)
    with pytest.raises(InputError, match="'owner/name' cannot be read .*looked for on the hub.*offline"):
        sources.load_tokenizer("owner/name")
