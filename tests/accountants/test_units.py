import math

import pytest
from accounting_cases import dp_sgd

import accountants
from accountants import lattice
from accountants.tilted import TiltedAccountant
from accountants.tuning import individual_epsilon, individual_report, tuning_epsilon
from accountants.units import group_delta_of, group_epsilon, group_event, rdp_group_epsilon


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
def test_the_exact_group_is_the_library_s_and_never_worse_than_the_black_box(q, sigma, steps, k, expected):
    event = group_event(noise_multiplier=sigma, sampling_prob=q, num_steps=steps, num_records=k)
    exact = TiltedAccountant().epsilon(event, 1e-6)
    assert exact.upper == pytest.approx(expected, rel=2e-3)
    black_box = group_epsilon(dp_sgd(q, sigma, steps), 1e-6, k, TiltedAccountant())
    assert exact.lower <= black_box.certified_upper()
    renyi = rdp_group_epsilon(dp_sgd(q, sigma, steps), 1e-6, k)
    assert exact.lower <= renyi.certified_upper()


def test_the_mixture_agrees_with_pld():
    event = group_event(noise_multiplier=1.0, sampling_prob=0.01, num_steps=200, num_records=4)
    exact = TiltedAccountant().epsilon(event, 1e-6)
    assert exact.lower <= accountants.epsilon(event, 1e-6).certified_upper() <= 1.002 * exact.upper


def test_example_sampling_with_one_record_is_user_sampling_with_one():
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
    geometric = tuning_epsilon(event, 1e-5, mean_runs=10).certified_upper()
    logarithmic = tuning_epsilon(event, 1e-5, mean_runs=10, shape="logarithmic").certified_upper()
    assert single < logarithmic < geometric
    assert geometric == pytest.approx(4.10, abs=0.02)
    with pytest.raises(ValueError, match="fixed"):
        tuning_epsilon(event, 1e-5, mean_runs=10, shape="fixed")


def test_individual_spending_is_a_report_and_not_a_guarantee():
    report = individual_report(
        [0.0, 0.05, 0.3, 0.31, 1.0], noise_multiplier=1.0, sampling_prob=0.01, num_steps=500, delta=1e-6
    )
    assert [level.num_users for level in report] == [1, 1, 1, 1, 1]
    values = [level.answer.estimate for level in report]
    assert values == sorted(values)
    assert values[0] == 0
    with pytest.raises(accountants.NotCertifiedError):
        report[-1].answer.certified_upper()


def test_a_user_known_to_have_joined_n_steps_spent_the_gaussian_of_their_root_sum_of_squares():
    answer = individual_epsilon([1.0, 0.5, 0.0, 0.5], noise_multiplier=2.0, delta=1e-6)
    exact = accountants.epsilon(dp_sgd(1.0, 2.0 / math.sqrt(1.5), 1), 1e-6, accountant="tilted")
    assert answer.estimate == pytest.approx(exact.upper, rel=1e-9)
    assert individual_epsilon([], noise_multiplier=2.0, delta=1e-6).estimate == 0
    with pytest.raises(accountants.NotCertifiedError):
        answer.certified_upper()
    with pytest.raises(ValueError, match="step_ratios"):
        individual_epsilon([1.1], noise_multiplier=2.0, delta=1e-6)


def test_many_records_are_answered_with_bounded_work(monkeypatch):
    """An answer as sharp as the work allows, or a refusal by name; never minutes of Newton steps."""
    setting = {"noise_multiplier": 0.762, "sampling_prob": 3.43e-5, "num_steps": 1256}
    work, build = [], lattice.build_cells
    monkeypatch.setattr(
        lattice,
        "build_cells",
        lambda step, low, spacing, count: work.append(len(step.shifts) * count) or build(step, low, spacing, count),
    )
    answer = accountants.epsilon(group_event(**setting, num_records=16), 1.8e-6, accountant="tilted")
    assert 0 < max(work) <= 1.01 * 2**23
    assert 0.31616 <= answer.upper < 0.33
    assert answer.lower <= 0.31694
    for ask, argument in ((accountants.epsilon, 1.8e-6), (accountants.delta, 2.0)):
        with pytest.raises(ValueError, match="use 'tilted-edgeworth'"):
            ask(group_event(**setting, num_records=64), argument, accountant="tilted")


def test_records_that_are_always_sampled_are_one_plain_gaussian():
    event = group_event(noise_multiplier=1.864, sampling_prob=1.0, num_steps=10, num_records=3)
    plain = dp_sgd(1.0, 1.864 / 3, 10)
    assert event == plain
    for name in ("pld", "tilted"):
        assert accountants.epsilon(event, 1e-5, accountant=name) == accountants.epsilon(plain, 1e-5, accountant=name)


def test_where_pld_cannot_resolve_them_it_says_so():
    event = group_event(noise_multiplier=1.864, sampling_prob=1.0, num_steps=10447, num_records=1)
    with pytest.raises(ValueError, match="use 'tilted'"):
        accountants.epsilon(event, 9.44e-4, accountant="pld")
    assert 1673.76 < accountants.epsilon(event, 9.44e-4, accountant="tilted").upper < 1673.78
