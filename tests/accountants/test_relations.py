"""The conventions of neighbouring relations, pinned, and what is refused."""

import dp_accounting
import pytest
from accounting_cases import dp_sgd
from dp_accounting import pld, rdp
from shuffling import shuffle_lower_bound

import accountants
from accountants import events
from accountants.protocol import UnsupportedEventError

ADD, REPLACE, ZERO = (
    dp_accounting.NeighboringRelation.ADD_OR_REMOVE_ONE,
    dp_accounting.NeighboringRelation.REPLACE_ONE,
    dp_accounting.NeighboringRelation.REPLACE_SPECIAL,
)


def test_the_library_reads_replacement_noise_in_two_ways():
    epsilons = []
    for accountant in (rdp.RdpAccountant(neighboring_relation=REPLACE), pld.PLDAccountant(REPLACE)):
        accountant.compose(dp_accounting.GaussianDpEvent(1.0))
        epsilons.append(accountant.get_epsilon(1e-5))
    assert epsilons[0] == pytest.approx(4.73, abs=0.01)
    assert epsilons[1] == pytest.approx(9.997, abs=0.01)


def test_ours_reads_it_relative_to_the_clipping_norm_everywhere():
    event = dp_sgd(1.0, 1.0, 1)
    by_pld = accountants.epsilon(event, 1e-5, relation=REPLACE).certified_upper(REPLACE.name)
    by_rdp = accountants.epsilon(event, 1e-5, accountant="rdp", relation=REPLACE).certified_upper(REPLACE.name)
    doubled = accountants.epsilon(dp_sgd(1.0, 0.5, 1), 1e-5, accountant="tilted").upper
    assert by_pld == pytest.approx(doubled, rel=1e-3)
    assert by_pld <= by_rdp <= 1.1 * by_pld


def test_zero_out_coincides_with_add_or_remove_for_a_plain_sum():
    event = dp_sgd(0.01, 1.0, 1000)
    for name in ("pld", "tilted", "rdp"):
        one = accountants.epsilon(event, 1e-5, accountant=name, relation=ADD)
        other = accountants.epsilon(event, 1e-5, accountant=name, relation=ZERO)
        assert one.upper == other.upper
        assert (one.relation, other.relation) == ("ADD_OR_REMOVE_ONE", "REPLACE_SPECIAL")


def test_replacement_costs_more():
    event = dp_sgd(0.01, 1.0, 1000)
    assert accountants.epsilon(event, 1e-5, relation=REPLACE).upper == pytest.approx(2.843, abs=0.01)


@pytest.mark.parametrize("name", ["tilted", "tilted-edgeworth", "gdp", "aea1", "eeai", "contour", "prv", "allocation"])
def test_methods_for_two_normals_refuse_replacement(name):
    with pytest.raises(UnsupportedEventError, match="REPLACE_ONE"):
        accountants.epsilon(dp_sgd(0.01, 1.0, 10), 1e-5, accountant=name, relation=REPLACE)


def test_fixed_size_batches_are_for_replacement_and_renyi_only():
    event = events.fixed_size_event(noise_multiplier=2.0, batch_size=10, num_units=1000, num_steps=100)
    assert accountants.epsilon(event, 1e-5, accountant="rdp", relation=REPLACE).certified_upper(REPLACE.name) > 0
    for name, relation in (("rdp", ADD), ("pld", REPLACE), ("tilted", ADD)):
        with pytest.raises(UnsupportedEventError):
            accountants.epsilon(event, 1e-5, accountant=name, relation=relation)


def test_truncated_poisson_has_a_cliff_and_then_none():
    def spent(cap):
        event = events.truncated_poisson_event(
            noise_multiplier=0.8, sampling_prob=0.1, max_batch_size=cap, num_units=2000, num_steps=20
        )
        return accountants.epsilon(event, 1e-6, relation=ZERO).certified_upper(ZERO.name)

    poisson = accountants.epsilon(dp_sgd(0.1, 0.8, 20), 1e-6).certified_upper()
    assert spent(200) > 1.5 * poisson
    assert poisson <= spent(320) * (1 + 1e-3)
    assert spent(320) <= 1.01 * poisson


def test_shuffling_costs_at_least_its_lower_bound():
    event = events.shuffled_event(noise_multiplier=1.0, num_batches=100, num_epochs=10)
    upper = accountants.epsilon(event, 1e-5, relation=ZERO).certified_upper(ZERO.name)
    fixed_order = accountants.epsilon(dp_sgd(1.0, 1.0, 10), 1e-5).certified_upper()
    lower = shuffle_lower_bound(1.0, 100, 10, 1e-5)
    poisson = accountants.epsilon(dp_sgd(0.01, 1.0, 1000), 1e-5).certified_upper()
    assert upper == pytest.approx(fixed_order, rel=1e-9)
    assert 5 * poisson < lower < upper
    with pytest.raises(UnsupportedEventError, match="ADD_OR_REMOVE_ONE"):
        accountants.epsilon(event, 1e-5, relation=ADD)


@pytest.mark.campaign
def test_random_allocation_beats_poisson_at_the_same_rate():
    event = events.random_allocation_event(noise_multiplier=1.0, num_steps=100)
    answer = accountants.epsilon(event, 1e-5, accountant="allocation")
    assert 0 < answer.lower <= answer.certified_upper()
    assert answer.upper < accountants.epsilon(dp_sgd(0.01, 1.0, 100), 1e-5).upper


@pytest.mark.parametrize("name", ["pld", "tilted", "rdp"])
def test_unsupported_events_are_refused_by_name(name):
    event = events.random_allocation_event(noise_multiplier=1.0, num_steps=10)
    with pytest.raises(UnsupportedEventError, match=r"RandomAllocation|Unsupported"):
        accountants.epsilon(event, 1e-5, accountant=name)


@pytest.mark.parametrize(
    "arguments",
    [
        {"noise_multiplier": -1.0, "sampling_prob": 0.1, "num_steps": 1},
        {"noise_multiplier": 1.0, "sampling_prob": 1.1, "num_steps": 1},
        {"noise_multiplier": 1.0, "sampling_prob": 0.1, "num_steps": -1},
        {"noise_multiplier": float("nan"), "sampling_prob": 0.1, "num_steps": 1},
    ],
)
def test_impossible_settings_are_refused(arguments):
    with pytest.raises(ValueError, match="must"):
        accountants.dp_sgd_event(**arguments)


def test_statistics_that_ride_on_a_step_share_its_noise():
    joint = events.joint_noise_multiplier(1.0, 10.0)
    assert joint == pytest.approx((1 + 0.01) ** -0.5)
    gradient = events.adaptive_clipping_noise(1.0, 5.0)
    assert events.joint_noise_multiplier(gradient, 2 * 5.0) == pytest.approx(1.0)
    with pytest.raises(ValueError, match="count_noise"):
        events.adaptive_clipping_noise(1.0, 0.5)
