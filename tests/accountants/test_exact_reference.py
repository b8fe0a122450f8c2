"""Certified ends against closed forms at 60 digits: none may lie on the wrong side, at any size."""

import math

import mpmath as mp
import numpy as np
import pytest
from exact_reference import gaussian_delta, step_delta, worst_delta
from scipy import special

import accountants
from accountants.answer import BoundKind, Direction
from accountants.mixtures import MixtureStep
from accountants.numerics import closed_form, tails

ACCOUNTANTS = ("tilted", "tilted-edgeworth", "rdp", "gdp", "pld", "prv", "eeai")
NUM_ALWAYS, NUM_CAMPAIGN = 24, 2000
#: The Opacus and dp-accounting libraries take up to seconds: they are asked about every so many settings.
SLOW_EVERY = 8


def draw(seed):
    """One release, or a composition of plain Gaussian ones: an event with its shifts, weights, and a delta."""
    rng = np.random.default_rng([20_15, seed])
    delta = float(10 ** rng.uniform(-100, -0.3)) if rng.random() < 0.7 else float(10 ** rng.uniform(-12, -2))
    noise = float(10 ** rng.uniform(-2.5, 3))
    match seed % 4:
        case 0:
            steps = int(10 ** rng.uniform(0, 6))
            event = accountants.dp_sgd_event(
                noise_multiplier=noise * math.sqrt(steps), sampling_prob=1.0, num_steps=steps
            )
            with mp.workdps(60):
                return event, None, delta, steps / mp.mpf(noise * math.sqrt(steps)) ** 2
        case 1:
            q = float(10 ** rng.uniform(-9, -0.001))
            event = accountants.dp_sgd_event(noise_multiplier=noise, sampling_prob=q, num_steps=1)
            return event, ((0, 1), (1 - q, q)), delta, mp.mpf(noise)
        case 2:
            q = 1 - float(10 ** rng.uniform(-9, -0.3))
            event = accountants.dp_sgd_event(noise_multiplier=noise, sampling_prob=q, num_steps=1)
            return event, ((0, 1), (1 - q, q)), delta, mp.mpf(noise)
        case _:
            import dp_accounting

            sensitivities = sorted({0.0, *rng.uniform(0, 2, int(rng.integers(1, 5))).tolist()})
            weights = np.maximum(rng.dirichlet(np.full(len(sensitivities), 0.4)), 1e-9)
            weights = (weights / weights.sum()).tolist()
            event = dp_accounting.dp_event.MixtureOfGaussiansDpEvent(noise, sensitivities, weights)
            return event, (sensitivities, weights), delta, mp.mpf(noise)


def truth(step, scale, epsilon, direction=Direction.BOTH):
    """Delta at 60 digits."""
    if step is None:
        return gaussian_delta(scale, epsilon)
    shifts = [mp.mpf(s) / scale for s in step[0]]
    if direction is Direction.REMOVE:
        return step_delta(shifts, step[1], epsilon, add=False)
    return worst_delta(shifts, step[1], epsilon)


def check(seed):
    """Ask every certifying accountant that answers; returns how many did."""
    event, step, delta, scale = draw(seed)
    asked = 0
    for name in ACCOUNTANTS:
        if name in ("pld", "prv") and seed % SLOW_EVERY:
            continue
        try:
            answer = accountants.epsilon(event, delta, accountant=name)
        except ValueError:
            assert name not in ("tilted", "rdp", "tilted-edgeworth"), (seed, name)
            continue
        if answer.kind is not BoundKind.CERTIFIED_UPPER:
            continue
        asked += 1
        if 0 < answer.lower < 1e5:
            assert truth(step, scale, answer.lower, answer.direction) >= mp.mpf(delta), (seed, answer)
        if answer.upper < 1e5:
            assert truth(step, scale, answer.upper, answer.direction) <= mp.mpf(delta), (seed, answer)
        if name == "tilted":
            assert answer.upper - answer.lower <= 1e-7 * answer.upper, (seed, answer)
            epsilon = answer.upper
    if not 0 < epsilon < 1e5:
        return asked
    epsilon *= 1 + 0.1 * math.sin(seed)
    exact = truth(step, scale, epsilon)
    for name in ("tilted", "tilted-edgeworth", "rdp", "gdp"):
        try:
            answer = accountants.delta(event, epsilon, accountant=name)
        except ValueError:
            assert name == "gdp", (seed, name)
            continue
        if answer.kind is BoundKind.CERTIFIED_UPPER:
            assert mp.mpf(answer.lower) <= exact <= mp.mpf(answer.upper), (seed, answer, exact)
    return asked


@pytest.mark.parametrize("seed", [*range(NUM_ALWAYS), 73, 112, 120, 232, 1978])  # the last five were wrong once
def test_no_certified_end_is_on_the_wrong_side(seed):
    assert check(seed) >= 3


@pytest.mark.campaign
@pytest.mark.parametrize("first", range(NUM_ALWAYS, NUM_CAMPAIGN, 50))
def test_certified_ends_hold_truth_in_2000_settings(first):
    assert all(check(seed) >= 3 for seed in range(first, min(first + 50, NUM_CAMPAIGN)))


EXTREMES = [
    ((1e-3,), (1.0,), 1e-300),
    ((447.0,), (1.0,), 1e-300),
    ((5e4,), (1.0,), 1e-10),
    ((0.0, 50.0), (1 - 1e-9, 1e-9), 1e-250),
    ((0.0, 1.0), (1e-12, 1 - 1e-12), 1e-290),
    ((0.0, 1.0), (1 - 1e-10, 1e-10), 1e-180),
    ((0.0, 1e-4), (0.5, 0.5), 1e-30),
    ((0.0, 3.0, 30.0), (0.5, 0.5 - 1e-15, 1e-15), 1e-280),
    ((2.0, 3.0), (0.25, 0.75), 1e-200),
]


@pytest.mark.parametrize(("shifts", "probs", "delta"), EXTREMES)
def test_the_ends_of_the_range_are_right_and_tight(shifts, probs, delta):
    ends = closed_form.epsilon_bounds(MixtureStep(shifts, probs), delta)
    assert 0 < ends.lower <= ends.upper <= (1 + 1e-9) * ends.lower
    if ends.upper < 1e5:
        assert worst_delta(shifts, probs, ends.lower) >= mp.mpf(delta) >= worst_delta(shifts, probs, ends.upper)
    epsilon = min(ends.upper, 1e4)
    at = closed_form.delta_bounds(MixtureStep(shifts, probs), epsilon)
    assert mp.mpf(at.lower) <= worst_delta(shifts, probs, epsilon) <= mp.mpf(at.upper)
    assert at.upper <= (1 + 1e-6) * at.lower


@pytest.mark.parametrize("add", [False, True])
@pytest.mark.parametrize(("shifts", "probs"), [((0.0, 2.0), (0.7, 0.3)), ((1.0, 2.0), (0.5, 0.5)), ((3.0,), (1.0,))])
def test_each_direction_is_its_own(shifts, probs, add):
    for epsilon in (0.0, 0.1, 0.3, 2.0):
        exact = step_delta(shifts, probs, epsilon, add=add)
        low, high = (closed_form.step_delta(MixtureStep(shifts, probs), epsilon, add=add, side=s) for s in (-1, 1))
        assert mp.mpf(low) <= exact <= mp.mpf(high) <= exact * (1 + mp.mpf(1e-12)) + mp.mpf(1e-300)


def is_found_wrong():
    """Whether any of a few settings is found wrong."""
    for seed in range(16):
        try:
            check(seed)
        except AssertionError:
            return True
    return False


def test_the_check_finds_planted_faults(monkeypatch):
    right = closed_form.step_log_delta

    def underflows(step, epsilon, *, add, side=0):
        """The closed form that this one replaced: the second law's tail as a plain number."""
        z = step.inverse_loss(np.array([-epsilon if add else epsilon]))
        sign = 1 if add else -1
        under_p = float(special.ndtr(sign * z[0]))
        under_q = float(np.dot(step.probs, special.ndtr(sign * (z[0] - np.asarray(step.shifts)))))
        first, second = (under_p, under_q) if add else (under_q, under_p)
        scaled = math.exp(min(epsilon + math.log(second), 0.0)) if second > 0 else 0.0
        value = max(first - scaled, 0.0)
        value += side * (1e-10 * value + 2.0**-49 * (first + scaled))
        return math.log(value) if value > 0 else -math.inf

    faults = {
        "tails that underflow": underflows,
        "no margin": lambda step, epsilon, *, add, side=0: right(step, epsilon, add=add),
        "directions swapped": lambda step, epsilon, *, add, side=0: right(step, epsilon, add=not add, side=side),
        "sides swapped": lambda step, epsilon, *, add, side=0: right(step, epsilon, add=add, side=-side),
    }
    # A direction swapped leaves the worse of both as it was, so each direction is compared by itself.
    step = ((0.0, 2.0), (0.7, 0.3))
    for name, fault in faults.items():
        monkeypatch.setattr(closed_form, "step_log_delta", fault)
        value = closed_form.step_delta(MixtureStep(*step), 0.3, add=True, side=1)
        is_far = mp.mpf(value) > step_delta(*step, 0.3, add=True) * (1 + mp.mpf(1e-6))
        assert is_far or is_found_wrong(), name


def test_the_log_of_mills_ratio_is_within_its_stated_error():
    x = np.concatenate([np.linspace(-60, 60, 301), np.geomspace(1e-8, 1e8, 80)])
    values = tails.log_mills(x)
    with mp.workdps(60):
        for at, value, error in zip(x, values, tails.mills_error(values), strict=True):
            at = mp.mpf(float(at))
            exact = mp.log(mp.erfc(at / mp.sqrt(2)) / 2) + at**2 / 2 + mp.log(2 * mp.pi) / 2
            assert abs(mp.mpf(float(value)) - exact) <= mp.mpf(float(error)) / 2
