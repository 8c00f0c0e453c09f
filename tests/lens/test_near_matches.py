"""Near matches and label ids: losses equal to a method on most tokens, and weights by label id."""

import math

import torch
import torch.nn.functional as F
from losses import label_log_probs, nll

import qlens
from qlens.core.probes import trials
from qlens.lens.identify.near_identity import gate, near_match
from qlens.lens.reading import Reading
from qlens.lens.weights.class_weights import class_weights, divided_by_mean, relabelled
from qlens.lens.weights.weight_law import law
from qlens.registry import resolve

T = trials()
NAMES = ("sft", "dft", "focal", "topk_kd(k=4)", "kd")


def find_near_match(loss):
    variant = resolve(loss)
    return near_match(Reading.of(variant, T), variant.loss, NAMES)


def entropy(logits):
    log_p = logits.log_softmax(-1)
    return -(log_p.exp() * log_p).sum(-1)


def test_a_clamped_truncated_divergence_is_a_near_match():
    def clamped(logits, labels, teacher):
        log_t, ids = teacher.log_softmax(-1).topk(4, -1)
        return (log_t.exp() * (log_t - logits.log_softmax(-1).gather(-1, ids))).sum(-1).clamp_min(0).mean()

    near = find_near_match(clamped)
    assert near.spec == "topk_kd(k=4)" and near.factor == 1
    assert "its gradient is zero, where the loss is held at 0: a clamp" in str(near)


def test_clamps_and_gates_are_near_matches():
    for loss, message in (
        (lambda logits, labels: nll(logits, labels).clamp(max=10).mean(), "held at 10: a clamp"),
        (lambda logits, labels: -label_log_probs(logits, labels).exp().clamp(min=1e-8).log(), "p_y >= "),
        (lambda logits, labels: nll(logits, labels) * (entropy(logits.detach()) < 4), "where H <= 4 "),
        (
            lambda logits, labels: nll(logits, labels) * ((logits > logits.gather(1, labels[:, None])).sum(-1) <= 60),
            "rank (0 first) <= 60",
        ),
    ):
        near = find_near_match(loss)
        assert near.spec == "sft" and message in str(near), str(near)


def test_an_epsilon_inside_a_logarithm_is_named():
    def focal(logits, labels):
        p = label_log_probs(logits, labels).exp()
        return (-((1 - p) ** 2) * (p + 1e-8).log()).mean()

    near = find_near_match(focal)
    assert near.spec == "focal" and "an epsilon of about 1e-08 beside p_y" in str(near)


def test_losses_far_from_all_methods_have_no_near_match():
    assert (
        find_near_match(
            lambda logits, labels: nll(logits, labels) * (1 + 0.3 * torch.sin(7 * logits.detach().amax(-1)))
        )
        is None
    )


def test_weights_by_label_id_are_found_with_their_ids():
    weights = torch.arange(1, 161, dtype=torch.float64)
    for loss, unusual in (
        (lambda logits, labels: nll(logits, labels) * torch.where(labels == 2, 10.0, 1.0), {2: 10.0}),
        (
            lambda logits, labels: F.cross_entropy(logits, labels, weights, reduction="none"),
            {i: i + 1.0 for i in range(1, 160)},
        ),
    ):
        got = class_weights(resolve(loss).loss, T, 26, range(160), torch.float64)
        assert got.equal and got.unusual == unusual
    ids = T.labels.unique().tolist()
    assert class_weights(qlens.get("eaft").loss, T, 26, ids, torch.float64) is None
    assert math.isclose(got.of(torch.tensor([4]))[0], 5.0)


def test_a_special_vocabulary_column_is_no_label_weight():
    def suppressed(logits, labels):
        mask = torch.zeros_like(logits)
        mask[:, 7] = -5.0
        return nll(logits + mask, labels)

    got = class_weights(resolve(suppressed).loss, T, 26, range(160), torch.float64)
    assert got is not None and not got.equal


def ids_of(loss):
    return class_weights(resolve(loss).loss, T, 26, range(160), torch.float64)


def test_ids_of_weight_zero_are_counted():
    got = ids_of(lambda logits, labels: nll(logits, labels) * (labels < 8))
    assert got.equal and {i for i, w in got.weights.items() if w} == set(range(8))
    assert "1 for ids 0 to 7, 0 for the others (152 of 160 ids)" in str(got)
    assert got.of(torch.tensor([3, 8, 4000])).tolist() == [1.0, 0.0, 0.0]
    got = ids_of(lambda logits, labels: nll(logits, labels) * (labels != 2))
    assert "0 for id 2, 1 for the others" in str(got) and got.of(torch.tensor([4000])).tolist() == [1.0]


def test_a_pull_toward_the_next_id_depends_on_ids():
    def neighbour(logits, labels):
        return 0.9 * nll(logits, labels) + 0.1 * nll(logits, (labels + 1) % logits.shape[-1])

    assert not ids_of(neighbour).equal


def test_position_weights_are_not_label_id_weights():
    assert ids_of(lambda logits, labels: nll(logits, labels) * torch.linspace(0.5, 1.5, len(labels))) is None


def test_normalised_class_weights_are_told_from_plain_ones():
    weights = torch.ones(160, dtype=torch.float64)
    weights[2] = 10.0

    for loss in (
        lambda logits, labels: F.cross_entropy(logits, labels, weights),
        lambda logits, labels: F.cross_entropy(logits, labels, ignore_index=0),
        lambda logits, labels: (nll(logits, labels) * (labels == 5)).sum() / (labels == 5).sum().clamp(min=1),
    ):
        run = resolve(loss).loss
        got = class_weights(run, T, 26, range(160), torch.float64)
        assert divided_by_mean(got, run, T, torch.float64).divided
    run = resolve(lambda logits, labels: nll(logits, labels) * weights[labels]).loss
    assert divided_by_mean(class_weights(run, T, 26, range(160), torch.float64), run, T, torch.float64) is None


def test_relabelling_to_one_id_keeps_every_distribution():
    same = relabelled(T, 7)
    assert bool((same.labels == 7).all())
    assert torch.equal(same.gather(same.logits), T.gather(T.logits))
    assert torch.equal(same.logits.sort(-1).values, T.logits.sort(-1).values)
    assert torch.equal(same.gather(same.teacher), T.gather(T.teacher))


def test_a_gated_method_is_a_near_match():
    def truncated(logits, labels):
        p = label_log_probs(logits, labels).exp()
        return torch.where(p <= 0.5, 0.0, (1 - p**0.7) / 0.7).mean()

    def backed(logits, labels, teacher):
        return nll(logits, labels) * (teacher.softmax(-1).gather(1, labels[:, None])[:, 0] > 0.1)

    for loss, spec, rule in ((truncated, "gce", "where p_y >= 0.5"), (backed, "sft", "where teacher_y >= 0.1")):
        variant = resolve(loss)
        reading = Reading.of(variant, T)
        rows = ~reading.zero_rows
        pull = torch.where(rows, -reading.tokens.gather(reading.grad) / reading.tokens.rest_log_probs.exp(), 0.0)
        weight_law = law(pull, reading.tokens, noise=reading.noise.rows)
        got = gate(reading, variant.loss, weight_law)
        assert got.spec == spec and got.why.startswith(f"it is that method {rule}"), str(got)


def test_a_clamp_on_probabilities_is_a_near_match():
    def clamped(pred, labels):
        p = pred.softmax(-1).clamp(1e-7, 1.0)
        one_hot = torch.nn.functional.one_hot(labels, pred.shape[1]).to(p).clamp(1e-4, 1.0)
        return 0.1 * torch.nn.functional.cross_entropy(pred, labels) - (p * one_hot.log()).sum(-1).mean()

    e = qlens.explain(clamped)
    assert e.summary.startswith("This is sce(log_zero=-9.21), up to "), e.summary
