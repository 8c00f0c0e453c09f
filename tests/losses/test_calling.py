"""How losses are called: names, layouts, masks, teachers, return values, classes; and losses that cannot be called."""

import gc
import weakref

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.testing import assert_close
from written_losses import (
    SFT,
    V,
    by_batch_size,
    by_text,
    distils,
    first_name,
    label_log_probs_only,
    labels_are_ids,
    rows_by_mask,
    scale_of_swift,
    transposed,
    unknown_names,
    weighted,
)

import qlens
from qlens.losses.layout.layout_search import style_of
from qlens.losses.reduction.scalar import find_reduction
from qlens.registry import resolve
from qlens.testing import random_tokens

ce = F.cross_entropy


def tokens(n=12):
    return random_tokens(n, V)


def implied(loss, batch=None):
    return qlens.implied_target(loss, tokens() if batch is None else batch)


@pytest.mark.parametrize("grouped", [True, False])
def test_sft_is_read_in_every_layout(grouped):
    batch = tokens() if grouped else tokens().replace(sequence=None, pair=None, chosen=None)
    for loss in SFT:
        assert_close(implied(loss, batch).q, batch.one_hot, msg=lambda text, loss=loss: f"{loss}: {text}")


def test_the_layout_is_described():
    descriptions = {
        rows_by_mask: "logits (N, V) and labels (N,), each row with its own label; loss_mask: a mask of the supervised",
        first_name: "unshifted: it has to shift them itself",
        transposed: "that are shifted already",
        scale_of_swift: "outputs.logits (B, T, V)",
        labels_are_ids: "a mask of all that is no padding",
        by_text: "it returns a mean of each text, mean over texts, which is undone",
        label_log_probs_only: "log-probabilities of the labels, (N,)",
    }
    for loss, words in descriptions.items():
        assert words in resolve(loss).account(tokens()).called_as, loss
    assert "Called with logits (N, V)" in str(qlens.check(unknown_names))
    explained = qlens.explain(unknown_names, tokens(24))
    assert explained.to_dict()["called_as"] in explained.text(full=True).replace("\n    ", " ")


def test_token_weights_are_applied_once():
    weight = torch.arange(12, dtype=torch.float64) / 4
    for loss in (weighted, scale_of_swift, ce, rows_by_mask):
        grad = implied(loss, tokens().replace(weight=weight)).grad
        assert_close(grad, weight[:, None] * (tokens().probs - tokens().one_hot))


def distils_from_outputs(student_outputs, teacher_outputs, labels):
    supervised = labels[:, 1:] != -100
    student, teacher = (outputs.logits[:, :-1][supervised] for outputs in (student_outputs, teacher_outputs))
    return distils(student, teacher)


def distils_from_probs(student_log_probs, teacher_probs, labels):
    return -(teacher_probs * student_log_probs).sum(-1).mean()


def distils_from_a_column(model, inputs, return_outputs=False):
    teacher, labels = inputs.pop("teacher_logits"), inputs.pop("labels")
    supervised = labels[:, 1:] != -100
    return distils(model(**inputs).logits[:, :-1][supervised], teacher[:, :-1][supervised])


def distils_from_a_model(model, teacher_model, inputs):
    labels = inputs.pop("labels")
    supervised = labels[:, 1:] != -100
    return distils(*(each(**inputs).logits[:, :-1][supervised] for each in (model, teacher_model)))


def needs_a_temperature(student_logits, teacher_logits, temperature):
    return distils(student_logits, teacher_logits, temperature=temperature) * temperature**2


def test_teacher_inputs_are_recognised_by_name():
    batch = tokens()
    from_others = (distils_from_outputs, distils_from_probs, distils_from_a_column, distils_from_a_model)
    for loss in (distils, *from_others, needs_a_temperature):
        assert_close(implied(loss, batch).q, batch.teacher.softmax(-1), msg=lambda text, loss=loss: f"{loss}: {text}")
    with pytest.raises(qlens.InputError, match="needs a teacher"):
        implied(distils, batch.replace(teacher=None))


def clipped(log_probs, old_log_probs, advantages, action_mask=None):
    ratio = (log_probs - old_log_probs).exp()
    loss = -torch.minimum(ratio * advantages, ratio.clamp(0.8, 1.2) * advantages)
    mask = torch.ones_like(loss) if action_mask is None else action_mask
    return (loss * mask).sum() / mask.sum(), (ratio > 1).double().mean()


def clipped_by_text(per_token_logps, old_per_token_logps, advantages, completion_mask):
    return clipped(per_token_logps, old_per_token_logps, advantages[:, None], completion_mask)[0]


def preference(policy_chosen_logps, policy_rejected_logps, reference_chosen_logps, reference_rejected_logps, beta=0.3):
    ratio = policy_chosen_logps - policy_rejected_logps - reference_chosen_logps + reference_rejected_logps
    return -F.logsigmoid(beta * ratio).mean(), policy_chosen_logps.detach()


def test_losses_of_label_log_probs_reach_the_logits():
    batch = tokens()
    batch = batch.replace(advantage=batch.advantage[batch.sequence * 4])  # one advantage for each text
    ratio = (batch.label_log_probs - batch.gather(batch.old.log_softmax(-1))).exp()
    active = torch.where(batch.advantage > 0, ratio < 1.2, ratio > 0.8)
    expected = (active * ratio * batch.advantage)[:, None] * (batch.probs - batch.one_hot)
    for loss in (clipped, clipped_by_text):
        assert_close(implied(loss, batch).grad, expected)
    assert "one for each text" in resolve(clipped_by_text).account(batch).called_as


def test_a_loss_of_chosen_and_rejected_sums_is_one_of_pairs():
    batch = random_tokens(16, V)
    gap = batch.label_log_probs - batch.gather(batch.reference.log_softmax(-1))
    sign = batch.chosen.double() * 2 - 1
    margin = torch.zeros(2, dtype=torch.float64).index_add(0, batch.pair, sign * gap)
    push = (0.3 * torch.sigmoid(-0.3 * margin))[batch.pair] * sign
    assert_close(implied(preference, batch).grad, push[:, None] * (batch.probs - batch.one_hot))


# --- reductions


def test_batch_reductions_are_found():
    reductions = {by_text: "mean of each text, mean over texts", by_batch_size: "sum of each text, mean over texts"}
    for loss, reduction in reductions.items():
        assert find_reduction(loss, {}, tokens(), "loss") == reduction


# --- what cannot be called


class NeedsASize:
    def __init__(self, size):
        self.table = torch.zeros(size)

    def __call__(self, logits, labels):
        return ce(logits, labels)


def quits(logits, labels):
    raise SystemExit(0)


def test_uncallable_losses_are_refused_with_the_line_to_write():
    cases = {
        r'FILE.py:"<lambda>\(beta=...\)" .* functools.partial\(<lambda>, beta=...\)': lambda logits, labels, *, beta: 0,
        "'config' has no default": lambda logits, labels, config: 0,
        r"loss = NeedsASize\(size=...\), then FILE.py:loss": NeedsASize,
        r"reads inputs\['domain'\], which qlens cannot fill": lambda model, inputs: inputs["domain"],
        r"quits raises SystemExit: 0 \(test_calling.py, line \d+\)": quits,
        "raises ZeroDivisionError: division by zero": lambda logits, labels: 1 / 0,
        "without a graph": lambda logits, labels: ce(logits.detach(), labels),
        "a method without its object": lambda self, logits, labels: 0,
    }
    for says, loss in cases.items():
        for entry_point in (implied, qlens.check, qlens.explain):
            with pytest.raises(qlens.InputError, match=says):
                entry_point(loss)


def test_parameters_without_a_default_come_from_the_spec(tmp_path):
    file = tmp_path / "own.py"
    file.write_text(
        "import torch.nn.functional as F\n"
        "print('read')\n"
        "def scaled(logits, labels, *, beta):\n"
        "    print('called')\n"
        "    return beta * F.cross_entropy(logits, labels)\n"
    )
    batch = tokens()
    grad = qlens.implied_target(f"{file}:scaled(beta=0.25)", batch).grad
    assert_close(grad, 0.25 * (batch.probs - batch.one_hot))
    assert qlens.get(f"{file}:scaled", beta=2.0).spec.endswith("scaled(beta=2.0)")
    with pytest.raises(qlens.ParameterError, match="'beta' has no default"):
        qlens.get(f"{file}:scaled")
    with pytest.raises(qlens.ParameterError, match=r"no parameter 'gamma' \(parameters: beta\)"):
        qlens.get(f"{file}:scaled(beta=1.0, gamma=2)")


def test_a_file_that_ends_the_program_is_refused(tmp_path):
    (tmp_path / "own.py").write_text("import sys\nsys.exit(0)\n")
    with pytest.raises(qlens.InputError, match="it ends the program"):
        qlens.get(f"{tmp_path / 'own.py'}:f")


def test_prints_of_a_loss_are_suppressed(capsys):
    def prints(logits, labels):
        print("computing")
        return ce(logits, labels)

    qlens.check(prints)
    qlens.explain(prints, tokens()).text(full=True)
    assert capsys.readouterr().out == ""


def test_a_printed_loss_may_reduce_itself():
    @qlens.register("half_mean_example")
    def half(tokens):
        return qlens.Target.mix(tokens, trust=0.5, residual="student")

    try:
        half.loss(lambda tokens: -0.5 * tokens.label_log_probs.mean())
        batch = tokens()
        assert resolve(half).loss(batch).shape == (12,)
        assert_close(implied(half, batch).grad, 0.5 * (batch.probs - batch.one_hot))
    finally:
        del qlens.registry.registry._METHODS["half_mean_example"]


def test_no_loss_is_kept_alive():
    teacher = nn.Embedding(V, V)

    def build():
        def loss(logits, labels):
            return ce(logits, labels) + 0 * teacher.weight.sum().detach()

        return loss

    loss = build()
    implied(loss)
    style_of(loss, {}, tokens())
    reference = weakref.ref(loss)
    del loss
    gc.collect()
    assert reference() is None


def test_line_numbers_are_not_taken_for_sizes():
    from qlens.losses.user_code import numbers_of

    assert numbers_of("f raises IndexError: index 40 is out of bounds for size 24 (losses.py, line 512)") == [
        "40",
        "24",
    ]
