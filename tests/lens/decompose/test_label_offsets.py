"""Label offsets: losses that train positions on another label than the next one are found in every layout."""

import torch.nn.functional as F

from qlens import Explanation, implied_target, probes
from qlens.core.autograd import gradient
from qlens.lens.decompose.label_offset import label_offset
from qlens.lens.rounding import rounding
from qlens.losses.layout.layout_search import style_of
from qlens.registry import resolve


def by(places):
    """A batch loss whose labels are shifted by so many places."""

    def loss(logits, labels):
        assert labels.ndim == 2
        return F.cross_entropy(logits[:, :-places].flatten(0, 1), labels[:, places:].flatten())

    return loss


def offset(loss):
    tokens = probes()
    grad = gradient(resolve(loss).loss, tokens)
    return label_offset(resolve(loss).loss, tokens, grad, rounding(grad, tokens).rows)


def test_label_offsets_are_found():
    assert [offset(by(places)) for places in (1, 2)] == [0, 1]
    assert offset("sft") == offset("mile") == 0  # a loss of the batch depends on more than one label


def test_a_maximum_over_each_text_is_given_unshifted_labels():
    def largest(logits, labels):
        losses = F.cross_entropy(logits[:, :-1].transpose(1, 2), labels[:, 1:], reduction="none")
        return losses.max(1).values.mean()

    def shifted_already(logits, labels):
        return F.cross_entropy(logits.transpose(1, 2), labels, reduction="none").max(1).values.mean()

    assert style_of(largest, {}, probes()).shape == "batch"
    assert style_of(shifted_already, {}, probes()).shape == "aligned"


def test_a_label_offset_is_the_first_finding():
    tokens = probes()
    target = implied_target("sft", tokens)
    explanation = Explanation(resolve(by(2)), tokens, target, -tokens.label_log_probs, [], label_offset=1)
    sentence = "each position is trained on the label 1 place after the one that it should predict"
    assert explanation.summary.startswith(f"It trains the wrong token: {sentence}")
    assert any(line.startswith(f"WARNING: {sentence}") for line in explanation.findings)
