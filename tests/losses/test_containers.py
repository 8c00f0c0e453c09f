"""Labels in tuples, in dicts and as one-hot labels; outputs in a tuple; training steps; what is refused."""

import pytest
import torch
from torch import nn
from torch.testing import assert_close
from transformers import modeling_outputs

import qlens
from qlens.losses.arguments import CausalLMOutput
from qlens.testing import random_tokens

V = 11


def ce(logits, labels):
    return nn.functional.cross_entropy(logits.reshape(-1, logits.shape[-1]), labels.reshape(-1), ignore_index=-100)


def labels_beside_a_mask(outputs, labels):
    labels, mask = labels
    losses = nn.functional.cross_entropy(outputs.transpose(1, 2), labels.clamp(min=0), reduction="none")
    return (losses * mask).sum() / mask.sum()


def one_hot_labels(logits, labels):
    return -(labels * logits.log_softmax(-1)).sum() / labels.sum()


def soft_targets(logits, targets):
    return -(targets * logits.log_softmax(-1)).sum(-1).mean()


def labels_in_a_dict(logits, labels):
    return ce(logits[:, :-1], labels["labels"][:, 1:])


def outputs_in_a_tuple(outputs, labels):
    logits, auxiliary = outputs
    return ce(logits[:, :-1], labels[:, 1:]) + auxiliary


class Module(nn.Module):
    """A module with a training step, as of Lightning."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def training_step(self, batch, batch_idx):
        logits = self.model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
        return ce(logits[:, :-1], batch["labels"][:, 1:])


def test_labels_and_outputs_are_passed_in_containers():
    tokens = random_tokens(12, V)
    for loss in (labels_beside_a_mask, one_hot_labels, soft_targets, labels_in_a_dict, outputs_in_a_tuple, Module):
        q = qlens.implied_target(loss, tokens).q
        assert_close(q, tokens.one_hot, rtol=1e-5, atol=1e-5, msg=lambda text, loss=loss: f"{loss}: {text}")


def test_a_training_step_restores_its_model():
    own = nn.Linear(2, 2)
    module = Module(own)
    qlens.implied_target(module, random_tokens(12, V))
    assert module.model is own


def test_a_training_step_without_a_model_is_refused():
    class Holder(nn.Module):
        def training_step(self, batch, batch_idx):
            return self.inner(batch["input_ids"]).sum()

    with pytest.raises(qlens.InputError, match=r"keep it as self.model"):
        qlens.implied_target(Holder(), random_tokens(12, V))


def test_an_async_loss_and_a_generator_are_refused():
    async def awaited(logits, labels):
        return ce(logits, labels)

    def yielded(logits, labels):
        yield ce(logits, labels)

    for loss in (awaited, yielded):
        with pytest.raises(qlens.InputError, match="write def and return loss, with no async or yield"):
            qlens.implied_target(loss, random_tokens(12, V))


def test_a_value_without_the_graph_of_the_logits_is_refused():
    def loss(logits, labels):
        return torch.tensor(float(ce(logits, labels)), requires_grad=True)

    with pytest.raises(qlens.InputError, match="keep the tensor that was computed from the logits"):
        qlens.implied_target(loss, random_tokens(12, V))


def test_rows_react_to_their_labels_by_the_scale_of_their_own_gradient():
    def dft(logits, labels, loss_mask):
        losses = nn.functional.cross_entropy(
            logits[:, :-1].reshape(-1, logits.shape[-1]), labels[:, 1:].reshape(-1).clamp(min=0), reduction="none"
        )
        mask = loss_mask[:, 1:].reshape(-1)
        return (losses * torch.exp(-losses.detach()) * mask).sum() / mask.sum()

    tokens = random_tokens(12, V)
    tokens = tokens.with_logits(8 * tokens.logits)  # label probabilities from 1 to far below 1e-3
    reference = qlens.implied_target("dft", tokens)
    assert_close(qlens.implied_target(dft, tokens).grad, reference.grad, rtol=1e-5, atol=1e-9)


def test_outputs_in_a_trial_read_as_those_of_transformers():
    logits = torch.ones(2, 3)
    for outputs in (CausalLMOutput(logits), modeling_outputs.CausalLMOutput(logits=logits)):
        assert outputs.logits is outputs["logits"] is outputs[0] is logits
        assert outputs.loss is None and "loss" not in outputs and len(outputs) == 1 and outputs.to_tuple() == (logits,)
