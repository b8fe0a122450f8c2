import math

import numpy as np
import pytest
from accounting_cases import dp_sgd
from scipy import stats
from shuffling import shuffle_lower_bound

from accountants.registry import get_accountant
from accountants.tradeoff import privacy_curve


def test_the_cap_is_the_gaussian_tradeoff_curve_without_sampling():
    curve = privacy_curve(dp_sgd(1.0, 1.0, 1), get_accountant("tilted"), largest_epsilon=8.0, points=400)
    for rate in (1e-3, 0.01, 0.1, 0.5):
        exact = stats.norm.cdf(stats.norm.ppf(rate) + 1.0)
        assert exact <= curve.true_positive_cap(rate) * (1 + 1e-9)
        assert curve.true_positive_cap(rate) <= exact * 1.01
    assert curve.advantage() == pytest.approx(2 * stats.norm.cdf(0.5) - 1, rel=1e-8)
    assert curve.certified


def test_no_simulated_attack_beats_the_cap():
    rng = np.random.default_rng(3)
    curve = privacy_curve(dp_sgd(0.3, 1.0, 10), get_accountant("tilted"), largest_epsilon=6.0, points=13)
    mu, steps, n = 1.0, 10, 100_000
    out = rng.standard_normal((n, steps))
    member = rng.standard_normal((n, steps)) + mu * (rng.random((n, steps)) < 0.3)

    def score(z):
        return np.log1p(0.3 * np.expm1(mu * z - mu * mu / 2)).sum(axis=1)

    thresholds = np.quantile(score(out), 1 - np.array([0.001, 0.01, 0.1, 0.3]))
    for rate, threshold in zip((0.001, 0.01, 0.1, 0.3), thresholds, strict=True):
        attack = float(np.mean(score(member) > threshold))
        assert attack <= curve.true_positive_cap(rate) + 5 / math.sqrt(n)
        assert attack >= 0.5 * curve.true_positive_cap(rate)


@pytest.mark.parametrize(
    ("sigma", "batches", "epochs", "delta", "expected"),
    [
        (0.573, 196, 20, 1e-6, 60.37),
        (0.7865, 33, 20, 1e-5, 32.17),
        (1.0, 100, 10, 1e-5, 9.36),
        (0.5, 1000, 1, 1e-6, 11.0),
    ],
)
def test_shuffling_certainly_costs_this_much(sigma, batches, epochs, delta, expected):
    assert shuffle_lower_bound(sigma, batches, epochs, delta) == pytest.approx(expected, abs=0.02)
