from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from attacks.analysis import statistics
from attacks.analysis.statistics import DpBound

bounds = st.builds(DpBound, st.floats(0.0, 30.0), st.floats(0.0, 1.0))


@pytest.mark.parametrize(("epsilon", "published"), [(1.0, 0.731), (2.0, 0.881), (4.0, 0.982), (8.0, 0.9997)])
def test_published_auroc_caps(epsilon, published):
    digits = len(str(published)) - 2
    assert round(DpBound(epsilon, 0.0).max_auroc(), digits) == published


def test_infinite_epsilon_and_certain_failure_allow_everything():
    for bound in (DpBound(math.inf, 0.0), DpBound(1e4, 0.0), DpBound(0.0, 1.0)):
        assert bound.max_auroc() == 1.0
        assert bound.max_tpr([0.0, 0.3, 1.0]).tolist() == pytest.approx([1.0, 1.0, 1.0])
        assert statistics.auroc_cap(bound, 10) == 1.0


def test_perfect_privacy_allows_guessing_only():
    bound = DpBound(0.0, 0.0)
    assert bound.max_auroc() == 0.5
    assert bound.max_tpr(0.3) == pytest.approx(0.3)
    assert statistics.auroc_cap(bound, 7) == pytest.approx(0.5)


@pytest.mark.parametrize(("epsilon", "delta"), [(-0.1, 0.0), (1.0, -0.1), (1.0, 1.1), (math.nan, 0.0), (1.0, math.nan)])
def test_what_is_no_guarantee_is_refused(epsilon, delta):
    with pytest.raises(ValueError, match="expected epsilon >= 0"):
        DpBound(epsilon, delta)


def dominating_pair(bound):
    """Outputs of the worst (epsilon, delta) mechanism: P(output | out), P(output | in), ordered by likelihood ratio."""
    share = (1.0 - bound.delta) / (1.0 + math.exp(bound.epsilon))
    grown = share * math.exp(bound.epsilon)
    return np.array([0.0, share, grown, bound.delta]), np.array([bound.delta, grown, share, 0.0])


@given(bounds)
def test_the_worst_mechanism_attains_both_caps(bound):
    """The bounds come from inequalities; this is a mechanism that meets them, so they cannot be tighter."""
    out, inside = dominating_pair(bound)
    fpr, tpr = np.concatenate([[0.0], out.cumsum()]), np.concatenate([[0.0], inside.cumsum()])
    grid = np.linspace(0.0, 1.0, 101)
    vertical = np.interp(grid, fpr[1:], tpr[1:])
    np.testing.assert_allclose(bound.max_tpr(grid), vertical, atol=1e-9)
    assert bound.max_auroc() == pytest.approx(np.trapezoid(tpr, fpr), abs=1e-12)


@given(bounds, st.integers(1, 400))
def test_a_sample_may_show_a_little_more_than_the_population(bound, num_held_out):
    cap = statistics.auroc_cap(bound, num_held_out)
    assert bound.max_auroc() - 1e-9 <= cap <= 1.0
    assert statistics.auroc_cap(bound, 20 * num_held_out) <= cap + 1e-12


def test_the_sample_cap_falls_to_the_population_cap():
    bound = DpBound(1.0, 1e-4)
    assert statistics.auroc_cap(bound, 100_000) == pytest.approx(bound.max_auroc(), abs=1e-4)


@pytest.mark.parametrize("num_units", [3, 20])
def test_real_mechanism_keeps_sample_caps_breaks_naive(num_units):
    """Each user's score is their membership bit under Laplace noise: epsilon-DP in one user, whatever the others do."""
    bound, rng = DpBound(1.0, 0.0), np.random.default_rng(0)
    areas, hits_at_zero = [], []
    for _ in range(2000):
        held_in = 1.0 + rng.laplace(scale=1.0, size=num_units)
        held_out = rng.laplace(scale=1.0, size=num_units)
        areas.append(statistics.auroc(held_in, held_out))
        hits_at_zero.append(statistics.tpr_at_fpr(held_in, held_out, 0.0).tpr)
    error = np.std(hits_at_zero) / math.sqrt(len(hits_at_zero))
    assert np.mean(areas) <= statistics.auroc_cap(bound, num_units) + 4 * np.std(areas) / math.sqrt(len(areas))
    cap = statistics.tpr_cap(bound, 0, num_units)
    assert np.mean(hits_at_zero) <= cap + 4 * error
    assert np.mean(hits_at_zero) > 0.5 * cap
    assert bound.max_tpr(0.0) == 0.0 < np.mean(hits_at_zero) - 4 * error


@pytest.mark.parametrize("num_held_out", [1, 2, 5, 68])
@pytest.mark.parametrize("epsilon", [0.5, 1.0, 4.0])
def test_private_mechanism_attains_sample_caps(epsilon, num_held_out):
    """A mechanism that publishes a ranking of one candidate among n others: uniform without the candidate's data.

    With the data it tilts the ranks as far as epsilon lets it. Exact arithmetic; the closed form would call it broken.
    """
    bound = DpBound(epsilon, 0.0)
    without = np.full(num_held_out + 1, 1.0 / (num_held_out + 1))
    with_data = np.diff(bound.max_tpr(np.arange(num_held_out + 2) / (num_held_out + 1)))
    ratio = with_data / without
    assert ratio.max() <= math.exp(epsilon) * (1 + 1e-9)
    assert ratio.min() >= math.exp(-epsilon) * (1 - 1e-9)
    share_outranked = 1.0 - np.arange(num_held_out + 1) / num_held_out
    expected_auroc = with_data @ share_outranked
    assert expected_auroc == pytest.approx(statistics.auroc_cap(bound, num_held_out), abs=1e-12)
    assert expected_auroc > bound.max_auroc()
    for num_allowed in range(num_held_out):
        tpr = with_data[: num_allowed + 1].sum()
        assert tpr == pytest.approx(statistics.tpr_cap(bound, num_allowed, num_held_out), abs=1e-12)


def test_randomised_response_sits_at_the_auroc_cap():
    """The worst mechanism, one bit a user: its expected AUROC with ties at one half is the population cap."""
    bound, rng, num_units = DpBound(2.0, 0.0), np.random.default_rng(0), 30
    keep = math.exp(2.0) / (1.0 + math.exp(2.0))
    areas = [
        statistics.auroc((rng.random(num_units) < keep) * 1.0, (rng.random(num_units) > keep) * 1.0)
        for _ in range(4000)
    ]
    assert np.mean(areas) == pytest.approx(bound.max_auroc(), abs=4 * np.std(areas) / math.sqrt(4000))
    assert bound.max_auroc() <= statistics.auroc_cap(bound, num_units)
