"""QSFTTrainer equals trl.SFTTrainer for sft and dft, in losses, gradient norms and weights."""

import pytest
import torch
from cases import case
from datasets import Dataset
from peft import LoraConfig
from tiny_models import MARKED, letters, llama, parameters, steps_of
from torch.testing import assert_close

TALKS = [
    {
        "messages": [
            {"role": "user", "content": f"say {word}"},
            {"role": "assistant", "content": word},
            {"role": "user", "content": "again"},
            {"role": "assistant", "content": word[::-1]},
        ],
        "source": "tests",
    }
    for word in ("hello", "lamp", "tree", "x", "quick")
]


def assert_equal_runs(mine, other):
    for ours, theirs in zip(steps_of(mine), steps_of(other), strict=True):
        for name in ("loss", "grad_norm", "num_tokens"):
            assert ours[name] == pytest.approx(theirs[name], rel=1e-4), name
    assert_close(parameters(mine.model), parameters(other.model), rtol=1e-4, atol=1e-5)


def lora():
    shape = dict(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM", init_lora_weights=False)
    return LoraConfig(**shape)


SETTINGS = {
    "plain": {},
    "accumulated": dict(accumulate=2, batch=1),
    "whole logits": dict(fused=False),
    "all tokens": dict(completion_only_loss=False),
    "cut": dict(max_length=12),
    "bfd": dict(packing=True, max_length=40),
    "bfd, accumulated": dict(packing=True, max_length=24, accumulate=2, batch=1),
    "bfd_split": dict(packing=True, packing_strategy="bfd_split", max_length=12),
    "wrapped": dict(packing=True, packing_strategy="wrapped", max_length=16),
    "padding free": dict(padding_free=True, max_length=None),
    "shuffled": dict(shuffle_dataset=True, packing=True, max_length=40),
    "checkpointed": dict(activation_checkpointing=True),
    "padded": dict(pad_to_multiple_of=8),
}


@pytest.mark.parametrize("loss", ["nll", "dft"])
def test_plain_rows_train_as_by_trl(train, words, loss):
    for name, options in SETTINGS.items():
        with case(name):
            mine = train("qlens", words, variant={"nll": "sft"}.get(loss, loss), **options)
            other = train("trl", words, loss_type=loss, **{k: v for k, v in options.items() if k != "fused"})
            assert_equal_runs(mine, other)
            assert float((parameters(mine.model) - parameters(llama(context=256))).norm()) > 1e-3


@pytest.mark.filterwarnings("ignore::FutureWarning")  # of peft with newer transformers
def test_conversations_and_adapters_train_as_by_trl(train):
    settings = {
        "whole texts": {},
        "assistant alone": dict(assistant_only_loss=True),
        "packed": dict(assistant_only_loss=True, packing=True, max_length=120),
    }
    for name, options in settings.items():
        for peft in (None, lora()):
            with case(f"{name}, {peft and 'LoRA'}"):
                options = options | dict(template=MARKED, peft_config=peft)
                mine, other = train("qlens", TALKS, variant="sft", **options), train("trl", TALKS, **options)
                assert_equal_runs(mine, other)
                trained = [name for name, value in mine.model.named_parameters() if value.requires_grad]
                assert all("lora" in name for name in trained) == (peft is not None)


@pytest.mark.filterwarnings("ignore::FutureWarning")  # of peft with newer transformers
def test_gradients_equal_those_of_trl(train, words):
    for peft in (None, lora()):
        gradients = []
        for kind, options in (("trl", dict(loss_type="dft")), ("qlens", dict(variant="dft"))):
            trainer = train(kind, words, steps=0, batch=6, peft_config=peft, **options)
            batch = next(iter(trainer.get_train_dataloader()))
            trainer.compute_loss(trainer.model, batch).backward()
            gradients.append(torch.cat([p.grad.flatten() for p in trainer.model.parameters() if p.requires_grad]))
        assert float(gradients[0].norm()) > 1e-3
        assert_close(gradients[1], gradients[0], rtol=1e-4, atol=1e-6)


def test_metrics_of_trl_are_logged_beside_those_of_qlens(train, words):
    held_out = Dataset.from_list(words[:3])
    options = dict(batch=3, eval_strategy="steps", eval_steps=1, eval_dataset=held_out, per_device_eval_batch_size=3)
    for fused in (None, False):
        mine, other = train("qlens", words, variant="sft", fused=fused, **options), train("trl", words, **options)
        for prefix in ("", "eval_"):
            ours, theirs = ([entry for entry in t.state.log_history if f"{prefix}loss" in entry] for t in (mine, other))
            for one, two in zip(ours, theirs, strict=True):
                for name in ("loss", "mean_token_accuracy", "num_tokens", "entropy"):
                    assert one[prefix + name] == pytest.approx(two[prefix + name], rel=1e-4), prefix + name
                assert {f"{prefix}nll", f"{prefix}label_weight", f"{prefix}kl_target"} <= set(one)


def test_a_model_may_be_given_by_its_path(train, words, tmp_path):
    folder = tmp_path / "model"
    llama(context=256).save_pretrained(folder)
    letters().save_pretrained(folder)
    for place in (str(folder), folder):
        by_path = train("qlens", words, model=place, variant="dft", model_init_kwargs={"dtype": "float32"})
        assert_close(parameters(by_path.model), parameters(train("qlens", words, variant="dft").model))
