"""Bins, aggregates and bootstrap bands against scipy and arithmetic by hand."""

import numpy as np
import pytest
import scipy.stats

from dreamer.plot import statistics
from dreamer.plot.statistics import (
    AGGREGATES,
    band,
    bin_means,
    interquartile_mean,
    mean,
    mean_interval,
    median,
    optimality_gap,
)


def test_bins_include_their_right_edge_and_gaps_are_bridged():
    xs, ys = np.array([5.0, 1.0, 10.0, 11.0, 40.0]), np.array([1.0, 3.0, 5.0, 9.0, 3.0])
    edges = np.array([0.0, 10.0, 20.0, 30.0, 40.0, 50.0])
    # (0, 10]: 1, 3, 5; (10, 20]: 9; (20, 30]: none, half-way to 3; (30, 40]: 3; nothing after
    np.testing.assert_array_equal(bin_means(xs, ys, edges), [3.0, 9.0, 6.0, 3.0, np.nan])
    np.testing.assert_array_equal(bin_means(np.array([60.0]), np.array([1.0]), edges), [np.nan] * 5)


@pytest.mark.parametrize("seeds", [(3,), (5, 5), (4, 7, 5), (1, 2)])
def test_aggregates_are_scipy_s_and_numpy_s(seeds):
    rng = np.random.default_rng(1)
    groups = [rng.normal(task, 1.0, count) for task, count in enumerate(seeds)]
    pooled = np.concatenate(groups)
    assert mean(groups) == pytest.approx(np.mean([np.mean(group) for group in groups]))
    assert median(groups) == pytest.approx(np.median([np.mean(group) for group in groups]))
    assert interquartile_mean(groups) == pytest.approx(scipy.stats.trim_mean(pooled, 0.25))
    assert optimality_gap(groups) == pytest.approx(np.mean([max(0.0, 1.0 - score) for score in pooled]))


def test_aggregates_by_hand():
    groups = [np.array([0.0, 1.0]), np.array([3.0, 5.0]), np.array([0.5, 10.5])]
    assert [float(f(groups)) for f in AGGREGATES.values()] == [10.0 / 3, 4.0, 9.5 / 4, 1.5 / 6]


@pytest.mark.parametrize("name", list(AGGREGATES))
@pytest.mark.parametrize("seeds", [(6,), (5, 8, 6)])
def test_bands_are_scipy_s_stratified_bootstrap(name, seeds):
    """Seeds drawn within each task: what scipy does to several samples. Both are random, so alike, not equal."""
    rng = np.random.default_rng(2)
    groups = [rng.gamma(2.0, 0.4 + task, count) for task, count in enumerate(seeds)]

    def statistic(*samples, axis):
        return AGGREGATES[name]([np.moveaxis(np.asarray(sample), axis, -1) for sample in samples])

    oracle = scipy.stats.bootstrap(
        groups, statistic, n_resamples=20_000, method="percentile", vectorized=True, rng=np.random.default_rng(3)
    )
    ends = oracle.confidence_interval
    low, high = band(AGGREGATES[name], groups)
    tolerance = 0.05 * (ends.high - ends.low)
    assert low == pytest.approx(ends.low, abs=tolerance) and high == pytest.approx(ends.high, abs=tolerance)


def test_a_band_of_curves_is_that_of_each_point_and_always_the_same():
    scores = np.random.default_rng(4).normal(size=(5, 7))
    whole = band(mean, [scores])
    assert whole.shape == (2, 7)
    for point in range(7):
        np.testing.assert_array_equal(whole[:, point], band(mean, [scores[:, point]]))


def test_a_band_of_two_seeds_is_their_range_and_of_one_there_is_none():
    """Both draws are the same seed in a quarter of all cases each: more than the 2.5 % outside the band."""
    np.testing.assert_array_equal(band(mean, [np.array([3.0, 7.0])]), [3.0, 7.0])
    assert np.isnan(band(mean, [np.array([3.0])])).all()
    assert np.isfinite(band(mean, [np.array([3.0]), np.array([1.0, 2.0])])).all()


def test_bands_cover_the_truth_about_as_often_as_they_say(monkeypatch):
    """Of 200 experiments with ten normal seeds: a percentile bootstrap covers some 90 %, being narrow for few seeds."""
    monkeypatch.setattr(statistics, "RESAMPLES", 400)
    rng = np.random.default_rng(5)
    ends = [band(mean, [rng.normal(size=10)]) for _ in range(200)]
    covered = np.mean([low <= 0.0 <= high for low, high in ends])
    assert 0.84 <= covered <= 0.98


@pytest.mark.parametrize("seeds", range(2, 11))
def test_the_interval_of_published_means_is_student_s(seeds):
    scores = np.random.default_rng(seeds).normal(size=seeds)
    low, high = scipy.stats.ttest_1samp(scores, 0.0).confidence_interval(0.95)
    half = mean_interval(np.array(scores.std()), np.array(seeds))
    assert half == pytest.approx((high - low) / 2, rel=1e-3)
    assert scores.mean() - half == pytest.approx(low, rel=2e-3, abs=1e-3)


def test_one_published_seed_has_no_interval():
    assert np.isnan(mean_interval(np.array([0.0]), np.array([1]))).all()
