"""True positive rates at an estimated threshold: how often their interval says too much, exactly and by simulation."""

from __future__ import annotations

import math

import numpy as np
import pytest
import scipy.integrate
import scipy.stats
from hypothesis import given
from hypothesis import strategies as st

from attacks.analysis import results, statistics
from attacks.analysis.results import Statistic
from attacks.analysis.statistics import DpBound, tpr_cap
from attacks.analysis.verdict import Cap

TAIL = 0.025
SIZES = [(300, 300), (300, 20), (20, 300), (50, 50), (50, 10), (10, 50), (20, 20), (10, 10), (5, 5)]
TARGETS = (0.0, 0.01, 0.05, 0.1)


def lower_of_count(num_above, num_held_in, num_allowed, num_held_out, *, is_old=False):
    """The lower end with this many held-in users above the threshold; ``is_old``: the threshold taken as given."""
    if is_old:
        return statistics.clopper_pearson(num_above, num_held_in).lower
    held_in = np.where(np.arange(num_held_in) < num_above, num_held_out + 1.0, -1.0)
    return statistics.rate_interval(held_in, np.arange(num_held_out, dtype=np.float64), num_allowed).lower


def fewest_above(cap, num_held_in, num_allowed, num_held_out, *, is_old=False):
    """The fewest users above the threshold whose lower end exceeds the cap; one more than all if none does."""
    low, high = 0, num_held_in + 1
    while low < high:
        middle = (low + high) // 2
        if lower_of_count(middle, num_held_in, num_allowed, num_held_out, is_old=is_old) > cap + 1e-12:
            high = middle
        else:
            low = middle + 1
    return low


def chance_of_exceeding(bound, num_held_in, num_held_out, target, *, is_old=False):
    """Exact chance that the lower end exceeds the printed cap for the mechanism that attains the bound.

    By integration over the threshold's false positive rate: nothing here is the code's own formula.
    """
    num_allowed = math.floor(target * num_held_out + 1e-9)
    cap = tpr_cap(bound, num_allowed, num_held_out)
    fewest = fewest_above(cap, num_held_in, num_allowed, num_held_out, is_old=is_old)
    law = scipy.stats.beta(num_allowed + 1, num_held_out - num_allowed)
    if bound.epsilon == bound.delta == 0.0:
        return float(scipy.stats.betabinom(num_held_in, law.args[0], law.args[1]).sf(fewest - 1))

    def density(rate):
        return law.pdf(rate) * scipy.stats.binom.sf(fewest - 1, num_held_in, bound.max_tpr(rate))

    return float(scipy.integrate.quad(density, 0.0, 1.0, limit=300, points=[law.mean(), law.ppf(0.999)])[0])


@pytest.mark.parametrize("bound", [DpBound(0.0, 0.0), DpBound(1.0, 0.0), DpBound(3.0, 0.01)], ids=str)
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_lower_end_passes_a_tight_cap_as_rarely_as_stated(bound, sizes):
    for target in TARGETS:
        assert chance_of_exceeding(bound, *sizes, target) <= TAIL + 0.0005, target


def test_clopper_pearson_at_a_given_threshold_is_caught():
    """The planted mutant: the threshold taken as given passes the cap in 7 % and 22 % of null samples."""
    null = DpBound(0.0, 0.0)
    assert chance_of_exceeding(null, 300, 300, 0.01, is_old=True) > 0.06
    assert chance_of_exceeding(null, 300, 20, 0.01, is_old=True) > 0.2
    assert chance_of_exceeding(DpBound(1.0, 0.0), 300, 20, 0.01, is_old=True) > 0.2


def test_many_held_out_users_give_clopper_pearson():
    """Where the threshold is all but known only the luck of the held-in side is left."""
    held_in = np.where(np.arange(50) < 20, 1.0, 0.0)
    found = statistics.rate_interval(held_in, np.linspace(0.0, 0.5, 10**6) + held_in.min(), 300_000)
    expected = statistics.clopper_pearson(20, 50)
    assert (found.lower, found.upper) == pytest.approx((expected.lower, expected.upper), abs=2e-3)


scores = st.lists(st.integers(0, 5), min_size=2, max_size=20).map(lambda values: np.array(values, dtype=np.float64))


@given(scores, scores, st.data())
def test_an_interval_over_ties_holds_that_of_every_order_of_them(held_in, held_out, data):
    allowed = data.draw(st.integers(0, held_out.size - 1))
    found = statistics.rate_interval(held_in, held_out, allowed)
    rng = np.random.default_rng(data.draw(st.integers(0, 99)))
    broken = [side + 0.5 * rng.random(side.size) for side in (held_in, held_out)]
    assert found.lower <= statistics.rate_interval(*broken, allowed).lower
    assert found.upper >= statistics.rate_interval(*broken, allowed).upper


@given(scores, scores, st.data())
def test_the_interval_holds_its_rate_and_clopper_pearson(held_in, held_out, data):
    allowed = data.draw(st.integers(0, held_out.size - 1))
    found = statistics.rate_interval(held_in, held_out, allowed)
    num_above = int((held_in > np.sort(held_out)[::-1][allowed]).sum())
    assert found.lower <= statistics.clopper_pearson(num_above, held_in.size).lower + 1e-6
    assert found.lower <= num_above / held_in.size <= found.upper


def attaining(bound, num_held_in, num_held_out, rng):
    """Scores whose true ROC is the bound with delta 0: minus the false positive rate at which each user is accused."""
    growth, heights = math.exp(bound.epsilon), rng.random(num_held_in)
    kink = growth / (1.0 + growth)
    return -np.where(heights <= kink, heights / growth, 1.0 - (1.0 - heights) * growth), -rng.random(num_held_out)


def of_records(scores, rng):
    """One to eight records of each user that rise and fall together, the law of one record unchanged."""
    owners = np.repeat(np.arange(scores.size), rng.integers(1, 9, scores.size))
    return scores[owners], owners


def passes(bound, num_held_in, num_held_out, num_samples, kind):
    """How often any lower end, and each, exceeds its cap."""
    cap, found = Cap(bound, ""), np.zeros(len(results.TARGET_FPRS), dtype=int)
    rng = np.random.default_rng(num_held_in * 1000 + num_held_out)
    for seed in range(num_samples):
        sides, owners = attaining(bound, num_held_in, num_held_out, rng), None
        if kind == "ties":
            sides = tuple(np.floor(3 * side) for side in sides)
        if kind == "records":
            (held_in, users_in), (held_out, users_out) = (of_records(side, rng) for side in sides)
            sides, owners = (held_in, held_out), (users_in, users_out)
        statistic = Statistic("drawn", "", "fresh", "record" if owners else "user", *sides, owners)
        points = results.operating_points(statistic, cap, seed)
        found += [point["tpr_interval"][0] > point["tpr_cap"] + 1e-12 for point in points]
    return found


@pytest.mark.parametrize("kind", ["plain", "ties", "records"])
def test_rates_say_too_much_as_rarely_as_they_may_short(kind):
    assert passes(DpBound(0.0, 0.0), 60, 20, 150, kind).max() <= scipy.stats.binom.ppf(0.999, 150, TAIL)


def test_records_counted_as_if_independent_are_caught():
    """The planted mutant: all records count, so that one lucky user moves many."""
    found, rng, bound = 0, np.random.default_rng(0), DpBound(0.0, 0.0)
    for _ in range(150):
        held_in, held_out = (of_records(side, rng)[0] for side in attaining(bound, 60, 20, rng))
        allowed = math.floor(0.1 * held_out.size)
        lower = statistics.rate_interval(held_in, held_out, allowed).lower
        found += lower > tpr_cap(bound, allowed, held_out.size)
    assert found > scipy.stats.binom.ppf(0.999, 150, TAIL)


@pytest.mark.campaign
@pytest.mark.parametrize("kind", ["plain", "ties", "records"])
@pytest.mark.parametrize("epsilon", [0.0, 1.0])
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_rates_say_too_much_as_rarely_as_they_may(sizes, epsilon, kind):
    num_samples = 2000
    found = passes(DpBound(epsilon, 0.0), *sizes, num_samples, kind)
    print(f"{sizes[0]}+{sizes[1]}, epsilon {epsilon:g}, {kind}: lower end > cap in {found / num_samples}")
    assert found.max() <= scipy.stats.binom.ppf(0.9995, num_samples, TAIL)
