"""QTrainer against training loops written out."""

import copy
import weakref
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from cases import case
from tiny_models import VOCAB, Recorder, llama, parameters, rows, steps_of
from transformers import GPT2Config, GPT2LMHeadModel, Trainer

import qlens
from qlens.core.errors import InputError
from qlens.core.supervised import IGNORE
from qlens.data.collator import collate
from qlens.data.examples import encode
from qlens.data.models import load_model, load_tokenizer
from qlens.registry import Method
from qlens.training.fitting import fit
from qlens.training.trainer import QTrainer

MODELS = Path(__file__).resolve().parents[3] / "shared/data/models"


def sums_by_hand(model, batch, weigh) -> tuple[torch.Tensor, int]:
    """The sum of weigh(p_y) * -log p_y over a batch, token by token, and the number of tokens."""
    total, count = 0.0, 0
    for ids, mask, labels in zip(batch["input_ids"], batch["attention_mask"], batch["labels"], strict=True):
        length = int(mask.sum())
        logits = model(input_ids=ids[:length][None]).logits[0]
        for t in range(1, length):
            if labels[t] != IGNORE:
                nll = F.cross_entropy(logits[t - 1], labels[t])
                total, count = total + weigh(torch.exp(-nll).detach()) * nll, count + 1
    return total, count


@pytest.mark.parametrize(("variant", "weigh"), [("sft", lambda p: 1.0), ("dft", lambda p: p)], ids=["sft", "dft"])
def test_training_matches_a_plain_loop(make, variant, weigh):
    recorder, model = Recorder(), llama()
    trainer = make(variant, model=copy.deepcopy(model), batch=2, accumulate=2, steps=4, data_collator=recorder)
    trainer.train()
    losses = []
    for step in range(4):
        batches = recorder.batches[2 * step : 2 * step + 2]
        sums, counts = zip(*[sums_by_hand(model, batch, weigh) for batch in batches], strict=True)
        loss = sum(sums) / sum(counts)
        gradients = torch.autograd.grad(loss, list(model.parameters()))
        with torch.no_grad():
            for parameter, gradient in zip(model.parameters(), gradients, strict=True):
                parameter -= 0.1 * gradient
        losses.append(loss.item())
    torch.testing.assert_close(parameters(trainer.model), parameters(model), atol=1e-5, rtol=1e-5)
    assert [entry["loss"] for entry in steps_of(trainer)] == pytest.approx(losses, abs=1e-5)


def test_sft_matches_transformers_training(make):
    qtrainer, reference = make("sft", accumulate=2, batch=2), make(kind=Trainer, accumulate=2, batch=2)
    qtrainer.train()
    reference.train()
    torch.testing.assert_close(parameters(qtrainer.model), parameters(reference.model), atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("variant", ["dft", "target_sft", "asft_anchored"])
def test_accumulation_changes_nothing(make, variant):
    runs = []
    for batch, accumulate in ((8, 1), (4, 2), (1, 8)):
        other_models = dict(teacher=llama(1), reference=llama(2))
        trainer = make(variant, batch=batch, accumulate=accumulate, steps=3, **other_models)
        trainer.train()
        runs.append((parameters(trainer.model), steps_of(trainer)))
    for values, logs in runs[1:]:
        torch.testing.assert_close(values, runs[0][0], atol=2e-6, rtol=1e-5)
        for log, first in zip(logs, runs[0][1], strict=True):
            assert log == pytest.approx(first, rel=1e-4, abs=1e-5)
    assert (runs[0][0] - parameters(llama())).norm() > 1e-3


def test_the_last_step_of_an_epoch_may_be_short(make):
    runs = []
    for batch, accumulate in ((5, 1), (1, 5)):  # 8 rows: a step of 5, then one of 3
        trainer = make("dft", batch=batch, accumulate=accumulate, steps=-1, num_train_epochs=1)
        trainer.train()
        runs.append(parameters(trainer.model))
    torch.testing.assert_close(runs[0], runs[1], atol=2e-6, rtol=1e-5)


def test_the_penalty_is_added_once_per_step(make):
    variant = Method(name="zero", fn=lambda tokens: 0 * tokens.label_log_probs, scope="token").variant()
    variant.method.on_model = lambda model: sum(p.square().sum() for p in model.parameters()) / 2
    for batch, accumulate in ((8, 1), (2, 4)):
        trainer = make(variant, batch=batch, accumulate=accumulate, steps=1, examples=rows(8))
        trainer.train()
        torch.testing.assert_close(parameters(trainer.model), 0.9 * parameters(llama()), atol=1e-6, rtol=1e-5)


def shifted_left(batch: dict) -> dict:
    """The same batch padded on the left, three columns wider than it need be."""
    shift = (1 - batch["attention_mask"]).sum(-1)
    wide = {"input_ids": 0, "attention_mask": 0, "labels": IGNORE}
    wide = {k: torch.cat([torch.full_like(batch[k][:, :3], fill), batch[k]], 1) for k, fill in wide.items()}
    return {k: torch.stack([row.roll(int(s)) for row, s in zip(v, shift, strict=True)]) for k, v in wide.items()}


def gpt2() -> GPT2LMHeadModel:
    torch.manual_seed(0)
    shape = dict(n_positions=32, n_embd=16, n_layer=1, n_head=2)
    return GPT2LMHeadModel(GPT2Config(vocab_size=VOCAB, bos_token_id=0, eos_token_id=0, **shape)).eval()


@pytest.mark.parametrize("build", [llama, gpt2], ids=["rotary", "absolute"])
def test_padding_side_and_amount_change_nothing(make, build):
    model, batch = build(), collate(rows(5))
    trainer = make("target_sft", model=model, teacher=llama(1))
    losses, gradients = [], []
    for padded in (batch, shifted_left(batch)):
        model.zero_grad()
        loss = trainer.compute_loss(model, padded)
        loss.backward()
        losses.append(loss.item())
        gradients.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    torch.testing.assert_close(gradients[0], gradients[1], atol=1e-5, rtol=1e-4)


def test_the_count_is_of_the_labels_that_are_predicted(make):
    examples = [{**row, "labels": row["input_ids"]} for row in rows(8)]  # first tokens too: nothing predicts those
    runs = []
    for collator in (collate, lambda batch: shifted_left(collate(batch))):
        trainer = make("dft", examples=examples, data_collator=collator, accumulate=2)
        trainer.train()
        runs.append(parameters(trainer.model))
    torch.testing.assert_close(runs[0], runs[1], atol=1e-5, rtol=1e-5)


def test_packed_rows_are_trained_as_rows(make):
    examples = rows(3)[:2]
    trainer = make("dft", examples=examples)
    packed = {name: torch.tensor([examples[0][name] + examples[1][name]]) for name in ("input_ids", "labels")}
    packed["labels"][0, len(examples[0]["labels"])] = 5  # a first token that nothing may be taught to predict
    packed["position_ids"] = torch.tensor([[t for example in examples for t in range(len(example["input_ids"]))]])
    alone = trainer.compute_loss(trainer.model, collate(examples)).item()
    assert trainer.compute_loss(trainer.model, packed).item() == pytest.approx(alone, rel=1e-5)


def test_a_batch_without_supervised_tokens_gives_zero_with_a_graph(make):
    trainer = make("target_sft", teacher=llama(1), examples=[rows(3)[2]] * 4)
    loss = trainer.compute_loss(trainer.model, collate(rows(3)[2:]), num_items_in_batch=torch.tensor(0))
    loss.backward()
    assert loss.item() == 0
    assert all(p.grad is not None and not p.grad.any() for p in trainer.model.parameters())
    trainer.train()  # every step of it
    torch.testing.assert_close(parameters(trainer.model), parameters(llama()))
    assert [entry["loss"] for entry in steps_of(trainer)] == [0, 0] and "nll" not in steps_of(trainer)[0]


def test_variants_get_the_same_batches_at_one_seed(make):
    noisy = lambda tokens: -tokens.label_log_probs * torch.rand(len(tokens))  # noqa: E731  draws numbers of its own
    batches = []
    for variant in ("sft", "target_sft", noisy):
        recorder = Recorder()
        make(variant, teacher=llama(1), steps=6, data_collator=recorder).train()
        batches.append([batch["input_ids"].tolist() for batch in recorder.batches])
    assert batches[0] == batches[1] == batches[2]
    assert batches[0][:2] != batches[0][2:4]  # and every epoch is shuffled anew


def test_training_is_deterministic(make):
    runs = []
    for _ in range(2):
        trainer = make("target_sft", teacher=llama(1), steps=3, optim="adamw_torch")
        trainer.train()
        runs.append(parameters(trainer.model))
    assert torch.equal(runs[0], runs[1])


def test_the_teacher_is_frozen_and_unchanged(make):
    teacher = llama(1).train()
    trainer = make("kd", teacher=teacher)
    trainer.train()
    assert not teacher.training and not any(p.requires_grad or p.grad is not None for p in teacher.parameters())
    torch.testing.assert_close(parameters(teacher), parameters(llama(1)))


def test_a_teacher_that_is_not_needed_is_not_run(make):
    teacher = llama(1).train()
    teacher.forward = lambda **inputs: pytest.fail("the teacher was run")
    trainer = make("sft", teacher=teacher)
    trainer.train()
    assert len(steps_of(trainer)) == 2 and teacher.training


def test_arguments_that_do_not_fit_are_refused(make):
    for options, message in (
        (dict(variant="kd"), r"kd needs a teacher: give QTrainer\(teacher=...\)"),
        (dict(variant="asft_anchored"), r"asft_anchored needs a reference: give QTrainer\(reference=...\)"),
        (dict(old_every=0), "old_every must be a whole number of at least 1, got 0"),
        (dict(variant="kd", teacher="path/of/one"), "teacher: model folder .path/of/one. is not there"),
        (dict(variant="nope"), "unknown method 'nope'"),
        (dict(compute_loss_func=lambda *args, **kwargs: 0), "compute_loss_func and variant"),
        (dict(label_smoothing_factor=0.1), "label_smoothing_factor competes with variant"),
    ):
        with case(message), pytest.raises(InputError, match=message):
            make(**options)


def test_models_may_be_given_as_paths(make, tmp_path):
    for seed in range(2):
        llama(seed).save_pretrained(tmp_path / str(seed))
    ends = []
    for model, teacher in ((llama(0), llama(1)), (tmp_path / "0", str(tmp_path / "1"))):
        trainer = make("kd", model=model, teacher=teacher)
        trainer.train()
        ends.append(parameters(trainer.model))
        fitted = fit(model, rows(4), steps=1, batch_size=2, learning_rate=0.1, seed=0, variant="kd", teacher=teacher)
        ends.append(parameters(fitted)) if isinstance(model, Path) else None
    assert torch.equal(ends[0], ends[1]) and float((ends[2] - ends[0]).norm()) > 0
    for name in ("model", "teacher"):
        with pytest.raises(InputError, match=f"{name}: model folder .*no/such. is not there"):
            make(**({"variant": "kd", "teacher": llama(1)} | {name: tmp_path / "no/such"}))


def test_the_model_itself_is_refused_as_reference(make):
    model = llama()
    with pytest.raises(InputError, match="reference is the model being trained"):
        make("asft_anchored", model=model, reference=model)
    assert model.training or all(p.requires_grad for p in model.parameters())


def test_bfloat16_models_train(make):
    trainer = make("target_sft", model=llama().bfloat16(), teacher=llama(1).bfloat16())
    trainer.train()
    single = make("target_sft", teacher=llama(1))
    single.train()
    assert steps_of(trainer)[0]["nll"] == pytest.approx(steps_of(single)[0]["nll"], rel=0.05)


def test_real_models_learn_from_real_text(make):
    if not MODELS.is_dir():
        pytest.skip("the tiny real models are not there (shared/data/models beside the repository)")
    tokenizer = load_tokenizer(MODELS / "stories260k")
    stories = (MODELS.parent / "tinystories/sample.txt").read_text().split("<|endoftext|>")
    texts = [{"text": story.strip()[:250]} for story in stories if story.strip()]
    examples = encode(texts[:16], tokenizer, 160).examples
    trainer = make(
        "target_sft", model=load_model(MODELS / "llama2xs-279k"), teacher=load_model(MODELS / "stories260k"),
        examples=examples, eval_dataset=examples, batch=8, steps=12, optim="adamw_torch", learning_rate=3e-4,
    )  # fmt: skip
    before = trainer.evaluate()
    trainer.train()
    after = trainer.evaluate()
    assert after["eval_loss"] < before["eval_loss"] - 0.02
    assert all(entry["kl_target"] > 0 and entry["update_norm"] > 0 for entry in steps_of(trainer))
    assert qlens.QTrainer is QTrainer


def test_fit_releases_its_objects():
    texts, alive = [{"input_ids": [1, 2, 3, 4], "labels": [IGNORE, 2, 3, 4]}] * 4, []
    for _ in range(3):
        model = llama()
        alive.append(weakref.ref(model))
        fit(model, texts, steps=1, batch_size=2, learning_rate=1e-3, seed=0)
        del model
    assert [ref() for ref in alive] == [None] * 3


def test_an_evaluation_without_a_supervised_token_has_no_loss(make):
    nothing = [{"input_ids": [1, 2, 3], "labels": [-100] * 3}]
    trainer = make("sft", fused=None)
    with pytest.raises(InputError, match=r"the evaluation set \(eval\) has no supervised token"):
        trainer.evaluate(nothing)
    assert trainer.evaluate(nothing + rows(2))["eval_loss"] > 0


def test_a_fit_of_no_steps_is_refused():
    from qlens.training.fitting import fit

    for steps in (0, -1, 1.5, True):
        with pytest.raises(InputError, match="steps must be a whole number, at least 1"):
            fit(llama(), rows(4), steps=steps, batch_size=2, learning_rate=0.1, seed=0)
