"""Reductions of losses: powers of a count, a count plus a constant, two counts, losses that use earlier labels."""

import pytest
import torch
import torch.nn.functional as F
from torch.testing import assert_close

import qlens
from qlens.losses.layout.layout_search import style_of
from qlens.losses.layout.signature import settings_of
from qlens.losses.reduction import unreduced
from qlens.losses.reduction.divisors import REDUCTIONS, Division
from qlens.losses.reduction.scalar import by_length, find_reduction
from qlens.registry import resolve
from qlens.testing import random_tokens

ce = F.cross_entropy
V = 11


def of_rows(power, added=0.0):
    return lambda logits, labels: ce(logits, labels, reduction="sum") / (len(labels) ** power + added)


def mean_by_texts(logits, labels):
    return ce(logits[:, :-1].transpose(1, 2), labels[:, 1:]) / len(labels)


def root_of_lengths(logits, labels):
    losses = ce(logits[:, :-1].transpose(1, 2), labels[:, 1:], reduction="none").sum(1)
    return (losses / (labels[:, 1:] != -100).sum(1).sqrt()).mean()


def test_powers_products_and_sums_of_counts_are_undone():
    tokens = random_tokens(12, V)
    cases = {
        of_rows(2): "sum divided by the number of supervised tokens to the power 2",
        of_rows(0.5): "sum divided by the number of supervised tokens to the power 0.5",
        of_rows(1, 1.0): "sum divided by the number of supervised tokens + 1",
        of_rows(1, 1e-8): "mean over unmasked",
        mean_by_texts: "mean over unmasked, divided by the number of texts once more",
        root_of_lengths: "sum of each text divided by the root of its length, mean over texts",
    }
    for loss, name in cases.items():
        assert find_reduction(loss, {}, tokens, "loss") == name
        assert_close(
            qlens.implied_target(loss, tokens).q, tokens.one_hot, msg=lambda text, name=name: f"{name}: {text}"
        )
    assert "to the power 2, which is undone" in resolve(of_rows(2)).account(tokens).called_as


def test_two_terms_with_two_counts_are_reported():
    def all_positions(logits, labels):
        flat = logits[:, :-1]
        return ce(flat.flatten(0, 1), labels[:, 1:].flatten()) + 0.01 * flat.logsumexp(-1).square().mean()

    def mean_and_sum(logits, labels):
        return ce(logits, labels) + 0.01 * logits.logsumexp(-1).square().sum()

    cases = {all_positions: "one a mean over unmasked, the other (", mean_and_sum: ") a sum: their balance"}
    tokens = random_tokens(12, V)
    for loss, phrase in cases.items():
        account = resolve(loss).account(tokens)
        assert any(
            "two terms that are divided by different counts" in note and phrase in note for note in account.notes
        )
    grad = qlens.implied_target(all_positions, tokens).grad  # texts of 4 and 8 labels: 12 tokens in 16 positions
    z_loss = 0.02 * (12 / 16) * tokens.logits.logsumexp(-1)[:, None] * tokens.probs
    assert_close(grad, tokens.probs - tokens.one_hot + z_loss)


def test_reductions_of_losses_that_use_earlier_labels_are_found():
    def unlikelihood(lprobs, target):
        before = target[None].expand(len(target), -1).tril(-1) - torch.ones(len(target), len(target)).triu().long()
        marks = torch.zeros_like(lprobs, dtype=torch.bool)
        marks = marks.scatter(1, before.clamp(min=0), before >= 0).scatter(1, target[:, None], False)
        return F.nll_loss(lprobs, target) - ((1 - lprobs.exp()).log() * marks).sum(-1).mean()

    tokens = random_tokens(12, V)
    assert find_reduction(unlikelihood, {}, tokens, "loss") == "mean over unmasked"
    assert resolve(unlikelihood).account(tokens).notes == ()


def test_unknown_reductions_are_refused_with_the_measured_factors():
    def odd(logits, labels):
        return ce(logits, labels, reduction="sum") * (2 + torch.tensor(float(len(labels))).sin())

    with pytest.raises(
        qlens.InputError,
        match=r"shown twice, a row's gradient changes by a factor 0.\d+, shown three times by 0.\d+.*\(N,\)",
    ):
        qlens.implied_target(odd, random_tokens(12, V))


def test_a_vocabulary_of_one_token_is_refused_everywhere_in_the_same_words():
    says = "has a vocabulary of 1: at least 2 entries are needed, for one token alone always has p = 1"
    labels = torch.zeros(3, dtype=torch.long)
    with pytest.raises(qlens.InputError, match=f"logits {says}"):
        qlens.Tokens(logits=torch.zeros(3, 1), labels=labels)
    with pytest.raises(qlens.InputError, match=f"head {says}"):
        qlens.fused_loss("sft", torch.zeros(3, 4), torch.zeros(1, 4), labels)
    one = random_tokens(1, V)
    assert_close(qlens.implied_target(ce, one).q, one.one_hot)
    assert qlens.explain(ce, one).nearest[0].spec == "sft"


class LearnsATemperature(torch.nn.Module):
    """The mean over texts of each text's mean, with a parameter of its own; ``coupled``: texts weigh by each other's losses."""

    def __init__(self, coupled=False):
        super().__init__()
        self.sharpness = torch.nn.Parameter(torch.tensor(1.5, dtype=torch.float64))
        self.coupled = coupled

    def forward(self, outputs, labels):
        z, y = outputs.logits[:, :-1] * self.sharpness, labels[:, 1:]
        nll = F.cross_entropy(z.transpose(1, 2), y, reduction="none").sum(1) / (y != -100).sum(1)
        return (nll * (1 + 0.05 * nll.mean().detach() * self.coupled)).mean()


def test_a_parameter_of_a_mean_over_texts_has_the_gradient_of_the_sum_over_tokens():
    tokens = random_tokens(12, 11).replace(sequence=torch.tensor([0] * 2 + [1] * 7 + [2] * 3), pair=None, chosen=None)
    loss = LearnsATemperature()
    summed = F.cross_entropy(tokens.logits * loss.sharpness, tokens.labels, reduction="sum")
    (expected,) = torch.autograd.grad(summed, loss.sharpness)
    for requires_grad in (False, True):
        batch = tokens.with_logits(tokens.logits.clone().requires_grad_(requires_grad))
        (grad,) = torch.autograd.grad(resolve(loss).loss(batch).sum(), loss.sharpness)
        assert_close(grad, expected)


def test_a_parameter_is_refused_where_texts_depend_on_each_other():
    tokens = random_tokens(12, 11).replace(sequence=torch.tensor([0] * 2 + [1] * 7 + [2] * 3), pair=None, chosen=None)
    variant = resolve(LearnsATemperature(coupled=True))
    name = "mean of each text, mean over texts"
    variant.unreduced.division = Division(name, REDUCTIONS[name])
    variant.unreduced.settings = settings_of(variant.method.fn)
    with pytest.raises(qlens.InputError, match="a parameter of its own that requires a gradient, of shape"):
        variant.loss(tokens.with_logits(tokens.logits.clone().requires_grad_())).sum()


def test_finding_a_reduction_keeps_state_and_generators():
    calls = []

    def counting(outputs, labels, attention_mask):
        calls.append(1)
        z, y = outputs.logits[:, :-1], labels[:, 1:]
        nll = F.cross_entropy(z.transpose(1, 2), y, reduction="none")
        return (nll * torch.rand(()).item()).sum(1).div((y != -100).sum(1)).mean()

    tokens = random_tokens(12, 11).replace(sequence=torch.tensor([0] * 2 + [1] * 7 + [2] * 3), pair=None, chosen=None)
    style = style_of(counting, {}, tokens)
    for find in (find_reduction, lambda *args: by_length(["sum", "mean over unmasked"], *args[:3], style)):
        before, calls_before = torch.get_rng_state(), len(calls)
        find(counting, {}, tokens, "counting")
        assert torch.equal(torch.get_rng_state(), before) and len(calls) == calls_before


def test_weights_of_a_loss_that_reduces_itself_are_bounded():
    tokens = random_tokens(1030, 4)
    weight = torch.linspace(0, 1, 1030, dtype=torch.float64)
    with pytest.raises(qlens.InputError, match="1030 different weights, of which at most 1024 are possible"):
        resolve(F.cross_entropy).loss(tokens.replace(weight=weight))


def test_state_is_copied_only_where_a_second_call_may_follow(monkeypatch):
    snapshots = []

    class Counted(unreduced.Replay):
        def __init__(self, *args):
            snapshots.append(1)
            super().__init__(*args)

    def user(logits, labels):
        return F.cross_entropy(logits, labels)

    variant = resolve(user)
    tokens = random_tokens(12, 11)
    tokens = tokens.with_logits(tokens.logits.clone().requires_grad_())
    first = variant.loss(tokens)
    monkeypatch.setattr(unreduced, "Replay", Counted)
    assert_close(variant.loss(tokens), first)
    assert not snapshots
