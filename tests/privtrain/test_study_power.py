"""Power of verdicts over seeds: against simulation of the verdict itself, with mutants that the comparison rejects."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from privtrain.studies import power
from privtrain.studies.power import Design
from privtrain.studies.results import Estimate

NUM_STUDIES = 20_000
#: (seeds, spread, true difference)
CASES = [(3, 1.0, 1.0), (3, 0.5, 2.0), (5, 1.0, 1.0), (10, 2.0, 1.5), (30, 1.0, -0.2), (4, 1.0, 0.0)]


def _intervals(num_seeds: int, spread: float, difference: float) -> tuple[np.ndarray, np.ndarray]:
    """Of many simulated studies; a study's own code gives the first one's, so that the rule is the rule."""
    values = np.random.default_rng(0).normal(difference, spread, (NUM_STUDIES, num_seeds))
    half = stats.t.ppf(0.975, num_seeds - 1) * values.std(axis=1, ddof=1) / num_seeds**0.5
    low, high = values.mean(axis=1) - half, values.mean(axis=1) + half
    assert Estimate(tuple(values[0])).interval == pytest.approx((low[0], high[0]))
    return low, high


def _farthest_from_simulation(chance: Callable[[int, float, float], float]) -> float:
    """In standard errors of the simulation."""
    errors = []
    for num_seeds, spread, difference in CASES:
        low, _ = _intervals(num_seeds, spread, difference)
        simulated = float((low > 0).mean())
        error = math.sqrt(max(simulated * (1 - simulated), 1e-4) / NUM_STUDIES)
        errors.append(abs(chance(num_seeds, spread, difference) - simulated) / error)
    return max(errors)


def _normal(num_seeds: int, spread: float, difference: float) -> float:
    """Mutant: as if the spread were known."""
    return float(stats.norm.sf(1.96 - difference * num_seeds**0.5 / spread))


def _unpaired(num_seeds: int, spread: float, difference: float) -> float:
    """Mutant: two arms of independent seeds, each with this spread."""
    return Design(num_seeds, spread * 2**0.5).chance_shown(difference)


def _one_seed_more(num_seeds: int, spread: float, difference: float) -> float:
    """Mutant: n degrees of freedom."""
    critical = stats.t.ppf(0.975, num_seeds)
    return float(stats.nct.sf(critical, num_seeds, difference * num_seeds**0.5 / spread))


def test_chance_of_a_verdict_is_that_of_simulated_studies():
    assert _farthest_from_simulation(lambda n, s, d: Design(n, s).chance_shown(d)) < 4


@pytest.mark.parametrize("mutant", [_normal, _unpaired, _one_seed_more])
def test_simulation_rejects_a_wrong_power(mutant):
    assert _farthest_from_simulation(mutant) > 20


@pytest.mark.parametrize(("num_seeds", "spread", "difference"), [(3, 0.02, 0.0), (5, 0.03, 0.0), (12, 0.05, 0.02)])
def test_chance_of_no_effect_is_that_of_simulated_studies(num_seeds, spread, difference):
    margin = 0.05
    low, high = _intervals(num_seeds, spread, difference)
    simulated = float(((low >= -margin) & (high <= margin)).mean())
    error = math.sqrt(simulated * (1 - simulated) / NUM_STUDIES)
    assert Design(num_seeds, spread).chance_within(margin, difference) == pytest.approx(simulated, abs=4 * error)
    # Mutant: a spread that is known.
    room = (margin - 1.96 * spread / num_seeds**0.5) / (spread / num_seeds**0.5)
    shift = difference * num_seeds**0.5 / spread
    known = stats.norm.cdf(room - shift) - stats.norm.cdf(-room - shift)
    assert abs(known - simulated) > 4 * error


@settings(max_examples=10, deadline=None)
@given(num_seeds=st.integers(2, 50), spread=st.floats(1e-3, 10))
def test_the_detectable_difference_has_the_wanted_power(num_seeds, spread):
    design = Design(num_seeds, spread)
    assert design.chance_shown(design.detectable()) == pytest.approx(power.POWER, abs=1e-6)


@settings(max_examples=10, deadline=None)
@given(ratio=st.floats(0.12, 20), spread=st.floats(1e-3, 10))
def test_one_seed_fewer_does_not_show_it(ratio, spread):
    for fewest, chance in (
        (power.seeds_to_show, lambda n: Design(n, spread).chance_shown(ratio * spread)),
        (power.seeds_to_exclude, lambda n: Design(n, spread).chance_within(ratio * spread)),
    ):
        needed = fewest(ratio * spread, spread)
        assert needed is not None
        assert chance(needed) >= power.POWER
        assert needed == 2 or chance(needed - 1) < power.POWER


def test_known_sample_size_of_the_paired_t_test():
    """Cohen's d = 0.5, two-sided 5 %, power 80 %: 34 pairs (G*Power); 0.8: 15; 1: 10."""
    assert [power.seeds_to_show(d, 1.0) for d in (0.5, 0.8, 1.0)] == [34, 15, 10]
    assert power.seeds_to_show(0.01, 1.0) is None


def test_upper_spread_covers_the_truth_in_four_pilots_of_five():
    pilots = np.random.default_rng(1).normal(0, 1, (NUM_STUDIES, 3)).std(axis=1, ddof=1)
    covered = np.mean([power.upper_spread(float(spread), 3) >= 1 for spread in pilots[:2000]])
    assert covered == pytest.approx(power.SPREAD_CONFIDENCE, abs=0.04)


def test_so_many_users_more_show_it_if_the_spread_is_theirs():
    factor = power.users_to_show(0.05, 0.1, 3)
    assert Design(3, 0.1 / factor**0.5).chance_shown(0.05) == pytest.approx(power.POWER, abs=1e-6)
    assert power.users_to_show(5.0, 0.1, 3) == 1.0


def test_users_take_away_their_part_of_the_spread_alone():
    """Simulated: a run's own part and the users' part, before and after; a plan that gives users all is a mutant."""
    of_runs, of_users, difference, num_seeds = 0.03, 0.08, 0.1, 4
    spread = math.hypot(of_runs, of_users)
    factor = power.users_to_show(difference, spread, num_seeds, of_users**2)
    rng = np.random.default_rng(2)
    shape = (NUM_STUDIES, num_seeds)

    def shown(users: float) -> float:
        values = difference + rng.normal(0, of_runs, shape) + rng.normal(0, of_users / users**0.5, shape)
        half = stats.t.ppf(0.975, num_seeds - 1) * values.std(axis=1, ddof=1) / num_seeds**0.5
        return float((values.mean(axis=1) > half).mean())

    assert shown(factor) == pytest.approx(power.POWER, abs=0.012)
    mutant = power.users_to_show(difference, spread, num_seeds)
    assert shown(mutant) < power.POWER - 0.012
    assert math.isinf(power.users_to_show(0.03, spread, num_seeds, of_users**2))  # the runs alone spread too much
    planned = power.plan((0.1, 0.0, 0.05), papers=0.03, users_variance=0.001)
    assert planned is not None
    assert "no number of users alone does (users make 40 % of its variance)" in planned.text()


def test_a_plan_says_what_would_decide():
    values = (0.30, 0.05, 0.03)
    planned = power.plan(values, papers=0.06)
    assert planned is not None
    assert planned.seeds[0] == power.seeds_to_show(0.06, float(np.std(values, ddof=1)))
    text = planned.text()
    assert "0.060 (the paper's) takes " in text
    assert f"{planned.seeds[0]} to {planned.seeds[1]} seeds, or 3 with at least" in text
    seen = power.plan(values)
    assert seen is not None
    assert f"{np.mean(values):.3f} (as seen)" in seen.text()
    least = power.plan(values, least=0.02)
    assert least is not None
    assert "0.020 (the least that counts)" in least.text()
    none = power.plan((0.01, -0.02, 0.03), margin=0.05)
    assert none is not None
    assert "that a true zero is within ± 0.050 takes" in none.text()
    assert none.seeds[0] == power.seeds_to_exclude(0.05, float(np.std((0.01, -0.02, 0.03), ddof=1)))


def test_plans_without_spread_or_difference_are_no_errors():
    assert power.plan((1.0,)) is None
    same = power.plan((2.0, 2.0))
    assert same is not None
    assert same.seeds == (2, 2)
    zero = power.plan((1.0, -1.0))
    assert zero is not None
    assert "cannot be planned for" in zero.text()
