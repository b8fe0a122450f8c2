"""The best of a random number of runs: against every outcome of a small mechanism, summed exactly."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable

import dp_accounting
import numpy as np
import pytest
from dp_accounting import dp_event
from hypothesis import example, given
from hypothesis import strategies as st
from scipy import stats

import accountants
from accountants.tuning import _rate_of_logarithmic, draw_num_runs, tuning_event

SHAPES = ("geometric", "logarithmic", "poisson")


def generating_function(shape: str, mean: float) -> Callable[[np.ndarray], np.ndarray]:
    """E[x^K] of the number of runs."""
    if shape == "poisson":
        return lambda x: np.exp(mean * (x - 1))
    if shape == "geometric":
        return lambda x: x / mean / (1 - (1 - 1 / mean) * x)
    rate = _rate_of_logarithmic(mean)
    return lambda x: -np.log1p(np.expm1(-rate) * x) / rate


def best_of(run: np.ndarray, shape: str, mean: float) -> np.ndarray:
    """Probabilities of the best outcome; outcomes are scores, worst first, and no run at all comes before them."""
    below = np.concatenate([[0.0], np.cumsum(run)])
    values = generating_function(shape, mean)(np.minimum(below, 1.0))
    return np.concatenate([values[:1], np.diff(values)])


def discretised(noise: float, sampling_prob: float) -> tuple[np.ndarray, np.ndarray]:
    """One run without and with a unit: a sampled Gaussian sum, rounded to cells, which is post-processing."""
    edges = np.concatenate([[-np.inf], np.linspace(-4 * noise, 1 + 4 * noise, 40), [np.inf]])
    without = np.diff(stats.norm.cdf(edges, 0, noise))
    return without, (1 - sampling_prob) * without + sampling_prob * np.diff(stats.norm.cdf(edges, 1, noise))


def real_delta(pair: tuple[np.ndarray, np.ndarray], epsilon: float) -> float:
    """The exact delta, of the worse direction."""
    both = itertools.permutations(pair)
    return max(float(np.maximum(p - math.exp(epsilon) * q, 0).sum()) for p, q in both)


def sampled(noise: float, sampling_prob: float) -> dp_accounting.DpEvent:
    gaussian = dp_accounting.GaussianDpEvent(noise)
    return gaussian if sampling_prob == 1 else dp_accounting.PoissonSampledDpEvent(sampling_prob, gaussian)


@pytest.mark.parametrize("flip", [False, True], ids=["best is largest", "best is smallest"])
@pytest.mark.parametrize("shape", SHAPES)
def test_claimed_epsilon_covers_every_outcome(shape: str, flip: bool):
    for noise, prob, mean, delta in itertools.product((0.8, 3.0), (0.2, 1.0), (1.5, 10.0), (1e-6, 1e-2)):
        event = tuning_event(sampled(noise, prob), mean_runs=mean, shape=shape)
        claimed = accountants.epsilon(event, delta, accountant="rdp").certified_upper()
        runs = [run[::-1] if flip else run for run in discretised(noise, prob)]
        without, with_unit = (best_of(run, shape, mean) for run in runs)
        assert without.sum() == pytest.approx(1)
        assert real_delta((without, with_unit), claimed) <= delta


def test_the_bound_of_one_run_does_not_cover_the_best_of_many():
    """The mutant that forgets the choice is seen by the brute force above."""
    noise, mean, delta = 0.8, 10.0, 1e-2
    single = accountants.epsilon(sampled(noise, 1.0), delta, accountant="rdp").certified_upper()
    runs = discretised(noise, 1.0)
    pair = best_of(runs[0], "geometric", mean), best_of(runs[1], "geometric", mean)
    assert real_delta(pair, single) > delta


@pytest.mark.parametrize("shape", ["geometric", "logarithmic"])
def test_one_expected_run_is_one_run(shape: str):
    event = dp_accounting.SelfComposedDpEvent(sampled(1.0, 0.1), 20)
    single = accountants.epsilon(event, 1e-5, accountant="rdp").certified_upper()
    assert draw_num_runs(0.999, mean_runs=1, shape=shape) == 1
    many = [
        accountants.epsilon(tuning_event(event, mean_runs=m, shape=shape), 1e-5, accountant="rdp").certified_upper()
        for m in (1.5, 5, 30)
    ]
    assert single < many[0] < many[1] < many[2]


@pytest.mark.parametrize("shape", ["geometric", "logarithmic"])
@pytest.mark.parametrize("mean", [1.2, 5.0, 40.0])
def test_number_of_runs_has_its_distribution(shape: str, mean: float):
    uniforms = (np.arange(200_000) + 0.5) / 200_000
    found = np.array([draw_num_runs(float(u), mean_runs=mean, shape=shape) for u in uniforms[::50]])
    largest = int(found.max())
    x = np.array([0.3, 0.8])
    assert found.min() == 1
    assert found.mean() == pytest.approx(mean, rel=0.03)
    for value in x:
        exact = generating_function(shape, mean)(np.array([value]))[0]
        assert np.mean(value**found) == pytest.approx(exact, abs=2e-3)
    assert largest > mean


@example(uniform=0.5, mean=math.nextafter(1, 2), shape="logarithmic")
@given(uniform=st.floats(1e-12, 1 - 1e-12), mean=st.floats(1, 200), shape=st.sampled_from(["geometric", "logarithmic"]))
def test_number_of_runs_grows_with_its_uniform(uniform: float, mean: float, shape: str):
    number = draw_num_runs(uniform, mean_runs=mean, shape=shape)
    assert 1 <= number <= draw_num_runs((1 + uniform) / 2, mean_runs=mean, shape=shape)


def test_best_of_runs_composes_with_other_runs():
    """Parts of a budget: divergences of each add up, whatever stands around them."""
    one, chosen = sampled(1.0, 0.1), tuning_event(sampled(1.0, 0.1), mean_runs=5)
    together = dp_accounting.ComposedDpEvent([dp_accounting.SelfComposedDpEvent(one, 3), chosen])
    claimed = accountants.epsilon(together, 1e-5, accountant="rdp").certified_upper()
    alone = [accountants.epsilon(e, 5e-6, accountant="rdp").certified_upper() for e in (one, chosen)]
    assert max(alone) < claimed < 3 * alone[0] + alone[1]
    poisson = dp_event.RepeatAndSelectDpEvent(one, 5.0, math.inf)
    assert accountants.epsilon(poisson, 1e-5, accountant="rdp").upper < math.inf
