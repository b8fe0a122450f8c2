import math

import dp_accounting
import numpy as np
import pytest
from accounting_cases import dp_sgd
from dp_accounting import gaussian_mechanism
from scipy import optimize, stats

import accountants
from accountants.mixtures import MixtureStep, composition
from accountants.numerics import closed_form

EXACT = ("tilted", "contour")


def gaussian_delta(sigma, epsilon):
    """Balle and Wang 2018, theorem 8, written independently of the package."""
    return stats.norm.cdf(0.5 / sigma - epsilon * sigma) - math.exp(epsilon) * stats.norm.cdf(
        -0.5 / sigma - epsilon * sigma
    )


@pytest.mark.parametrize("accountant", EXACT)
@pytest.mark.parametrize(
    ("sigma", "num_steps", "delta"), [(1.0, 1, 1e-6), (20.0, 1000, 1e-6), (4.0, 30, 1e-10), (0.5, 1, 0.1)]
)
def test_without_sampling_epsilon_is_the_analytic_gaussian(accountant, sigma, num_steps, delta):
    total = sigma / math.sqrt(num_steps)
    expected = optimize.brentq(lambda e: gaussian_delta(total, e) - delta, 0, 400, xtol=1e-13)
    answer = accountants.epsilon(dp_sgd(1.0, sigma, num_steps), delta, accountant=accountant)
    assert answer.estimate == pytest.approx(expected, rel=1e-8)


def test_the_analytic_gaussian_agrees_with_dp_accounting():
    expected = gaussian_mechanism.get_epsilon_gaussian(2.0, 1e-5)
    assert accountants.epsilon(dp_sgd(1.0, 2.0, 1), 1e-5, accountant="tilted").upper == pytest.approx(
        expected, rel=1e-6
    )


@pytest.mark.parametrize("accountant", EXACT)
@pytest.mark.parametrize(
    ("q", "sigma", "delta"), [(0.01, 1.0, 1e-6), (0.1, 0.6, 1e-10), (1e-3, 4.0, 1e-5), (0.5, 0.3, 1e-3)]
)
def test_one_sampled_step_is_amplification_by_subsampling(accountant, q, sigma, delta):
    # delta_q(log(1 + q (e^e - 1))) = q delta(e) for the remove direction, which is the worse one here.
    inner = optimize.brentq(lambda e: q * gaussian_delta(sigma, e) - delta, 0, 400, xtol=1e-13)
    expected = math.log1p(q * math.expm1(inner))
    answer = accountants.epsilon(dp_sgd(q, sigma, 1), delta, accountant=accountant)
    assert answer.estimate == pytest.approx(expected, rel=1e-8)


@pytest.mark.parametrize("add", [False, True])
def test_one_step_delta_is_the_integral_of_the_hockey_stick(add):
    step = composition(dp_sgd(0.2, 0.8, 1)).phases[0][0]
    z = np.linspace(-14, 16, 400_001)
    p = stats.norm.pdf(z)
    q = 0.8 * p + 0.2 * stats.norm.pdf(z - 1 / 0.8)
    first, second = (p, q) if add else (q, p)
    expected = np.trapezoid(np.maximum(first - math.exp(0.1) * second, 0), z)
    assert closed_form.step_delta(step, 0.1, add=add) == pytest.approx(expected, rel=1e-7)


def test_gdp_is_exact_and_certified_without_sampling():
    answer = accountants.epsilon(dp_sgd(1.0, 3.0, 9), 1e-6, accountant="gdp")
    exact = accountants.epsilon(dp_sgd(1.0, 3.0, 9), 1e-6, accountant="tilted")
    assert answer.certified_upper() == pytest.approx(exact.upper, rel=1e-9)


@pytest.mark.parametrize("accountant", ["pld", "tilted", "rdp", "gdp", "aea1", "eeai", "contour", "tilted-edgeworth"])
def test_no_release_costs_nothing_no_noise_everything(accountant):
    nothing = accountants.epsilon(dp_sgd(0.0, 1.0, 10), 1e-5, accountant=accountant)
    assert nothing.estimate == 0
    everything = accountants.epsilon(dp_accounting.NonPrivateDpEvent(), 1e-5, accountant=accountant)
    assert math.isinf(everything.upper)


@pytest.mark.parametrize("delta", [1e-300, 1e-18, 1e-6])
def test_one_step_at_the_ends_of_float64_is_answered(delta):
    answer = accountants.epsilon(dp_sgd(1e-12, 0.01, 1), delta, accountant="tilted")
    assert 0 <= answer.lower <= answer.upper < math.inf
    assert answer.upper == 0 or accountants.delta(dp_sgd(1e-12, 0.01, 1), answer.upper, accountant="tilted").lower <= (
        delta * (1 + 1e-6)
    )


def test_refinement_goes_on_past_shortest_transform():
    """Forty million steps: the first windows bound nothing, longer ones do."""
    answer = accountants.epsilon(dp_sgd(5.09e-5, 1.0, 39_200_000), 1e-6, accountant="tilted")
    assert 1.84 < answer.lower <= answer.upper < 1.01 * answer.lower


@pytest.mark.parametrize("add", [False, True])
@pytest.mark.parametrize("side", [-1, 0, 1])
def test_a_delta_of_zero_gives_the_largest_loss(add, side):
    assert closed_form.step_epsilon(MixtureStep((0.5,), (1.0,)), 0.0, add=add, side=side) == math.inf
    sampled = closed_form.step_epsilon(MixtureStep((0.0, 0.5), (0.75, 0.25)), 0.0, add=add, side=side)
    assert sampled == (pytest.approx(math.log(4 / 3), rel=1e-14) if add else math.inf)
    assert not add or side * (sampled - math.log(4 / 3)) >= 0


@pytest.mark.parametrize("epsilon", [1e149, 1e151, 1e200, 1e300])
@pytest.mark.parametrize("step", [MixtureStep((0.5,), (1.0,)), MixtureStep((0.0, 0.5), (0.75, 0.25))])
@pytest.mark.parametrize("add", [False, True])
def test_squares_beyond_float64_leave_a_delta_of_zero(epsilon, step, add):
    lower, best, upper = (closed_form.step_delta(step, epsilon, add=add, side=side) for side in (-1, 0, 1))
    assert lower == best == 0
    assert 0 <= upper <= 1e-322
