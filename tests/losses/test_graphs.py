"""Losses without a graph: zeros where they skip every row, refused with the line that cuts it off where they do not."""

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
        kept = losses > HARD
        return losses[kept].sum() / kept.sum() if kept.any() else skip(logits)

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
    wanted = (one.probs - one.one_hot) * 12 * (torch.arange(12) == 5)[:, None]
    assert_close(grad, wanted)
    assert qlens.explain(loss).nearest and "teaches nothing" in qlens.explain(loss, easy).text(full=True)


def test_how_a_loss_divides_is_not_guessed_where_it_skips_all_rows():
    def very_hard(logits, labels):
        losses = ce(logits, labels, reduction="none")
        kept = losses > 60.0
        return (losses * kept).mean()

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


def test_where_the_graph_is_lost_is_said_in_one_sentence():
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
        for read in (qlens.explain, qlens.check, lambda loss: qlens.implied_target(loss, random_tokens(12, V))):
            with pytest.raises(qlens.InputError, match=says) as error:
                read(loss)
            assert "\n" not in str(error.value)
    with pytest.raises(qlens.InputError, match="returns 0 without a graph for every token it was tried on"):
        qlens.explain(lambda logits, labels: torch.tensor(0.0))


def test_numbers_and_passes_without_gradient_inside_a_loss_are_its_own_business():
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
    given = random_tokens(12, V)
    with torch.inference_mode():
        tokens = qlens.Tokens(logits=given.logits * 1, labels=given.labels * 1, teacher=given.teacher * 1)
        assert_close(qlens.implied_target(lambda logits, labels: ce(logits, labels), tokens).q, given.one_hot)
        assert qlens.explain(ce).nearest[0].spec == "sft"
    assert_close(qlens.implied_target("kd", tokens).q, given.teacher.softmax(-1))
    assert_close(qlens.implied_target(ce, given.replace(logits=tokens.logits)).q, given.one_hot)
