import math

import numpy as np
import pytest
from accounting_cases import dp_sgd
from hypothesis import given, settings
from hypothesis import strategies as st
from individual import individual_epsilon
from scipy import special

import accountants
from accountants.methods import rdp
from accountants.methods.tilted import TiltedAccountant
from accountants.mixtures import composition
from accountants.numerics import lattice
from accountants.tuning import tuning_event
from accountants.units import group_delta_of, group_epsilon, group_event


def test_the_group_delta_is_the_geometric_sum_and_never_k_delta():
    epsilon, delta = group_delta_of(0.5, 1e-6, 3)
    assert epsilon == pytest.approx(1.5)
    assert delta == pytest.approx(1e-6 * (1 + math.exp(0.5) + math.exp(1.0)), rel=1e-12)
    assert delta > 3e-6
    assert group_delta_of(2.0, 1e-6, 1) == pytest.approx((2.0, 1e-6))
    assert group_delta_of(100.0, 1e-6, 10)[1] == 1.0


@pytest.mark.parametrize(
    ("q", "sigma", "steps", "k", "expected"),
    [
        (0.01, 1.0, 1000, 2, 4.5541),
        (0.001, 1.0, 2000, 5, 1.4287),
        (0.01, 4.0, 1000, 10, 3.8885),
        pytest.param(0.001, 0.6, 200, 2, 2.7192, marks=pytest.mark.campaign),
    ],
)
def test_exact_group_never_worse_than_black_box(q, sigma, steps, k, expected):
    event = group_event(noise_multiplier=sigma, sampling_prob=q, num_steps=steps, num_records=k)
    exact = TiltedAccountant().epsilon(event, 1e-6)
    assert exact.upper == pytest.approx(expected, rel=2e-3)
    black_box = group_epsilon(dp_sgd(q, sigma, steps), 1e-6, k, TiltedAccountant())
    assert exact.lower <= black_box.certified_upper()


def test_the_mixture_agrees_with_pld():
    event = group_event(noise_multiplier=1.0, sampling_prob=0.01, num_steps=200, num_records=4)
    exact = TiltedAccountant().epsilon(event, 1e-6)
    assert exact.lower <= accountants.epsilon(event, 1e-6).certified_upper() <= 1.002 * exact.upper


def test_example_equals_user_sampling_with_one_record():
    els = group_event(noise_multiplier=1.0, sampling_prob=0.01, num_steps=1000, num_records=1)
    uls = dp_sgd(100 / 10_000, 1.0, 1000)
    assert TiltedAccountant().epsilon(els, 1e-6).upper == pytest.approx(
        TiltedAccountant().epsilon(uls, 1e-6).upper, rel=1e-9
    )


def test_a_hopeless_black_box_is_infinite_and_says_so():
    answer = group_epsilon(dp_sgd(0.01, 1.0, 1000), 1e-6, 50, TiltedAccountant())
    assert math.isinf(answer.upper)
    assert "record epsilon" in answer.note


def test_choosing_the_best_of_several_runs_costs():
    event = dp_sgd(0.01, 1.0, 1000)
    single = accountants.epsilon(event, 1e-5, accountant="rdp").certified_upper()
    geometric, logarithmic = (
        accountants.epsilon(tuning_event(event, mean_runs=10, shape=shape), 1e-5, accountant="rdp").certified_upper()
        for shape in ("geometric", "logarithmic")
    )
    assert single < logarithmic < geometric
    assert geometric == pytest.approx(4.10, abs=0.02)
    with pytest.raises(ValueError, match="fixed"):
        tuning_event(event, mean_runs=10, shape="fixed")


def test_known_participation_spends_root_sum_of_squares():
    answer = individual_epsilon([1.0, 0.5, 0.0, 0.5], noise_multiplier=2.0, delta=1e-6)
    exact = accountants.epsilon(dp_sgd(1.0, 2.0 / math.sqrt(1.5), 1), 1e-6, accountant="tilted")
    assert answer.estimate == pytest.approx(exact.upper, rel=1e-9)
    assert individual_epsilon([], noise_multiplier=2.0, delta=1e-6).estimate == 0
    with pytest.raises(accountants.NotCertifiedError):
        answer.certified_upper()
    with pytest.raises(ValueError, match="step_ratios"):
        individual_epsilon([1.1], noise_multiplier=2.0, delta=1e-6)


@pytest.mark.parametrize(
    ("q", "sigma", "steps", "delta", "lowest", "highest"),
    [
        (0.01, 1.0, 1000, 1e-6, 452.0, 452.5),
        (0.001, 0.6, 200, 1e-6, 32.40, 32.43),
        (3.43e-5, 0.762, 1256, 1.8e-6, 1.3760, 1.3775),
    ],
)
def test_sixty_four_records_are_answered_with_bounded_work(q, sigma, steps, delta, lowest, highest, monkeypatch):
    """A range of losses that ends where no mass is, and shifts that cannot matter left out."""
    cells, build = [], lattice.build_cells
    monkeypatch.setattr(
        lattice,
        "build_cells",
        lambda step, low, spacing, count: cells.append(count) or build(step, low, spacing, count),
    )
    event = group_event(noise_multiplier=sigma, sampling_prob=q, num_steps=steps, num_records=64)
    answer = accountants.epsilon(event, delta, accountant="tilted")
    assert lowest < answer.lower <= answer.upper < highest
    assert sum(cells) <= 2**20
    for other in ("rdp", "tilted-edgeworth"):
        assert accountants.epsilon(event, delta, accountant=other).upper > lowest


@settings(max_examples=30)
@given(
    q=st.floats(1e-6, 0.999), sigma=st.floats(0.2, 20.0), num_records=st.integers(2, 70), reach=st.floats(-60.0, 400.0)
)
def test_the_loss_of_many_shifts_is_the_sum_over_all_of_them(q, sigma, num_records, reach):
    event = group_event(noise_multiplier=sigma, sampling_prob=q, num_steps=1, num_records=num_records)
    step = composition(event).phases[0][0]
    z = np.linspace(reach - 30, reach + 30, 5001)
    logs = [math.log(p) + mu * z - mu * mu / 2 for p, mu in zip(step.probs, step.shifts, strict=True)]
    expected = special.logsumexp(logs, axis=0)
    loss = step.loss(z)
    # Both round terms as large as the largest exponent.
    rounding = 1e-15 * (num_records + step.shifts[-1] * (abs(reach) + 30 + step.shifts[-1]))
    np.testing.assert_allclose(loss, expected, rtol=1e-14, atol=rounding)
    inside = (z > -8) & (np.gradient(loss, z) > 1e-3)
    np.testing.assert_allclose(step.inverse_loss(loss[inside]), z[inside], rtol=1e-12, atol=2e3 * rounding)


def test_orders_left_out_of_renyi_accounting_change_no_epsilon(monkeypatch):
    composed = composition(group_event(noise_multiplier=1.0, sampling_prob=0.01, num_steps=300, num_records=6))
    quick = rdp.mixture_divergences(composed)
    monkeypatch.setattr(rdp, "_HOPELESS", math.inf)
    full = rdp.mixture_divergences(composed)
    assert all(one >= other for one, other in zip(quick, full, strict=True))
    assert quick != full
    for delta in (1e-300, 1e-100, 1e-6, 0.1):
        one, other = (rdp.conversion.compute_epsilon(rdp.ORDERS, values, delta) for values in (quick, full))
        assert one == other
    for epsilon in (0.0, 1.0, 30.0, 1e3, 1e4):
        one, other = (rdp.conversion.compute_delta(rdp.ORDERS, values, epsilon)[0] for values in (quick, full))
        assert one == other


def test_records_that_are_always_sampled_are_one_plain_gaussian():
    event = group_event(noise_multiplier=1.864, sampling_prob=1.0, num_steps=10, num_records=3)
    plain = dp_sgd(1.0, 1.864 / 3, 10)
    assert event == plain
    for name in ("pld", "tilted"):
        assert accountants.epsilon(event, 1e-5, accountant=name) == accountants.epsilon(plain, 1e-5, accountant=name)


def test_many_steps_without_sampling_at_large_epsilon():
    """At 60 digits epsilon is 1672.79699088; tails without their logarithm made it 1673.77."""
    event = group_event(noise_multiplier=1.864, sampling_prob=1.0, num_steps=10447, num_records=1)
    answer = accountants.epsilon(event, 9.44e-4, accountant="tilted")
    assert 1672.7969908 < answer.lower <= answer.upper < 1672.7969909
    assert answer.lower <= accountants.epsilon(event, 9.44e-4, accountant="pld").upper < 1.001 * answer.upper
