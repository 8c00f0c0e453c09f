"""Options of training on the user's own model: batches, lengths, precision, adapters, templates."""

import json

import pytest
import torch
from numpy.testing import assert_allclose

import qlens
from qlens.analysis.compare.environments import open_environment
from qlens.analysis.compare.user_source import UserSource
from qlens.core.errors import InputError
from qlens.data.base_models import has_adapters
from qlens.data.models import load_model


@pytest.fixture
def source(user_files):
    def make(**options):
        paths = {name: str(path) for name, path in user_files.items()}
        return UserSource.of(**paths, **options)

    return make


def nll(study, method="sft"):
    return study.results.query("method == @method")["score"].to_numpy()


def test_micro_batches_and_checkpointing_leave_the_result_as_it_is(compare, tmp_path):
    options = dict(variants="sft", seeds=1, batch_size=8, learning_rate=0.03)
    whole = compare(**options, out=tmp_path / "whole")
    cut = compare(**options, micro_batch_size=2, gradient_checkpointing=True, out=tmp_path / "cut")
    assert_allclose(nll(cut), nll(whole), atol=1e-5)
    other = compare(**options | {"batch_size": 4}, out=tmp_path / "other")
    assert abs(nll(other) - nll(whole)).max() > 1e-3


def test_adapters_are_trained_and_the_reference_is_the_model_without_them(compare, user_files, tmp_path):
    study = compare(
        ["base", "sft", "asft_anchored", "psft"], seeds=1, steps=8, lora_rank=2, learning_rate=0.03, save=True
    )
    assert study.config["settings"]["words"]["lora_rank"] == 2
    assert study.config["noted"]["settings"]["words"]["adapters"] == "LoRA of rank 2"
    kl = study.diagnostics.set_index("method")["kl_start"]
    assert kl["base"] < 1e-7 < 1e-3 < kl["sft"]
    folder, base = tmp_path / "run/models/sft-0", load_model(user_files["model"])
    trained = load_model(folder).state_dict()
    changed = {name for name, value in base.state_dict().items() if not torch.equal(value, trained[name])}
    assert changed and all("proj" in name for name in changed), "all linear layers but the head, merged"
    (folder / "adapter_model.safetensors").unlink()
    with pytest.raises(InputError, match="have no adapter_model.safetensors"):
        load_model(folder)
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps(config | {"base_model_name_or_path": str(tmp_path / "x")}))
    (folder / "adapter_model.safetensors").write_bytes(b"")
    with pytest.raises(InputError, match="holds adapters of a model that is not read"):
        load_model(folder)


def test_products_in_bfloat16_and_weights_in_float32(source):
    environment = open_environment(source(dtype="bfloat16"))
    assert environment.start().dtype == torch.float32 and environment.reference().dtype == torch.bfloat16
    assert environment.options["dtype"] == "bfloat16"
    adapted = open_environment(source(dtype="bfloat16", lora_rank=2)).start()
    assert has_adapters(adapted)
    dtypes = {value.requires_grad: value.dtype for value in adapted.parameters()}
    assert dtypes == {True: torch.float32, False: torch.bfloat16}


def test_a_comparison_in_bfloat16_ends_near_that_in_float32(compare, tmp_path):
    options = dict(variants="sft", seeds=1, learning_rate=0.01)
    float32, bfloat16 = (compare(**options, dtype=dtype, out=tmp_path / dtype) for dtype in ("float32", "bfloat16"))
    difference = abs(nll(float32) - nll(bfloat16))
    assert 0 < difference.max() < 0.02


def test_longer_rows_are_dropped_and_a_template_replaces_the_tokenizers(source, tmp_path):
    rows = open_environment(source(max_length=18)).metadata
    assert rows["context"] == 18 and 1 < rows["dropped"] < 41
    cut = open_environment(source(max_length=18, on_long="truncate_left"))
    assert cut.metadata["dropped"] == 0 and max(len(each["input_ids"]) for each in cut.train) == 18
    template = tmp_path / "chat.jinja"
    template.write_text("{% for m in messages %}{{ m['content'] }} {% endfor %}", encoding="utf-8")
    plain, chat = open_environment(source()), open_environment(source(chat_template=str(template)))
    assert chat.tokenizer.chat_template and not plain.tokenizer.chat_template
    assert chat.train[0]["input_ids"] != plain.train[0]["input_ids"]
    assert str(template) in dict(source(chat_template=str(template)).files), "a changed template is another run"


def test_options_that_do_not_fit_are_refused_with_the_argument(compare, source):
    with pytest.raises(InputError, match="micro_batch_size=3 does not divide batch_size=16"):
        compare(micro_batch_size=3)
    with pytest.raises(InputError, match="dtype must be one of float32, bfloat16 on cpu, got 'float16'"):
        compare(dtype="float16")
    with pytest.raises(InputError, match="lora_rank must be at least 1, got 0"):
        compare(lora_rank=0)
    with pytest.raises(InputError, match="on_long must be one of"):
        compare(on_long="cut")
    with pytest.raises(InputError, match="max_length goes with model= and data="):
        qlens.compare("sft", max_length=20)
    with pytest.raises(InputError, match="chat_template '.*missing.jinja' cannot be read"):
        compare(chat_template="missing.jinja")
