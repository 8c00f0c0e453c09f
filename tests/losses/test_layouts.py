"""Layouts found by trials: chunks of logits, sequence first, dicts, teachers; and the error that is raised."""

import pytest
import torch
import torch.nn.functional as F
from chunk_losses import (
    KD,
    SFT,
    Chunked,
    ChunkedDistillation,
    ReadsADict,
    ce,
    classes_second,
    sequence_first,
    sequence_first_by_mask,
)
from torch import nn
from torch.testing import assert_close

import qlens
from qlens.core.probes import probes
from qlens.losses.layout.layout_search import style_of
from qlens.registry import resolve
from qlens.testing import random_tokens

V = 11


@pytest.mark.parametrize("grouped", [True, False])
def test_sft_and_distillation_are_read_in_chunks_sequence_first_and_in_dicts(grouped):
    tokens = random_tokens(12, V)
    tokens = tokens if grouped else tokens.replace(sequence=None, pair=None, chosen=None)
    for losses, target in ((SFT, tokens.one_hot), (KD, tokens.teacher.softmax(-1))):
        for loss in losses:
            q = qlens.implied_target(loss, tokens).q
            assert_close(q, target, rtol=1e-5, atol=1e-5, msg=lambda text, loss=loss: f"{loss}: {text}")


def test_unusual_layouts_are_described_and_checked():
    words = {
        Chunked: "logits (B, T / 8, V), in a list of 8 chunks along the tokens (torch.chunk), and labels (B, T) that are shifted",
        sequence_first: "logits (T, B, V), sequence first, and labels (B, T) that are shifted already",
        sequence_first_by_mask: "logits (T, B, V), sequence first,",
        classes_second: "logits (B, V, T) and labels (B, T)",
        ReadsADict: "a dict of logits (N, V) and labels (N,)",
    }
    for loss, description in words.items():
        assert description in resolve(loss).account(random_tokens(12, V)).called_as, loss
    report = qlens.check(Chunked)
    assert {item.id for item in report.failures} == {"accumulation", "all_masked"}, str(report)  # both are true of it
    assert qlens.check(ChunkedDistillation)["inputs_have_effect"].state == "passed"


def test_the_error_of_the_furthest_layout_is_raised():
    def fails_late(logits, labels):
        batch, width, size = logits.shape
        labels = labels.view(batch, width)
        table = torch.zeros(3)
        return table[labels.max() + size]

    def soft(logits, targets):
        return -(targets * logits.log_softmax(-1)[..., :5]).sum(-1).mean()

    def unconnected(logits, labels):
        return torch.tensor(float(logits.square().mean().detach()), requires_grad=True)

    async def waits(logits, labels):
        return logits.sum()

    def configured(logits, labels, config=None):
        return config.weight * ce(logits, labels)

    def fails_early(logits, labels):
        raise ValueError("no")

    cases = {
        r"IndexError: index \d+ is out of bounds.* called with logits \(B, T, V\) and labels \(B, T\)": fails_late,
        "targets holds token ids here: .* is named teacher_probs or teacher_logits": soft,
        "returns a value whose graph does not lead back to the logits": unconnected,
        "write def and return loss, with no async or yield": waits,
        "config is None by default: give it a value, functools.partial": configured,
        "if it takes them in another form, write the call yourself, def loss": fails_early,
        "reads inputs\\['domain'\\], which qlens cannot fill": lambda logits, batch: logits * batch["domain"],
    }
    for says, loss in cases.items():
        with pytest.raises(qlens.InputError, match=says):
            qlens.implied_target(loss, random_tokens(12, V))


def test_a_loss_that_reads_tokens_by_another_name_gets_a_hint():
    def unnamed(t):
        return -t.label_log_probs

    def target(t, eta=0.5):
        return qlens.Target.mix(t, trust=eta, residual="student")

    def batch(batch):
        return -batch.log_probs.gather(-1, batch.labels[:, None])[:, 0]

    def shadowed(x, y):
        return ce(x.reference, y)

    for loss, name in ((unnamed, "unnamed"), (target, "target"), (batch, "batch"), (shadowed, "shadowed")):
        for entry_point in (qlens.explain, qlens.check):
            with pytest.raises(qlens.InputError, match=rf"named tokens: def {name}\(tokens, \.\.\.\)"):
                entry_point(loss)


class Holds(nn.Module):
    def __init__(self, model=None):
        super().__init__()
        self.model = model

    def training_step(self, batch, batch_idx):
        return shifted_ce(self.model(input_ids=batch["input_ids"]).logits, batch["labels"])


class HoldsAndIsCalled:
    def __init__(self, model):
        self.model = model

    def __call__(self, batch):
        return self.model(**batch).loss


class NoTrainer:
    def __init__(self):
        self.scale = 1.0

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        outputs = model(input_ids=inputs["input_ids"])
        loss = self.scale * shifted_ce(outputs.logits, inputs["labels"])
        return (loss, outputs) if return_outputs else loss


class HoldsNothing(nn.Module):
    def training_step(self, batch, batch_idx):
        return batch["labels"].sum()


def shifted_ce(logits, labels):
    return F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())


def test_labels_outputs_and_batches_are_passed_in_containers():
    """Tuples, dicts and distributions; keyword arguments alone; a model that the loss's own object holds."""

    def labels_and_mask(outputs, labels):
        labels, mask = labels
        nll = F.cross_entropy(outputs[:, :-1].transpose(1, 2), labels[:, 1:], reduction="none")
        return (nll * mask[:, 1:]).sum() / mask[:, 1:].sum()

    def targets_in_a_dict(logits, targets):
        nll = F.cross_entropy(logits.transpose(1, 2), targets["labels"], reduction="none")
        return (nll * targets["mask"]).sum() / targets["mask"].sum()

    def one_hot(logits, targets):
        return -(targets * logits.log_softmax(-1)).sum(-1).mean()

    def one_hot_of_batches(logits, one_hot_labels):
        batch, width, size = one_hot_labels.shape
        return -(one_hot_labels * logits.log_softmax(-1)).sum() / one_hot_labels.sum()

    def two_outputs(outputs, labels):
        logits, auxiliary = outputs
        return shifted_ce(logits, labels) + auxiliary

    def two_inputs(model, batch):
        ids, labels = batch
        return shifted_ce(model(ids).logits, labels)

    def x_and_y(model, x, y):
        return shifted_ce(model(x).logits, y)

    def keywords(**given):
        return F.cross_entropy(given["logits"], given["labels"])

    def odd_keywords(*, z, y):
        return F.cross_entropy(z, y)

    words = {
        labels_and_mask: "the labels in a tuple (labels, mask of the supervised ones)",
        targets_in_a_dict: "the labels in a dict of labels",
        one_hot: "the labels as one-hot distributions",
        one_hot_of_batches: "the labels as one-hot distributions",
        two_outputs: "the logits in a tuple (logits, 0)",
        two_inputs: "as a tuple (input ids, labels)",
        x_and_y: "x: made-up token ids",
        keywords: "logits (N, V) and labels (N,)",
        odd_keywords: "logits (N, V) and labels (N,)",
        Holds: "a model whose logits (B, T, V) are a free table",
        HoldsAndIsCalled: "a model whose logits (B, T, V) are a free table",
        NoTrainer: "a model whose logits (B, T, V) are a free table",
    }
    tokens = random_tokens(12, V)
    off = {}
    for loss, description in words.items():
        q = qlens.implied_target(loss, tokens).q
        called = resolve(loss).account(tokens).called_as
        if description not in called or not torch.allclose(q, tokens.one_hot, atol=1e-5):
            off[loss] = called
    assert not off
    for loss in (labels_and_mask, one_hot, two_outputs, two_inputs, Holds):
        failed = {item.id for item in qlens.check(loss).failures}
        assert failed <= {"accumulation", "all_masked"}, (loss, failed)
    with pytest.raises(qlens.InputError, match="keep it as self.model, or write def loss"):
        resolve(HoldsNothing)


def test_a_models_attribute_is_restored():
    own = nn.Linear(2, 2)
    holder = Holds(own)
    resolve(holder).loss(random_tokens(12, V))
    assert holder.model is own


def dft_with_the_mask_of_unshifted_labels(logits, labels, loss_mask):
    shifted, labels = logits[:, :-1], labels[:, 1:]
    mask = loss_mask[:, 1:].reshape(-1)
    ce = F.cross_entropy(shifted.reshape(-1, shifted.shape[-1]), labels.reshape(-1).clamp(min=0), reduction="none")
    return (ce * torch.exp(-ce.detach()) * mask).sum()


def nll_with_an_epsilon(logits, labels):
    return F.nll_loss(torch.log(logits.softmax(-1) + 1e-8), labels, reduction="sum")


def test_rows_of_small_gradient_react_to_their_labels():
    tokens = probes()
    assert_close(
        qlens.implied_target(dft_with_the_mask_of_unshifted_labels, tokens).grad,
        qlens.implied_target("dft", tokens).grad,
    )
    style = style_of(nll_with_an_epsilon, {}, tokens)
    assert (style.shape, style.order) == ("rows", "texts")


def reinforce(log_probs, rewards, mask):
    advantages = (rewards - rewards.mean()) / (rewards.std() + 1e-6)
    return -((advantages.unsqueeze(-1) * log_probs) * mask).sum() / mask.sum()


def gspo(per_token_logps, old_per_token_logps, advantages, completion_mask):
    ratio = ((per_token_logps - old_per_token_logps) * completion_mask).sum(-1) / completion_mask.sum(-1)
    ratio = ratio.exp().unsqueeze(-1)
    losses = -torch.min(ratio * advantages, ratio.clamp(0.8, 1.2) * advantages)
    return (losses.expand_as(per_token_logps) * completion_mask).sum() / completion_mask.sum()


def mean_over_texts(per_token_logps, completion_mask):
    return -((per_token_logps * completion_mask).sum(-1) / completion_mask.sum(-1)).mean()


def mean_over_tokens(per_token_logps, completion_mask):
    return -(per_token_logps * completion_mask).sum() / completion_mask.sum()


def mean_of_rows(logits, labels):
    return F.cross_entropy(logits, labels, reduction="none").mean(-1)


@pytest.mark.parametrize(
    ("loss", "shape", "by_text"),
    [
        (reinforce, "aligned", "texts"),
        (gspo, "aligned", "column"),
        (mean_over_texts, "aligned", "logits"),
        (mean_over_tokens, "rows", "labels"),
        (mean_of_rows, "rows", "labels"),
    ],
)
def test_text_losses_are_not_called_with_rows(loss, shape, by_text):
    style = style_of(loss, {}, probes())
    assert (style.shape, style.fields, style.order) == (shape, by_text, "texts")


def decoupled_ppo(logprobs, proximal_logprobs, old_logprobs, advantages, loss_mask):
    ratio, weight = torch.exp(logprobs - proximal_logprobs), torch.exp(proximal_logprobs - old_logprobs)
    losses = -torch.min(ratio * advantages, ratio.clamp(0.8, 1.2) * advantages)
    return (losses * weight * loss_mask).sum() / loss_mask.sum()


def test_proximal_log_probs_are_log_probs():
    style = style_of(decoupled_ppo, {}, probes())
    assert (style.shape, style.fields) == ("rows", "labels")


class Counted(dict):
    """A counter that replayed calls do not reset: a subclass of dict is no state of the loss."""


def test_the_layout_search_of_a_refused_loss_is_remembered():
    calls = Counted(number=0)

    def output_tensor_loss(loss_mask, output_tensor):
        calls["number"] += 1
        return (output_tensor.float().view(-1) * loss_mask.view(-1)).sum()

    numbers = []
    for vocabulary in (V, V + 5):
        before = calls["number"]
        with pytest.raises(qlens.InputError):
            style_of(output_tensor_loss, {}, random_tokens(12, vocabulary))
        numbers.append(calls["number"] - before)
    assert 0 < numbers[1] < numbers[0] / 5, numbers


def test_a_layout_that_a_small_vocabulary_forced_is_given_up_by_one_trial():
    calls = Counted(number=0)

    def top_16_rows(logits, labels):
        calls["number"] += 1
        if logits.ndim == 2 and logits.shape[-1] < 16:
            raise ValueError("16 entries are needed")
        return F.cross_entropy(logits.flatten(0, -2), labels.flatten(), reduction="none").view_as(labels)

    assert style_of(top_16_rows, {}, random_tokens(12, V)).shape == "aligned"
    before = calls["number"]
    assert style_of(top_16_rows, {}, random_tokens(12, 2 * V)).shape == "rows"
    assert calls["number"] - before == 2, "a trial calls it with its labels and with others"
