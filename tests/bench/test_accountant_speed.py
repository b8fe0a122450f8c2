"""Times of the accountants, alternating with dp-accounting and Opacus in one process.

Run with ``pytest tests/bench -m campaign -s`` on an idle machine; the ratios, not the milliseconds, are asserted.
"""

import time

import dp_accounting
import pytest
from dp_accounting import mechanism_calibration, pld

import accountants
from accountants.comparison import compare
from accountants.methods.edgeworth import Aea1Accountant
from accountants.methods.tilted import TiltedAccountant

pytestmark = pytest.mark.campaign

SETTINGS = [(0.01, 1000, 2.0, 1e-5), (2000 / 392_702, 3920, 8.0, 1e-6)]


def event(noise, q, steps):
    return accountants.dp_sgd_event(noise_multiplier=noise, sampling_prob=q, num_steps=steps)


def seconds(function, repeats=5):
    best = float("inf")
    for _ in range(repeats):
        start = time.perf_counter()
        function()
        best = min(best, time.perf_counter() - start)
    return best


@pytest.mark.parametrize(("q", "steps", "target", "delta"), SETTINGS)
def test_calibration_takes_a_quarter_of_the_library_s_time(q, steps, target, delta):
    ours, library = [], []
    for _ in range(2):
        ours.append(
            seconds(
                lambda: accountants.calibrate_noise_multiplier(
                    target_epsilon=target, target_delta=delta, sampling_prob=q, num_steps=steps
                ),
                1,
            )
        )
        library.append(
            seconds(
                lambda: mechanism_calibration.calibrate_dp_mechanism(
                    pld.PLDAccountant,
                    lambda noise: event(noise, q, steps),
                    target,
                    delta,
                    mechanism_calibration.ExplicitBracketInterval(0.3, 2.0),
                    tol=1e-4,
                ),
                1,
            )
        )
    print(f"\ncalibrate q={q:.4g} T={steps}: ours {min(ours):.2f} s, dp-accounting {min(library):.2f} s")
    assert min(ours) <= min(library) / 4


@pytest.mark.parametrize(("q", "steps", "target", "delta"), SETTINGS)
def test_epsilon_times_do_not_depend_on_the_number_of_steps(q, steps, target, delta):
    times = {}
    for name, accountant in (("tilted", TiltedAccountant()), ("aea1", Aea1Accountant())):
        for factor in (1, 100):
            run = event(1.0, q / factor**0.5, steps * factor)
            times[name, factor] = seconds(lambda a=accountant, e=run: a.epsilon(e, delta))
    print("\n", {key: f"{value * 1e3:.1f} ms" for key, value in times.items()})
    # A hundred times as many steps; linear cost would be a factor of a hundred.
    assert times["aea1", 100] <= 2 * times["aea1", 1]
    assert times["tilted", 100] <= 2 * times["tilted", 1]


def test_alternating_with_opacus():
    from opacus.accountants import PRVAccountant

    rows = {}
    run = event(0.6045, 2000 / 392_702, 3920)
    opacus = PRVAccountant()
    opacus.history = [(0.6045, 2000 / 392_702, 3920)]
    for _ in range(2):
        for name, function in (
            ("opacus prv", lambda: opacus.get_epsilon(1e-6)),
            ("tilted", lambda: accountants.epsilon(run, 1e-6, accountant="tilted")),
            ("pld", lambda: accountants.epsilon(run, 1e-6)),
        ):
            rows[name] = min(rows.get(name, float("inf")), seconds(function, 1))
    print("\n", {name: f"{value * 1e3:.0f} ms" for name, value in rows.items()})
    assert rows["tilted"] <= rows["opacus prv"]


def test_comparing_everything_takes_seconds():
    names = ["tilted", "pld", "tilted-edgeworth", "rdp", "gdp", "aea1", "aea2", "aea3", "eeai"]
    run = event(0.6045, 2000 / 392_702, 3920)
    assert isinstance(run, dp_accounting.SelfComposedDpEvent)
    assert seconds(lambda: compare(run, 1e-6, names), 1) <= 5
