"""Experiments without any effect: how often the intervals and tests speak all the same. And with one: their power."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.stats

from attacks.analysis import statistics
from attacks.analysis.statistics import DpBound
from attacks.analysis.verdict import Cap, Verdict, judge

LEVEL = 0.95
HALF = (1.0 - LEVEL) / 2.0


def plausible(num_experiments, rate):
    """The counts that a true rate produces in all but one test run in a thousand."""
    return scipy.stats.binom.ppf([0.0005, 0.9995], num_experiments, rate)


def experiments(num, num_users, shift, *, heavy, first_seed):
    """Per-user statistics of both sides: normal, or Student with 3 degrees of freedom."""
    for seed in range(first_seed, first_seed + num):
        rng = np.random.default_rng(seed)
        sides = rng.standard_t(3, (2, num_users)) if heavy else rng.normal(size=(2, num_users))
        yield seed, sides[0] + shift, sides[1]


def run(num, num_users, shift=0.0, *, heavy=False, num_resamples=1000, first_seed=0):
    """Counts of misses, of lower ends above 1/2, and of p-values at most 5 %, over the experiments."""
    found = {"bootstrap": [0, 0], "delong": [0, 0], "p": 0}
    for seed, held_in, held_out in experiments(num, num_users, shift, heavy=heavy, first_seed=first_seed):
        bootstrap = statistics.bootstrap_interval(held_in, held_out, seed=seed, num_resamples=num_resamples)
        for name, interval in (("bootstrap", bootstrap), ("delong", statistics.delong_interval(held_in, held_out))):
            found[name][0] += not interval.lower <= 0.5 <= interval.upper
            found[name][1] += interval.lower > 0.5
        found["p"] += statistics.auroc_p_value(held_in, held_out) <= 0.05
    return found


@pytest.mark.parametrize("heavy", [False, True])
def test_null_experiments_short(heavy):
    found = run(200, 30, heavy=heavy, num_resamples=400, first_seed=50_000)
    for name in ("bootstrap", "delong"):
        assert found[name][0] <= plausible(200, 1.0 - LEVEL)[1]
        assert found[name][1] <= plausible(200, HALF)[1]
    assert found["p"] <= plausible(200, 0.05)[1]


def test_holm_keeps_the_family_error_on_null_runs():
    """Ten correlated attacks on the same users, none of which knows anything."""
    num_false = 0
    for seed in range(120):
        rng = np.random.default_rng(seed)
        common = rng.normal(size=(2, 30))
        attacks = [common + rng.normal(size=(2, 30)) for _ in range(10)]
        p_values = statistics.holm([statistics.auroc_p_value(*sides) for sides in attacks])
        num_false += p_values.min() <= 0.05
    assert num_false <= plausible(120, 0.05)[1]


def test_a_private_mechanism_at_its_cap_is_rarely_called_broken():
    """Randomised response with epsilon 1, one bit a user: the worst that the claim allows."""
    cap, keep, num_falsified = Cap(DpBound(1.0, 0.0), ""), np.e / (1.0 + np.e), 0
    for seed in range(200):
        rng = np.random.default_rng(seed)
        held_in, held_out = (rng.random(60) < keep) * 1.0, (rng.random(60) > keep) * 1.0
        interval = statistics.bootstrap_interval(held_in, held_out, seed=seed, num_resamples=400)
        num_falsified += judge(cap, interval, 60, 60, is_constant=False)[0] is Verdict.FALSIFIED
    assert num_falsified <= plausible(200, HALF)[1]


@pytest.mark.campaign
@pytest.mark.parametrize("num_users", [20, 68, 300])
@pytest.mark.parametrize("heavy", [False, True])
def test_two_thousand_null_experiments(num_users, heavy):
    """AUROC intervals cover 1/2 in 95 +- 1.5 %; lower ends exceed it in at most alpha / 2, as far as can be told."""
    num = 2000
    found = run(num, num_users, heavy=heavy, first_seed=100_000)
    for name in ("bootstrap", "delong"):
        covered, above = 1.0 - found[name][0] / num, found[name][1] / num
        law = "t3" if heavy else "normal"
        print(f"null, {num_users}+{num_users}, {law}, {name}: covers {covered:.4f}, above {above:.4f}")
        assert abs(covered - LEVEL) <= 0.015
        assert found[name][1] <= plausible(num, HALF)[1]
    print(f"null, {num_users}+{num_users}: p <= .05 in {found['p'] / num:.4f}")
    assert found["p"] <= plausible(num, 0.05)[1]


@pytest.mark.campaign
def test_power_curves():
    """How often a true AUROC is told from 1/2, and from the cap that epsilon = 1 sets: printed, and growing."""
    cap, num = Cap(DpBound(1.0, 1e-5), ""), 300
    print("\nusers   true AUROC   lower end > .5   falsifies eps=1")
    for num_users in (20, 68, 200):
        told = []
        for area in (0.55, 0.65, 0.75, 0.85, 0.95):
            shift, above, falsified = np.sqrt(2.0) * scipy.stats.norm.ppf(area), 0, 0
            for seed, held_in, held_out in experiments(num, num_users, shift, heavy=False, first_seed=200_000):
                interval = statistics.bootstrap_interval(held_in, held_out, seed=seed, num_resamples=600)
                above += interval.lower > 0.5
                verdict = judge(cap, interval, num_users, num_users, is_constant=False)[0]
                falsified += verdict is Verdict.FALSIFIED
            told.append(above)
            print(f"{num_users:5d}   {area:10.2f}   {above / num:14.3f}   {falsified / num:15.3f}")
        assert told == sorted(told)
