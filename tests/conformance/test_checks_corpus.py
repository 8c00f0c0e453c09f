"""`check` on two corpora: correct losses, none of which fails, and faulty ones, each of which fails the expected rules."""

import logging

import pytest
import right_models  # noqa: F401  it adds to RIGHT, as does right_batches
import torch
import torch.nn.functional as F
import wrong_calls  # noqa: F401  it adds to WRONG
from cases import case
from right_losses import FINDINGS, RIGHT
from wrong_losses import UNSEEN, WRONG

import qlens
from qlens.conformance import RULES, Specimen
from qlens.registry import resolve

ASKED = {
    "top_teacher_tokens": 64,
    "a_module": 64,
    "class_weights_of_a_size": 1500,
    "special_token_of_a_vocabulary": 3001,
}


def mismatch(report, expected):
    """What a report says beyond, or short of, the failures that are wanted."""
    failures = {item.id: item.evidence for item in report.failures}
    if set(failures) != set(expected):
        return f"{sorted(failures)} fail, {sorted(expected)} should\n{report}"
    return next((failures[name] for name, evidence in expected.items() if evidence not in failures[name]), "")


def test_correct_losses_pass_the_check(capsys):
    assert len(RIGHT) >= 40
    off = {}
    for name, loss in RIGHT.items():
        report = qlens.check(loss)
        assert report.vocabulary == ASKED.get(name, 24)
        if difference := mismatch(report, FINDINGS.get(name, {})):
            off[name] = difference
    assert not off, "\n".join(f"{name}: {difference}" for name, difference in off.items())
    assert capsys.readouterr().out == ""  # two of them print


def test_faulty_losses_fail_the_rule_of_their_fault():
    assert len(WRONG) >= 20
    off = {
        name: difference
        for name, (loss, expected) in WRONG.items()
        if (difference := mismatch(qlens.check(loss), expected))
    }
    assert not off, "\n".join(f"{name}: {difference}" for name, difference in off.items())


def test_unusual_labels_and_normalisation_are_remarks():
    """A teacher's own tokens, another model's alone, logits fitted one by one: no faults of the code."""

    def of_the_teachers_argmax(logits, labels, teacher_logits):
        return F.cross_entropy(logits, torch.where(labels == -100, labels, teacher_logits.argmax(-1)))

    def of_logits(logits, labels, teacher_logits):
        return F.mse_loss(logits, teacher_logits)

    def of_binary_cross_entropy(logits, labels):
        p, one_hot = logits.softmax(-1), F.one_hot(labels, logits.size(-1))
        return F.binary_cross_entropy(p, one_hot.to(p))

    def of_halved_labels(logits, labels):
        return F.cross_entropy(logits, labels // 2)

    expected = {
        of_the_teachers_argmax: ("labels", "remark", "every row learns the teacher's own most probable token"),
        of_logits: ("functions", "remark", "each logit is pulled for itself"),
        of_binary_cross_entropy: ("functions", "remark", "binary cross-entropy of softmax probabilities"),
        of_halved_labels: ("labels", "remark", "another token than the label"),
        RIGHT["distilled_by_logs"]: ("labels", "not applicable", "it learns from teacher alone"),
        RIGHT["distills_from_its_closure"]: ("labels", "not applicable", "it learns from another model"),
        RIGHT["masked_by_attention"]: ("labels", "passed", "follows which token its label is"),
    }
    off = {}
    for loss, (name, state, evidence) in expected.items():
        item = qlens.check(loss)[name]
        if item.state != state or evidence not in item.evidence:
            off[getattr(loss, "__name__", str(loss))] = item
    assert not off
    for name in ("mae", "brier", "gce", "kd", "sft"):  # of probabilities, and no softmax of these
        report = qlens.check(name)
        assert report["functions"].state in ("passed", "not applicable")
        assert report["labels"].state == ("passed" if name != "kd" else "not applicable")


def test_overflow_inherent_in_the_method_is_a_remark():
    report = qlens.check(RIGHT["penalised_by_k3"])
    assert "grows exponentially with the gap between the logits (1.5e+06 at 20" in report["extremes"].evidence
    assert "only where all tokens of a batch are" in qlens.check(RIGHT["entropy_over_its_mean"])["extremes"].evidence
    for name in ("floors_nothing", "log_of_the_rest", "overflows_float16"):
        assert qlens.check(WRONG[name][0])["extremes"].state == "failed"  # gradients that are small, badly computed


def test_faults_outside_the_loss_are_no_failures():
    reports = {name: qlens.check(loss) for name, loss in UNSEEN.items()}
    assert all(report.ok for report in reports.values())
    assert "less probable, in every one of 24 rows" in reports["flips_the_sign"]["shift"].evidence
    assert reports["ignores_token_zero"]["label_ids"].evidence.endswith("0: 0")


def times(factor, loss):
    return lambda logits, labels: factor * loss(logits, labels)


def cancels(logits, labels):
    s = logits.log_softmax(-1)
    return (s.exp().detach() * (s - 2 * s.detach())).sum(-1).mean()


def cancels_in_float32(logits, labels):
    return (logits.float().softmax(-1).sum(-1) ** 2).mean()


def test_gradients_of_rounding_are_told_from_small_ones():
    for factor in [1.0, 1e-6]:
        with case(factor):
            for loss in (cancels, cancels_in_float32):
                with pytest.raises(qlens.InputError, match="teaches nothing: its gradient is zero up to rounding"):
                    qlens.check(times(factor, loss))
            assert qlens.check(times(1e-9 * factor, RIGHT["gathered"])).ok
            assert qlens.check(times(factor, RIGHT["upcast"])).ok


def test_masking_by_attention_is_told_from_training_on_padding():
    """What a mean over attended positions divides by is a remark; padding that is learned is a failure."""
    report = qlens.check(RIGHT["takes_an_attention_mask"])
    assert {item.id for item in report.remarks} == {"evaluation", "padding_side", "padding_amount", "packing"}
    assert "where nothing is a prompt" in report["evaluation"].evidence + report["padding_side"].evidence
    assert "takes its labels from input_ids" in qlens.check(RIGHT["masked_by_attention"])["prompt"].evidence
    assert not qlens.check(WRONG["learns_padding"][0]).ok


def test_an_exception_in_a_loss_is_reported_without_a_consequence():
    def only_doubles(logits, labels):
        if logits.dtype != torch.float64:
            raise ValueError("give doubles")
        return F.cross_entropy(logits, labels)

    report = qlens.check(only_doubles)
    assert {item.id for item in report.failures} == {"float32", "bfloat16", "impossible", "extremes"}
    assert all("only_doubles raises ValueError: give doubles" in item.evidence for item in report.failures)
    assert not any(item.consequence for item in report.failures) and "so:" not in str(report)


def test_a_weight_per_token_of_a_real_vocabulary_is_checked_at_that_vocabulary(capsys):
    weight = torch.ones(49_152)
    weight[2] = 3.0

    def weighted(logits, labels):
        logging.getLogger("loss").warning("called")
        return F.cross_entropy(logits, labels, weight=weight.to(logits), reduction="none").mean()

    report = qlens.check(weighted)
    assert report.ok and report.vocabulary == 49_152 and report.to_dict()["vocabulary"] == 49_152
    assert report["label_ids"].evidence.endswith("by a weight (others 1): 2: 3")
    assert "a vocabulary of 49152: with 24 columns weighted raises RuntimeError: weight tensor" in str(report)
    assert capsys.readouterr() == ("", "")


def test_ignored_rows_are_tested_on_row_losses():
    """A remark where they are trained in silence, no alarm where they are left out, refused, or left to the caller."""

    def clamped(logits, labels):
        return F.nll_loss(logits.log_softmax(-1), labels.clamp(min=0))

    def of_each_row(logits, labels):
        return F.nll_loss(logits.log_softmax(-1), labels.clamp(min=0), reduction="none")

    def indexed(logits, labels):  # raises at 24 columns, and trains token V - 100 at real vocabularies
        return -logits.log_softmax(-1)[torch.arange(len(labels)), labels].mean()

    def counted_all(logits, labels):
        return F.cross_entropy(logits, labels, reduction="none").mean()

    def counted_after_a_mask(logits, labels):
        return (of_each_row(logits, labels) * (labels != -100)).mean()

    def masked_by_hand(logits, labels):
        supervised = labels != -100
        return (of_each_row(logits, labels) * supervised).sum() / supervised.sum()

    def told_by_a_mask(logits, labels, mask):
        return (of_each_row(logits, labels) * mask).sum() / mask.sum()

    def mean_over_padding(logits, labels, mask):
        return (of_each_row(logits, labels) * mask).mean()

    def pulls_masked_rows(logits, labels, mask, teacher):
        kl = F.kl_div(logits.log_softmax(-1), teacher.softmax(-1), reduction="batchmean")
        return told_by_a_mask(logits, labels, mask) + kl

    def of_hidden_states(hidden, head, labels):
        return clamped(hidden @ head.T, labels)

    silent, fine = "rows labelled -100 are trained as token", "no gradient on 6 rows"
    expected = {
        clamped: ("remark", f"{silent} 0, by up to"),
        of_hidden_states: ("remark", f"{silent} 0, by up to"),
        indexed: ("remark", f"{silent} 28 (-100 counted from the end of the vocabulary)"),
        counted_all: ("not applicable", "with 6 of them among 30 the others learn 0.8 times as much"),
        counted_after_a_mask: ("remark", "with 6 of them among 30 the others learn 0.8 times as much"),
        RIGHT["distilled"]: ("remark", "rows labelled -100 have a gradient, up to 0.033 of the largest"),
        of_each_row: ("not applicable", "it returns a loss per row; rows labelled -100 have that of token 0"),
        RIGHT["gathered"]: ("not applicable", "rows labelled -100 are refused: gathered raises RuntimeError"),
        RIGHT["distilled_by_logs"]: ("not applicable", "no label has a part in its gradient"),
        F.cross_entropy: ("passed", fine),
        F.linear_cross_entropy: ("passed", fine),
        masked_by_hand: ("passed", fine),
        told_by_a_mask: ("passed", fine),
        mean_over_padding: ("failed", "rows that its mask leaves out count in what it divides by"),
        pulls_masked_rows: ("failed", "rows that its mask leaves out have a gradient"),
    }
    off = {}
    for loss, (state, evidence) in expected.items():
        report = qlens.check(loss)
        item = report["prompt"]
        if item.state != state or evidence not in item.evidence or report.ok != (state != "failed"):
            off[getattr(loss, "__name__", str(loss))] = str(report)
    assert not off, "\n".join(f"{name}: {evidence}" for name, evidence in off.items())


def test_cross_entropy_is_not_taken_for_a_binary_one():
    for vocabulary in [32, 5_000]:
        with case(vocabulary):
            """Where all other tokens are unlikely the two are nearly one: nothing is to be said then."""
            loss = Specimen(resolve(lambda logits, labels: F.cross_entropy(logits, labels)), torch.float32, vocabulary)
            assert "cross_entropy" in RULES["functions"].run(loss)
