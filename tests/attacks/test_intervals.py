from __future__ import annotations

import numpy as np
import pytest
import scipy.stats
import statsmodels.stats.proportion

from attacks.analysis import statistics


@pytest.mark.parametrize(("num_hits", "num_trials"), [(0, 68), (3, 68), (19, 68), (68, 68), (1, 1), (5, 10)])
def test_clopper_pearson_agrees_with_beta_and_statsmodels(num_hits, num_trials):
    found = statistics.clopper_pearson(num_hits, num_trials)
    expected = statsmodels.stats.proportion.proportion_confint(num_hits, num_trials, alpha=0.05, method="beta")
    assert (found.lower, found.upper) == pytest.approx(expected, abs=1e-9)


def test_zero_of_299_is_what_one_percent_at_95_percent_takes():
    assert statistics.clopper_pearson(0, 299, level=0.90).upper < 0.01
    assert statistics.clopper_pearson(0, 298, level=0.90).upper > 0.01


def test_perfect_separation_is_all_pairs_won():
    for num_units in (1, 3, 68, 350):
        found = statistics.perfect_separation(num_units, 2 * num_units)
        assert found == statistics.perfect_separation(2 * num_units, num_units)
        assert found.upper == 1.0
        assert found.lower == pytest.approx(statistics.clopper_pearson(num_units, num_units).lower, abs=1e-12)


def test_perfect_separation_is_as_rare_as_lower_end_says():
    # The extremal attack: it misses a held-in user outright with probability 1 - AUROC and is perfect otherwise.
    num_units, rng = 6, np.random.default_rng(0)
    lower = statistics.perfect_separation(num_units, num_units).lower
    num_separated = 0
    for _ in range(20_000):
        held_in = np.where(rng.random(num_units) < lower, 1.0, -1.0)
        num_separated += statistics.auroc(held_in, np.zeros(num_units)) == 1.0
    low, high = scipy.stats.binom.ppf([0.0005, 0.9995], 20_000, 0.025)
    assert low <= num_separated <= high
