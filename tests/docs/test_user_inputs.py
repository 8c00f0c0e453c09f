"""Inputs of user methods: copies that they may modify, masks as bool, weights where needed; and counts of selected tokens."""

import functools

import pytest
import torch
import torch.nn.functional as F
from losses import nll
from tiny_models import llama, parameters, rows
from torch.testing import assert_close
from user_methods import hidden_and_head

import qlens
from qlens import Tokens, fused_loss
from qlens.registry.registry import _method


def registered(fn, **card):
    """A new variant of a method at every call, as a name gives one."""
    method = _method(fn.__name__, fn, **card)
    return method.variant


def assert_trained_as(variant, expected_loss, **fields):
    """Value and gradients of the engine against a loss of whole logits, (N,)."""
    hidden, head, labels = hidden_and_head(50, 40)
    whole = expected_loss(hidden @ head.T, labels).mean()
    value = fused_loss(variant, hidden, head, labels, **{name: each.clone() for name, each in fields.items()})
    assert_close(value, whole, rtol=1e-9, atol=1e-12)
    for got, right in zip(*(torch.autograd.grad(v, (hidden, head)) for v in (value, whole)), strict=True):
        assert_close(got, right, rtol=0, atol=1e-9 * max(1e-3, float(right.abs().max())))


def test_a_method_may_write_on_its_inputs():
    calls = []

    def halving(tokens):
        calls.append(len(tokens))
        teacher, z = tokens.teacher, tokens.logits
        teacher /= 2.0
        z *= 0.5
        return -(teacher.softmax(-1) * z.log_softmax(-1)).sum(-1)

    teacher = torch.randn(40, 50, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    fresh = registered(halving, needs=("teacher",), scope="token")
    for _ in range(3):
        calls.clear()
        assert_trained_as(
            fresh(), lambda z, y: -((teacher / 2).softmax(-1) * (z / 2).log_softmax(-1)).sum(-1), teacher=teacher
        )
    assert calls == [40]  # what is tried is tried once, and not on these rows
    tokens = Tokens(
        logits=torch.zeros(40, 50).double(), labels=torch.zeros(40, dtype=torch.long), teacher=teacher.clone()
    )
    assert_close(fresh().loss(tokens), fresh().loss(tokens))
    assert_close(tokens.teacher, teacher)


def test_a_loss_of_logits_may_write_on_some_batches_only():
    def zeroing(logits, labels):
        if (labels == 7).any():
            logits[labels == 7] = 0.0
        return F.cross_entropy(logits, labels, reduction="none")

    variant = registered(zeroing)()
    hidden, head, labels = hidden_and_head(50, 40)
    for own in (labels.masked_fill(labels == 7, 8), labels.clone().fill_(7), labels):
        value = fused_loss(variant, hidden, head, own)
        logits = hidden @ head.T
        whole = torch.where(own == 7, nll(logits * 0, own), nll(logits, own)).mean()
        assert_close(value, whole)
        assert_close(*(torch.autograd.grad(each, hidden)[0] for each in (value, whole)))


def test_masks_of_zeros_and_ones_are_bool():
    def outside(tokens):
        return (~tokens.critical) * -tokens.label_log_probs * torch.where(tokens.hint, 1.0, 0.1)

    mask = torch.arange(40) % 3 == 0
    for dtype in (torch.bool, torch.long, torch.float32):
        fields = {"critical": mask.to(dtype), "hint": (~mask).to(dtype)}
        assert_trained_as(
            registered(outside)(), lambda z, y: (~mask) * nll(z, y) * torch.where(~mask, 1.0, 0.1), **fields
        )
    tokens = Tokens(logits=torch.zeros(40, 5), labels=torch.zeros(40, dtype=torch.long), critical=mask.long())
    assert tokens.critical.dtype == torch.bool == tokens.replace(hint=mask.long()).hint.dtype


def test_a_method_that_needs_the_weight_gets_it():
    def squared(tokens):
        return -(tokens.weight.clamp(max=0.5) ** 2) * tokens.label_log_probs

    def pushed(tokens):
        return qlens.Target.mix(tokens, 1.0, "student", scale=tokens.weight.clamp(max=0.5) ** 2)

    weight = torch.linspace(0.1, 1.0, 40, dtype=torch.float64)
    for fn in (squared, pushed):
        assert_trained_as(
            registered(fn, needs=("weight",))(), lambda z, y: weight.clamp(max=0.5) ** 2 * nll(z, y), weight=weight
        )


def test_a_loss_that_reduces_itself_has_the_value_of_its_weighted_rows(make):
    weight = torch.linspace(0.1, 2.0, 40, dtype=torch.float64)
    for reduction in ("mean", "sum", "none"):
        for scope in ("", "token"):
            loss = functools.partial(F.cross_entropy, reduction=reduction)
            variant = registered(lambda logits, labels, loss=loss: loss(logits, labels), scope=scope)()
            assert_trained_as(variant, lambda z, y: weight * nll(z, y), weight=weight)

    def over_the_hardest(logits, labels):
        losses = F.cross_entropy(logits, labels, reduction="none")
        return (losses * (losses >= losses.detach().mean())).mean()

    hidden, head, labels = hidden_and_head(50, 40)
    with pytest.raises(qlens.InputError, match="its rows depend on each other.*return the unreduced loss"):
        fused_loss(over_the_hardest, hidden, head, labels, weight=weight)


def test_selected_tokens_of_a_loss_alone_are_counted(make):
    def selecting(logits, labels):
        losses = F.cross_entropy(logits, labels, reduction="none")
        return losses * (losses.detach() < 4.0)

    updates, logged = [], []
    for fused in (True, False):
        model = llama()
        before = parameters(model)
        variant = registered(selecting, scope="token", denominator="selected")()
        trainer = make(variant, model=model, fused=fused, steps=1, eval_dataset=rows(4))
        trainer.train()
        updates.append(parameters(model) - before)
        logged.append((trainer.state.log_history[0]["loss"], trainer.evaluate()["eval_loss"]))
    assert_close(*updates, rtol=1e-3, atol=1e-6)
    assert logged[0] == pytest.approx(logged[1], rel=1e-4) and logged[0][0] < 4.0


def test_layouts_are_not_decided_on_a_skipped_batch():
    """Neither the layout nor the reduction of a loss is taken from rows that it skips, with zeros or without a graph."""

    def shifting(logits, labels, critical):
        z, y, mask = logits[..., :-1, :], labels[..., 1:], critical[..., 1:]
        losses = F.cross_entropy(z.reshape(-1, z.shape[-1]), y.reshape(-1), ignore_index=-100, reduction="none")
        return (losses * mask.reshape(-1)).sum()

    def skipping(logits, labels, critical):
        mask = critical.bool()
        if not mask.any():
            return torch.zeros((), dtype=logits.dtype)
        return F.cross_entropy(logits[mask], labels[mask], reduction="sum")

    none, some = torch.zeros(40, dtype=torch.bool), torch.arange(40) % 2 == 1
    for fn in (shifting, skipping):
        variant = registered(fn, scope="token")()
        for critical in (none, some, none):
            assert_trained_as(variant, lambda z, y, critical=critical: critical * nll(z, y), critical=critical)


def test_a_reused_variant_follows_a_changed_reduction():
    reduction = ["mean"]
    variant = registered(lambda logits, labels: F.cross_entropy(logits, labels, reduction=reduction[0]))()
    for reduction[0] in ("mean", "sum", "none", "mean"):
        assert_trained_as(variant, nll)
