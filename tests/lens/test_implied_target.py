"""implied_target on losses of every kind and reduction, and on losses that it flags or refuses."""

import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from cases import case
from hypothesis import given, settings
from hypothesis import strategies as st
from released_losses import shifted
from released_losses import sound as outputs_items
from torch import nn
from torch.testing import assert_close

import qlens
from qlens.losses.reduction.scalar import find_reduction
from qlens.testing import random_tokens


def logits_none(logits, labels):
    return F.cross_entropy(logits, labels, reduction="none")


def logits_sum(logits, labels):
    return F.cross_entropy(logits, labels, reduction="sum")


def logits_mean(logits, labels):
    return F.cross_entropy(logits, labels)


def tokens_none(tokens):
    return -tokens.label_log_probs


def tokens_mean(tokens):
    return -tokens.label_log_probs.mean()


def outputs_needs_items(outputs, labels, num_items_in_batch):
    return F.cross_entropy(*shifted(outputs, labels), reduction="sum") / num_items_in_batch


def outputs_sum(outputs, labels):
    return F.cross_entropy(*shifted(outputs, labels), reduction="sum")


def outputs_mean_over_all(outputs, labels):
    return F.cross_entropy(*shifted(outputs, labels), reduction="none").mean()


def outputs_mean_over_all_t(outputs, labels):
    return F.cross_entropy(*shifted(outputs, labels), reduction="sum") / labels.numel()


def outputs_none(outputs, labels):
    return F.cross_entropy(*shifted(outputs, labels), reduction="none").view(1, -1)


SHAPES = {
    logits_none: None,
    logits_sum: "sum",
    logits_mean: "mean over unmasked",
    tokens_none: None,
    tokens_mean: "mean over unmasked",
    outputs_items: "mean over unmasked",
    outputs_needs_items: "mean over unmasked",
    outputs_sum: "sum",
    outputs_mean_over_all: "mean over all",
    outputs_mean_over_all_t: "mean over all, the unused last position included",
    outputs_none: None,
}


def test_every_kind_and_reduction_is_undone():
    for loss in SHAPES:
        for n in [1, 7, 40]:
            with case(loss, n):
                tokens = random_tokens(n, 6)
                assert_close(qlens.implied_target(loss, tokens).q, tokens.one_hot)
                if SHAPES[loss]:
                    assert find_reduction(loss, {}, tokens, "loss") == SHAPES[loss]


def test_modules_and_torch_functions_are_read():
    tokens = random_tokens(9, 6)
    for loss in (nn.CrossEntropyLoss(), nn.CrossEntropyLoss(reduction="sum"), F.cross_entropy):
        assert_close(qlens.implied_target(loss, tokens).q, tokens.one_hot)


def test_losses_may_take_fields_of_tokens_by_name():
    def distil(logits, labels, teacher, *, temperature=1.0):
        return F.kl_div(logits.log_softmax(-1), teacher.softmax(-1), reduction="batchmean")

    tokens = random_tokens(9, 6)
    assert_close(qlens.implied_target(distil, tokens).q, tokens.teacher.softmax(-1))
    with pytest.raises(qlens.InputError, match="distil needs a teacher"):
        qlens.implied_target(distil, tokens.replace(teacher=None))


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 10**6), v=st.integers(2, 8), n=st.integers(1, 6))
def test_round_trip_on_random_soft_targets(seed, v, n):
    """Cross-entropy toward any distribution, however reduced, gives that distribution back."""
    tokens = random_tokens(n, v, seed=seed)
    target_probs = random_tokens(n, v, seed=seed + 1).probs
    lookup = {tuple(row.tolist()): q for row, q in zip(tokens.logits, target_probs, strict=True)}

    def loss(logits, labels):
        q = torch.stack([lookup[tuple(row.tolist())] for row in logits.detach()])
        return -(q * logits.log_softmax(-1)).sum(-1).mean()

    assert_close(qlens.implied_target(loss, tokens).q, target_probs)


def test_a_loss_that_sees_raw_logits_is_flagged_not_projected():
    def with_z_loss(logits, labels):
        return F.cross_entropy(logits, labels) + 0.1 * logits.logsumexp(-1).square().mean()

    tokens = random_tokens(12, 6)
    target = qlens.implied_target(with_z_loss, tokens)
    lse = tokens.logits.logsumexp(-1)
    assert_close(target.total, 1 - 0.2 * lse)  # Q = d - 2 c lse p
    assert_close(target.q, tokens.one_hot - 0.2 * lse[:, None] * tokens.probs)
    assert not bool(target.shift_invariant.any()) and not bool(target.in_simplex.any())


def test_rows_of_a_scalar_loss_can_be_weighted():
    tokens = random_tokens(5, 6)
    weight = torch.tensor([0.0, 1.0, 2.0, 0.5, 3.0], dtype=torch.float64)
    plain = qlens.implied_target(logits_mean, tokens).grad
    assert_close(qlens.implied_target(logits_mean, tokens.replace(weight=weight)).grad, plain * weight[:, None])
    rows = qlens.registry.resolve(logits_mean).loss(tokens)
    assert_close(rows.sum() / 5, F.cross_entropy(tokens.logits, tokens.labels))


def test_no_rows_give_no_loss_but_a_graph():
    tokens = random_tokens(3, 6)[:0]
    tokens = tokens.replace(logits=tokens.logits.requires_grad_())
    rows = qlens.registry.resolve(logits_mean).loss(tokens)
    assert rows.shape == (0,)
    rows.sum().backward()
    assert tokens.logits.grad.shape == (0, 6)


def test_the_input_is_not_modified():
    tokens = random_tokens(4, 6)
    before = tokens.logits.clone()
    qlens.implied_target(logits_mean, tokens)
    assert torch.equal(tokens.logits, before) and tokens.logits.grad is None


def test_unreadable_losses_are_refused_with_the_reason():
    tokens = random_tokens(8, 6)
    count = itertools.count(1)
    cases = {
        "takes no argument that logits can be given to": lambda: torch.zeros(()),
        "give 'extra' a default": lambda logits, labels, extra: logits.sum(),
        "without a gradient": lambda logits, labels: F.cross_entropy(logits.detach(), labels),
        "must return a floating-point tensor": lambda logits, labels: "1.0",
        "does not depend on the logits it is given": lambda logits, labels: 1.0,
        r"returned shape \(8, 6\)": lambda logits, labels: logits * 2,
        "reduction could not be found: .* a factor 0.83, shown three times by 0.7675": lambda logits, labels: (
            F.cross_entropy(logits, labels, reduction="sum") * (1 + math.exp(-len(labels) / 8))
        ),
        "not deterministic": lambda logits, labels: F.cross_entropy(logits, labels) * next(count),
    }
    for says, loss in cases.items():
        with pytest.raises(qlens.InputError, match=says):
            qlens.implied_target(loss, tokens)
    with pytest.raises(qlens.InputError, match="'unit' or 'natural', got 'structural'"):
        qlens.implied_target("sft", tokens, scale="structural")


def test_a_loss_that_skips_rows_is_still_read():
    def hard_only(logits, labels):
        nll = F.cross_entropy(logits, labels, reduction="none")
        return (nll * (nll.detach() > 5)).mean()

    tokens = random_tokens(12, 6, spread=0.1)  # nothing is hard here
    assert_close(qlens.implied_target(hard_only, tokens).q, tokens.probs)


def test_long_texts_are_read_some_rows_at_a_time(monkeypatch):
    tokens = random_tokens(50, 20)
    whole = qlens.implied_target("focal", tokens).grad
    monkeypatch.setattr("qlens.lens.implied.ENTRIES", 7 * 20)
    assert_close(qlens.implied_target("focal", tokens).grad, whole, rtol=0, atol=0)
