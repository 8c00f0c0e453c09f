"""Layouts and names that are found by trying: chunks of logits, sequence first, dicts, teachers; and the error that is told."""

import pytest
import torch
from chunk_losses import (
    KD,
    SFT,
    Chunked,
    ChunkedDistillation,
    ReadsADict,
    ce,
    classes_second,
    sequence_first,
    sequence_first_by_mask,
)
from torch.testing import assert_close

import qlens
from qlens.registry import resolve
from qlens.testing import random_tokens

V = 11


@pytest.mark.parametrize("grouped", [True, False])
def test_sft_and_distillation_are_read_in_chunks_sequence_first_and_in_dicts(grouped):
    tokens = random_tokens(12, V)
    tokens = tokens if grouped else tokens.replace(sequence=None, pair=None, chosen=None)
    for losses, target in ((SFT, tokens.one_hot), (KD, tokens.teacher.softmax(-1))):
        for loss in losses:
            q = qlens.implied_target(loss, tokens).q
            assert_close(q, target, rtol=1e-5, atol=1e-5, msg=lambda text, loss=loss: f"{loss}: {text}")


def test_the_layout_taken_is_said_and_checked():
    words = {
        Chunked: "logits (B, T / 8, V), in a list of 8 chunks along the tokens (torch.chunk), and labels (B, T) that are shifted",
        sequence_first: "logits (T, B, V), sequence first, and labels (B, T) that are shifted already",
        sequence_first_by_mask: "logits (T, B, V), sequence first,",
        classes_second: "logits (B, V, T) and labels (B, T)",
        ReadsADict: "a dict of logits (N, V) and labels (N,)",
    }
    for loss, said in words.items():
        assert said in resolve(loss).account(random_tokens(12, V)).called_as, loss
    report = qlens.check(Chunked)
    assert {item.id for item in report.failures} == {"accumulation", "all_masked"}, str(report)  # both are true of it
    assert qlens.check(ChunkedDistillation)["inputs_have_effect"].state == "passed"


def test_the_error_told_is_that_of_the_layout_that_came_furthest():
    def fails_late(logits, labels):
        batch, width, size = logits.shape
        labels = labels.view(batch, width)
        table = torch.zeros(3)
        return table[labels.max() + size]

    def soft(logits, targets):
        return -(targets * logits.log_softmax(-1)).sum(-1).mean()

    cases = {
        r"IndexError: index \d+ is out of bounds.* called with logits \(B, T, V\) and labels \(B, T\)": fails_late,
        "targets holds token ids here: .* is named teacher_probs or teacher_logits": soft,
        "reads inputs\\['domain'\\], which qlens cannot fill": lambda logits, batch: logits * batch["domain"],
    }
    for says, loss in cases.items():
        with pytest.raises(qlens.InputError, match=says):
            qlens.implied_target(loss, random_tokens(12, V))


def test_a_loss_that_means_tokens_is_told_how_to_name_them():
    def unnamed(t):
        return -t.label_log_probs

    def target(t, eta=0.5):
        return qlens.Target.mix(t, trust=eta, residual="student")

    def batch(batch):
        return -batch.log_probs.gather(-1, batch.labels[:, None])[:, 0]

    def shadowed(x, y):
        return ce(x.reference, y)

    for loss, name in ((unnamed, "unnamed"), (target, "target"), (batch, "batch"), (shadowed, "shadowed")):
        for read in (qlens.explain, qlens.check):
            with pytest.raises(qlens.InputError, match=rf"named tokens: def {name}\(tokens, \.\.\.\)"):
                read(loss)
