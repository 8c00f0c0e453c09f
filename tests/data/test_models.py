"""Models and tokenizers from disk, and whether they fit together."""

import shutil
from pathlib import Path

import pytest
import torch
from tiny_models import CHARACTERS, letters, llama

import qlens
from qlens.analysis.compare.user_source import UserSource
from qlens.cli.inputs import Source, own_tokens
from qlens.core.errors import InputError
from qlens.core.numerics import dtype_name
from qlens.data import compatibility, models
from qlens.data.examples import encode
from qlens.data.vocabularies import match_vocabulary
from qlens.engine.models.backbone import Backbone


def test_tokenizers_are_compared_piece_by_piece():
    swapped = CHARACTERS[:5] + ["b", "a"] + CHARACTERS[7:]
    compatibility.check_same_tokenizer(letters(), letters(special=False))
    with pytest.raises(InputError, match="differ in 2: 'a' is 5 in one and 6 in the other"):
        compatibility.check_same_tokenizer(letters(), letters(order=swapped))
    with pytest.raises(InputError, match="32 and 33 pieces and differ in 1: 'é' is absent in one and 32"):
        compatibility.check_same_tokenizer(letters(), letters(order=[*CHARACTERS, "é"]))


@pytest.fixture
def folder(tmp_path):
    """A model and its tokenizer on disk."""
    llama().save_pretrained(tmp_path / "model")
    letters().save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def test_models_and_tokenizers_come_back_as_saved(folder):
    model = models.load_model(str(folder), dtype="bfloat16")
    assert model.dtype == torch.bfloat16 and not model.training
    torch.testing.assert_close(models.load_model(folder).lm_head.weight, llama().lm_head.weight)
    compatibility.check_same_tokenizer(models.load_tokenizer(folder), letters())
    assert compatibility.context_length(model) == 32 and compatibility.vocabulary_size(model) == len(CHARACTERS)
    assert not any(p.requires_grad for p in models.freeze(model).parameters())


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
        models.load_model(folder)


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
        models.load_tokenizer(folder)
    with pytest.raises(InputError, match="dtype must be a floating-point type .* got 'int8'"):
        models.load_model(folder, dtype="int8")
    with pytest.raises(InputError, match="device 'nope' cannot be used"):
        models.load_model(folder, device="nope")
    with pytest.raises(InputError, match="model folder './nope' is not there"):
        models.load_model("./nope")

    def offline(*args, **options):
        raise OSError("offline")

    monkeypatch.setattr(models.AutoTokenizer, "from_pretrained", offline)
    with pytest.raises(InputError, match="'owner/name' cannot be read .*looked for on the hub.*offline"):
        models.load_tokenizer("owner/name")


@pytest.mark.parametrize(("student_size", "teacher_size"), [(512, 520), (520, 512)])
def test_padded_vocabularies_over_one_tokenizer_are_matched(tmp_path, capsys, student_size, teacher_size):
    student, teacher = llama(0, vocab=student_size), llama(1, vocab=teacher_size)
    for name, model in (("student", student), ("teacher", teacher)):
        model.save_pretrained(tmp_path / name)
        letters().save_pretrained(tmp_path / name)
    (tmp_path / "data.jsonl").write_text('{"text": "what is banana"}')
    folders = (str(tmp_path / "student"), str(tmp_path / "teacher"), None, str(tmp_path / "data.jsonl"))
    tokens = own_tokens(*folders[:3], Source(folders[3]), 1, "cpu", None, ("teacher",))["tokens"]
    assert f"teacher: a vocabulary of {teacher_size} over the model's own tokenizer" in capsys.readouterr().err
    assert tokens.logits.shape == tokens.teacher.shape == (len(tokens), student_size)
    ids = torch.tensor([encode([{"text": "what is banana"}], letters(), None).examples[0]["input_ids"]])
    with torch.no_grad():
        shared = min(student_size, teacher_size)
        expected = teacher(ids)["logits"][0, :-1, :shared].softmax(-1)
    torch.testing.assert_close(tokens.teacher.softmax(-1)[:, :shared], expected)
    assert float(tokens.teacher.softmax(-1)[:, shared:].sum()) == 0.0
    target = qlens.get("kd").target(tokens)
    torch.testing.assert_close(target.grad[:, shared:], tokens.probs[:, shared:])  # p - 0, where there is padding
    for spec in ("kd", "reverse_kl", "target_sft", "jsd"):
        assert (
            qlens.implied_target(spec, tokens).grad.isfinite().all() and qlens.get(spec).loss(tokens).isfinite().all()
        )
    environment = UserSource.of(folders[0], folders[3], folders[1]).open
    (tmp_path / "data.jsonl").write_text('{"text": "what is banana"}\n{"text": "banana"}')
    other = environment().teacher()
    hidden, head = torch.randn(2, 16, requires_grad=True), student.lm_head.weight
    linear = other.get_output_embeddings()
    whole = qlens.fused_loss("kd", hidden, head, torch.tensor([1, 2]), teacher=linear(hidden).detach())
    assert whole.isfinite() and Backbone(other, {"input_ids": ids}).at(hidden).logits(slice(None)).shape == (
        2,
        student_size,
    )


def test_vocabularies_of_other_tokenizers_are_not_matched():
    with pytest.raises(InputError, match="the tokenizers have"):
        match_vocabulary(32, llama(vocab=40), "teacher", letters(), letters(order=[*CHARACTERS, "é"]))
    with pytest.raises(InputError, match="a token 31: they cannot be matched"):
        match_vocabulary(33, llama(vocab=30), "teacher", letters(), letters())


@pytest.mark.parametrize("saved", [torch.bfloat16, torch.float16])
def test_weights_saved_in_half_precision_are_read_in_float32_on_a_cpu(tmp_path, caplog, monkeypatch, saved):
    folder, data = tmp_path / "model", tmp_path / "data.jsonl"
    llama().to(saved).save_pretrained(folder)
    letters().save_pretrained(folder)
    data.write_text('{"text": "what is banana"}')
    ids = encode([{"text": "what is banana"}], letters(), None).examples[0]["input_ids"]
    expected = llama().to(saved).double()(torch.tensor([ids])).logits[0, :-1].detach()
    read = own_tokens(str(folder), None, None, Source(str(data)), 1, None, None, ())["tokens"]
    named = dtype_name(saved)
    assert f"is saved in {named} and read in float32 on the CPU; dtype='{named}'" in caplog.text
    passed = llama().to(saved)
    from_folder = qlens.Tokens.from_text(folder, letters(), ["what is banana"], teacher=folder, reference=passed)
    for logits in (read.logits, from_folder.logits, from_folder.teacher):
        assert logits.dtype == torch.float32
        torch.testing.assert_close(logits.double(), expected, rtol=1e-5, atol=1e-5)
    assert from_folder.reference.dtype == passed.dtype == saved  # a module stays as it is
    caplog.clear()
    kept = own_tokens(str(folder), None, None, Source(str(data)), 1, None, named, ())["tokens"]
    trained_with = qlens.Watch("kd", [{"text": "banana"}], tokenizer=letters(), teacher=folder).other_models["teacher"]
    assert kept.logits.dtype == trained_with.dtype == models.load_model(folder).dtype == saved and not caplog.text
    view = qlens.view(str(folder), letters(), ["what is banana"], ["sft"])
    kept_view = qlens.view(passed, letters(), ["what is banana"], ["sft"])
    assert float((view.table.p_y - kept_view.table.p_y).abs().max()) > 1e-5
    monkeypatch.setattr(models.psutil, "virtual_memory", lambda: type("Memory", (), {"available": 1000}))
    assert models.load_to_read(folder).dtype == saved and f"is read in {named}, as saved" in caplog.text
