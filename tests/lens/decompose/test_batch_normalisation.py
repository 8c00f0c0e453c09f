"""Batch normalisations: methods times a statistic of the batch, and matches that hold in one batch only."""

from cases import case
from losses import dft_by_sum, nll

import qlens
from qlens.core.probes import probes, trials
from qlens.lens.identify import matching
from qlens.lens.identify.batch_factors import on_other_batches
from qlens.lens.identify.other_batches import read_other_batches
from qlens.lens.reading import Reading
from qlens.registry import resolve


def find_normalisation(loss):
    variant = resolve(loss)
    reading, trial = (Reading.of(variant, tokens) for tokens in (probes(), trials()))
    near = matching.nearest(reading.grad, reading.tokens, noise=reading.noise)
    return on_other_batches(near, variant, reading, trial, read_other_batches(variant, reading, trial))


def by_mean_weight(logits, labels):
    weight = (-nll(logits, labels)).exp().detach()
    return weight / weight.mean() * nll(logits, labels)


def by_softmax(logits, labels):
    return ((-nll(logits, labels)).softmax(0).detach() * nll(logits, labels)).sum()


def by_largest_weight(logits, labels):
    weight = (-nll(logits, labels)).exp().detach()
    return weight / weight.max() * nll(logits, labels)


def by_mean_loss(logits, labels):
    return (nll(logits, labels) / nll(logits, labels).detach().mean()).mean()


def log_of_mean(logits, labels):
    return nll(logits, labels).mean().log1p()


def test_batch_normalisations_are_named_without_a_factor():
    for loss, method_name in [
        (by_mean_weight, "dft divided by the batch's mean weight"),
        (dft_by_sum, "dft divided by the batch's mean weight"),
        (by_softmax, "dft divided by the batch's mean weight"),
        (by_largest_weight, "dft divided by the batch's largest weight"),
        (by_mean_loss, "sft divided by the batch's mean loss"),
        (log_of_mean, "sft divided by 1 + the batch's mean loss"),
    ]:
        with case(loss, method_name):
            near, normal = find_normalisation(loss)
            assert normal.named == method_name
            assert not any(match.same for match in near)
            assert len({round(factor, 6) for factor, _ in normal.factors}) > 1


def test_methods_of_the_batch_keep_their_names():
    near, normal = find_normalisation(lambda tokens: qlens.get("mile").loss(tokens))
    assert near[0].spec == "mile" and near[0].relation == "identical" and normal is None


def test_mean_normalised_weights_of_no_method_are_described():
    def by_entropy(logits, labels):
        log_p = logits.log_softmax(-1)
        weight = -(log_p.exp() * log_p).sum(-1).detach()
        return (weight / weight.mean() * nll(logits, labels)).mean()

    def kept_of_the_best(logits, labels):
        mask = (logits > logits.gather(1, labels[:, None])).sum(-1) < 20
        return (nll(logits, labels) * mask).sum() / mask.sum()

    for loss in (by_entropy, kept_of_the_best):
        near, normal = find_normalisation(loss)
        assert not any(match.same for match in near)
        assert str(normal) == "every token's weight is divided by the batch's mean weight"


def test_a_match_in_one_batch_only_is_not_named():
    def median(logits, labels):
        return nll(logits, labels).median()

    near, _ = find_normalisation(median)
    assert not any(match.same for match in near)


def test_other_statistics_of_the_weights_are_named():
    def by(statistic):
        def loss(logits, labels):
            weight = (-0.5 * nll(logits, labels)).exp().detach()
            return weight / statistic(weight) * nll(logits, labels)

        return loss

    for statistic, message in (
        (lambda w: w.max(), "the batch's largest weight"),
        (lambda w: w.quantile(0.9), "the 0.9-quantile of the batch's weights"),
        (lambda w: w.std(), "the standard deviation of the batch's weights"),
        (lambda w: w.sum(), "the sum of the batch's weights"),
        (lambda w: w.norm(), "the norm of the batch's weights"),
    ):
        e = qlens.explain(by(statistic))
        assert e.scope.of == "batch" and f"gce(q=0.5) divided by {message}" in e.summary, (message, e.summary)


def test_a_token_gate_divided_by_its_count_is_described():
    def few_confident(logits, labels):
        mask = (logits.softmax(-1).amax(-1) < 0.5).detach()
        return (nll(logits, labels) * mask).sum() / mask.sum().clamp(min=1)

    _, normal = find_normalisation(few_confident)
    assert str(normal) == "every token's weight is divided by the batch's mean weight"
