"""Batch gates, extremes and spreads: losses in which a token's weight depends on its rank or deviation in the batch."""

import torch
import torch.nn.functional as F
from cases import case
from losses import flooded, nll

import qlens
from qlens.core.probes import probes, trials
from qlens.lens.identify import matching
from qlens.lens.identify.other_batches import read_other_batches
from qlens.lens.reading import Reading, adapt_tokens, whole_where_needed
from qlens.lens.weights.batch_gates import batch_gate
from qlens.lens.weights.batch_moments import batch_moments
from qlens.registry import resolve


def p_y(logits, labels):
    return (-nll(logits, labels)).exp().detach()


def above_quantile(logits, labels):
    p = p_y(logits, labels)
    return ((p > p.quantile(0.5)) * nll(logits, labels)).mean()


def above_quantile_by_advantage(logits, labels, advantage):
    p = p_y(logits, labels)
    return ((p > p.quantile(0.3)) * advantage * nll(logits, labels)).mean()


def weighted_below_quantile(logits, labels, weight):
    p = p_y(logits, labels)
    return ((p <= p.quantile(0.8)) * weight * nll(logits, labels)).mean()


def halved_above_mean(logits, labels):
    p = p_y(logits, labels)
    return (torch.where(p > p.mean(), 0.5, 1.0) * nll(logits, labels)).mean()


def uncertain_half(logits, labels):
    log_p = logits.log_softmax(-1).detach()
    entropy = -(log_p.exp() * log_p).sum(-1)
    return ((entropy > entropy.quantile(0.8)) * nll(logits, labels)).mean()


def readings(loss):
    variant, _ = whole_where_needed(resolve(loss), None)
    reading, trial = (Reading.of(variant, adapt_tokens(tokens, variant)) for tokens in (probes(), trials()))
    return reading, read_other_batches(variant, reading, trial)


def gate(loss):
    reading, other_batches = readings(loss)
    return batch_gate(reading, other_batches, matching.nearest(reading.grad, reading.tokens, noise=reading.noise))


def over_texts(outputs, labels, num_items_in_batch=None):
    z, y = outputs.logits[:, :-1], labels[:, 1:]
    loss = F.cross_entropy(z.flatten(0, 1), y.flatten(), reduction="none", ignore_index=-100).view_as(y)
    supervised = (y != -100).to(loss)
    return ((loss * supervised).sum(1) / supervised.sum(1).clamp(min=1)).max()


def over_tokens(logits, labels):
    return nll(logits, labels).max()


def test_a_gate_of_the_batch_is_named_with_the_tokens_that_pass():
    behind = "behind a gate that depends on the batch: on the tokens"
    for loss, words in (
        (above_quantile_by_advantage, f"reinforce {behind} of p_y above its 0.3-q"),
        (weighted_below_quantile, f"sft {behind} of p_y below its 0.8-q"),
        (halved_above_mean, "on the tokens of p_y below the batch's mean of it, weight 0.5 on the others"),
        (uncertain_half, "on the tokens of entropy above its 0.8-quantile in the batch, 0 on the others"),
        (over_texts, "the one sequence with the largest mean loss in its batch, a maximum over sequences"),
        (over_tokens, "the one token with the smallest p_y in its batch, a maximum over tokens"),
    ):
        with case(loss):
            assert words in str(gate(loss)), gate(loss)


def test_a_gate_of_the_batch_is_explained():
    e = qlens.explain(above_quantile)
    assert e.scope.of == "batch" and not any(match.same for match in e.nearest)
    gated = "This is sft behind a gate that depends on the batch: on the tokens of p_y above its 0.5-quantile"
    assert gated in e.summary and "divided by the batch" not in e.summary and e.to_dict()["gate"]["rule"]


def test_a_loss_without_a_gate_has_none():
    assert gate(nll) is None
    assert batch_moments(*readings(above_quantile)) is None


def with_variance(logits, labels):
    loss = nll(logits, labels)
    return loss.mean() + 0.3 * loss.var(correction=0)


def with_deviation(logits, labels):
    loss = nll(logits, labels)
    return loss.mean() - 0.2 * loss.std()


def test_a_spread_of_losses_is_named():
    variance = "the mean cross-entropy plus 0.3 times the variance of the tokens'"
    assert str(batch_moments(*readings(with_variance))).startswith(variance)
    deviation = "the mean cross-entropy minus 0.2 times the standard deviation (divided by N - 1) of the tokens'"
    assert str(batch_moments(*readings(with_deviation))).startswith(deviation)
    assert f"that of {variance}" in qlens.explain(with_variance).summary


def test_flooding_is_described_in_one_line():
    e = qlens.explain(flooded)
    assert e.summary.startswith("This is sft times 1 while the batch's mean loss is above 0.5, times -1 below it")
    assert "times -1 below it, flooding." in e.summary and "so far" not in e.summary
