"""delta(epsilon) from simulated runs lies inside the certified interval."""

import numpy as np
import pytest
from accounting_cases import dp_sgd, hockey_stick, simulated_losses

import accountants
from accountants.events import random_allocation_event

SETTINGS = [
    (0.1, 1.0, 10, 0.5),
    (0.2, 0.8, 5, 1.0),
    (0.05, 0.6, 20, 1.0),
    (0.5, 2.0, 8, 0.3),
    (0.3, 1.5, 15, 0.7),
    (0.01, 0.5, 30, 0.5),
    (0.8, 3.0, 12, 0.4),
    (0.02, 1.0, 40, 0.2),
    (0.15, 0.7, 6, 1.5),
]


def check(setting, num_samples, chunk=1_000_000):
    q, sigma, steps, epsilon = setting
    answer = accountants.delta(dp_sgd(q, sigma, steps), epsilon, accountant="tilted")
    assert answer.upper <= 1.02 * answer.lower
    rng = np.random.default_rng(11)
    worst = (0.0, 0.0)
    for add in (False, True):
        parts = [
            hockey_stick(simulated_losses(q, sigma, steps, chunk, rng, add), epsilon)
            for _ in range(num_samples // chunk)
        ]
        mean = float(np.mean([p[0] for p in parts]))
        error = float(np.sqrt(np.mean([p[1] ** 2 for p in parts]) / len(parts)))
        worst = max(worst, (mean, error))
    mean, error = worst
    assert answer.lower - 5 * error <= mean <= answer.upper + 5 * error
    assert error <= 0.05 * mean


@pytest.mark.parametrize("setting", SETTINGS[:3], ids=str)
def test_simulated_delta_lies_in_the_interval(setting):
    check(setting, 1_000_000)


@pytest.mark.campaign
@pytest.mark.parametrize("setting", SETTINGS, ids=str)
def test_ten_million_simulated_losses_lie_in_the_interval(setting):
    check(setting, 10_000_000)


@pytest.mark.campaign
def test_ten_million_simulated_allocations_lie_in_the_interval():
    sigma, steps, epsilon = 1.0, 10, 0.5
    answer = accountants.delta(
        random_allocation_event(noise_multiplier=sigma, num_steps=steps), epsilon, accountant="allocation"
    )
    rng = np.random.default_rng(13)
    mu, results = 1 / sigma, {False: [], True: []}
    for _ in range(10):
        for add, values in results.items():
            z = rng.standard_normal((1_000_000, steps))
            if not add:
                z[:, 0] += mu  # by symmetry the unit may always sit in the first step
            loss = np.log(np.mean(np.exp(mu * z - mu * mu / 2), axis=1))
            values.append(hockey_stick(-loss if add else loss, epsilon))
    mean, error = max(
        (float(np.mean([v[0] for v in values])), float(np.sqrt(np.mean([v[1] ** 2 for v in values]) / 10)))
        for values in results.values()
    )
    assert answer.lower - 5 * error <= mean <= answer.upper + 5 * error


@pytest.mark.parametrize(
    ("sigma", "steps", "selected", "epsilon", "simulated"),
    [(1.0, 5, 3, 4.0, 0.00585), (1.0, 5, 4, 5.0, 0.0139), (2.0, 7, 2, 0.5, 0.0241)],
)
def test_allocation_to_several_steps_claims_no_lower_end(sigma, steps, selected, epsilon, simulated):
    """Simulated delta of the worse direction; the library's lower end exceeds it by up to a half."""
    event = random_allocation_event(noise_multiplier=sigma, num_steps=steps, num_selected=selected)
    answer = accountants.delta(event, epsilon, accountant="allocation")
    assert answer.lower == 0 <= simulated <= answer.upper
