"""Each bound of the audit against published values and second implementations, and the defects of other suites."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest
import scipy.optimize
import scipy.stats
import statsmodels.stats.proportion
from hypothesis import given
from hypothesis import strategies as st

from accountants.methods import gdp
from attacks.analysis.audit import (
    Claim,
    Coins,
    audit,
    clopper,
    correct_guesses,
    declared_guesses,
    fair,
    one_run,
    tradeoff,
)
from attacks.analysis.audit.evaluate import epsilon_ceiling
from attacks.analysis.statistics import CurveBound, DpBound
from attacks.analysis.verdict import Verdict


@pytest.mark.parametrize(("delta", "published"), [(0.0, 0.7022), (1e-5, 0.6995), (1e-4, 0.6730)])
def test_one_run_bound_of_the_papers_example(delta, published):
    """Steinke et al. 2023, appendix D: 75 of 100 guesses among 1000. Subtracting m delta / r gives .7012."""
    assert one_run.epsilon_lower_bound(1000, 100, 75, delta, 0.05) == pytest.approx(published, abs=5e-5)


def test_a_large_delta_leaves_nothing():
    """A public copy without the theorem's delta term reports 4.14 here."""
    assert one_run.epsilon_lower_bound(1000, 200, 200, 0.01, 0.05) == 0.0


@pytest.mark.parametrize(
    ("count", "value"), [(10, 1.05), (50, 2.78), (100, 3.49), (136, 3.80), (500, 5.11), (1000, 5.81)]
)
def test_all_right_gives_the_closed_form(count, value):
    found = one_run.epsilon_lower_bound(count, count, count, 0.0, 0.05)
    quantile = 0.05 ** (1 / count)
    assert found == pytest.approx(math.log(quantile / (1 - quantile)), abs=1e-5)
    assert round(found, 2) == value


@pytest.mark.parametrize(
    ("coins", "guesses", "needed"),
    [
        (1000, 1000, (755, 898, 990, None)),
        (1000, 200, (157, 185, 200, None)),
        (1000, 100, (81, 94, None, None)),
        (136, 136, (109, 127, None, None)),
    ],
)
def test_correct_guesses_needed(coins, guesses, needed):
    found = tuple(one_run.correct_guesses_needed(coins, guesses, epsilon, 1e-5, 0.05) for epsilon in (1, 2, 4, 8))
    assert found == needed


counts = st.integers(1, 120).flatmap(
    lambda m: st.integers(1, m).flatmap(lambda r: st.tuples(st.just(m), st.just(r), st.integers(0, r)))
)


@given(counts, st.floats(0.0, 6.0), st.floats(0.0, 0.2))
def test_the_p_value_is_the_theorem_term_by_term(found, epsilon, delta):
    coins, guesses, correct = found
    q = math.exp(epsilon) / (1 + math.exp(epsilon))
    chances = [math.comb(guesses, k) * q**k * (1 - q) ** (guesses - k) for k in range(guesses + 1)]
    slack = max((sum(chances[correct - i : correct]) / i for i in range(1, correct + 1)), default=0.0)
    expected = min(1.0, sum(chances[correct:]) + 2 * coins * delta * slack)
    assert one_run.p_value(coins, guesses, correct, epsilon, delta) == pytest.approx(expected, abs=1e-9)


@given(counts, st.floats(0.0, 6.0), st.floats(0.0, 1.0), st.floats(0.0, 0.2))
def test_a_weaker_claim_is_never_less_likely(found, epsilon, more, delta):
    before = one_run.p_value(*found, epsilon, delta)
    assert one_run.p_value(*found, epsilon + more, delta) >= before - 1e-12
    assert one_run.p_value(*found, epsilon, delta * 1.5) >= before - 1e-12


def normal_scores(mu, num):
    """Scores at the quantiles of N(mu, 1)."""
    return mu + scipy.stats.norm.ppf((np.arange(num) + 0.5) / num)


def hull_thresholds(held_in, held_out):
    """Corners of the convex hull of the ROC: what jax_privacy's Bonferroni counts and searches."""
    thresholds = np.concatenate([np.unique(np.concatenate([held_in, held_out])), [np.inf]])
    points = np.stack([(np.sort(s).searchsorted(thresholds)) for s in (held_out, held_in)], axis=1).astype(float)
    kept: list[int] = []
    for number, point in enumerate(points):
        while len(kept) > 1:
            (x1, y1), (x2, y2) = points[kept[-2]], points[kept[-1]]
            if (x2 - x1) * (point[1] - y1) - (y2 - y1) * (point[0] - x1) > 0:
                break
            kept.pop()
        kept.append(number)
    return thresholds[kept]


@pytest.mark.parametrize(
    ("shift", "pinned", "pinned_gaussian"), [(1, 1.13346, 2.164749), (2, 2.311945, 4.7218075), (4, 4.395568, 9.133752)]
)
def test_the_values_that_jax_privacy_pins(shift, pinned, pinned_gaussian):
    """Its tests/auditing_test.py, test_epsilon_one_run_close: 10,000 + 10,000 scores, delta 1e-6, Bonferroni."""
    held_in, held_out = normal_scores(shift, 10_000), normal_scores(0, 10_000)
    thresholds = hull_thresholds(held_in, held_out)
    share = 0.05 / len(thresholds)
    hits, false = (scores.size - np.sort(scores).searchsorted(thresholds) for scores in (held_in, held_out))
    guesses = hits + false
    steinke, gaussian = 0.0, 0.0
    for i in np.argsort(-scipy.stats.beta.ppf(share, np.maximum(hits, 1e-9), false + 1)):
        # Only thresholds that beat the best so far are worked out in full.
        found = 20_000, int(guesses[i]), int(hits[i])
        if found[1] and one_run.p_value(*found, steinke, 0.0) <= share:
            steinke = max(steinke, one_run.epsilon_lower_bound(*found, 1e-6, share))
        if found[1] and not tradeoff.is_possible(tradeoff.gaussian(gaussian), *found, share):
            gaussian = tradeoff.mu_lower_bound(*found, share)
    assert steinke == pytest.approx(pinned, rel=1e-5)
    assert gdp.gdp_epsilon(gaussian, 1e-6) == pytest.approx(pinned_gaussian, rel=1e-5)


@pytest.mark.parametrize(("counts_", "published"), [((1000, 100, 75), 1.01), ((1000, 1000, 650), 0.97)])
def test_the_gaussian_bound_of_published_counts(counts_, published):
    assert round(tradeoff.gaussian_epsilon_lower_bound(*counts_, 1e-5, 0.05), 2) == published


def by_linear_program(points, coins, guesses, correct):
    """The largest tail under the same constraints, all at once: f of (epsilon, delta) points is piecewise linear."""
    index = np.arange(guesses + 1)
    rows, limits = [], []
    for first in range(1, guesses + 1):
        right = np.where(index >= first, index, 0) / coins
        wrong = np.where(index >= first - 1, guesses - index, 0) / coins
        for point in points:
            for slope, at_zero in (
                (math.exp(point.epsilon), point.delta),
                (math.exp(-point.epsilon), 1 - math.exp(-point.epsilon) * (1 - point.delta)),
            ):
                rows.append(right - slope * wrong)
                limits.append(at_zero)
    target = -(index >= correct).astype(float)
    found = scipy.optimize.linprog(target, rows, limits, [np.ones(guesses + 1)], [1.0], bounds=(0, 1))
    return -found.fun


@pytest.mark.parametrize("points", [((1.0, 0.0),), ((1.0, 0.01),), ((0.5, 0.05), (1.5, 0.002))])
@pytest.mark.parametrize("found", [(20, 20, 18), (40, 20, 17), (30, 10, 10), (60, 20, 12), (20, 20, 20)])
def test_the_curve_test_is_the_linear_program(points, found):
    bounds = tuple(DpBound(*point) for point in points)
    exact = by_linear_program(bounds, *found)
    assert exact <= tradeoff.p_value(tradeoff.of_points(CurveBound(bounds)), *found) * (1 + 1e-6)
    assert tradeoff.p_value(tradeoff.of_points(CurveBound(bounds)), *found) <= 1.011 * exact


def test_pure_epsilon_and_all_right_is_the_binomial():
    inverse = tradeoff.of_points(DpBound(1.0, 0.0))
    assert tradeoff.p_value(inverse, 30, 10, 10) == pytest.approx(one_run.p_value(30, 10, 10, 1.0, 0.0), rel=0.011)


@given(st.floats(0.0, 1.0), st.floats(0.0, 5.0), st.floats(0.0, 0.5))
def test_the_inverse_curve_inverts(rate, epsilon, delta):
    bound = DpBound(epsilon, delta)
    least = tradeoff.of_points(bound)(rate)
    assert bound.max_tpr(least) >= rate - 1e-9
    if least > 1e-6:
        assert bound.max_tpr(least - 1e-6) < rate


def test_gaussian_curve_and_epsilon_belong_together():
    """The curve test of mu-GDP's own (epsilon, delta) points is close to, and never tighter than, the Gaussian one."""
    epsilons = np.linspace(0.0, 6.0, 200)
    points = CurveBound(tuple(DpBound(float(e), gdp.gdp_delta(1.0, float(e))) for e in epsilons))
    for found in ((200, 40, 38), (200, 200, 150)):
        smooth = tradeoff.p_value(tradeoff.gaussian(1.0), *found)
        assert smooth <= tradeoff.p_value(tradeoff.of_points(points), *found) * 1.02 <= smooth * 1.2


@pytest.mark.parametrize(("hits", "trials"), [(0, 10), (3, 10), (10, 10), (68, 68), (150, 400)])
def test_one_sided_clopper_pearson_is_that_of_statsmodels(hits, trials):
    low, high = statsmodels.stats.proportion.proportion_confint(hits, trials, alpha=0.05, method="beta")
    assert clopper.lower_rate(hits, trials, 0.025) == pytest.approx(low, abs=1e-9)
    assert clopper.upper_rate(hits, trials, 0.025) == pytest.approx(high, abs=1e-9)


def test_clopper_pearson_epsilon_of_a_perfect_attack_on_enron():
    """68 + 68 users can show 2.89 and no more."""
    assert clopper.epsilon_of_counts(68, 68, 0, 68, 0.0, 0.05) == pytest.approx(2.887, abs=5e-4)


def test_both_rules_count():
    """Many false positives and no false negative: only the second rule sees anything."""
    first_alone = math.log(clopper.lower_rate(100, 100, 0.025) / clopper.upper_rate(60, 100, 0.025))
    both = clopper.epsilon_of_counts(100, 100, 60, 100, 0.0, 0.05)
    assert both == pytest.approx(
        math.log(clopper.lower_rate(40, 100, 0.025) / clopper.upper_rate(0, 100, 0.025)), abs=1e-9
    )
    assert both > 2 > 1 > first_alone


@pytest.mark.parametrize("strategy", ["bonferroni", "split"])
@pytest.mark.parametrize("delta", [0.0, 0.05])
def test_clopper_pearson_finds_gaussian_epsilon(strategy, delta):
    held_in, held_out = normal_scores(1.0, 20_000), normal_scores(0.0, 20_000)
    rng = np.random.default_rng(0)
    found = clopper.epsilon_lower_bound(
        rng.permutation(held_in), rng.permutation(held_out), delta, 0.05, strategy=strategy
    )
    truth = gdp.gdp_epsilon(1.0, delta) if delta else math.inf
    assert found < truth
    assert found > (0.75 * truth if delta else 1.5)


def test_no_bound_is_negative_and_nothing_is_floored_away():
    """PrivacyGuard gives a perfect attack on 500 + 500 users 0.002, and null data down to -0.018."""
    ones, zeros = np.ones(500), np.zeros(500)
    for strategy in ("bonferroni", "split"):
        assert clopper.epsilon_lower_bound(ones, zeros, 0.0, 0.05, strategy=strategy) > 3.5
        assert clopper.epsilon_lower_bound(zeros, ones, 0.0, 0.05, strategy=strategy) == 0.0
        assert clopper.epsilon_lower_bound(zeros, zeros, 0.0, 0.05, strategy=strategy) == 0.0


def coins_of(num, mu, seed, prob_in=0.5):
    rng = np.random.default_rng(seed)
    is_in = rng.random(num) < prob_in
    return Coins(rng.normal(size=num) + mu * is_in, is_in, prob_in, "user", "test")


def test_equal_scores_tell_nothing_in_any_order():
    is_in = np.repeat([True, False], 100)
    coins = Coins(np.zeros(200), is_in, 0.5, "user", "sorted")
    for guess in declared_guesses(200):
        assert abs(correct_guesses(coins, guess, 0) - guess.num / 2) <= 4 * math.sqrt(guess.num) / 2 + 1
    assert audit(coins, Claim(DpBound(1.0, 0.0), None, ""), 0.0, seed=0).verdict is Verdict.UNINFORMATIVE


@given(st.integers(10, 200), st.integers(0, 10_000))
def test_perfect_score_is_guessed_right_at_any_weights(num, seed):
    coins = coins_of(num, 100.0, seed)
    if abs(int(coins.is_in.sum()) - num // 2) < math.isqrt(num):
        guesses = [guess for guess in declared_guesses(num) if guess.num <= coins.is_in.sum() or not guess.only_in]
        assert [correct_guesses(coins, guess, seed) for guess in guesses] == [guess.num for guess in guesses]


@given(st.integers(1, 60), st.integers(0, 1000))
def test_as_many_guesses_as_declared(num, seed):
    coins = dataclasses.replace(coins_of(num, 0.3, seed), is_in=np.ones(num, dtype=bool))
    for guess in declared_guesses(num):
        flipped = dataclasses.replace(coins, is_in=~coins.is_in)
        assert correct_guesses(coins, guess, seed) + correct_guesses(flipped, guess, seed) == guess.num


@pytest.mark.parametrize("prob_in", [0.3, 0.5, 0.7, 0.9])
def test_dropping_makes_unfair_coins_fair(prob_in):
    coins = coins_of(40_000, 0.0, 3, prob_in)
    kept = fair(coins, 0)
    error = math.sqrt(0.25 / kept.num_coins)
    assert kept.is_in.mean() == pytest.approx(0.5, abs=4 * error)
    assert kept.num_coins == pytest.approx(2 * min(prob_in, 1 - prob_in) * 40_000, rel=0.03)


def test_unfair_coins_without_dropping_would_be_called_broken():
    """Nine in ten held in and scores without any meaning: guessing everybody "in" is right nine times in ten."""
    coins = coins_of(400, 0.0, 5, prob_in=0.9)
    naive = one_run.epsilon_lower_bound(400, 400, int(coins.is_in.sum()), 0.0, 0.05)
    assert naive > 1.0
    assert audit(coins, Claim(DpBound(1.0, 0.0), None, ""), 0.0, seed=0).epsilon == 0.0


@pytest.mark.parametrize(
    ("mu", "epsilon", "num", "expected"),
    [
        (50.0, 1.0, 400, Verdict.FALSIFIED),
        (0.0, 1.0, 400, Verdict.CONSISTENT),
        (50.0, 8.0, 400, Verdict.UNINFORMATIVE),
        (50.0, 1.0, 8, Verdict.UNINFORMATIVE),
        (50.0, math.inf, 400, Verdict.UNINFORMATIVE),
    ],
)
def test_the_verdict_of_an_audit(mu, epsilon, num, expected):
    claim = Claim(DpBound(epsilon, 1e-6), None, "")
    found = audit(coins_of(num, mu, 1), claim, 1e-6, seed=0)
    assert found.verdict is expected
    assert found.epsilon <= found.epsilon_ceiling == epsilon_ceiling(num, 1e-6, 0.025)
    assert audit(coins_of(num, mu, 1), claim, 1e-6, seed=0, confounded_by="words").verdict is Verdict.CONFOUNDED


def test_the_curve_contradicts_where_the_pair_is_too_coarse():
    """A claim of epsilon 6 whose curve is that of a weak Gaussian: the guesses fit the pair and not the curve."""
    points = tuple(DpBound(e, gdp.gdp_delta(0.5, e)) for e in (0.0, 0.25, 0.5, 1.0, 2.0))
    pair = DpBound(6.0, 1e-9)
    coins = coins_of(300, 2.0, 2)
    assert audit(coins, Claim(pair, None, ""), 1e-9, seed=0).verdict is not Verdict.FALSIFIED
    found = audit(coins, Claim(pair, CurveBound((*points, pair)), ""), 1e-9, seed=0)
    assert found.verdict is Verdict.FALSIFIED
    assert "the claimed privacy curve" in found.verdict_reason
    assert found.epsilon < 6.0


def test_two_sources_share_the_error():
    coins, claim = coins_of(200, 2.0, 0), Claim(DpBound(1.0, 1e-6), None, "")
    one, two = (audit(coins, claim, 1e-6, seed=0, num_sources=num) for num in (1, 2))
    assert two.significance == one.significance / 2
    assert two.epsilon < one.epsilon
