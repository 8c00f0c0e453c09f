"""Gradient flow: closed forms of fixed points, the sentence that describes them, and the figure."""

import json

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from cases import case
from numpy.testing import assert_allclose
from torch.testing import assert_close

import qlens
from qlens import InputError
from qlens.analysis.plots.flow_figure import GREY
from qlens.lens.gradient_flow import Destination, destination
from qlens.lens.weights.class_weights import ClassWeights
from qlens.registry import resolve

F2 = np.array([0.55, 0.45, 0.0, 0.0])
TEACHER = np.array([0.2, 0.3, 0.4, 0.1])


def assert_ends(actual, expected, within=0.002):
    assert_close(torch.tensor(actual.end), torch.tensor(np.asarray(expected, float)), atol=within, rtol=0)


def test_sft_ends_at_the_label_frequencies():
    for frequencies in [(0.55, 0.45), (0.2, 0.5, 0.3), (1.0,)]:
        with case(frequencies):
            result = destination("sft", frequencies)
            assert_ends(result, [*frequencies, *[0.0] * (4 - len(frequencies))])
            assert result.settled and result.sentence.endswith("the label frequencies.")


def test_sft_follows_the_ordinary_differential_equation_step_by_step():
    z, euler = np.zeros(4), {}
    for step in range(40_000):  # small steps of Euler's, written out
        euler[step] = np.exp(z) / np.exp(z).sum()
        z = z + 5e-4 * (F2 - euler[step])
    actual = destination("sft")
    for t in (0.01, 0.1, 1.0, 10.0, 19.9):
        at = [np.interp(np.log(t), np.log(actual.times), entry) for entry in actual.probs.T]
        assert_allclose(at, euler[round(t / 5e-4)], atol=2e-4)


def test_dft_converges_to_the_majority_from_any_start():
    for start in [None, (0.1, 0.7, 0.1, 0.1)]:
        with case(start):
            result = destination("dft", start=start)
            assert_ends(result, [1, 0, 0, 0])
            assert (
                result.sentence
                == "With label frequencies 55/45 training converges to 1.00/0.00: the majority wins outright."
            )
            assert_ends(destination("dft", (0.3, 0.7), start=start), [0, 1, 0, 0])


def test_beyond_log_ends_at_a_power_of_the_frequencies():
    for alpha in [0.3, 0.5, 0.7]:
        with case(alpha):
            power = F2 ** (1 / (1 - alpha))  # where f_y p_y^alpha / p_y is the same for every label
            result = destination(f"beyond_log(alpha={alpha})")
            assert_ends(result, power / power.sum(), within=0.005)
            assert result.sentence.endswith("sharper than the label frequencies.")


def test_label_smoothing_ends_at_the_smoothed_frequencies():
    for epsilon in [0.1, 0.4]:
        with case(epsilon):
            result = destination(f"label_smoothing(epsilon={epsilon})", size=5)
            assert_ends(result, (1 - epsilon) * np.append(F2, 0) + epsilon / 5)
            assert (
                f"flatter than the label frequencies, with {epsilon * 3 / 5:.2f} on entries that are never"
                in result.sentence
            )


def test_distillation_ends_at_the_teacher_and_mixtures_in_between():
    for spec in ("kd", "reverse_kl"):
        result = destination(spec, teacher=TEACHER)
        assert_ends(result, TEACHER)
        assert_allclose(result.teacher, TEACHER)
        assert result.reference is None and result.sentence.endswith(": the teacher's distribution.")
    result = destination("sft_kl(weight=0.5)", reference=TEACHER)
    assert_ends(result, (F2 + 0.5 * TEACHER) / 1.5)
    assert result.sentence.endswith(": 33% of the way from the label frequencies to the reference's distribution.")


def test_reference_and_old_policy_are_the_start_unless_given():
    start = np.array([0.4, 0.1, 0.3, 0.2])
    assert_ends(destination("sft_kl(weight=1.0)", start=start), (F2 + start) / 2)
    clipped = destination("psft(eps_high=0.2)", start=start).end  # no label's ratio may pass 1.2 by more than a step
    assert_close(torch.tensor(clipped[:2]), torch.tensor([0.48, 0.12], dtype=torch.float64), atol=0.004, rtol=0)


def test_the_default_teacher_prefers_the_second_entry_at_any_size():
    for size in [2, 3, 4, 40]:
        with case(size):
            teacher = destination("kd", size=size).teacher
            assert teacher.argmax() == 1 and teacher.min() > 0 and abs(teacher.sum() - 1) < 1e-12
            assert size != 4 or np.allclose(teacher, [0.35, 0.5, 0.1, 0.05])


def test_a_user_loss_of_any_reduction_is_followed():
    def smoothed(logits, labels):
        return F.cross_entropy(logits, labels, label_smoothing=0.2)

    assert_ends(destination(smoothed), 0.8 * F2 + 0.05)


def test_raw_logits_are_centred_in_the_flow():
    def drifting(tokens):
        assert_close(tokens.logits.sum(-1).detach(), torch.zeros(2, dtype=torch.float64), atol=1e-6, rtol=0)
        return -tokens.label_log_probs + tokens.logits.sum(-1)

    assert_ends(destination(drifting, start=(0.1, 0.2, 0.3, 0.4)), F2)


def test_thresholds_do_not_hang_the_solver():
    result = destination("tvd", teacher=TEACHER)  # its gradient jumps where the student meets the teacher
    assert_ends(result, TEACHER, within=0.01)
    assert result.settled and 60 < result.times[-1] < 1000


def test_unsettled_flows_are_reported():
    slow = destination("beyond_log(alpha=10.0)")
    assert (
        slow.sentence == "With label frequencies 55/45 training has reached 0.26/0.25 at t = 1e+05 and is still moving."
    )
    assert destination("profit(threshold=0.3)").sentence.endswith(": where it started.")


def test_a_winning_minority_is_reported():
    ends = np.array([[0.25, 0.25, 0.25, 0.25], [0.0, 1.0, 0.0, 0.0]])
    result = Destination("mine", F2, ends[0], np.array([0.01, 1e5]), ends, settled=True)
    assert (
        str(result)
        == "mine: With label frequencies 55/45 training converges to 0.00/1.00: entry 1 wins, against the majority."
    )


def test_a_destination_serialises_to_json():
    result = destination("kd_hybrid")
    back = json.loads(json.dumps(result.to_dict()))
    assert back["end"] == result.end.tolist() == back["probs"][-1] and back["sentence"] == result.sentence
    assert (back["spec"], back["settled"], back["reference"]) == ("kd_hybrid", True, None)


def test_invalid_distributions_are_refused():
    for arguments, message in [
        ({"frequencies": (0.5, 0.4)}, r"frequencies must be some probabilities that sum to 1, got \(0.5, 0.4\)"),
        ({"frequencies": 0.5}, "frequencies must be .* got 0.5"),
        ({"frequencies": ("a", "b")}, r"frequencies must be .* got \('a', 'b'\)"),
        ({"frequencies": (1.5, -0.5)}, "frequencies must be"),
        ({"frequencies": (0.2,) * 5}, "size must be .* at least 2 and the 5 frequencies, got 4"),
        ({"size": 2.5}, "size must be a whole number"),
        ({"start": (0.5, 0.5, 0.0, 0.0)}, "start must be positive, got 0 for entry 2"),
        ({"teacher": (0.5, 0.5)}, "teacher must be 4 probabilities"),
        ({"reference": (0.5, 0.5, 0.5, 0.5)}, "reference must be 4 probabilities"),
    ]:
        with case(arguments, message):
            with pytest.raises(InputError, match=message):
                destination("sft", **arguments)


def test_losses_without_a_flow_are_refused_with_the_reason():
    for spec, scope in [("dpo", "pair"), ("iw_sft", "sequence"), ("mile", "batch")]:
        with case(spec, scope):
            with pytest.raises(
                InputError, match=f"loss: {spec} has scope '{scope}': its gradient depends on the {scope}, not"
            ):
                destination(spec)


def test_errors_inside_a_loss_are_reported():
    def broken(logits, labels):
        raise KeyError("mine")

    def rootless(logits, labels):  # fine at the start, and not where a label has become likely
        return (F.cross_entropy(logits, labels, reduction="none") - 1.0).sqrt()

    with pytest.raises(InputError, match="broken raises KeyError: 'mine'") as raised:
        destination(broken)
    assert isinstance(raised.value.__cause__, KeyError)
    with pytest.raises(InputError, match=r"the gradient of rootless is not finite at p = \[0.3"):
        destination(rootless)


def test_every_token_scope_method_ends_on_the_simplex():
    for name in [name for name in qlens.names() if qlens.get(name).scope == "token"]:
        result = destination(name)
        assert_allclose(result.probs.sum(-1), 1.0, err_msg=name)
        assert result.probs.min() >= 0 and "With label frequencies 55/45 training " in result.sentence, name


def test_the_figure_draws_every_entry_its_frequency_and_the_other_model():
    for spec in ["sft", "target_sft", "sft_kl"]:
        with case(spec):
            result = destination(spec)
            figure = result.plot()
            (ax,) = figure.axes
            lines = [line for line in ax.lines if len(line.get_ydata())]  # without the legend's
            curves = {tuple(line.get_ydata()): line for line in lines if np.array_equal(line.get_xdata(), result.times)}
            assert set(curves) == set(map(tuple, result.probs.T))
            levels = {line.get_ydata()[0]: line.get_color() for line in lines if line.get_linestyle() == "--"}
            colors = [curves[tuple(result.probs[:, entry])].get_color() for entry in (0, 1)]
            assert levels == {0.55: colors[0], 0.45: colors[1]}
            assert curves[tuple(result.probs[:, 3])].get_color() == GREY and len({*colors, GREY}) == 3
            other_name, other = {
                "target_sft": ("teacher", result.teacher),
                "sft_kl": ("reference", result.reference),
            }.get(spec, ("", []))
            assert sorted(line.get_ydata()[0] for line in lines if line.get_marker() == "<") == sorted(other)
            legend = [text.get_text() for text in figure.legends[0].get_texts()]
            names = ["entry 0, 0.55 of the labels", "entry 1, 0.45 of the labels", "never a label", "label frequency"]
            assert legend == names + [other_name] * bool(other_name)
            assert ax.get_xscale() == "log" and ax.get_xlim() == (result.times[0], result.times[-1])
            assert ax.get_ylim() == (-0.02, 1.02) and "time" in ax.get_xlabel() and ax.get_ylabel() == "probability"
            assert result.sentence == ax.get_title(loc="left") and figure.get_suptitle() == spec
            figure.draw_without_rendering()


def test_time_is_counted_in_the_size_of_the_gradient():
    usual = destination("sft")
    for factor in (1e-9, 1e9):
        result = destination(lambda logits, labels, factor=factor: factor * F.cross_entropy(logits, labels))
        assert_ends(result, F2)
        assert result.settled and np.allclose(result.times[-1] * factor, usual.times[-1])
    assert np.isclose(usual.times[-1], 1e5)


def explained(loss, **options):
    tokens = qlens.probes()
    target = qlens.implied_target("sft", tokens)
    return qlens.Explanation(resolve(loss), tokens, target, -tokens.label_log_probs, [], **options).destination


def test_a_fixed_point_that_depends_on_ids_is_reported():
    def masked(logits, labels):
        z = logits.clone()
        z[:, 0] = -1e4
        return F.cross_entropy(z, labels)

    assert destination(masked).sentence.startswith(
        "With label frequencies 55/45 at ids 0/1 training converges to 1.00/0.00"
    )
    assert destination(masked).sentence.endswith("; with other label ids it converges elsewhere.")
    sentence = explained("sft", class_weights=ClassWeights({0: 1.0, 1: 2.0}, 1.0))
    assert sentence == "which ids the labels have changes its gradient, and with it the fixed point"


def test_a_loss_is_followed_on_a_vocabulary_that_it_takes_in_float64():
    def more_than(size, logits, labels):
        if logits.shape[-1] <= size:
            raise ValueError(f"made for more than {size} entries")
        return F.cross_entropy(logits, labels)

    result = explained(lambda logits, labels: more_than(8, logits, labels))
    assert "With label frequencies 55/45 (V = 12) training" in result.sentence
    failed = explained(lambda logits, labels: more_than(99, logits, labels))
    where = (
        "the loss fails where it was followed, on vocabularies of 4, 12, 32 (ValueError: made for more than 99 entries)"
    )
    assert failed == f"not known, because {where}"
    coarse = destination(lambda logits, labels: F.cross_entropy(logits.bfloat16(), labels))
    assert coarse.settled and coarse.sentence.endswith("training converges to 0.55/0.45: the label frequencies.")

    def insists(logits, labels):
        assert logits.dtype == torch.float32
        return F.cross_entropy(logits, labels)

    assert destination(insists).sentence == coarse.sentence
