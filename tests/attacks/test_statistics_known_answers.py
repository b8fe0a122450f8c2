"""Paired DeLong, Holm, rank p-values, cluster bootstrap and curve caps against second implementations."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.stats
import statsmodels.stats.multitest
from hypothesis import given, settings
from hypothesis import strategies as st

from attacks.analysis import statistics
from attacks.analysis.statistics import CurveBound, DpBound


def kernel(held_in, held_out):
    return (held_in[:, None] > held_out[None]) + 0.5 * (held_in[:, None] == held_out[None])


def two_attacks(num, seed, shift=0.8):
    """Two correlated scores of the same users."""
    rng = np.random.default_rng(seed)
    cov = [[1.0, 0.6], [0.6, 1.0]]
    held_in, held_out = rng.multivariate_normal([shift, shift / 2], cov, num), rng.multivariate_normal([0, 0], cov, num)
    return (held_in[:, 0], held_out[:, 0]), (held_in[:, 1], held_out[:, 1])


def test_paired_delong_is_the_covariance_matrix_of_the_paper():
    """DeLong, DeLong and Clarke-Pearson 1988, eq. 5: S = S10 / m + S01 / n and the contrast (1, -1)."""
    first, second = two_attacks(60, 0)
    matrices = [kernel(*pair) for pair in (first, second)]
    s10 = np.cov([matrix.mean(axis=1) for matrix in matrices])
    s01 = np.cov([matrix.mean(axis=0) for matrix in matrices])
    covariance = s10 / 60 + s01 / 60
    contrast = np.array([1.0, -1.0])
    difference = matrices[0].mean() - matrices[1].mean()
    z = difference / np.sqrt(contrast @ covariance @ contrast)
    found = statistics.paired_difference(first, second)
    assert found.difference == pytest.approx(difference)
    assert found.p_value == pytest.approx(2 * scipy.stats.norm.sf(abs(z)))
    parts = [contrast @ matrix @ contrast / 60 for matrix in (s10, s01)]
    freedom = sum(parts) ** 2 / sum(part**2 / 59 for part in parts)
    half = scipy.stats.t.ppf(0.975, freedom) * abs(difference / z)
    assert found.interval.lower == pytest.approx(difference - half, abs=1e-9)


def test_paired_delong_of_a_score_with_itself_finds_nothing():
    first, _ = two_attacks(10, 0)
    found = statistics.paired_difference(first, first)
    assert (found.difference, found.p_value) == (0.0, 1.0)


def test_paired_delong_rejects_no_difference_as_often_as_it_says():
    num_rejected = 0
    for seed in range(600):
        first, second = two_attacks(40, seed, shift=0.0)
        num_rejected += statistics.paired_difference(first, second).p_value <= 0.05
    low, high = scipy.stats.binom.ppf([0.0005, 0.9995], 600, 0.05)
    assert low <= num_rejected <= high


@settings(max_examples=15)  # a third of a second each, of the other implementation
@given(st.lists(st.floats(0.0, 1.0), min_size=1, max_size=30))
def test_holm_is_that_of_statsmodels(p_values):
    expected = statsmodels.stats.multitest.multipletests(p_values, method="holm")[1]
    np.testing.assert_allclose(statistics.holm(p_values), expected, atol=1e-12)


def test_holms_own_example():
    """Holm 1979's procedure by hand: .01, .02, .03, .04 times 4, 3, 2, 1, made monotone."""
    assert statistics.holm([0.03, 0.01, 0.04, 0.02]).tolist() == pytest.approx([0.06, 0.04, 0.06, 0.06])


def test_rank_p_values_count_ties_against_membership():
    assert statistics.rank_p_values(np.array([3.0, 1.0]), np.array([1.0, 2.0, 3.0])).tolist() == [0.5, 1.0]
    rng = np.random.default_rng(0)
    found = np.concatenate([statistics.rank_p_values(rng.normal(size=1), rng.normal(size=19)) for _ in range(4000)])
    for level in (0.05, 0.2, 0.5):
        assert np.mean(found <= level) == pytest.approx(level, abs=4 * np.sqrt(level / 4000))


def test_attack_p_value_is_scipys_and_one_for_constant():
    rng = np.random.default_rng(1)
    for size, method in ((20, "exact"), (70, "asymptotic")):
        held_in, held_out = rng.normal(0.5, 1, 80), rng.normal(size=size)
        expected = scipy.stats.mannwhitneyu(held_in, held_out, alternative="greater", method=method).pvalue
        assert statistics.auroc_p_value(held_in, held_out) == expected
    assert statistics.auroc_p_value(np.ones(3), np.ones(4)) == 1.0


def clustered(num_users, records, spread, rng):
    owners = np.repeat(np.arange(num_users), records)
    return rng.normal(0.0, spread, num_users)[owners] + rng.normal(0.0, 1.0, owners.size), owners


def test_one_record_a_user_gives_the_users_own_interval():
    rng = np.random.default_rng(0)
    held_in, held_out = rng.normal(0.5, 1.0, 30), np.sort(rng.normal(size=25))
    users = np.arange(30), np.arange(25)
    ours = statistics.bootstrap_interval(held_in, held_out, owners=users, seed=3, num_resamples=2000)
    assert ours == statistics.bootstrap_interval(held_in, held_out, seed=3, num_resamples=2000)


def test_the_cluster_bootstrap_is_a_loop_over_resampled_users():
    rng = np.random.default_rng(4)
    (held_in, users_in), (held_out, users_out) = (clustered(12, 5, 1.0, rng) for _ in range(2))
    areas = []
    for _ in range(3000):
        picked = [rng.integers(0, 12, 12) for _ in range(2)]
        sides = [
            np.concatenate([scores[owners == user] for user in chosen])
            for scores, owners, chosen in ((held_in, users_in, picked[0]), (held_out, users_out, picked[1]))
        ]
        areas.append(statistics.auroc(*sides))
    found = statistics.bootstrap_interval(held_in, held_out, owners=(users_in, users_out), seed=0, num_resamples=3000)
    # BCa moves the percentiles a little; the width is that of resampled users.
    width = np.subtract(*np.quantile(areas, [0.975, 0.025]))
    assert found.upper - found.lower == pytest.approx(width, rel=0.1)


def test_records_as_if_independent_would_be_too_narrow():
    """Users with 20 records each that rise and fall together: the cluster interval covers, the naive one does not."""
    misses, naive_misses = 0, 0
    for seed in range(120):
        rng = np.random.default_rng(seed)
        (held_in, users_in), (held_out, users_out) = (clustered(20, 20, 2.0, rng) for _ in range(2))
        owners = users_in, users_out
        found = statistics.bootstrap_interval(held_in, held_out, owners=owners, seed=seed, num_resamples=400)
        naive = statistics.delong_interval(held_in, held_out)
        misses += not found.lower <= 0.5 <= found.upper
        naive_misses += not naive.lower <= 0.5 <= naive.upper
    assert misses <= scipy.stats.binom.ppf(0.9995, 120, 0.05)
    assert naive_misses > 40


def gaussian_points(mu, epsilons):
    """Balle and Wang 2018, theorem 8: the exact curve of the Gaussian mechanism."""
    deltas = scipy.stats.norm.cdf(mu / 2 - epsilons / mu) - np.exp(epsilons) * scipy.stats.norm.cdf(
        -mu / 2 - epsilons / mu
    )
    return tuple(DpBound(float(e), float(max(d, 0.0))) for e, d in zip(epsilons, deltas, strict=True))


@pytest.mark.parametrize("mu", [0.3, 1.0, 2.0])
def test_gaussian_curve_caps_auroc_at_closed_form(mu):
    """For mu-GDP the cap is Phi(mu / sqrt 2); a few points of the curve give a little more, never less."""
    exact = scipy.stats.norm.cdf(mu / np.sqrt(2.0))
    fine = CurveBound(gaussian_points(mu, np.linspace(0.0, 6.0, 400)))
    assert exact <= fine.max_auroc() <= exact + 1e-3
    coarse = CurveBound(gaussian_points(mu, np.array([0.0, 0.1, 0.25, 0.5, 1.0, 2.0])))
    assert exact <= coarse.max_auroc() <= exact + 0.01
    fpr = np.linspace(0.001, 0.999, 50)
    roc = scipy.stats.norm.cdf(mu + scipy.stats.norm.ppf(fpr))
    assert (coarse.max_tpr(fpr) >= roc - 1e-9).all()


def test_a_curve_is_never_looser_than_any_of_its_points():
    points = gaussian_points(1.0, np.array([0.0, 0.5, 1.0, 2.0]))
    curve = CurveBound(points)
    for point in points:
        assert curve.max_auroc() <= point.max_auroc() + 1e-3
        assert statistics.auroc_cap(curve, 50) <= statistics.auroc_cap(point, 50) + 1e-12
