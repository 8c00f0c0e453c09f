"""Statistics against scipy's, ordinary least squares, loops and enumeration, and against simulated coverage."""

import itertools
import math
import re
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from numpy.testing import assert_allclose, assert_array_equal
from scipy import stats

from qlens import InputError
from qlens.analysis.maintenance import simulate_intervals as simulation
from qlens.analysis.study.stats import avg_at_k, crossed_interval, holm, paired_difference, pass_at_k, rank_sets

SHARE = st.floats(0, 1)
TABLES = arrays(float, (4, 2, 3), elements=st.integers(0, 8).map(lambda right: right / 8))
RATES = Path(simulation.__file__).parents[1] / "results" / "coverage.csv"


def simulate(rng, seeds, items, components):
    """Scores of mean 0 with the given spreads of seeds, items and cells."""
    by_seed, by_item, cell = components
    return (
        rng.normal(0, by_seed, (seeds, 1))
        + rng.normal(0, by_item, (1, items))
        + rng.normal(0, cell, (seeds, items))
    )  # fmt: skip


def variance_of(interval):
    """What the half width says the grand mean's variance is."""
    return ((interval.high - interval.mean) / stats.t.ppf(0.975, interval.df)) ** 2


def mean_squares(x):
    """The classical table, from residual sums of squares of nested linear models: nothing shared with stats.py."""
    seeds, items = x.shape
    rows, columns = np.repeat(np.eye(seeds), items, axis=0), np.tile(np.eye(items), (seeds, 1))

    def residual(*parts):
        design = np.column_stack([np.ones(x.size), *parts])
        fitted = design @ np.linalg.lstsq(design, x.ravel(), rcond=None)[0]
        return ((x.ravel() - fitted) ** 2).sum()

    full = residual(rows, columns)
    df = (seeds - 1, items - 1, (seeds - 1) * (items - 1))
    return [(residual(columns) - full) / df[0], (residual(rows) - full) / df[1], full / df[2]], df


def test_variance_degrees_of_freedom_and_p_are_those_of_the_linear_model():
    x = 0.4 + simulate(np.random.default_rng(0), 4, 7, (1.0, 1.0, 0.3))
    (a, b, e), df = mean_squares(x)
    result = crossed_interval(x)
    assert a > e and b > e, "the case must be one without negative components"
    variance = (a + b - e) / x.size
    assert_allclose(variance_of(result), variance)
    assert_allclose(result.df, (a + b - e) ** 2 / (a**2 / df[0] + b**2 / df[1] + e**2 / df[2]))
    assert_allclose(result.p, 2 * (1 - stats.t.cdf(abs(x.mean()) / variance**0.5, result.df)))


def test_a_negative_component_counts_as_zero():
    x = simulate(np.random.default_rng(3), 3, 40, (0.0, 0.5, 1.0))
    (a, b, e), df = mean_squares(x)
    result = crossed_interval(x)
    assert a < e < b, "the case must have a negative component of seeds"
    assert_allclose(variance_of(result), b / x.size)
    assert_allclose(result.df, df[1])


def test_the_estimated_variance_is_that_of_the_mean():
    rng = np.random.default_rng(0)
    draws = [simulate(rng, 6, 30, (0.5, 1.0, 0.7)) for _ in range(1500)]
    true = 0.5**2 / 6 + 1.0**2 / 30 + 0.7**2 / 180
    assert_allclose(np.var([draw.mean() for draw in draws]), true, rtol=0.1)
    assert_allclose(np.mean([variance_of(crossed_interval(draw)) for draw in draws]), true, rtol=0.05)


def test_one_seed_gives_scipys_interval_over_items():
    x = np.array([[0.0, 0.25, 1.0, 0.5, 0.75]])
    result = crossed_interval(x, level=0.9)
    assert_allclose([result.low, result.high], stats.t.interval(0.9, 4, x.mean(), stats.sem(x[0])))
    assert_allclose([result.p, crossed_interval(x.T).p], stats.ttest_1samp(x[0], 0).pvalue)
    assert "one seed" in result.note and result.n == "1 x 5"


def test_equal_items_give_scipys_interval_over_seeds():
    seeds = np.array([0.1, 0.4, 0.5])
    expected = stats.t.interval(0.95, 2, seeds.mean(), stats.sem(seeds))
    for items in (1, 50):
        result = crossed_interval(np.repeat(seeds[:, None], items, axis=1))
        assert_allclose([result.low, result.high], expected)
        assert ("one item" in result.note) == (items == 1)


def test_a_score_equal_at_every_seed_varies_by_items_only():
    items = np.array([0.1, 0.4, 0.5, 0.9])
    result = crossed_interval(np.repeat(items[None], 3, axis=0))
    assert_allclose([result.low, result.high], stats.t.interval(0.95, 3, items.mean(), stats.sem(items)))


def test_constant_scores_get_a_note():
    certain, single = crossed_interval(np.full((3, 4), 0.7)), crossed_interval([[0.5]])
    assert_allclose([certain.low, certain.high], 0.7)
    assert certain.note and single.note and single.mean == 0.5 and np.isnan(single.low) and np.isnan(single.high)


def test_incomplete_score_tables_are_refused():
    for scores in (np.ones(3), np.ones((0, 2)), [[1.0, np.nan]], [[np.inf], [0.0]]):
        with pytest.raises(InputError, match="full table"):
            crossed_interval(scores)


def test_a_level_in_percent_is_refused():
    with pytest.raises(InputError, match="level.*95"):
        crossed_interval(np.ones((2, 2)), level=95)


@given(TABLES, st.floats(0.5, 0.99))
def test_p_is_below_one_minus_level_where_the_interval_leaves_out_zero(tables, level):
    result = crossed_interval(tables[0] - 0.3, level)
    assert abs(result.p - (1 - level)) < 1e-9 or (result.p < 1 - level) == (result.low > 0 or result.high < 0)


def test_p_where_nothing_varies_is_1_at_zero_and_0_elsewhere_and_none_for_one_score():
    assert crossed_interval(np.zeros((3, 4))).p == 1 and crossed_interval(np.full((3, 4), -0.1)).p == 0
    assert np.isnan(crossed_interval([[0.5]]).p)
    thirds = paired_difference(np.full((3, 4), 0.3), np.full((3, 4), 0.1 + 0.2))
    assert thirds.p == 1 and thirds.mean == 0, "0.3 and 0.1 + 0.2 differ by rounding only"


def test_tables_with_leading_axes_are_fitted_one_by_one():
    x = simulate(np.random.default_rng(2), 3, 8 * 5, (0.2, 1.0, 0.7)).reshape(3, 2, 4, 5).transpose(1, 2, 0, 3) + 0.5
    mean, variance, df = simulation.stats.fit(x)
    half, p = (
        simulation.stats.half_width(variance, df, 0.95),
        simulation.stats.p_value(mean, variance, df),
    )
    for index in np.ndindex(2, 4):
        alone = crossed_interval(x[index])
        assert_allclose([mean[index], mean[index] - half[index], p[index]], [alone.mean, alone.low, alone.p])


def test_paired_difference_is_the_interval_of_the_differences():
    rng = np.random.default_rng(0)
    a, b = simulate(rng, 3, 20, (0.1, 1.0, 0.3)), simulate(rng, 3, 20, (0.1, 1.0, 0.3))
    assert paired_difference(a, b, level=0.9) == crossed_interval(a - b, level=0.9)
    forth, back = paired_difference(a, b), paired_difference(b, a)
    assert_allclose([forth.mean, forth.low, forth.p], [-back.mean, -back.high, back.p])


def test_paired_difference_refuses_tables_of_other_seeds_and_names_the_incomplete_one():
    with pytest.raises(InputError, match=r"same seeds.*'a': \(3, 4\), 'b': \(2, 4\)"):
        paired_difference(np.ones((3, 4)), np.ones((2, 4)))
    with pytest.raises(InputError, match="^b must be a full table"):
        paired_difference(np.ones((1, 2)), [[1.0, np.nan]])


def holm_by_hand(p):
    """Step by step through the sorted p-values."""
    adjusted, running = [math.nan] * len(p), 0.0
    tests = sorted((value, place) for place, value in enumerate(p) if not math.isnan(value))
    for step, (value, place) in enumerate(tests):
        running = max(running, min(1.0, (len(tests) - step) * value))
        adjusted[place] = running
    return adjusted


@given(st.lists(SHARE | st.just(math.nan), max_size=30))
def test_holm_matches_a_loop(p):
    assert_allclose(holm(p), holm_by_hand(p))
    assert_array_equal(holm(np.reshape(p, (1, -1, 1))), np.reshape(holm(p), (1, -1, 1)))


@given(st.lists(SHARE, min_size=1, max_size=30), st.randoms())
def test_holm_never_lowers_is_monotone_keeps_the_order_and_ignores_where_a_test_stands(p, random):
    result, places = holm(p), random.sample(range(len(p)), len(p))
    assert (result >= p).all() and (result <= 1).all()
    assert (holm(np.maximum(p, random.random())) >= result).all()
    assert (np.diff(result[np.argsort(p)]) >= 0).all()
    assert_array_equal(holm(np.array(p)[places]), result[places])


def test_holm_refuses_invalid_p_values():
    for p in (-0.1, 1.5):
        with pytest.raises(InputError, match=f"between 0 and 1.*{p}"):
            holm([0.5, p])


def test_pass_at_k_is_the_share_of_subsets_with_a_right_one():
    for n in range(1, 8):
        for k in range(1, n + 1):
            expected = [np.mean([min(s) < c for s in itertools.combinations(range(n), k)]) for c in range(n + 1)]
            assert_allclose(pass_at_k(np.arange(n + 1), n, k), expected)
        assert_allclose(avg_at_k(np.arange(n + 1), n), pass_at_k(np.arange(n + 1), n, 1))


def test_pass_at_k_of_many_samples_is_that_of_whole_number_arithmetic():
    n, k, right = 4000, 1000, [0, 1, 2, 7, 3000, 3001, 4000]
    expected = [1 - math.comb(n - c, k) / math.comb(n, k) for c in right]
    assert_allclose(pass_at_k([right], n, k), [expected], rtol=1e-12)


def test_pass_at_k_refuses_invalid_counts():
    cases = [
        ([1], 4, 5, "k.* n = 4"), ([1], 4, 0, "k.*0"), ([1], 4, 1.5, "k.*1.5"), ([5], 4, 2, "right.*5"),
        ([-1], 4, 2, "right.*-1"), ([0.5], 4, 2, "right.*0.5"), ([math.nan], 4, 2, "right"), ([0], 2.5, 1, "n must.*2.5"),
    ]  # fmt: skip
    for right, n, k, message in cases:
        with pytest.raises(InputError, match=message):
            pass_at_k(right, n, k)


def test_rank_sets_are_those_of_the_pairs_one_by_one():
    rng = np.random.default_rng(5)
    scores = {name: mean + simulate(rng, 4, 30, (0.05, 0.2, 0.2)) for name, mean in enumerate([0, 0.1, 0.3, 0.32])}
    pairs = list(itertools.permutations(scores, 2))
    result = {pair: crossed_interval(scores[pair[0]] - scores[pair[1]]) for pair in pairs}
    once = [pair for pair in pairs if pair[0] < pair[1]]
    adjusted = dict(zip(once, holm_by_hand([result[pair].p for pair in once]), strict=True))
    beats = {pair for pair in pairs if adjusted[tuple(sorted(pair))] < 0.05 and result[pair].mean > 0}
    assert 0 < len(beats) < len(once), "the case must have pairs told apart and pairs that are not"
    for name, rank, best, worst in rank_sets(scores):
        assert rank == 1 + sum(result[other, name].mean > 0 for other in scores if other != name)
        assert best == 1 + sum((other, name) in beats for other in scores)
        assert worst == len(scores) - sum((name, other) in beats for other in scores)


@given(TABLES)
def test_rank_sets_hold_the_rank_come_sorted_and_turn_round_with_better(tables):
    scores = dict(zip("abcd", tables, strict=True))
    result = rank_sets(scores)
    assert all(1 <= each.best <= each.rank <= each.worst <= 4 for each in result)
    assert [each.rank for each in result] == sorted(each.rank for each in result)
    assert rank_sets({name: -table for name, table in scores.items()}, better="lower") == result


def test_equal_means_share_the_smallest_rank():
    x = np.array([[0.0, 0.5], [1.0, 0.5]])
    result = rank_sets({"a": x, "b": x[::-1], "best": x + 1, "worst": x - 1})
    assert [(each.name, each.rank) for each in result] == [("best", 1), ("a", 2), ("b", 2), ("worst", 4)]
    assert rank_sets({"alone": x}) == [("alone", 1, 1, 1)]
    assert rank_sets({"a": [[1.0]], "b": [[0.0]]}) == [("a", 1, 1, 2), ("b", 2, 1, 2)]


def test_rank_sets_refuse_invalid_tables():
    cases = [({}, {}, "at least one"), ({"a": [[1.0]], "b": [[1.0, 2.0]]}, {}, "same seeds"), ({"a": [1.0]}, {}, "'a'.*full"),
     ({"a": [[1.0]]}, {"better": "up"}, "better.*up"), ({"a": [[1.0]]}, {"level": 95}, "level.*95")]  # fmt: skip
    for scores, options, message in cases:
        with pytest.raises(InputError, match=message):
            rank_sets(scores, **options)


def test_a_short_simulation_is_near_the_stored_rates():
    for case in (simulation.CASES[3], *simulation.CASES[8:]):
        result = simulation.measure(case, seeds=5, items=40, repeats=400)
        assert 0.89 < result["mean"] < 0.99 and 0.91 < result["difference"] < 0.99 and 0.01 < result["type I"] < 0.09
        assert 0 < result["family"] < 0.12 and result["ranks apart"] > 0.97 and result["ranks close"] > 0.95


def test_true_means_are_those_of_many_draws():
    for case in (*simulation.CASES[7:9], simulation.BetaBinomial(a=0.5, b=4, seed=1, own=0.7, cell=0.8)):
        shifts = np.array([-1.25, 0.0, 0.02, 1.25])
        x = case.draw(np.random.default_rng(0), 40_000, shifts, 1, 1).squeeze()
        assert (np.abs(x.mean(0) - case.means(shifts)) < 4 * stats.sem(x)).all()


def test_the_docstrings_give_the_measured_figures():
    frame = pd.read_csv(RATES)
    figures = {
        crossed_interval: [("mean",)],
        paired_difference: [("difference",), ("type I",)],
        holm: [("family",)],
        rank_sets: [("ranks apart", "ranks close")],
    }
    for function, groups in figures.items():
        measured = [row for group in groups for row in simulation.ranges(frame, group)]
        printed = re.findall(r"(\d+) to (\d+) % with (\d+)", " ".join((function.__doc__ or "").split()))
        assert [tuple(map(int, row)) for row in printed] == measured, function.__name__


def test_the_stored_rates_are_reproduced():
    frame, case = pd.read_csv(RATES), simulation.CASES[2]
    written = frame[(frame["case"] == str(case)) & (frame["seeds"] == 3) & (frame["items"] == 20)]
    result = simulation.measure(case, seeds=3, items=20, repeats=1000, seed=simulation.CASES.index(case))
    assert set(frame["case"]) == set(map(str, simulation.CASES)) and set(frame["figure"]) == set(simulation.FIGURES)
    assert_allclose(written["rate"], [result[figure] for figure in written["figure"]], atol=0.05)
    assert (RATES.with_suffix(".md")).read_text(encoding="utf-8") == simulation.markdown(frame)


def test_the_command_writes_rates_and_page(tmp_path, capsys):
    simulation.main(["--repeats", "1", "--out", str(tmp_path / "new")])
    frame = pd.read_csv(tmp_path / "new" / "coverage.csv")
    assert len(frame) == len(simulation.FIGURES) * len(simulation.CASES) * 3 * 2 and frame["rate"].between(0, 1).all()
    assert "--repeats 1" in (tmp_path / "new" / "coverage.md").read_text(encoding="utf-8")
    assert "10 seeds" in capsys.readouterr().out
