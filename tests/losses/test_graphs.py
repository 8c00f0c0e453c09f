"""Losses without a graph: a zero gradient where all rows are skipped, else an error that names the line."""

import pytest
import torch
import torch.nn.functional as F
from torch.testing import assert_close

import qlens
from qlens.testing import random_tokens

ce = F.cross_entropy
V = 11
HARD = 4.0  # nats


def hard_rows(n, rows):
    """Tokens whose labels are easy but for the given rows."""
    tokens = random_tokens(n, V, spread=0.5)
    raised = torch.full((n,), 3.0, dtype=torch.float64)
    raised[rows] = -6.0
    return tokens.replace(logits=tokens.logits.scatter_add(1, tokens.labels[:, None], raised[:, None]))


def mined(skip):
    """Hard mining: a mean over the rows above a threshold, or what ``skip`` gives where there are none."""

    def loss(logits, labels):
        losses = ce(logits, labels, reduction="none")
        hard = losses > HARD
        return losses[hard].sum() / hard.sum() if hard.any() else skip(logits)

    return loss


SKIPS = {
    "tensor": lambda logits: torch.tensor(0.0),
    "new": lambda logits: logits.new_zeros(()),
    "number": lambda logits: 0.0,
    "whole": lambda logits: 0,
    "leaf": lambda logits: torch.tensor(0.0, requires_grad=True),
    "dict": lambda logits: {"loss": torch.tensor(0.0), "rows": 0},
    "tuple": lambda logits: (0.0, {"rows": 0}),
}


@pytest.mark.parametrize("skip", SKIPS)
def test_a_loss_that_skips_all_rows_has_a_gradient_of_zero(skip):
    loss = mined(SKIPS[skip])
    easy = hard_rows(12, [])
    assert qlens.implied_target(loss, easy).grad.any().item() is False
    one = hard_rows(12, [5])  # not among the rows on which a division is tried first
    grad = qlens.implied_target(loss, one).grad
    expected = (one.probs - one.one_hot) * 12 * (torch.arange(12) == 5)[:, None]
    assert_close(grad, expected)
    assert "teaches nothing" in qlens.explain(loss, easy).text(full=True)
    if skip in ("number", "dict"):
        assert qlens.explain(loss).nearest


def test_reductions_are_not_guessed_from_skipped_rows():
    def very_hard(logits, labels):
        losses = ce(logits, labels, reduction="none")
        hard = losses > 60.0
        return (losses * hard).mean()

    variant = qlens.registry.resolve(very_hard)
    assert not variant.loss(hard_rows(12, [])).any()
    tokens = hard_rows(12, [])
    tokens = tokens.replace(logits=20 * tokens.logits.neg())  # every label is far from the top
    losses = variant.loss(tokens)
    assert_close(losses.sum(), tokens.label_log_probs.neg()[tokens.label_log_probs < -60].sum())


@torch.no_grad()
def under_no_grad(logits, labels):
    return ce(logits, labels)


@torch.inference_mode()
def under_inference(logits, labels):
    return ce(logits, labels)


def takes_a_number(logits, labels):
    return torch.tensor(ce(logits, labels).item())


def returns_a_number(logits, labels):
    return float(ce(logits, labels))


def detaches(logits, labels):
    losses = ce(logits, labels, reduction="none").detach()
    return losses.mean()


def takes_data(outputs, labels):
    return ce(outputs.logits.data[:, :-1].flatten(0, 1), labels[:, 1:].flatten())


def counts_hits(logits, labels):
    return 1 - (logits.argmax(-1) == labels).float().mean()


def ignores_logits(logits, labels):
    return labels.double().mean() + 1


def teacher_in_inference_mode(logits, labels):
    with torch.inference_mode():
        weight = logits.softmax(-1)
    return (weight * logits.log_softmax(-1)).sum(-1).mean()


def test_the_line_that_cuts_the_graph_is_named():
    cases = {
        under_no_grad: r"under torch.no_grad\(\) \(test_graphs.py, line \d+\): take that off",
        under_inference: r"under torch.inference_mode\(\) \(test_graphs.py, line \d+\): take that off",
        takes_a_number: r"\.item\(\) \(test_graphs.py, line \d+\) turns tensors into numbers: return the tensor itself",
        returns_a_number: r"float\(\) \(test_graphs.py, line \d+\) turns tensors into numbers",
        detaches: r"\.detach\(\) \(test_graphs.py, line \d+\) detaches what it returns",
        takes_data: r"\.data \(test_graphs.py, line \d+\) detaches what it returns",
        counts_hits: r"argmax\(\) \(test_graphs.py, line \d+\) has no gradient",
        ignores_logits: "does not depend on the logits it is given",
        teacher_in_inference_mode: r"write torch.no_grad\(\) in place of torch.inference_mode\(\)",
        lambda tokens: tokens.label_log_probs.detach(): r"\.detach\(\) \(test_graphs.py, line \d+\) detaches",
    }
    for loss, says in cases.items():
        for entry_point in (qlens.explain, qlens.check, lambda loss: qlens.implied_target(loss, random_tokens(12, V))):
            with pytest.raises(qlens.InputError, match=says) as error:
                entry_point(loss)
            assert "\n" not in str(error.value)
    with pytest.raises(qlens.InputError, match="returns 0 without a graph for every token it was tried on"):
        qlens.explain(lambda logits, labels: torch.tensor(0.0))


def test_detached_passes_inside_a_loss_are_allowed():
    def logs(logits, labels):
        loss = ce(logits, labels)
        with torch.no_grad():
            share = (logits.argmax(-1) == labels).float().mean().item()
        return {"loss": loss, "logged": loss.item(), "share": share, "detached": loss.detach()}

    tokens = random_tokens(12, V)
    assert_close(qlens.implied_target(logs, tokens).q, tokens.one_hot)


def test_the_part_with_a_graph_is_the_loss_without_gradients_too():
    def accuracy_first(logits, labels):
        return {"accuracy": (logits.argmax(-1) == labels).float().mean(), "nll": ce(logits, labels)}

    tokens = random_tokens(12, V)
    variant = qlens.registry.resolve(accuracy_first)
    with torch.no_grad():
        assert_close(variant.loss(tokens).sum(), -tokens.label_log_probs.sum())
    report = qlens.check(accuracy_first)
    assert not {"stop_gradient", "row_count"} & {item.id for item in report.failures}, str(report)


def test_tokens_and_callers_may_be_in_inference_mode():
    ordinary = random_tokens(12, V)
    with torch.inference_mode():
        tokens = qlens.Tokens(logits=ordinary.logits * 1, labels=ordinary.labels * 1, teacher=ordinary.teacher * 1)
        assert_close(qlens.implied_target(lambda logits, labels: ce(logits, labels), tokens).q, ordinary.one_hot)
        assert qlens.explain(ce).nearest[0].spec == "sft"
    assert_close(qlens.implied_target("kd", tokens).q, ordinary.teacher.softmax(-1))
    assert_close(qlens.implied_target(ce, ordinary.replace(logits=tokens.logits)).q, ordinary.one_hot)
