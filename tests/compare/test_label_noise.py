"""AUROC against counted pairs, calibration against hand-computed bins, and truth labels of demonstrations."""

import itertools
import random

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from mini_lab import MINI, PROBLEM
from numpy.testing import assert_allclose

from qlens import InputError
from qlens.analysis.compare.label_noise import auroc, calibration
from qlens.lab import Annotator, Demonstration
from qlens.lab.language import Writer, verify

LABELS = st.lists(
    st.tuples(st.sampled_from([-1.0, 0.0, 0.2, 0.2, 0.5, 0.9, 3.0]), st.booleans()), min_size=1, max_size=30
)


@given(LABELS)
def test_auroc_is_the_share_of_pairs_in_order(labels):
    good = [trust for trust, right in labels if right]
    noisy = [trust for trust, right in labels if not right]
    result = auroc(*zip(*labels, strict=True))
    if good and noisy:
        wins = [(g > n) + 0.5 * (g == n) for g, n in itertools.product(good, noisy)]
        assert_allclose(result, np.mean(wins))
    else:
        assert np.isnan(result)


@given(LABELS)
def test_calibration_counts_every_label_once_and_clips_none(labels):
    trust, good = map(np.array, zip(*labels, strict=True))
    result = calibration(trust, good, bins=4)
    assert sum(result["n"]) == len(labels)
    assert_allclose(np.dot(result["n"], result["good"]), good.sum(), atol=1e-4)
    assert_allclose(np.dot(result["n"], result["trust"]), trust.sum(), atol=1e-4)
    assert min(result["trust"]) <= trust.min() + 0.25 and (trust.min() >= 0 or min(result["trust"]) == -1)


def test_calibration_of_known_bins():
    result = calibration([0.0, 0.24, 0.25, 1.0, 1.5], [1, 0, 1, 1, 0], bins=4)
    assert result == {"trust": [0.12, 0.25, 1.0, 1.5], "good": [0.5, 1.0, 1.0, 0.0], "n": [2, 1, 1, 1]}


@pytest.mark.parametrize(
    ("trust", "good", "message"), [([0.1], [1, 0], "one length"), ([0.1, np.nan], [1, 0], "1 NaN among 2")]
)
def test_what_cannot_be_compared_is_refused(trust, good, message):
    for judge in (auroc, calibration):
        with pytest.raises(InputError, match=message):
            judge(trust, good)


def truth_of(completion):
    return [right for right in Demonstration(PROBLEM, completion, True).correct if right is not None]


def test_a_propagated_error_counts_once():
    right = "first 7 plus 5 gives 2 , then 2 minus 3 is 9 , now 9 times 3 comes to 7 , so answer 7"
    assert truth_of(right.replace("comes to", "makes")) == [True] * 4
    wrong = "first 7 plus 5 gives 4 , then 4 minus 3 is 1 , now 1 times 3 makes 3 , so answer 3"
    assert truth_of(wrong) == [False, True, True, True] and not verify(PROBLEM, wrong)
    assert truth_of(wrong[:-1] + "7") == [False, True, True, False]


def test_truth_labels_match_the_writers_errors():
    rng, slips = random.Random(0), 0
    for seed in range(300):
        writer = Writer(Annotator(slip=(0.3, 0.3, 0.3)), 10, random.Random(seed))
        error = rng.choice([None, 0, 3])
        completion, clean = writer.write(PROBLEM, error)
        judged = Demonstration(PROBLEM, completion, clean).correct
        digits = [right for right in judged if right is not None]
        assert len(judged) == len(completion.split()) and len(digits) == 4
        assert clean == all(digits)
        assert error is None or not digits[error]
        slips += sum(not right for number, right in enumerate(digits[:3]) if number != error)
    assert slips / (300 * 3 - 100) == pytest.approx(0.3, abs=0.06)
    assert MINI.modulus == 6
