"""Batch gates, extremes and spreads: losses in which what a token counts depends on how it compares with its batch."""

import torch
import torch.nn.functional as F

import qlens


def nll(logits, labels):
    return F.cross_entropy(logits, labels, reduction="none")


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


def test_a_gate_of_the_batch_is_named_with_what_passes():
    for loss, said in (
        (
            above_quantile,
            "This is sft behind a gate that depends on the batch: on the tokens of p_y above its 0.5-quantile",
        ),
        (
            above_quantile_by_advantage,
            "This is reinforce behind a gate that depends on the batch: on the tokens of p_y above its 0.3-q",
        ),
        (
            weighted_below_quantile,
            "This is sft behind a gate that depends on the batch: on the tokens of p_y below its 0.8-q",
        ),
        (halved_above_mean, "on the tokens of p_y below the batch's mean of it, weight 0.5 on the others"),
        (uncertain_half, "on the tokens of entropy above its 0.8-quantile in the batch, 0 on the others"),
    ):
        e = qlens.explain(loss)
        assert e.scope.of == "batch" and not any(match.same for match in e.nearest), loss.__name__
        assert said in e.summary, (loss.__name__, e.summary)
        assert "divided by the batch" not in e.summary and e.to_dict()["gate"]["rule"]


def test_a_maximum_is_no_mean():
    def over_texts(outputs, labels, num_items_in_batch=None):
        z, y = outputs.logits[:, :-1], labels[:, 1:]
        loss = F.cross_entropy(z.flatten(0, 1), y.flatten(), reduction="none", ignore_index=-100).view_as(y)
        kept = (y != -100).to(loss)
        return ((loss * kept).sum(1) / kept.sum(1).clamp(min=1)).max()

    def over_tokens(logits, labels):
        return nll(logits, labels).max()

    assert (
        "the one sequence with the largest mean loss in its batch, a maximum over sequences"
        in qlens.explain(over_texts).summary
    )
    assert (
        "the one token with the smallest p_y in its batch, a maximum over tokens" in qlens.explain(over_tokens).summary
    )


def test_a_spread_of_losses_is_said_in_one_line():
    def with_variance(logits, labels):
        loss = nll(logits, labels)
        return loss.mean() + 0.3 * loss.var(correction=0)

    def with_deviation(logits, labels):
        loss = nll(logits, labels)
        return loss.mean() - 0.2 * loss.std()

    assert (
        "that of the mean cross-entropy plus 0.3 times the variance of the tokens'"
        in qlens.explain(with_variance).summary
    )
    said = "that of the mean cross-entropy minus 0.2 times the standard deviation (divided by N - 1) of the tokens'"
    assert said in qlens.explain(with_deviation).summary


def test_flooding_is_said_in_one_line():
    def flooded(logits, labels):
        return (nll(logits, labels).mean() - 0.5).abs() + 0.5

    e = qlens.explain(flooded)
    assert e.summary.startswith("This is sft times 1 while the batch's mean loss is above 0.5, times -1 below it")
    assert "times -1 below it, flooding." in e.summary and "so far" not in e.summary
