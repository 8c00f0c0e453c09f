"""Scope: how far a token's gradient reaches, and whether a weight is held constant, against what methods declare."""

import pytest
import torch
from losses import forgot_detach, root_weighted

import qlens
from qlens.findings.reading import asked, fed
from qlens.findings.scope import scope
from qlens.probes import probes
from qlens.registry import resolve

REACH = {
    "apo_zero": "sequence",
    "asft_absolute": "sequence",
    "rpsft": "token",
}  # pairs that never meet; a penalty elsewhere
DETACHED = {"dft", "eaft", "iw_sft", "target_sft", "gem", "deft", "idft", "mile", "cayley", "bootstrap_hard"}
WHOLE = {"sft", "beyond_log", "gce", "focal", "kd", "reverse_kl", "brier", "label_smoothing", "ppo_clip", "dpo", "poly"}


@pytest.mark.parametrize("name", qlens.names())
def test_methods_reach_as_far_as_they_declare(name):
    variant = qlens.get(name)
    assert scope(variant.loss, probes()).of == REACH.get(name, variant.scope)


@pytest.mark.parametrize("name", sorted(DETACHED | WHOLE))
def test_weights_that_are_held_constant_are_told(name):
    found = scope(qlens.get(name).loss, probes())
    assert found.detached == (name in DETACHED)
    assert found.gap > 1e-2 if name in DETACHED else found.gap < 1e-7


def test_a_mean_over_the_batch_is_no_scope():
    for loss, detached in ((forgot_detach, False), (root_weighted, True)):
        found = scope(resolve(loss).loss, probes())
        assert (found.of, found.detached) == ("token", detached) and "no other token" in str(found)


def test_a_batch_statistic_is_seen_without_ids():
    tokens = probes().replace(sequence=None, pair=None, chosen=None)

    def normalised(logits, labels):
        nll = torch.nn.functional.cross_entropy(logits, labels, reduction="none")
        return nll / nll.detach().mean()

    found = scope(resolve(normalised).loss, tokens)
    assert found.of == "batch" and "98% of the others through logits and labels" in found.evidence


def test_detaching_is_told_in_float32_and_not_in_less():
    for name, detached in (
        ("dft", True),
        ("sft", False),
        ("focal", False),
        ("gce", False),
        ("focal(detach=True)", True),
    ):
        assert scope(qlens.get(name).loss, probes(torch.float32), 1e-3).detached == detached, name
    coarse = resolve(lambda logits, labels: nll(logits.bfloat16(), labels))
    assert scope(coarse.loss, probes(), precision=torch.bfloat16).detached is None


def nll(logits, labels):
    return torch.nn.functional.cross_entropy(logits, labels, reduction="none")


def test_other_tokens_count_through_labels_weights_and_fields():
    def softmax_of_rewards(logits, labels, advantage):
        return (advantage.softmax(0) * nll(logits, labels)).sum()

    def averaged_weights(logits, labels, weight):
        return (weight * nll(logits, labels)).sum() / weight.sum()

    def earlier_labels(logits, labels):
        before = (labels[:, None] == labels[None]).tril(-1).any(-1)  # a token that was a label before counts half
        return nll(logits, labels) * torch.where(before, 0.5, 1.0)

    for loss, through in ((softmax_of_rewards, "advantage"), (averaged_weights, "weight"), (earlier_labels, "labels")):
        variant = resolve(loss)
        found = scope(variant.loss, fed(probes(), variant), needs=asked(variant))
        assert (found.of, found.through) == ("batch", (through,)), found.evidence


def test_the_number_of_tokens_counts():
    def by_chunks(logits, labels):
        count = -(-len(logits) // 32)
        parts = zip(logits.chunk(count), labels.chunk(count), strict=True)
        return sum(nll(z, y).mean() for z, y in parts)

    def squared(logits, labels):
        return nll(logits, labels) / len(labels)

    def by_sequences(logits, labels, sequence):
        losses, ids = nll(logits, labels), sequence.unique()
        return sum(losses[sequence == i].mean() for i in ids) / len(ids)

    found = scope(resolve(by_sequences).loss, probes(), needs=("sequence",))
    assert (found.of, found.through) == ("sequence", ("number",)), found.evidence
    for loss in (by_chunks, squared):
        found = scope(resolve(loss).loss, probes())
        assert (found.of, found.through) == ("batch", ("number",)) and "how many tokens" in found.evidence
    assert scope(resolve(lambda logits, labels: nll(logits, labels).sum() / 512).loss, probes()).of == "token"
