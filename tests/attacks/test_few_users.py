"""Few users, ties, clusters, unequal sides: how often intervals and tests speak without any leak, and mutants."""

from __future__ import annotations

import itertools
import math
from unittest import mock

import numpy as np
import pytest
import scipy.stats
from hypothesis import given
from hypothesis import strategies as st

from attacks.analysis import results, statistics
from attacks.analysis.results import Statistic
from attacks.analysis.statistics import DpBound, bootstrap, delong, permutation
from attacks.analysis.verdict import Cap

HALF = 0.025
SIZES = [(300, 20), (20, 300), (50, 10), (10, 50), (20, 20), (10, 10), (5, 5), (5, 300), (50, 50)]


def plausible(num_samples, rate):
    """The largest count that a true rate produces in all but one test run in a thousand."""
    return scipy.stats.binom.ppf(0.999, num_samples, rate)


LAWS = {
    "two values, .5": lambda rng, num: (rng.random(num) < 0.5) * 1.0,
    "two values, .1": lambda rng, num: (rng.random(num) < 0.1) * 1.0,
    "two values, .01": lambda rng, num: (rng.random(num) < 0.01) * 1.0,
    "three values": lambda rng, num: rng.integers(0, 3, num) * 1.0,
    "nine of ten alike": lambda rng, num: np.where(rng.random(num) < 0.1, 1.0 + rng.random(num), 0.0),
    "normal": lambda rng, num: rng.normal(size=num),
}


def null_counts(law, sizes, num_samples, *, num_resamples=200, seed=0):
    """Of samples without any leak: lower ends above 1/2, upper ends below, p-values at most .05."""
    rng, found = np.random.default_rng((*sizes, seed)), dict.fromkeys(("above", "below", "delong", "p"), 0)
    for number in range(num_samples):
        sides = LAWS[law](rng, sizes[0]), LAWS[law](rng, sizes[1])
        ends = statistics.bootstrap_interval(*sides, seed=number, num_resamples=num_resamples)
        found["above"] += ends.lower > 0.5
        found["below"] += ends.upper < 0.5
        found["delong"] += statistics.delong_interval(*sides).lower > 0.5
        found["p"] += statistics.auroc_p_value(*sides) <= 0.05
    return found


def check_null(found, num_samples):
    for name, count in found.items():
        assert count <= plausible(num_samples, 0.05 if name == "p" else HALF), (name, found)


@pytest.mark.parametrize(("law", "sizes"), [("two values, .1", (100, 10)), ("nine of ten alike", (20, 60))])
def test_few_users_and_ties_keep_the_level_short(law, sizes):
    check_null(null_counts(law, sizes, 60), 60)


def test_intervals_without_floors_are_caught():
    """The planted mutant: resamples of a side without any spread call its mean certain."""
    with mock.patch.object(bootstrap, "floored", lambda found, *_, **__: found):
        found = null_counts("two values, .1", (100, 10), 60)
    assert found["above"] > plausible(60, HALF)


def test_kept_resamples_change_no_interval():
    rng = np.random.default_rng(0)
    sides = rng.normal(size=30), rng.normal(size=20)
    kept = [statistics.bootstrap_interval(*sides, seed=3, num_resamples=50) for _ in range(2)]
    with mock.patch.object(bootstrap, "_MAX_KEPT", 0):
        drawn = statistics.bootstrap_interval(*sides, seed=3, num_resamples=50)
    assert kept == [drawn, drawn]


def test_the_normal_law_of_a_rare_value_is_caught():
    """The planted mutant: one user in three hundred with a score of its own is no evidence, whichever side has it."""
    held_in, held_out = np.eye(1, 50)[0], np.zeros(300)
    assert scipy.stats.mannwhitneyu(held_in, held_out, alternative="greater").pvalue < 0.01
    assert statistics.auroc_p_value(held_in, held_out) == pytest.approx(1 / 7, abs=0.02)


@pytest.mark.campaign
@pytest.mark.parametrize("sizes", SIZES, ids=str)
@pytest.mark.parametrize("law", LAWS)
def test_few_users_and_ties_keep_the_level(law, sizes):
    found = null_counts(law, sizes, 1000)
    print(f"{law}, {sizes[0]}+{sizes[1]}:", {name: count / 1000 for name, count in found.items()})
    check_null(found, 1000)


def coverage_counts(sizes, shares, num_samples, seed=0):
    """Two values, and who has the higher one: how often each end is on the wrong side of the true AUROC."""
    truth = 0.5 + (shares[0] - shares[1]) / 2.0
    rng, found = np.random.default_rng((*sizes, seed)), {"above": 0, "below": 0, "delong": 0}
    for number in range(num_samples):
        sides = [(rng.random(size) < share) * 1.0 for size, share in zip(sizes, shares, strict=True)]
        ends = statistics.bootstrap_interval(*sides, seed=number, num_resamples=400)
        found["above"] += ends.lower > truth
        found["below"] += ends.upper < truth
        found["delong"] += statistics.delong_interval(*sides).lower > truth
    return found


def test_values_that_few_users_lack_are_allowed_for():
    """A tenth of the held-out users score high and 20 of them often lack it; without the floor one in eight misses."""
    found = coverage_counts((200, 20), (0.5, 0.1), 60)
    assert max(found.values()) <= plausible(60, HALF), found
    with mock.patch.multiple(bootstrap, _MANY_TIED=2.0, _MANY_ALIKE=2.0):
        assert coverage_counts((200, 20), (0.5, 0.1), 60)["above"] > plausible(60, HALF)


@pytest.mark.campaign
@pytest.mark.parametrize("shares", [(0.5, 0.1), (0.9, 0.5), (0.73, 0.27)], ids=str)
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_two_values_are_covered(sizes, shares):
    found = coverage_counts(sizes, shares, 1000)
    print(f"two values, {shares}, {sizes[0]}+{sizes[1]}:", {name: count / 1000 for name, count in found.items()})
    assert max(found.values()) <= plausible(1000, HALF)


def rare_counts(sizes, num_samples):
    """No scores tie, yet a tenth of the held-out users, of whom the sample may have none, score above everybody."""
    rng, found = np.random.default_rng(sizes), {"above": 0, "below": 0, "delong": 0}
    for number in range(num_samples):
        held_in = np.where(rng.random(sizes[0]) < 0.8, 2.0, 0.0) + 0.5 * rng.random(sizes[0])
        held_out = np.where(rng.random(sizes[1]) < 0.1, 3.0, 1.0) + 0.5 * rng.random(sizes[1])
        ends = statistics.bootstrap_interval(held_in, held_out, seed=number, num_resamples=100)
        found["above"] += ends.lower > 0.72
        found["below"] += ends.upper < 0.72
        found["delong"] += statistics.delong_interval(held_in, held_out).lower > 0.72
    return found


def test_places_that_few_users_lack_are_allowed_for():
    """Between the same two of the other side is as good as a tie; the planted mutant looks at ties alone."""
    found = rare_counts((200, 20), 60)
    assert max(found.values()) <= plausible(60, HALF), found
    with mock.patch.object(bootstrap, "_MANY_ALIKE", 2.0):
        assert rare_counts((200, 20), 60)["above"] > plausible(60, HALF)


@pytest.mark.campaign
@pytest.mark.parametrize("sizes", [(300, 20), (100, 10), (20, 20)], ids=str)
def test_places_that_few_users_lack_are_covered(sizes):
    found = rare_counts(sizes, 500)
    print(f"a tenth above everybody, {sizes[0]}+{sizes[1]}:", {name: count / 500 for name, count in found.items()})
    assert max(found.values()) <= plausible(500, HALF)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_scores_that_are_not_finite_are_refused_and_named(value):
    """NaN would otherwise have a p-value of 0 and the place above everybody."""
    sides, good = (np.array([0.0, 1.0, value]), np.array([0.0, 2.0])), (np.arange(3.0), np.arange(2.0))
    for held_in, held_out, name in ((*sides, "held-in score 2"), (sides[1], sides[0], "held-out score 2")):
        for function in (
            statistics.auroc,
            statistics.auroc_p_value,
            statistics.rank_p_values,
            statistics.delong_interval,
            lambda one, other: statistics.bootstrap_interval(one, other, seed=0),
            lambda one, other: statistics.rate_interval(one, other, 0),
            lambda one, other: statistics.tpr_at_fpr(one, other, 0.1),
            lambda one, other: statistics.auroc_p_value(one, other, (np.arange(one.size), np.arange(other.size))),
            lambda one, other: statistics.paired_difference((one, other), good if one.size == 3 else good[::-1]),
        ):
            with pytest.raises(ValueError, match=name):
                function(held_in, held_out)
    for function in (statistics.holm, statistics.false_discovery_rate):
        with pytest.raises(ValueError, match="0"):
            function([0.5, value])
    with pytest.raises(ValueError, match="between"):
        statistics.bounded_mean_interval(np.array([value]), 0.0, 1.0)


def test_one_user_on_a_side_has_a_p_value_and_no_interval():
    one, three = np.array([5.0]), np.arange(3.0)
    assert statistics.auroc_p_value(one, three) == 0.25
    for function in (
        lambda: statistics.bootstrap_interval(one, three, seed=0),
        lambda: statistics.bootstrap_interval(three, np.ones(9), owners=(np.arange(3), np.zeros(9, int)), seed=0),
        lambda: statistics.delong_interval(three, one),
        lambda: statistics.paired_difference((one, three), (one, three)),
    ):
        with pytest.raises(ValueError, match="expected at least"):
            function()


def test_strict_lower_ends_pass_a_half_only_with_the_exact_test():
    """At the level of many statistics too; a normal law's growth alone, the planted mutant, says more."""
    rng, level, num_mutants = np.random.default_rng(0), 1.0 - 0.05 / 20, 0
    for _ in range(60):
        sides = rng.normal(size=100) + 1.4, rng.normal(size=8)
        if not 0.00125 < statistics.auroc_p_value(*sides) < 0.005:
            continue
        found = results.evaluate(Statistic("s", "", "fresh", "user", *sides), Cap(DpBound(0.1, 0.0), ""), 0, "", level)
        assert found["verdict_lower"] <= 0.5
        num_mutants += statistics.Interval(*found["bootstrap"]["interval"]).lower_at(level, found["auroc"]) > 0.5
    assert num_mutants


def test_worst_case_of_two_values_is_clopper_pearson():
    """Against a side that is all but known: the one user more makes the ends those of the binomial law."""
    held_out, held_in = np.full(3_000, 0.5), (np.arange(12) < 5) * 1.0
    found = statistics.bootstrap.worst_case(held_in, held_out, 0.95, num_resamples=4000)
    expected = statistics.clopper_pearson(5, 12)
    assert (found.lower, found.upper) == pytest.approx((expected.lower, expected.upper), abs=0.02)


def test_mean_of_values_at_a_bound_is_not_certain():
    """All held-in canaries at rank one: Clopper and Pearson's end, not a point; and few values cover their mean."""
    found = statistics.bounded_mean_interval(np.full(6, 7.0), 0.0, 7.0)
    assert found.lower == pytest.approx(7.0 * statistics.clopper_pearson(6, 6).lower, abs=0.1)
    assert found.upper == pytest.approx(7.0)
    rng, misses = np.random.default_rng(0), np.zeros(2, dtype=int)
    for _ in range(300):
        bits = 5.0 - np.log2(rng.integers(1, 33, 5))  # exposures of untrained secrets among 32
        ends = statistics.bounded_mean_interval(bits, 0.0, 5.0)
        truth = float(np.mean(5.0 - np.log2(np.arange(1, 33))))
        misses += [ends.lower > truth, ends.upper < truth]
    assert max(misses) <= plausible(300, HALF)


def exposure_misses(size, num, shift, num_samples, by_canaries_alone=False):
    """How often each end misses the mean exposure of canaries that are ranked among the same references."""
    draws, most = np.random.default_rng(99), math.log2(size)
    pools = np.sort(draws.normal(size=(400, size - 1)), axis=1)
    ranks = [size - np.searchsorted(pool, draws.normal(size=500) + shift) for pool in pools]
    truth, misses = most - float(np.log2(ranks).mean()), np.zeros(2, dtype=int)
    for seed in range(num_samples):
        rng = np.random.default_rng(seed)
        outranked = rng.normal(size=size - 1) >= rng.normal(size=(num, 1)) + shift
        if by_canaries_alone:
            ends = statistics.bounded_mean_interval(most - np.log2(1 + outranked.sum(axis=1)), 0.0, most)
        else:
            ends = statistics.mean_exposure_interval(outranked)
        misses += [ends.lower > truth, ends.upper < truth]
    return misses


def test_exposures_among_one_pool_carry_its_luck():
    """The planted mutant takes the canaries as independent, and misses twice in five."""
    assert exposure_misses(33, 100, 0.0, 60).max() <= plausible(60, HALF)
    assert exposure_misses(33, 100, 0.0, 60, by_canaries_alone=True).max() > plausible(60, HALF)


@pytest.mark.campaign
@pytest.mark.parametrize("shift", [0.0, 1.5])
@pytest.mark.parametrize(("size", "num"), [(33, 5), (33, 50), (33, 200), (257, 100)])
def test_exposures_among_one_pool_are_covered(size, num, shift):
    misses = exposure_misses(size, num, shift, 500)
    print(f"exposure, {num} canaries among {size} secrets, shift {shift:g}: ends miss in {misses / 500}")
    assert misses.max() <= plausible(500, HALF)


RECORDS = {
    "2 each": lambda rng, num: np.full(num, 2),
    "1 to 8": lambda rng, num: rng.integers(1, 9, num),
    "one of 8, rest 1": lambda rng, num: np.where(np.arange(num) == 0, 8, 1),
    "one of 500, rest 1": lambda rng, num: np.where(np.arange(num) == 0, 500, 1),
}


def clustered_side(kind, num_users, rng):
    """Records that share six tenths of their variance within a user."""
    owners = np.repeat(np.arange(num_users), RECORDS[kind](rng, num_users))
    return math.sqrt(0.6) * rng.normal(size=num_users)[owners] + math.sqrt(0.4) * rng.normal(size=owners.size), owners


def clustered_counts(kind, sizes, num_samples, p_value=statistics.auroc_p_value, seed=0):
    rng, found = np.random.default_rng((*sizes, seed)), {"p": 0, "above": 0}
    for number in range(num_samples):
        (held_in, users_in), (held_out, users_out) = (clustered_side(kind, num, rng) for num in sizes)
        owners = users_in, users_out
        found["p"] += p_value(held_in, held_out, owners) <= 0.05
        ends = statistics.bootstrap_interval(held_in, held_out, owners=owners, seed=number, num_resamples=100)
        found["above"] += ends.lower > 0.5
    return found


@pytest.mark.parametrize(("kind", "sizes"), [("one of 8, rest 1", (5, 5)), ("1 to 8", (30, 10))])
def test_records_of_few_users_keep_the_level_short(kind, sizes):
    check_null(clustered_counts(kind, sizes, 150), 150)


def test_the_normal_law_of_few_clusters_is_caught():
    """The planted mutant: the law of sums over users, which few users do not follow."""
    found = clustered_counts("one of 8, rest 1", (5, 5), 150, permutation._cluster_normal)
    assert found["p"] > plausible(150, 0.05)


@pytest.mark.campaign
@pytest.mark.parametrize("sizes", [*SIZES, (300, 300)], ids=str)
@pytest.mark.parametrize("kind", RECORDS)
def test_records_of_few_users_keep_the_level(kind, sizes):
    found = clustered_counts(kind, sizes, 1000)
    print(f"records {kind}, {sizes[0]}+{sizes[1]} users:", {name: count / 1000 for name, count in found.items()})
    check_null(found, 1000)


scores = st.lists(st.integers(0, 3), min_size=2, max_size=5).map(lambda values: np.array(values, dtype=np.float64))


@given(scores, scores)
def test_permuted_p_value_is_scipys(held_in, held_out):
    """The second implementation: every choice of users, the AUROC counted pair by pair."""

    def area(ours, theirs, axis):
        wins = (ours[..., :, None] > theirs[..., None, :]) + 0.5 * (ours[..., :, None] == theirs[..., None, :])
        return wins.mean(axis=(-2, -1))

    expected = scipy.stats.permutation_test(
        (held_in, held_out), area, vectorized=True, n_resamples=np.inf, alternative="greater", axis=-1
    )
    users = np.arange(held_in.size), np.arange(held_out.size)
    assert permutation._permuted(held_in, held_out, users) == pytest.approx(expected.pvalue)


@given(scores, scores, st.data())
def test_permuted_p_value_equals_a_loop_over_users(held_in, held_out, data):
    owners = tuple(
        np.array(data.draw(st.lists(st.integers(0, 2), min_size=s.size, max_size=s.size))) for s in (held_in, held_out)
    )
    users = [(0, user) for user in np.unique(owners[0])] + [(1, user) for user in np.unique(owners[1])]
    num_in = np.unique(owners[0]).size
    values, owner = np.concatenate([held_in, held_out]), [(0, u) for u in owners[0]] + [(1, u) for u in owners[1]]
    number = np.array([users.index(each) for each in owner])
    areas = []
    for chosen in itertools.combinations(range(len(users)), num_in):
        inside = np.isin(number, chosen)
        areas.append(statistics.auroc(values[inside], values[~inside]))
    observed = statistics.auroc(held_in, held_out)
    expected = np.mean(np.array(areas) >= observed - 1e-9)
    assert permutation._permuted(held_in, held_out, owners) == pytest.approx(expected)


def paired_counts(sizes, num_samples, kind="alike", seed=0, p_value=None):
    """Two scores of the same users with equal AUROC: independent, correlated, tied, of other laws, with a leak."""
    rng, found = np.random.default_rng((*sizes, seed)), {"p": 0, "excludes 0": 0}
    for _ in range(num_samples):
        first, second = ([rng.normal(size=size) for size in sizes] for _ in range(2))
        if kind == "correlated":
            second = [0.9 * one + 0.44 * other for one, other in zip(first, second, strict=True)]
        if kind == "ties":
            first, second = ([np.round(side) for side in sides] for sides in (first, second))
        if kind == "other laws":
            second = [side**3 for side in second]
        if kind == "leak":
            first, second = ([sides[0] + 1.0, sides[1]] for sides in (first, second))
        if kind == "leak, other spread":  # Φ(1 / √2) = Φ(√2.5 / √5)
            first, second = [first[0] + 1.0, first[1]], [2.0 * second[0] + math.sqrt(2.5), second[1]]
        result = statistics.paired_difference(tuple(first), tuple(second))
        found["p"] += (result.p_value if p_value is None else p_value(first, second)) <= 0.05
        found["excludes 0"] += not result.interval.lower <= 0.0 <= result.interval.upper
    return found


def delong_p_value(first, second):
    """The planted mutant: the normal law at every size."""
    ours, theirs = statistics.Placements.of(*first), statistics.Placements.of(*second)
    changes = ours.held_in - theirs.held_in, ours.held_out - theirs.held_out
    error = math.sqrt(sum(change.var(ddof=1) / change.size for change in changes))
    return 2.0 * scipy.stats.norm.sf(abs(changes[0].mean()) / error) if error else 1.0


def test_users_who_all_moved_alike_are_no_certainty():
    """Two users a side, every one moved to the other end: 2 of 16 exchanges differ as much."""
    first, second = (np.array([3.0, 4.0]), np.array([1.0, 2.0])), (np.array([1.0, 2.0]), np.array([3.0, 4.0]))
    found = statistics.paired_difference(first, second)
    assert found.p_value == 2 / 16
    assert found.interval.lower <= 0
    assert statistics.paired_difference(first, first).p_value == 1


def test_many_users_on_one_side_cost_no_memory():
    rng = np.random.default_rng(0)
    few, many = rng.normal(size=20), rng.normal(size=20_000)
    assert 0 < statistics.auroc_p_value(few + 1, many) < 0.05
    assert statistics.paired_difference((few + 1, many), (rng.normal(size=20), many)).p_value < 0.2


def test_paired_differences_of_few_users_keep_the_level_short():
    found = paired_counts((40, 5), 200)
    assert max(found.values()) <= plausible(200, 0.05), found
    assert paired_counts((100, 5), 200, p_value=delong_p_value)["p"] > plausible(200, 0.05)


def test_paired_differences_of_five_users_a_side_keep_the_level():
    """The planted mutant exchanges ranks and asks nobody else."""
    assert paired_counts((5, 5), 1500, seed=1)["p"] <= plausible(1500, 0.05)
    assert paired_counts((5, 5), 1500, seed=1, p_value=delong._exchanged)["p"] > scipy.stats.binom.ppf(0.95, 1500, 0.05)


@pytest.mark.campaign
@pytest.mark.parametrize("kind", ["alike", "correlated", "ties", "other laws", "leak", "leak, other spread"])
@pytest.mark.parametrize("sizes", [*SIZES, (300, 300)], ids=str)
def test_paired_differences_keep_the_level(sizes, kind):
    found = paired_counts(sizes, 1000, kind)
    print(f"paired, {sizes[0]}+{sizes[1]}, {kind}:", {name: count / 1000 for name, count in found.items()})
    assert max(found.values()) <= plausible(1000, 0.05)


def test_false_discovery_rate_over_users_is_kept_and_can_reject():
    """Half of the held-in users stand out; of those accused at most a twentieth should not, whatever the luck."""
    shares, num_found = [], 0
    for seed in range(200):
        rng = np.random.default_rng(seed)
        held_in, held_out = rng.normal(size=60) + 4.0 * (np.arange(60) < 30), rng.normal(size=60)
        accused = statistics.false_discovery_rate(statistics.rank_p_values(held_in, held_out)) <= 0.05
        shares.append(accused[30:].sum() / max(accused.sum(), 1))
        num_found += accused.sum()
        assert not (statistics.holm(statistics.rank_p_values(held_in, held_out)) <= 0.05).any(), "the old count"
    assert np.mean(shares) <= 0.05 + 3 * np.std(shares) / math.sqrt(200)
    assert num_found > 200 * 10


@given(st.integers(1, 40), st.integers(1, 60))
def test_fewest_discoveries_is_the_fewest_that_are_rejected(num_tested, num_held_out):
    fewest = statistics.fewest_discoveries(num_tested, num_held_out, 0.05)
    held_out = np.zeros(num_held_out)

    def any_rejected(num_above):
        scores = np.where(np.arange(num_tested) < num_above, 1.0, -1.0)
        p_values = statistics.rank_p_values(scores, held_out)
        return bool((statistics.false_discovery_rate(p_values) <= 0.05).any())

    if fewest is None:
        assert not any_rejected(num_tested)
    else:
        assert any_rejected(fewest)
        assert fewest == 1 or not any_rejected(fewest - 1)
