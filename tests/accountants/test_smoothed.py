"""The inversion of the smoothed sum: its ends against the lattice's, its error bounds against many digits."""

import math

import laplace_reference
import mpmath
import numpy as np
import pytest
from accounting_cases import dp_sgd
from hypothesis import assume, example, given, reject, settings
from hypothesis import strategies as st

from accountants.methods import tilted
from accountants.mixtures import Composition, MixtureStep, composition
from accountants.numerics import closed_form, saddle, smoothed
from accountants.numerics.window import MARGIN

QUICK = settings(max_examples=25)
RUNS = {
    "q": st.floats(1e-4, 1.0),
    "sigma": st.floats(0.4, 10.0),
    "steps": st.integers(2, 100_000),
    "log_delta": st.floats(-40.0, -2.0),
    "add": st.booleans(),
}


def inverted(q, sigma, steps, log_delta, add, smoothing=1 / 80):
    """One direction's smoothed sum, and its lattice; None where there is none."""
    composed = composition(dp_sgd(q, sigma, steps))
    law = saddle.directed_loss(composed, add=add, log_mass=log_delta - MARGIN)
    start = saddle.saddle_for_delta(law, math.exp(log_delta))
    smooth = tilted._smoothed(composed, law, start, log_delta, smoothing, add)
    return smooth, lambda: tilted._window(composed, law, start, log_delta, 1 << 14, add)


@QUICK
@given(**RUNS)
def test_both_inversions_enclose_the_same_number(q, sigma, steps, log_delta, add):
    smooth, lattice = inverted(q, sigma, steps, log_delta, add)
    assume(smooth is not None)
    try:
        window = lattice()
    except ArithmeticError:
        reject()  # losses beyond float64: the other inversion, here the reference, refuses
    delta = math.exp(log_delta)
    ends = [(side, side.upper_epsilon(delta)) for side in (smooth, window)]
    assume(all(upper is not None and upper > 0 for _, upper in ends))
    lowers = [side.lower_epsilon(delta, upper) for side, upper in ends]
    assert all(lower is None or lower <= other for lower in lowers for _, other in ends)
    epsilon = ends[1][1]
    upper = smooth.upper_delta(epsilon)
    assert upper >= (window.lower_delta(epsilon) or 0.0)
    assert (smooth.lower_delta(epsilon) or 0.0) <= (window.upper_delta(epsilon) or 1.0)


@QUICK
@example(q=1.0, sigma=0.400390625, steps=141, log_delta=-29.0, add=False)
@given(**RUNS)
def test_the_upper_epsilon_is_one_at_which_delta_is_kept(q, sigma, steps, log_delta, add):
    smooth, _ = inverted(q, sigma, steps, log_delta, add)
    assume(smooth is not None)
    upper = smooth.upper_epsilon(math.exp(log_delta))
    assert upper is None or smooth.upper_delta(upper) <= math.exp(log_delta)


@pytest.mark.parametrize("add", [False, True])
@pytest.mark.parametrize("smoothing", [1 / 20, 1 / 80, 1 / 320])
def test_the_gap_closes_with_the_square_of_the_smoothing(smoothing, add):
    smooth, _ = inverted(0.01, 1.0, 2000, math.log(1e-6), add, smoothing)
    upper = smooth.upper_epsilon(1e-6)
    lower = smooth.lower_epsilon(1e-6, upper)
    assert 0 < upper - lower <= 6 * smoothing**2 * upper


#: So few steps that the law keeps steep parts, and its transform does not fall before the smoothing makes it.
STEEP = (0.001, 0.5, 2, math.log(1e-6), False)
EPSILONS = np.linspace(2.2, 6.0, 400)


def steep_curve():
    """Certified lower ends of the lattice, and the smoothed sum as it stands."""
    smooth, lattice = inverted(*STEEP)
    window = lattice()
    return [window.lower_delta(epsilon) or 0.0 for epsilon in EPSILONS], smooth


@pytest.mark.parametrize("tail", [1e-6, 1e-2, 30.0])
def test_frequencies_left_out_are_paid_for(monkeypatch, tail):
    """However early the sum is cut, both ends hold."""
    monkeypatch.setattr(smoothed, "_TAIL", tail)
    lowers, smooth = steep_curve()
    assert all(smooth.upper_delta(epsilon) >= lower for epsilon, lower in zip(EPSILONS, lowers, strict=True))
    truth = inverted(*STEEP)[1]()
    assert all((smooth.lower_delta(epsilon) or 0.0) <= truth.upper_delta(epsilon) for epsilon in EPSILONS)


def test_check_fails_without_the_bound_on_frequencies_left_out(monkeypatch):
    monkeypatch.setattr(smoothed, "_tail", lambda frequency, m: 0.0)
    lowers, mutant = steep_curve()
    assert any(mutant.upper_delta(epsilon) < lower for epsilon, lower in zip(EPSILONS, lowers, strict=True))


def transform_of(step, frequency, tilt, add, low, high):
    """The transform by quadrature with twenty digits, on short stretches."""
    order = -tilt if add else 1 + tilt

    def integrand(z):
        ratio = mpmath.fsum(
            p * mpmath.exp(mu * z - mu * mu / 2)
            for p, mu in zip(map(mpmath.mpf, step.probs), map(mpmath.mpf, step.shifts), strict=True)
        )
        loss = mpmath.log(ratio)
        sign = -1 if add else 1
        return mpmath.npdf(z) * mpmath.exp(order * loss + 1j * sign * frequency * loss)

    with mpmath.workdps(20):
        return mpmath.quad(integrand, list(np.linspace(low, high, 61)))


@pytest.mark.parametrize(
    ("step", "tilt", "add"),
    [
        (MixtureStep((0.0, 1.0), (0.99, 0.01)), 2.0, False),
        (MixtureStep((0.0, 0.2), (0.5, 0.5)), 20.0, True),
        *[
            pytest.param(*case, marks=pytest.mark.campaign)
            for case in (
                (MixtureStep((0.0, 1.0), (0.99, 0.01)), 2.0, True),
                (MixtureStep((0.0, 3.0), (0.999, 0.001)), 1.0, False),
                (MixtureStep((0.0, 3.0), (0.999, 0.001)), 1.0, True),
                (MixtureStep((0.0, 0.2), (0.5, 0.5)), 20.0, False),
                (MixtureStep((0.0, 1.0, 2.0), (0.9, 0.09, 0.01)), 1.5, False),
                (MixtureStep((0.0, 1.0, 2.0), (0.9, 0.09, 0.01)), 1.5, True),
            )
        ],
    ],
    ids=str,
)
def test_the_error_of_a_transform_is_within_its_bound(step, tilt, add):
    """Also at frequencies that the panels cannot follow, where the bound must say so."""
    low, high = -9.0, 12.0
    transform = smoothed.StepTransform(step, low, high, add=add)
    weight, log_total = transform.tilted(tilt)
    spacing, num = 40.0, 65
    values = transform.values(weight, spacing, num)
    errors = transform.errors(weight, log_total, tilt, spacing * np.arange(num))
    assert np.all(np.diff(errors) >= 0)
    assert errors[0] <= 1e-11
    for place in (0, 8, 64):
        truth = transform_of(step, spacing * place, tilt, add, low, high) * mpmath.exp(-log_total)
        assert abs(complex(truth) - values[place]) <= errors[place], place


def test_a_rule_too_coarse_is_covered_by_its_bound(monkeypatch):
    """With few panels the values are wrong in the third digit; the bound grows with the error."""
    monkeypatch.setattr(smoothed, "_FEWEST_PANELS", 6)
    monkeypatch.setattr(smoothed, "_MOST_PANELS", 6)
    step, tilt, low, high = MixtureStep((0.0, 1.0), (0.5, 0.5)), 2.0, -9.0, 12.0
    transform = smoothed.StepTransform(step, low, high, add=False)
    weight, log_total = transform.tilted(tilt)
    values = transform.values(weight, 25.0, 2)
    errors = transform.errors(weight, log_total, tilt, np.array([0.0, 25.0]))
    wrong = [
        abs(complex(transform_of(step, y, tilt, False, low, high) * mpmath.exp(-log_total)) - value)
        for y, value in zip((0.0, 25.0), values, strict=True)
    ]
    assert wrong[1] > 1e-4
    assert all(error <= bound for error, bound in zip(wrong, errors, strict=True))


@QUICK
@given(
    shift=st.floats(0.01, 3.0),
    count=st.integers(2, 5000),
    tilt=st.floats(0.3, 20.0),
    place=st.floats(-1.0, 6.0),
    smoothing=st.sampled_from([1 / 80, 1 / 20, 1 / 5]),
    add=st.booleans(),
)
def test_plain_gaussian_steps_stay_within_the_closed_form(shift, count, tilt, place, smoothing, add):
    """Their sum has a closed form, so that every spread, deviation and epsilon can be asked for."""
    spread = shift * math.sqrt(count)
    epsilon = spread**2 / 2 + place * spread
    exact = closed_form.step_delta(MixtureStep((spread,), (1.0,)), epsilon, add=add)
    assume(epsilon > 0 and exact > 1e-250)
    smooth = smoothed.smoothed_sum(
        Composition(((MixtureStep((shift,), (1.0,)), count),)),
        tilt=tilt,
        window=max(60 / tilt, 12 * spread),
        centre=epsilon - 1e-9,
        deviation=smoothing * spread,
        scale=spread,
        log_delta=math.log(exact),
        add=add,
    )
    assume(smooth is not None)
    assert (smooth.lower_delta(epsilon) or 0.0) <= exact * (1 + 1e-12)
    assert smooth.upper_delta(epsilon) >= exact * (1 - 1e-12)


def test_a_window_too_short_for_a_bound_gives_no_lower_end():
    """What folds into it is a multiple of delta, not a probability: it is not capped at 1."""
    smooth = smoothed.smoothed_sum(
        composition(dp_sgd(0.5, 1.0, 2000)),
        tilt=0.3,
        window=60.0,
        centre=0.0,
        deviation=0.5,
        scale=26.0,
        log_delta=-3.0,
        add=False,
    )
    assert smooth is not None
    assert smooth.removed == math.inf
    assert smooth.lower_delta(0.0) == smooth.lower_delta(317.16) == 0.0


def test_lattice_beyond_float64_keeps_the_ends_found_before():
    ends = tilted.TiltedAccountant().epsilon_bounds(composition(dp_sgd(0.5, 0.02, 100)), 1e-6)
    assert 90_000 < ends.upper < 97_500


@pytest.mark.parametrize("q", [0.6, 0.99, 1 - 1e-6, 1 - 1e-10])
def test_the_loss_keeps_its_digits_near_certain_sampling(q):
    step = MixtureStep((0.0, 2.0), (1 - q, q))
    z = np.linspace(-14.0, 3.0, 200)
    with mpmath.workdps(40):
        truth = [mpmath.log(mpmath.mpf(1 - q) + mpmath.mpf(q) * mpmath.exp(2 * mpmath.mpf(x) - 2)) for x in z]
    assert step.loss(z) == pytest.approx(np.array(truth, dtype=float), rel=0, abs=2e-15 * 30)


def test_the_reference_agrees_on_a_step_with_a_large_shift():
    """Its rule must see that the loss is analytic in a narrow strip only."""
    step, y = MixtureStep((0.0, 8.257), (0.999, 0.001)), np.array([0.0, 0.5, 1.0])
    transform = smoothed.StepTransform(step, -40.0, 14.0 + 8.257, add=True)
    weight, log_total = transform.tilted(0.4)
    values = transform.values(weight, 0.5, 3)
    reference = laplace_reference._log_moment(step, 0.4, y, True)
    assert np.exp(reference - log_total) == pytest.approx(values, rel=1e-12)
