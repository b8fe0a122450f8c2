from __future__ import annotations

import numpy as np
import pytest
import scipy.stats
import sklearn.metrics
from hypothesis import given
from hypothesis import strategies as st

from attacks.analysis import statistics
from attacks.analysis.statistics.bootstrap import bca_levels
from attacks.analysis.statistics.interval import perfect_separation

scores = st.lists(st.integers(-20, 20), min_size=2, max_size=25).map(lambda values: np.array(values, dtype=np.float64))


def kernel(held_in, held_out):
    """The second implementation: every pair, nothing clever."""
    return (held_in[:, None] > held_out[None]) + 0.5 * (held_in[:, None] == held_out[None])


def normal_sides(num_held_in, num_held_out, shift, seed):
    rng = np.random.default_rng(seed)
    return rng.normal(shift, 1.0, num_held_in), rng.normal(0.0, 1.0, num_held_out)


@given(scores, scores)
def test_auroc_is_the_share_of_pairs_in_order(held_in, held_out):
    area = statistics.auroc(held_in, held_out)
    assert area == pytest.approx(kernel(held_in, held_out).mean(), abs=1e-12)
    labels = np.repeat([1, 0], [held_in.size, held_out.size])
    assert area == pytest.approx(sklearn.metrics.roc_auc_score(labels, np.concatenate([held_in, held_out])), abs=1e-12)
    u_statistic = scipy.stats.mannwhitneyu(held_in, held_out).statistic
    assert area == pytest.approx(u_statistic / (held_in.size * held_out.size), abs=1e-12)


@given(scores, scores)
def test_auroc_flips_under_negation_and_under_exchange(held_in, held_out):
    area = statistics.auroc(held_in, held_out)
    assert statistics.auroc(-held_in, -held_out) == pytest.approx(1.0 - area, abs=1e-12)
    assert statistics.auroc(held_out, held_in) == pytest.approx(1.0 - area, abs=1e-12)


@given(scores, scores)
def test_auroc_and_its_intervals_see_only_ranks(held_in, held_out):
    curved = [np.expm1(side / 7.0) for side in (held_in, held_out)]
    assert statistics.auroc(*curved) == statistics.auroc(held_in, held_out)
    assert statistics.delong_interval(*curved) == statistics.delong_interval(held_in, held_out)
    assert statistics.bootstrap_interval(*curved, seed=1, num_resamples=50) == statistics.bootstrap_interval(
        held_in, held_out, seed=1, num_resamples=50
    )


def test_known_values():
    assert statistics.auroc(np.array([3.0, 4.0]), np.array([1.0, 2.0])) == 1.0
    assert statistics.auroc(np.array([1.0, 2.0]), np.array([3.0, 4.0])) == 0.0
    assert statistics.auroc(np.zeros(3), np.zeros(5)) == 0.5
    assert statistics.auroc(np.array([1.0, 3.0]), np.array([1.0, 2.0])) == 0.625


@given(scores, scores)
def test_delong_variance_is_that_of_the_brute_force_placements(held_in, held_out):
    pairs = kernel(held_in, held_out)
    expected = pairs.mean(axis=1).var(ddof=1) / held_in.size + pairs.mean(axis=0).var(ddof=1) / held_out.size
    assert statistics.delong_variance(held_in, held_out) == pytest.approx(expected, abs=1e-12)


def test_delong_variance_matches_repeated_samples():
    areas, variances = [], []
    for seed in range(2000):
        sides = normal_sides(30, 40, 0.8, seed)
        areas.append(statistics.auroc(*sides))
        variances.append(statistics.delong_variance(*sides))
    assert np.mean(variances) == pytest.approx(np.var(areas), rel=0.1)


def test_delong_interval_is_the_logit_interval_by_hand():
    held_in, held_out = normal_sides(50, 60, 1.0, 0)
    area, error = statistics.auroc(held_in, held_out), np.sqrt(statistics.delong_variance(held_in, held_out))
    logit, half = np.log(area / (1 - area)), 1.959964 * error / (area * (1 - area))
    found = statistics.delong_interval(held_in, held_out)
    assert found.lower == pytest.approx(1 / (1 + np.exp(-(logit - half))), abs=1e-6)
    assert found.upper == pytest.approx(1 / (1 + np.exp(-(logit + half))), abs=1e-6)


def test_bootstrap_is_scipys_bca_but_for_monte_carlo_error():
    held_in, held_out = normal_sides(25, 35, 1.0, 3)
    reference = scipy.stats.bootstrap(
        (held_in, held_out), statistics.auroc, vectorized=False, method="BCa", n_resamples=4000, rng=1
    ).confidence_interval
    found = statistics.bootstrap_interval(held_in, held_out, seed=1)
    assert found.lower == pytest.approx(reference.low, abs=0.012)
    assert found.upper == pytest.approx(reference.high, abs=0.012)


def test_bca_levels_are_those_of_the_textbook():
    """Efron and Tibshirani 1993, chapter 14: a 90 % interval with bias .146 and acceleration .061."""
    assert bca_levels(0.146, 0.061, 0.9) == pytest.approx([0.110, 0.985], abs=0.001)
    assert bca_levels(0.0, 0.0, 0.9).tolist() == pytest.approx([0.05, 0.95])
    assert bca_levels(3.0, 0.5, 0.9)[1] == 1.0


def test_bootstrap_is_a_function_of_the_seed():
    sides = normal_sides(20, 20, 0.5, 0)
    assert statistics.bootstrap_interval(*sides, seed=7) == statistics.bootstrap_interval(*sides, seed=7)
    assert statistics.bootstrap_interval(*sides, seed=7) != statistics.bootstrap_interval(*sides, seed=8)


@given(scores, scores)
def test_no_interval_claims_more_than_perfect_separation_could(held_in, held_out):
    ceiling = perfect_separation(held_in.size, held_out.size)
    area = statistics.auroc(held_in, held_out)
    for found in (
        statistics.delong_interval(held_in, held_out),
        statistics.bootstrap_interval(held_in, held_out, seed=0, num_resamples=100),
    ):
        assert 0.0 <= found.lower <= ceiling.lower
        assert 1.0 - ceiling.lower <= found.upper <= 1.0
        assert found.lower <= area <= found.upper


@pytest.mark.parametrize("method", [statistics.delong_interval, statistics.bootstrap_interval])
def test_separated_sides_of_three_users_prove_little(method):
    arguments = {"seed": 0} if method is statistics.bootstrap_interval else {}
    found = method(np.array([4.0, 5.0, 6.0]), np.array([1.0, 2.0, 3.0]), **arguments)
    assert found.lower == pytest.approx(0.025 ** (1 / 3))
    assert found.upper == 1.0


def plausible(num_experiments, rate):
    """The counts that a true error rate produces in all but one test run in a thousand."""
    return scipy.stats.binom.ppf([0.0005, 0.9995], num_experiments, rate)


@pytest.mark.parametrize("method", ["bootstrap", "delong"])
def test_null_intervals_cover_one_half(method):
    misses = 0
    for seed in range(300):
        sides = normal_sides(20, 20, 0.0, 10_000 + seed)
        if method == "delong":
            found = statistics.delong_interval(*sides)
        else:
            found = statistics.bootstrap_interval(*sides, seed=seed, num_resamples=1000)
        misses += not found.lower <= 0.5 <= found.upper
    low, high = plausible(300, 0.05)
    assert low <= misses <= high


def test_lower_end_exceeds_truth_as_rarely_as_stated():
    truth = scipy.stats.norm.cdf(1.2 / np.sqrt(2.0))
    too_high = sum(
        statistics.bootstrap_interval(*normal_sides(20, 20, 1.2, 20_000 + seed), seed=seed, num_resamples=1000).lower
        > truth
        for seed in range(300)
    )
    assert too_high <= plausible(300, 0.025)[1]


def test_noise_averages_one_half_where_the_hull_would_not():
    areas = np.array([statistics.auroc(*normal_sides(20, 20, 0.0, seed)) for seed in range(2000)])
    assert abs(areas.mean() - 0.5) < 4 * areas.std() / np.sqrt(areas.size)
    hulls = [hull_area(*statistics.roc_points(*normal_sides(20, 20, 0.0, seed))) for seed in range(300)]
    assert np.mean(hulls) > 0.59


def hull_area(fpr, tpr):
    """Area under the upper convex hull: the statistic that we do not report."""
    hull = []
    for point in zip(fpr, tpr, strict=True):
        while len(hull) >= 2 and (hull[-1][0] - hull[-2][0]) * (point[1] - hull[-2][1]) >= (
            hull[-1][1] - hull[-2][1]
        ) * (point[0] - hull[-2][0]):
            hull.pop()
        hull.append(point)
    return np.trapezoid([y for _, y in hull], [x for x, _ in hull])
