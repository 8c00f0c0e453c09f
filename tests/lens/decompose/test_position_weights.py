"""Weights by position in the text: recovered, and described by explain."""

import torch
import torch.nn.functional as F

import qlens


def per_token(outputs, labels):
    z, y = outputs.logits[:, :-1], labels[:, 1:]
    loss = F.cross_entropy(z.flatten(0, 1), y.flatten(), reduction="none", ignore_index=-100).view_as(y)
    return loss, (y != -100).to(loss)


def decaying(outputs, labels, num_items_in_batch=None):
    loss, supervised = per_token(outputs, labels)
    return (0.8 ** torch.arange(loss.shape[1]) * loss * supervised).sum() / (num_items_in_batch or supervised.sum())


def by_length(outputs, labels, num_items_in_batch=None):
    loss, supervised = per_token(outputs, labels)
    place = torch.arange(1, loss.shape[1] + 1) / loss.shape[1]
    return (place * loss * supervised).sum() / (num_items_in_batch or supervised.sum())


def last_two(outputs, labels, num_items_in_batch=None):
    loss, supervised = per_token(outputs, labels)
    remaining = supervised.flip(1).cumsum(1).flip(1)
    return ((remaining <= 2) * loss * supervised).sum() / (num_items_in_batch or supervised.sum())


def warmed_up(outputs, labels, num_items_in_batch=None):
    loss, supervised = per_token(outputs, labels)
    place = ((torch.arange(loss.shape[1]) + 1) / 4).clamp(max=1)
    return (place * loss * supervised).sum() / (num_items_in_batch or supervised.sum())


def harmonic_dft(logits, labels):
    loss = F.cross_entropy(logits, labels, reduction="none")
    return ((-loss).exp().detach() * loss / (torch.arange(len(loss)) + 1)).mean()


def waving(logits, labels):
    loss = F.cross_entropy(logits, labels, reduction="none")
    return (loss * (1.5 + torch.sin(torch.arange(len(loss))))).mean()


def test_position_weights_are_recovered_and_described():
    for loss, method, formula in (
        (decaying, "sft", "0.8^t (t the position in its sequence"),
        (by_length, "sft", "(t + 1) / T"),
        (last_two, "sft", "1 where e <= 1, 0 elsewhere"),
        (warmed_up, "sft", "0.25 + 0.25 t, at most 1"),
        (harmonic_dft, "dft", "1 / (i + 1) (i the row of the batch"),
    ):
        e = qlens.explain(loss)
        assert e.nearest[0].spec == method and e.nearest[0].same, loss.__name__
        assert formula in str(e.position_weights), (loss.__name__, str(e.position_weights))
        assert f"This is {method} with a weight by position" in e.summary and formula in e.summary
        assert e.to_dict()["position_weights"]["weights"]


def test_a_weight_without_a_formula_is_listed():
    e = qlens.explain(waving)
    assert e.nearest[0].spec == "sft" and e.nearest[0].same and not e.position_weights.formula
    assert "without a known formula, 1.5, 2.3415" in e.summary


def test_positions_with_other_gradients_have_no_weight():
    def mixed(logits, labels):
        loss = F.cross_entropy(logits, labels, reduction="none")
        power = torch.arange(len(loss)) / len(loss)
        return ((-power * loss).exp().detach() * loss).mean()

    e = qlens.explain(mixed)
    assert e.position_weights is None and "depends on its position" in e.summary
