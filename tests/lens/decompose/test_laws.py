"""Laws: the formula of a pull, recovered from pulls that were made by it, with its numbers."""

import math

import numpy as np
import torch
from cases import case
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.testing import assert_close

from qlens.core.probes import probes, trials
from qlens.lens.weights.features import WeightReading
from qlens.lens.weights.weight_law import law, thresholds
from qlens.testing import random_tokens

T = probes()
P, REST = T.label_probs, T.rest_log_probs.exp()
H = -(T.probs * T.log_probs).sum(-1)
RATIO = P / T.gather(T.log_probs_of("old")).exp()
R_RATIO = P / T.gather(T.log_probs_of("reference")).exp()
ON = T.critical


def top_entropy(k):
    q = T.logits.topk(k, -1).values.softmax(-1)
    return -(q * q.log()).sum(-1)


def test_laws_are_recovered():
    for pull, formula in [
        (torch.full_like(P, 0.9), "0.9"),
        (torch.full_like(P, -0.5), "-0.5"),
        (0 * P, "0"),
        (P, "p_y"),
        (P.sqrt(), "p_y^0.5"),
        (3 * P**2, "3 p_y^2"),
        (P / REST, "(p_y / (1 - p_y))"),
        (REST**2, "(1 - p_y)^2"),
        (0.1 + 4 * P, "0.1 + 4 p_y"),
        (P * (1 + P.log()), "p_y (1 + log p_y), the undetached weight p_y"),
        (
            REST**2 - 2 * P * REST * P.log(),
            "(1 - p_y)^2 (1 - 2 p_y log p_y / (1 - p_y)), the undetached weight (1 - p_y)^2",
        ),
        (1.0 * (P >= 0.25), "1 where p_y >= 0.3 (seen between 0.2 and 0.3), 0 elsewhere"),
        (P * (P <= 0.25), "p_y where p_y <= 0.3 (seen between 0.2 and 0.3), 0 elsewhere"),
        (0.5 * H, "0.5 H"),
        ((top_entropy(10) / torch.tensor(10.0).log()) ** 2, "(H_top-10 / ln 10)^2"),
        (RATIO, "(p_y / old_y)"),
        (
            RATIO * (RATIO < 1.25),
            "(p_y / old_y) where p_y / old_y <= 1.3 (seen between 1.2219 and 1.3353), 0 elsewhere",
        ),
        (0.9 + 0.1 / R_RATIO, "0.9 + 0.1 reference_y / p_y"),
        (R_RATIO.clamp(max=1.8), "(p_y / reference_y), at most 1.8"),
        (2.0 * ON, "2 where critical, 0 elsewhere"),
        (T.advantage, "A"),
        (T.advantage * RATIO, "A (p_y / old_y)"),
        (1.0 + T.sequence, "one value per sequence, 1 to 8"),
    ]:
        with case(pull, formula):
            found = law(pull.double(), T)
            assert found is not None and found.formula == formula
            assert "57 tokens, p_y 1e-06 to 1 - 1e-06" in found.domain


@settings(max_examples=50, deadline=None)
@given(st.floats(-1.5, 3.0).filter(lambda a: abs(a) > 0.05), st.floats(0.05, 5.0))
def test_powers_come_out_to_their_digits(a, c):
    found = law(c * P**a, T)
    assert found is not None
    assert_close(found.values["a"], a, rtol=1e-5, atol=1e-6)
    assert_close(found.values["c"], c, rtol=1e-4, atol=1e-6)


def test_noise_follows_no_law():
    tokens = random_tokens(57, 32, spread=2.0)
    for seed in range(60):
        noise = torch.rand(57, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
        assert law(noise, tokens) is None and law(P * (1 + 1e-3 * noise), T) is None


def test_unknown_pulls_are_left_out_and_too_few_say_nothing():
    pull = P.sqrt()
    pull[::2] = torch.nan
    found = law(pull, T)
    assert found is not None and found.formula == "p_y^0.5" and "28 tokens" in found.domain
    pull[4:] = torch.nan
    assert law(pull, T) is None


def test_float32_pulls_are_read_at_their_own_digits():
    pull = (P.sqrt() * (1 + 1e-5 * torch.sin(torch.arange(57)))).double()
    assert law(pull, T) is None
    found = law(pull, T, tolerance=1e-3, noise=1e-6)
    assert found is not None
    assert_close(found.values["a"], 0.5, rtol=1e-3, atol=0)


WIDE = trials()


def on_both(pull):
    """The law of a pull, a function of tokens, on the probes and the trial tokens."""
    return law(pull(T), T, further=[WeightReading(pull(WIDE), WIDE, 1e-15)])


def p_of(tokens):
    return tokens.label_probs


def share_of_entropy(tokens):
    return -(tokens.probs * tokens.log_probs).sum(-1) / math.log(tokens.logits.shape[1])


def teacher_agrees(tokens):
    return tokens.teacher.argmax(-1) == tokens.labels


def test_an_epsilon_beside_p_y_is_part_of_the_law():
    for pull, formula in (
        (lambda t: p_of(t) / (p_of(t) + 1e-8), "p_y / (p_y + 1e-08)"),
        (lambda t: p_of(t) ** 2 / (p_of(t) + 1e-10), "p_y^2 / (p_y + 1e-10)"),
        (lambda t: 0.5 * (1 - p_of(t)) * p_of(t) / (p_of(t) + 1e-6), "0.5 (1 - p_y) p_y / (p_y + 1e-06)"),
    ):
        assert on_both(pull).formula == formula


def test_entropies_are_shares_of_the_largest_where_the_vocabulary_changes():
    assert on_both(share_of_entropy).formula == "(H / ln V)"
    assert on_both(lambda t: 1 - share_of_entropy(t)).formula == "1 - H / ln V"
    assert law(0.9 - 0.1 * H, T).formula == "0.9 - 0.1 H"


def test_a_pull_of_two_values_has_no_end_but_a_rule_or_two_values():
    for pull, formula in (
        (
            lambda t: torch.where(p_of(t) < 0.91, 1.0, -1.0),
            "1 where p_y <= 0.91 (seen between 0.9 and 0.92), -1 elsewhere",
        ),
        (
            lambda t: torch.where(p_of(t) < 0.42, p_of(t), 2.0),
            "p_y where p_y <= 0.4 (seen between 0.4 and 0.45), 2 elsewhere",
        ),
        (
            lambda t: torch.where(teacher_agrees(t), 1.0, 1e-16),
            "1 where the label's rank for the teacher (0 first) <= 0 (seen between 0 and 1), 0 elsewhere",
        ),
        (lambda t: torch.where(t.labels % 2 == 0, 0.1, 1.0), "two values, 0.1 and 1"),
        (lambda t: p_of(t).clamp(0.01, 0.5), "p_y, at most 0.5, at least 0.01"),
        (lambda t: torch.full_like(p_of(t), 1e-17), "0"),
    ):
        found = on_both(lambda t, pull=pull: pull(t).double())
        assert found.formula == formula


def test_one_value_for_each_vocabulary_is_no_law():
    assert on_both(lambda t: torch.full_like(p_of(t), 1 / t.logits.shape[1])) is None


def test_a_condition_excludes_something_and_is_written_near_one_as_the_rest():
    found = on_both(lambda t: (p_of(t) < 1 - 2e-4).double())
    assert found.formula == "1 where p_y <= 1 - 0.0005 (seen between 1 - 0.001 and 1 - 0.0001), 0 elsewhere"
    on = np.arange(len(T)) != 40  # one token that no threshold tells from those of the same rank
    assert list(thresholds([WeightReading(torch.ones(57), T, 0.0)], on)) == []


def test_values_of_one_reading_are_not_those_of_another():
    made = [torch.where(t.labels % 3 == 0, 0.0, 2.0 + 1 / len(t)).double() for t in (T, WIDE)]
    assert law(made[0], T, further=[WeightReading(made[1], WIDE, 1e-15)]) is None
    assert on_both(lambda t: (t.labels % 3 / 2).double()).formula == "three values, 0, 0.5 and 1"


def test_ends_at_which_rounding_decides_are_found():
    found = on_both(lambda t: ((p_of(t) >= 1e-7) & (p_of(t) <= 1 - 1e-7)).double())
    assert found.formula.startswith("1 where p_y >= ") and "p_y <= 1 - 1e-07" in found.formula


def test_the_entropy_of_a_teacher_may_weigh():
    log_t = T.log_probs_of("teacher")
    found = law(1 + (log_t.exp() * log_t).sum(-1) / math.log(32), T)
    assert found is not None and found.formula == "1 - H of the teacher / ln V"


def test_laws_of_the_largest_probabilities():
    tokens = probes()
    p = tokens.probs
    top = p.topk(2, -1).values
    of = {
        "max p^2": top[:, 0] ** 2,
        "(1 - max p)": 1 - top[:, 0],
        "0.5 (second p)": 0.5 * top[:, 1],
        "(max p - second p)": top[:, 0] - top[:, 1],
        "(p_y / max p)": tokens.label_probs / top[:, 0],
        "sum(p^2)": p.square().sum(-1),
        "1 - 0.5 max p": 1 - 0.5 * top[:, 0],
    }
    for formula, pull in of.items():
        found = law(pull, tokens)
        assert found is not None and found.formula == formula, (formula, found)


def test_no_end_of_a_law_lies_where_rounding_hides_the_pull():
    tokens = probes(torch.float64)
    p = tokens.label_probs
    noise = torch.full_like(p, 5e-7)  # a pull of 1 does not show at p_y = 1 - 1e-6
    found = law((p >= 0.1).double(), tokens, noise=noise)
    assert found is not None and "1 - " not in found.formula and "high" not in found.values, found
    assert found.formula.startswith("1 where p_y >= "), found.formula
