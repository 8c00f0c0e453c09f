"""QTrainer on losses that run the model themselves, f(model, inputs), or take whole batches (B, T, V)."""

import logging

import pytest
import torch
import torch.nn.functional as F
from cases import case
from tiny_models import VOCAB, llama, parameters, rows
from torch.testing import assert_close
from transformers import Trainer, TrainingArguments

import qlens
from qlens.core.errors import InputError
from qlens.core.supervised import Supervised
from qlens.data.collator import collate

TEACHER = llama(5).eval()


def logits_of(model, inputs):
    return model(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"]).logits[:, :-1]


def distilled(model, inputs, return_outputs=False, num_items_in_batch=None):
    """A teacher in a closure, run on the ids; divided as a Trainer asks."""
    mask = inputs["labels"][:, 1:] != -100
    with torch.no_grad():
        q = logits_of(TEACHER, inputs).softmax(-1)
    loss = F.kl_div(logits_of(model, inputs).log_softmax(-1), q, reduction="none").sum(-1)
    return (loss * mask).sum() / (mask.sum() if num_items_in_batch is None else num_items_in_batch)


def repeating(model, inputs):
    """Unlikelihood of repeating the input's token; a mean of its own."""
    z, labels = logits_of(model, inputs), inputs["labels"][:, 1:]
    mask = labels != -100
    p = z.softmax(-1).gather(-1, inputs["input_ids"][:, :-1, None])[..., 0]
    return (
        (F.cross_entropy(z.transpose(1, 2), labels, reduction="none") - torch.log1p(-p + 1e-6)) * mask
    ).sum() / mask.sum()


def decayed(model, inputs):
    """A term on the model's weights."""
    labels = inputs.pop("labels")[:, 1:]
    mask = labels != -100
    decay = 0.01 * sum(p.square().sum() for p in model.parameters())
    return F.cross_entropy(logits_of(model, inputs)[mask], labels[mask]) + decay


def two_passes(model, inputs):
    """R-Drop with a dropout that is drawn alike every time."""
    torch.manual_seed(3)
    one, two = logits_of(model, inputs), logits_of(model, inputs)
    labels = inputs["labels"][:, 1:]
    mask = labels != -100
    divergence = F.kl_div(one.log_softmax(-1), two.softmax(-1), reduction="none").sum(-1)[mask].mean()
    return F.cross_entropy(one[mask], labels[mask]) + 5 * divergence


def prompts_too(model, inputs, *, share=0.5):
    """Prompt tokens at half weight."""
    labels, mask = inputs["input_ids"][:, 1:], inputs["labels"][:, 1:] != -100
    losses = F.cross_entropy(logits_of(model, inputs).transpose(1, 2), labels, reduction="none")
    return (losses * torch.where(mask, 1.0, share) * inputs["attention_mask"][:, 1:]).sum() / mask.sum()


def shifted(logits, labels):
    z, y = logits[:, :-1], labels[:, 1:]
    return F.cross_entropy(z.transpose(1, 2), y, ignore_index=-100, reduction="none"), y != -100


def later_tokens_more(logits, labels):
    losses, mask = shifted(logits, labels)
    return (losses * torch.arange(losses.shape[1]) / 10 * mask).sum() / mask.sum()


def later_tokens_more_of_outputs(outputs, labels, num_items_in_batch=None):
    losses, mask = shifted(outputs.logits, labels)
    total = (losses * torch.arange(losses.shape[1]) / 10 * mask).sum()
    return total / (mask.sum() if num_items_in_batch is None else num_items_in_batch)


def later_tokens_more_unreduced(logits, labels):
    losses, mask = shifted(logits, labels)
    return losses * torch.arange(losses.shape[1]) / 10 * mask


def mean_of_each_text(logits, labels):
    losses, mask = shifted(logits, labels)
    return ((losses * mask).sum(1) / mask.sum(1).clamp(min=1)).mean()


RUN_THE_MODEL = (distilled, repeating, decayed, two_passes, prompts_too)
SEE_THE_BATCH = (later_tokens_more, later_tokens_more_of_outputs, later_tokens_more_unreduced)
EXAMPLES = [row for row in rows(9) if any(label != -100 for label in row["labels"])]


def by_hand(fn, examples=EXAMPLES):
    """The loss and its gradient on all examples as one batch."""
    model, batch = llama(), collate(examples)
    if fn in RUN_THE_MODEL:
        loss = fn(model, dict(batch))
    else:
        outputs = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])
        loss = fn(outputs if "outputs" in fn.__name__ else outputs.logits, batch["labels"])
    if loss.ndim:
        loss = loss.sum() / len(Supervised.of(batch))
    loss.backward()
    return loss.item(), torch.cat([p.grad.flatten() for p in model.parameters()])


def trained(make, fn, batch=8, **options):
    """The first logged entry, the gradient that SGD took, and the trainer."""
    model = llama()
    before, scope = parameters(model), options.pop("scope", "")
    variant = qlens.registry.registry._method(fn.__name__, fn, scope=scope).variant()
    trainer = make(variant, model=model, examples=EXAMPLES, batch=batch, steps=1, **options)
    trainer.train()
    return trainer.state.log_history[0], (before - parameters(model)) / 0.1, trainer


@pytest.mark.parametrize("fn", [*RUN_THE_MODEL, *SEE_THE_BATCH])
def test_model_losses_get_the_trained_model_and_batch(make, fn):
    loss, grad = by_hand(fn)
    for scope in ("", "token"):
        logged, got, trainer = trained(make, fn, scope=scope)
        assert logged["loss"] == pytest.approx(loss, rel=1e-4)
        assert_close(got, grad, rtol=1e-3, atol=1e-5 * float(grad.abs().max()) + 2e-6)
        assert trainer.evaluate(EXAMPLES)["eval_loss"] == pytest.approx(by_hand_after(fn, trainer.model), rel=1e-4)


def by_hand_after(fn, model):
    """The loss on the examples in evaluation."""
    batches = [collate(EXAMPLES[at : at + 8]) for at in range(0, len(EXAMPLES), 8)]
    total, number = 0.0, 0
    with torch.no_grad():
        for batch in batches:
            size = len(Supervised.of(batch))
            if fn in RUN_THE_MODEL:
                value = fn(model, dict(batch))
            else:
                outputs = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])
                value = fn(outputs if "outputs" in fn.__name__ else outputs.logits, batch["labels"])
            total += float(value.sum()) if value.ndim else float(value) * size
            number += size
    return total / number


def test_micro_batches_add_up_to_the_whole_step(make):
    """A loss that divides by the count it is given is a part of the step's; any other counts by its supervised tokens."""
    for fn in [distilled, repeating, decayed, prompts_too, *SEE_THE_BATCH]:
        with case(fn):
            _, grad = by_hand(fn)
            _, got, _ = trained(make, fn, batch=2, accumulate=4)
            assert_close(got, grad, rtol=1e-3, atol=1e-5 * float(grad.abs().max()) + 2e-6)


def test_compute_loss_functions_match_a_transformers_trainer(make, tmp_path):
    """The update is that of a transformers Trainer whose compute_loss it is."""

    class Own(Trainer):
        def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
            return distilled(model, inputs, return_outputs, num_items_in_batch)

    def run(kind, **overrides):
        model = llama()
        options = dict(
            per_device_train_batch_size=4, max_steps=2, optim="sgd", learning_rate=0.1, max_grad_norm=0.0, seed=7
        )
        args = TrainingArguments(
            str(tmp_path), report_to=[], disable_tqdm=True, use_cpu=True, save_strategy="no", **options
        )
        kind(model=model, args=args, train_dataset=EXAMPLES, data_collator=collate, **overrides).train()
        return parameters(model)

    assert_close(run(qlens.QTrainer, variant=distilled), run(Own), rtol=0, atol=1e-6)


def test_metrics_are_computed_from_the_trained_gradient(make):
    """For a plain cross-entropy all figures are sft's, in training and in evaluation; two passes have a loss alone."""

    def plain(model, inputs):
        return model(**inputs).loss

    logs = [make(variant, examples=EXAMPLES, eval_dataset=EXAMPLES, steps=1) for variant in (plain, mean_over, "sft")]
    for trainer in logs:
        trainer.train()
        trainer.figures = trainer.state.log_history[0] | trainer.evaluate()
    names = ("loss", "nll", "trust", "ess", "kl_target", "eval_loss", "eval_nll", "eval_trust", "eval_kl_target")
    for trainer in logs[:2]:
        for name in names:
            assert trainer.figures[name] == pytest.approx(logs[2].figures[name], rel=1e-3), name
    trainer = make(two_passes, examples=EXAMPLES, steps=1)
    trainer.train()
    assert "loss" in trainer.state.log_history[0] and "nll" not in trainer.state.log_history[0]


def mean_over(logits, labels):
    losses, mask = shifted(logits, labels)
    return (losses * mask).sum() / mask.sum()


def test_a_mean_per_text_is_logged_as_trained(make, caplog):
    """The rows of its unreduced loss are the tokens' cross-entropy, which is said once."""
    with caplog.at_level(logging.WARNING, "qlens"):
        logged, got, _ = trained(make, mean_of_each_text, batch=4, accumulate=2)
    sft = make("sft", examples=EXAMPLES, batch=4, accumulate=2, steps=1)
    before = parameters(sft.model)
    sft.train()
    assert logged["loss"] == pytest.approx(sft.state.log_history[0]["loss"], rel=1e-5)
    assert_close(got, (before - parameters(sft.model)) / 0.1, rtol=1e-3, atol=1e-5)
    (line,) = [line for line in caplog.messages if "undoes" in line]
    assert "mean of each text, mean over texts" in line and "divided by the supervised tokens" in line


def test_engine_options_are_refused_for_model_losses(make):
    hidden, head, labels = torch.randn(6, 4).requires_grad_(), torch.randn(20, 4), torch.arange(6)
    for fn in RUN_THE_MODEL[:4]:
        with pytest.raises(InputError, match="runs a model on its inputs.*QTrainer"):
            qlens.fused_loss(fn, hidden, head, labels)
    for fn in SEE_THE_BATCH:
        with pytest.raises(InputError, match="its place in the text.*QTrainer"):
            qlens.fused_loss(fn, hidden, head, labels)
    with pytest.raises(InputError, match="fused=True.*it runs the model itself"):
        make(distilled, fused=True).train()
    assert qlens.fused_loss(mean_over, hidden, head, labels).isfinite()


def test_inputs_without_a_source_are_refused(make):
    def of_ids(logits, input_ids, attention_mask):
        z, y, mask = logits[:, :-1], input_ids[:, 1:], attention_mask[:, 1:]
        return (F.cross_entropy(z.transpose(1, 2), y, reduction="none") * mask).sum() / mask.sum()

    with pytest.raises(InputError, match="would learn the tokens, such as prompts, whose labels are -100"):
        make(of_ids, examples=EXAMPLES).train()
    whole = [{"input_ids": row["input_ids"], "labels": row["input_ids"]} for row in EXAMPLES]
    losses = []
    for variant in (of_ids, "sft"):
        trainer = make(variant, examples=whole, steps=1)
        trainer.train()
        losses.append(trainer.state.log_history[0]["loss"])
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)

    def asking(model, inputs, weight):
        return model(**inputs).loss

    with pytest.raises(InputError, match="takes 'weight', which a batch of this data does not have"):
        make(asking, examples=EXAMPLES).train()

    class Distil(Trainer):
        def __init__(self, *args, teacher_model=None, **kwargs):
            super().__init__(*args, **kwargs)
            self.teacher = teacher_model

        def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
            return distilled(model, inputs)

    with pytest.raises(InputError, match="a Trainer's class, built with stand-ins"):
        make(Distil, teacher=llama(1))


def test_other_models_are_passed_to_losses_that_take_them(make):
    def with_teacher(model, teacher_model, inputs):
        mask = inputs["labels"][:, 1:] != -100
        with torch.no_grad():
            q = logits_of(teacher_model, inputs).softmax(-1)
        return F.kl_div(logits_of(model, inputs).log_softmax(-1), q, reduction="none").sum(-1)[mask].mean()

    loss, grad = by_hand(distilled)
    trainer = make(with_teacher, examples=EXAMPLES, batch=len(EXAMPLES), steps=1, teacher=llama(5))
    before = parameters(trainer.model)
    trainer.train()
    assert trainer.state.log_history[0]["loss"] == pytest.approx(loss, rel=1e-4)
    assert_close((before - parameters(trainer.model)) / 0.1, grad, rtol=1e-3, atol=1e-4)


def test_packed_texts_are_independent(make):
    packed = [{"input_ids": [3, 4, 5, 6, 7, 8], "labels": [3, 4, 5, 6, 7, 8], "position_ids": [0, 1, 2, 0, 1, 2]}]
    separate = [{"input_ids": ids, "labels": ids} for ids in ([3, 4, 5], [6, 7, 8])]

    def passing(model, inputs):
        z, y = model(input_ids=inputs["input_ids"], position_ids=inputs.get("position_ids")).logits, inputs["labels"]
        losses, mask = shifted(z, y)
        return (losses * mask).sum() / mask.sum()

    values = []
    for examples in (packed, separate):
        trainer = make(passing, examples=examples, steps=1)
        trainer.train()
        values.append(trainer.state.log_history[0]["loss"])
    assert values[0] == pytest.approx(values[1], rel=1e-4) and VOCAB > 8
    with pytest.raises(InputError, match="runs the model without position_ids.*model\\(\\*\\*inputs\\)"):
        make(lambda model, inputs: model(input_ids=inputs["input_ids"]).logits.mean(), examples=packed).train()
