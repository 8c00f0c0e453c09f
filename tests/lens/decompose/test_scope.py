"""Scope: which other tokens a gradient depends on, and whether a weight is detached, against what methods declare."""

import torch
from cases import case
from losses import flooded, forgot_detach, nll, root_weighted

import qlens
from qlens.core.probes import probes
from qlens.lens.decompose.dependence import scope
from qlens.lens.reading import adapt_tokens, requested_fields
from qlens.registry import resolve

REACH = {
    "apo_zero": "sequence",
    "asft_absolute": "sequence",
    "rpsft": "token",
}  # pairs that never meet; a penalty elsewhere
DETACHED = {"dft", "eaft", "iw_sft", "target_sft", "gem", "deft", "idft", "mile", "cayley"}
WHOLE = {
    "sft",
    "beyond_log",
    "gce",
    "focal",
    "kd",
    "reverse_kl",
    "brier",
    "label_smoothing",
    "ppo_clip",
    "dpo",
    "poly",
    "bootstrap_hard",
}


def test_scopes_of_methods_are_as_declared():
    for name in qlens.names():
        with case(name):
            variant = qlens.get(name)
            assert scope(variant.loss, probes()).of == REACH.get(name, variant.scope)


def test_detached_weights_are_detected():
    for name in sorted(DETACHED | WHOLE):
        with case(name):
            scope_found = scope(qlens.get(name).loss, probes())
            assert scope_found.detached == (name in DETACHED)
            assert scope_found.gap > 1e-2 if name in DETACHED else scope_found.gap < 1e-7


def test_a_mean_over_the_batch_is_no_scope():
    for loss, detached in ((forgot_detach, False), (root_weighted, True)):
        scope_found = scope(resolve(loss).loss, probes())
        assert (scope_found.of, scope_found.detached) == ("token", detached) and "no other token" in str(scope_found)


def test_a_batch_statistic_is_found_without_sequence_ids():
    tokens = probes().replace(sequence=None, pair=None, chosen=None)

    def normalised(logits, labels):
        nll = torch.nn.functional.cross_entropy(logits, labels, reduction="none")
        return nll / nll.detach().mean()

    scope_found = scope(resolve(normalised).loss, tokens)
    assert scope_found.of == "batch" and "98% of the others through logits and labels" in scope_found.evidence


def test_detaching_is_detected_in_float32_but_not_below():
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


def test_dependence_through_labels_weights_and_fields_is_found():
    def softmax_of_rewards(logits, labels, advantage):
        return (advantage.softmax(0) * nll(logits, labels)).sum()

    def averaged_weights(logits, labels, weight):
        return (weight * nll(logits, labels)).sum() / weight.sum()

    def earlier_labels(logits, labels):
        before = (labels[:, None] == labels[None]).tril(-1).any(-1)  # a token that was a label before counts half
        return nll(logits, labels) * torch.where(before, 0.5, 1.0)

    for loss, through in ((softmax_of_rewards, "advantage"), (averaged_weights, "weight"), (earlier_labels, "labels")):
        variant = resolve(loss)
        scope_found = scope(variant.loss, adapt_tokens(probes(), variant), needs=requested_fields(variant))
        assert (scope_found.of, scope_found.through) == ("batch", (through,)), scope_found.evidence


def test_dependence_on_the_number_of_tokens_is_found():
    def by_chunks(logits, labels):
        count = -(-len(logits) // 32)
        parts = zip(logits.chunk(count), labels.chunk(count), strict=True)
        return sum(nll(z, y).mean() for z, y in parts)

    def squared(logits, labels):
        return nll(logits, labels) / len(labels)

    def by_sequences(logits, labels, sequence):
        losses, ids = nll(logits, labels), sequence.unique()
        return sum(losses[sequence == i].mean() for i in ids) / len(ids)

    scope_found = scope(resolve(by_sequences).loss, probes(), needs=("sequence",))
    assert (scope_found.of, scope_found.through) == ("sequence", ("number",)), scope_found.evidence
    for loss, through in ((by_chunks, ("number", "position")), (squared, ("number",))):
        scope_found = scope(resolve(loss).loss, probes())
        assert (scope_found.of, scope_found.through) == ("batch", through) and "how many tokens" in scope_found.evidence
    assert scope(resolve(lambda logits, labels: nll(logits, labels).sum() / 512).loss, probes()).of == "token"


def test_thresholds_on_a_batch_statistic_are_found():
    def cooled(logits, labels):
        loss = nll(logits, labels).mean()
        return loss * 0.1 if loss.item() > 5 else loss

    def where_accurate(logits, labels):
        right = (logits.argmax(-1) == labels).double().mean()  # 0.95 needs all but two
        return nll(logits, labels).mean() * (2.0 if right > 0.95 else 1.0)

    for loss, effect in (
        (flooded, "at p_y = 0.999999 it is -1 times"),
        (cooled, "at p_y = 0.001 it is 0.1 times"),
        (where_accurate, "at p_y = 0.999999 it is 2 times"),
    ):
        scope_found = scope(resolve(loss).loss, probes())
        assert (scope_found.of, scope_found.through[0]) == ("batch", "losses") and effect in scope_found.effect, (
            scope_found.evidence
        )
        assert "labels" not in scope_found.through
    assert scope(resolve(lambda logits, labels: nll(logits, labels).max()).loss, probes()).of == "batch"


def test_position_dependence_is_not_token_dependence():
    def decayed(logits, labels):  # (B, T, V)
        losses = nll(logits[:, :-1].transpose(1, 2), labels[:, 1:])
        supervised = labels[:, 1:] != -100
        return (0.9 ** torch.arange(losses.shape[1]) * losses * supervised).sum() / supervised.sum()

    scope_found = scope(resolve(decayed).loss, probes())
    assert (scope_found.of, scope_found.through) == (
        "token",
        ("position",),
    ) and "on its position" in scope_found.evidence


def test_dependence_on_a_repeated_label_is_found():
    def repeats_count_less(logits, labels):
        repeated = torch.zeros_like(logits[:, 0])
        repeated[1:] = (labels[1:] == labels[:-1]).to(logits.dtype)
        return (nll(logits, labels) * (1 - 0.9 * repeated)).mean()

    scope_found = scope(resolve(repeats_count_less).loss, probes())
    assert (scope_found.of, scope_found.through) == ("batch", ("labels",)), scope_found.evidence


def test_the_evidence_names_the_tested_changes():
    evidence = scope(resolve(forgot_detach).loss, probes()).evidence
    assert (
        "in all that was tested (12 changed, one at a time; batches of mean loss 0.0024 to 20; repeated labels"
        in evidence
    )


def test_ties_and_thresholds_are_not_reported_as_detached():
    def half(logits, labels):
        return nll(logits, labels).topk(len(labels) // 2).values.mean()

    def gated(logits, labels):
        losses = nll(logits, labels)
        return (losses * ((-losses).exp() < 0.3)).mean()

    def clamped(logits, labels):
        return -(-nll(logits, labels)).exp().clamp(1e-4, 1 - 1e-4).log().mean()

    def margin(logits, labels):
        label = labels[:, None]
        runner_up = logits.scatter(1, label, -torch.inf).amax(-1)
        return (1 + runner_up - logits.gather(1, label)[:, 0]).relu().mean()

    def means_of_texts(logits, labels):
        losses = torch.nn.functional.cross_entropy(logits[:, :-1].transpose(1, 2), labels[:, 1:], reduction="none")
        return (losses.sum(1) / (labels[:, 1:] != -100).sum(1)).mean()

    for loss in (half, gated, clamped, margin, means_of_texts):
        scope_found = scope(resolve(loss).loss, probes())
        assert scope_found.detached is False and scope_found.gap < 1e-7, (loss.__name__, scope_found.gap)


class _Squared(torch.autograd.Function):
    @staticmethod
    def forward(ctx, logits, labels):
        ctx.save_for_backward(logits, labels)
        return nll(logits, labels).mean()

    @staticmethod
    def backward(ctx, *grads):
        logits, labels = ctx.saved_tensors
        one_hot = torch.nn.functional.one_hot(labels, logits.shape[-1])
        return grads[0] * (logits.softmax(-1) ** 2 - one_hot) / len(labels), None


def test_a_custom_backward_is_named():
    variant = resolve(lambda logits, labels: _Squared.apply(logits, labels))
    scope_found = scope(variant.loss, probes(), total=variant.total)
    assert (
        scope_found.backward == "_Squared"
        and "its own autograd function _Squared" in str(scope_found)
        and "detached" not in str(scope_found)
    )
    variant = resolve("dft")
    scope_found = scope(variant.loss, probes(), total=variant.total)
    assert scope_found.backward == "" and "a factor is detached" in str(scope_found)


def test_a_clamp_at_a_tokens_probability_is_not_a_detach():
    for level in (0.5, 0.9, 1 - 1e-6):
        for dtype in (torch.float64, torch.float32):

            def loss(tokens, level=level):
                return -tokens.label_probs.clamp(min=level).log()

            assert scope(loss, probes(dtype), 1e-4, precision=dtype).detached is False, (level, dtype)
