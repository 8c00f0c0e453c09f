"""Losses whose reduction needs the whole batch, and factors of the vocabulary: how explain reads and names them."""

import pytest
import torch
import torch.nn.functional as F
from losses import flooded, nll

import qlens


def test_a_loss_whose_division_needs_its_batch_is_read_whole():
    def hardest(logits, labels):
        losses = nll(logits, labels)
        k = int(0.6 * len(losses))
        return losses.topk(k).values.sum() / k

    def along_the_rows(logits, labels):
        losses = nll(logits, labels)
        return (torch.linspace(0.5, 1.5, len(losses), dtype=losses.dtype) * losses).mean()

    for loss, through in ((hardest, "labels"), (along_the_rows, "position")):
        explanation = qlens.explain(loss)
        assert explanation.scope.of == "batch" and through in explanation.scope.through, explanation.scope
        assert "reduction could not be found" in explanation.whole_batch
        assert explanation.findings[0].startswith("WARNING: read as a whole batch, its reduction left as it is")
        with pytest.raises(qlens.InputError, match="reduction could not be found"):
            qlens.implied_target(loss, qlens.probes())


def test_a_stateful_loss_is_not_called_random():
    class Smoothed:
        mean = None

        def __call__(self, logits, labels):
            losses = nll(logits, labels)
            now = losses.mean().item()
            self.mean = now if self.mean is None else 0.9 * self.mean + 0.1 * now
            return (losses / self.mean).mean()

    with pytest.raises(qlens.InputError, match="has a state, .*two calls on the same tokens differ"):
        qlens.explain(Smoothed())
    with pytest.raises(qlens.InputError, match="random.*switch dropout off"):
        qlens.explain(lambda logits, labels: nll(F.dropout(logits, 0.5), labels))


def test_a_batch_threshold_is_the_first_finding():
    explanation = qlens.explain(flooded)
    assert (
        "depends on the other tokens of its batch: with other tokens at p_y = 0.999999 it is -1 times what it was"
        in explanation.summary
    )


def test_factors_of_the_vocabulary_are_named():
    def kd_mean(logits, labels, teacher_logits):
        return F.kl_div(logits.log_softmax(-1), teacher_logits.softmax(-1), reduction="mean")

    def by_no_known_form(logits, labels):
        return nll(logits, labels).mean() * (1 + 0.01 * logits.shape[-1])

    for loss, sentence in (
        (kd_mean, "This is kd times 1/V (0.03125 at V = 32, 0.00625 at V = 160)."),
        (
            by_no_known_form,
            "This is sft times a factor that changes with the vocabulary: 1.32 at V = 32, 2.6 at V = 160.",
        ),
    ):
        explanation = qlens.explain(loss)
        assert explanation.summary.startswith(sentence), explanation.summary
        assert "the same, up to a factor that changes with the vocabulary" in explanation.other_vocabularies
    assert (
        explanation.law.formula == "1 times a factor that changes with the vocabulary: 1.32 at V = 32, 2.6 at V = 160"
    )


def test_growing_trust_is_not_reported_as_small():
    def with_margin(logits, labels):
        return F.cross_entropy(logits - 2.0 * F.one_hot(labels, logits.shape[-1]), labels)

    summary = qlens.explain(with_margin).summary
    assert "it grows with p_y, from 1 to 7.39." in summary and "hardly count" not in summary
