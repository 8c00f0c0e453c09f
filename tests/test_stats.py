"""Intervals against scipy's, against ordinary least squares, and against simulated coverage."""

import numpy as np
import pytest
from numpy.testing import assert_allclose
from scipy import stats

from qlens import InputError
from qlens.analysis.stats import crossed_interval


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


def test_variance_and_degrees_of_freedom_are_those_of_the_linear_model():
    x = simulate(np.random.default_rng(0), 4, 7, (1.0, 1.0, 0.3))
    (a, b, e), df = mean_squares(x)
    found = crossed_interval(x)
    assert a > e and b > e, "the case must be one without negative components"
    assert_allclose(variance_of(found), (a + b - e) / x.size)
    assert_allclose(found.df, (a + b - e) ** 2 / (a**2 / df[0] + b**2 / df[1] + e**2 / df[2]))


def test_a_negative_component_counts_as_zero():
    x = simulate(np.random.default_rng(3), 3, 40, (0.0, 0.5, 1.0))
    (a, b, e), df = mean_squares(x)
    found = crossed_interval(x)
    assert a < e < b, "the case must have a negative component of seeds"
    assert_allclose(variance_of(found), b / x.size)
    assert_allclose(found.df, df[1])


def test_the_estimated_variance_is_that_of_the_mean():
    rng = np.random.default_rng(0)
    draws = [simulate(rng, 6, 30, (0.5, 1.0, 0.7)) for _ in range(1500)]
    true = 0.5**2 / 6 + 1.0**2 / 30 + 0.7**2 / 180
    assert_allclose(np.var([draw.mean() for draw in draws]), true, rtol=0.1)
    assert_allclose(np.mean([variance_of(crossed_interval(draw)) for draw in draws]), true, rtol=0.05)


def test_one_seed_gives_scipys_interval_over_items():
    x = np.array([[0.0, 0.25, 1.0, 0.5, 0.75]])
    found = crossed_interval(x, level=0.9)
    assert_allclose([found.low, found.high], stats.t.interval(0.9, 4, x.mean(), stats.sem(x[0])))
    assert "one seed" in found.note and found.n == "1 x 5"


def test_items_that_are_alike_leave_scipys_interval_over_seeds():
    seeds = np.array([0.1, 0.4, 0.5])
    wanted = stats.t.interval(0.95, 2, seeds.mean(), stats.sem(seeds))
    for items in (1, 50):
        found = crossed_interval(np.repeat(seeds[:, None], items, axis=1))
        assert_allclose([found.low, found.high], wanted)
        assert ("one item" in found.note) == (items == 1)


def test_an_untrained_start_that_scores_alike_at_every_seed_varies_by_items_only():
    items = np.array([0.1, 0.4, 0.5, 0.9])
    found = crossed_interval(np.repeat(items[None], 3, axis=0))
    assert_allclose([found.low, found.high], stats.t.interval(0.95, 3, items.mean(), stats.sem(items)))


def test_where_nothing_varies_the_note_says_so():
    certain, single = crossed_interval(np.full((3, 4), 0.7)), crossed_interval([[0.5]])
    assert_allclose([certain.low, certain.high], 0.7)
    assert certain.note and single.note
    assert single.mean == 0.5 and np.isnan(single.low) and np.isnan(single.high)


@pytest.mark.parametrize("seeds", (3, 5))
@pytest.mark.parametrize("components", [(0.5, 1.0, 0.7), (0.1, 1.0, 1.0), (0.0, 1.0, 1.0), (1.0, 0.2, 0.3)], ids=str)
def test_coverage_is_what_the_docstring_says(seeds, components):
    rng = np.random.default_rng(1)
    found = [crossed_interval(simulate(rng, seeds, 60, components)) for _ in range(1500)]
    assert 0.905 < np.mean([interval.low <= 0 <= interval.high for interval in found]) < 0.98


@pytest.mark.parametrize("scores", [np.ones(3), np.ones((0, 2)), [[1.0, np.nan]], [[np.inf], [0.0]]], ids=str)
def test_scores_that_are_no_full_table_are_refused(scores):
    with pytest.raises(InputError, match="full table"):
        crossed_interval(scores)


def test_a_level_in_percent_is_refused():
    with pytest.raises(InputError, match="level.*95"):
        crossed_interval(np.ones((2, 2)), level=95)
