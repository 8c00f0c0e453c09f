"""Losses of whole texts: a weight for each text, input_ids that are the labels, and numbers in error messages."""

import pytest
import torch
import torch.nn.functional as F

import qlens


def nll_by_text(logits, ids):
    return F.cross_entropy(logits[:, :-1].transpose(1, 2), ids[:, 1:], reduction="none")


def weighs_texts(logits, labels, sample_weights):
    return (nll_by_text(logits, labels).sum(1) * sample_weights).sum() / (labels[:, 1:] != -100).sum()


def texts_are_labels(lm_logits, input_ids):
    """Looks ids up, so that no label may be -100."""
    z, ids = lm_logits[:, :-1], input_ids[:, 1:]
    return -z.log_softmax(-1).gather(-1, ids[..., None]).mean()


def test_weights_per_text_are_passed():
    text = qlens.explain(weighs_texts).text(full=True).replace("\n    ", " ")
    assert "sample_weights: one for each text, its first token's" in text
    assert "depends on no other token" in text  # a weight of a text is its own
    assert "no effect" not in text and "other lengths" not in text
    assert qlens.check(weighs_texts)["inputs_have_effect"].state == "passed"


def test_input_ids_used_as_labels_hold_no_ignore_index():
    assert qlens.explain(texts_are_labels).nearest[0].spec == "sft"
    report = qlens.check(texts_are_labels)
    assert report["prompt"].state == "remark" and "from input_ids" in report["prompt"].evidence
    assert report["padding_amount"].state == "failed"


def test_the_token_to_ignore_may_be_called_after_padding():
    def padded(logits, labels, pad_token_id):
        return F.cross_entropy(logits, labels, ignore_index=pad_token_id)

    assert qlens.explain(padded).nearest[0].spec == "sft"


def test_a_refusal_names_what_the_loss_raised():
    """Neither a dimension nor the number of a line is a vocabulary."""

    def fails(logits, labels):
        raise ValueError("expected to be in range of [-2, 1], but got 2")

    with pytest.raises(qlens.InputError, match=r"got 2 .*tried at vocabularies 32, 160;"):
        qlens.explain(fails)


def test_a_refusal_still_tries_the_vocabulary_named():
    def fixed(logits, labels):
        return F.cross_entropy(logits, labels, weight=torch.ones(50, dtype=logits.dtype))

    assert qlens.explain(fixed).nearest[0].spec == "sft"
