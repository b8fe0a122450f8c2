"""What is no event is refused by name, wherever it enters."""

import math

import dp_accounting
import mpmath as mp
import numpy as np
import pytest
from accounting_cases import dp_sgd
from dp_accounting import dp_event

import accountants
from accountants import events, validation
from accountants.methods import rdp as rdp_method
from accountants.mixtures import composition
from accountants.registry import ACCOUNTANTS
from accountants.units import _binomial, group_delta_of, group_event, record_delta_of

GAUSSIAN = dp_accounting.GaussianDpEvent(1.0)
MIXTURE = dp_event.MixtureOfGaussiansDpEvent
NAN, INF = math.nan, math.inf

MALFORMED = [
    (dp_accounting.GaussianDpEvent(-1.0), "noise_multiplier"),
    (dp_accounting.GaussianDpEvent(NAN), "noise_multiplier"),
    (dp_accounting.GaussianDpEvent(INF), "noise_multiplier"),
    (dp_accounting.GaussianDpEvent("1"), "noise_multiplier"),
    (dp_accounting.LaplaceDpEvent(-1.0), "noise_multiplier"),
    (dp_accounting.PoissonSampledDpEvent(-0.1, GAUSSIAN), "sampling_probability"),
    (dp_accounting.PoissonSampledDpEvent(1.1, GAUSSIAN), "sampling_probability"),
    (dp_accounting.PoissonSampledDpEvent(NAN, GAUSSIAN), "sampling_probability"),
    (dp_accounting.SelfComposedDpEvent(GAUSSIAN, -1), "count"),
    (dp_accounting.SelfComposedDpEvent(GAUSSIAN, 1.5), "count"),
    (dp_accounting.SelfComposedDpEvent(GAUSSIAN, True), "count"),
    (dp_accounting.SelfComposedDpEvent("no event", 1), "DpEvent"),
    (MIXTURE(1.0, [0.0, 1.0], [0.9, 0.2]), "sum to 1"),
    (MIXTURE(1.0, [0.0, 1.0], [0.9, 0.05]), "sum to 1"),
    (MIXTURE(1.0, [0.0, 1.0], [1.1, -0.1]), "sampling_probs"),
    (MIXTURE(1.0, [0.0, -1.0], [0.9, 0.1]), "sensitivities"),
    (MIXTURE(1.0, [0.0, INF], [0.9, 0.1]), "sensitivities"),
    (MIXTURE(1.0, [0.0, 1.0, 2.0], [0.9, 0.1]), "one of each"),
    (MIXTURE(1.0, [], []), "sensitivities"),
    (MIXTURE(-1.0, [0.0, 1.0], [0.9, 0.1]), "standard_deviation"),
    (dp_event.TruncatedSubsampledGaussianDpEvent(0, 0.1, 10, 1.0), "dataset_size"),
    (dp_event.TruncatedSubsampledGaussianDpEvent(10, 0.1, 0, 1.0), "truncated_batch_size"),
    (dp_event.TruncatedSubsampledGaussianDpEvent(10, 2.0, 5, 1.0), "sampling_probability"),
    (dp_accounting.SampledWithoutReplacementDpEvent(5, 10, GAUSSIAN), "must not exceed"),
    (dp_event.RepeatAndSelectDpEvent(GAUSSIAN, 0.0, 1.0), "mean"),
    (dp_event.RepeatAndSelectDpEvent(GAUSSIAN, 10.0, NAN), "shape"),
    (dp_accounting.ZCDpEvent(-1.0), "rho"),
    (dp_accounting.SelfComposedDpEvent(GAUSSIAN, 2**53 + 1), "2\\*\\*53"),
    (dp_accounting.SelfComposedDpEvent(GAUSSIAN, 10**400), "2\\*\\*53"),
    (dp_accounting.ComposedDpEvent(None), "list of events"),
    (dp_accounting.ComposedDpEvent("ab"), "list of events"),
]
NESTED = [
    lambda event: event,
    lambda event: dp_accounting.SelfComposedDpEvent(event, 3),
    lambda event: dp_accounting.ComposedDpEvent([GAUSSIAN, dp_accounting.ComposedDpEvent([event])]),
]


@pytest.mark.parametrize("nest", NESTED)
@pytest.mark.parametrize(("event", "field"), MALFORMED, ids=lambda value: str(value)[:60])
def test_no_accountant_answers_about_a_malformed_event(event, field, nest):
    for name in ACCOUNTANTS:
        with pytest.raises(ValueError, match=field):
            accountants.epsilon(nest(event), 1e-5, accountant=name)
    with pytest.raises(ValueError, match=field):
        accountants.delta(nest(event), 1.0)
    with pytest.raises(ValueError, match=field):
        composition(nest(event))
    with pytest.raises(ValueError, match=field):
        events.event_from_json(events.event_to_json(nest(event)))


def test_the_check_is_what_stands_between(monkeypatch):
    """Without it a weight too many is certified."""
    for module in ("protocol", "mixtures"):
        monkeypatch.setattr(f"accountants.{module}.check_event", lambda event: None)
    event = dp_accounting.PoissonSampledDpEvent(0.5, dp_accounting.GaussianDpEvent(-1.0))
    with pytest.raises(Exception):  # noqa: B017, PT011  # whatever it is, it is no refusal by name
        accountants.epsilon(event, 1e-5, accountant="tilted")


def test_all_faults_are_named_at_once_with_their_places():
    event = dp_accounting.ComposedDpEvent([dp_accounting.GaussianDpEvent(-1.0), MIXTURE(NAN, [-1.0], [2.0])])
    with pytest.raises(ValueError, match="noise_multiplier") as refusal:
        validation.check_event(event)
    for part in ("events[0].noise_multiplier=-1.0", "events[1].standard_deviation", "sensitivities", "sampling_probs"):
        assert part in str(refusal.value)


GOOD = {"noise_multiplier": 1.0, "sampling_prob": 0.1, "num_steps": 5, "num_units": 50, "max_batch_size": 9}
CONSTRUCTORS = [
    (events.dp_sgd_event, ("noise_multiplier", "sampling_prob", "num_steps")),
    (events.truncated_poisson_event, ("noise_multiplier", "sampling_prob", "num_steps", "num_units", "max_batch_size")),
    (events.fixed_size_event, ("noise_multiplier", "batch_size", "num_units", "num_steps")),
    (events.random_allocation_event, ("noise_multiplier", "num_steps", "num_selected", "num_epochs")),
    (events.shuffled_event, ("noise_multiplier", "num_batches", "num_epochs")),
    (group_event, ("noise_multiplier", "sampling_prob", "num_steps", "num_records")),
    (events.RandomAllocationDpEvent, ("noise_multiplier", "num_steps", "num_selected", "num_epochs")),
    (events.ShuffledBatchesDpEvent, ("noise_multiplier", "num_batches", "num_epochs")),
]


@pytest.mark.parametrize(("make", "names"), CONSTRUCTORS, ids=lambda value: getattr(value, "__name__", ""))
def test_constructors_name_every_bad_argument(make, names):
    bad = {name: -1 for name in names}
    with pytest.raises(ValueError, match="=-1 must be") as refusal:
        make(**bad)
    assert all(name in str(refusal.value) for name in names)
    for name in names:
        for value in (NAN, INF, "3", None):
            with pytest.raises(ValueError, match=name):
                make(**({each: GOOD.get(each, 2) for each in names} | {name: value}))


@pytest.mark.parametrize("noise", [1e-200, 1e200])
def test_noise_beyond_float64_is_refused(noise):
    with pytest.raises(ValueError, match="range"):
        accountants.epsilon(dp_sgd(0.1, noise, 10), 1e-5, accountant="tilted")


def test_group_conversions_round_up_and_check_arguments():
    for epsilon in (0.0, 1e-300, 1e-17, 1e-6, 1.0, 30.0):
        of_record = record_delta_of(epsilon, 1e-6, 5)
        assert 0 < of_record <= 1e-6 / 5
        assert group_delta_of(epsilon, of_record, 5)[1] <= 1e-6 * (1 + 1e-12)
        assert group_delta_of(epsilon, of_record * (1 + 1e-10), 5)[1] > 1e-6
    for bad in ((-1.0, 1e-5, 2), (1.0, 2.0, 2), (1.0, 1e-5, 0), (NAN, 1e-5, 2)):
        with pytest.raises(ValueError, match="must be"):
            group_delta_of(*bad)


NOTHING = [
    dp_accounting.PoissonSampledDpEvent(0.1, dp_accounting.SelfComposedDpEvent(GAUSSIAN, 0)),
    dp_accounting.PoissonSampledDpEvent(0.0, dp_accounting.NonPrivateDpEvent()),
    dp_accounting.SelfComposedDpEvent(dp_accounting.ComposedDpEvent([]), 3),
]


@pytest.mark.parametrize("event", NOTHING, ids=str)
def test_what_releases_nothing_costs_nothing(event):
    for name in ("pld", "tilted", "rdp", "gdp"):
        assert accountants.epsilon(event, 1e-5, accountant=name).upper == 0


@pytest.mark.parametrize("name", ["pld", "tilted", "rdp"])
def test_counts_may_be_numpys(name):
    event = dp_accounting.SelfComposedDpEvent(GAUSSIAN, np.int64(4))
    assert accountants.epsilon(event, 1e-5, accountant=name) == accountants.epsilon(
        dp_accounting.SelfComposedDpEvent(GAUSSIAN, 4), 1e-5, accountant=name
    )


@pytest.mark.parametrize(
    ("event", "accountant", "question"),
    [
        (dp_accounting.GaussianDpEvent(1e-5), "prv", accountants.epsilon),
        (dp_accounting.GaussianDpEvent(1e-5), "pld", accountants.delta),
        (dp_sgd(1e-3, 1.0, 10**12), "pld", accountants.delta),
    ],
)
def test_too_costly_event_names_another_accountant(event, accountant, question, monkeypatch):
    class Opacus:
        def _get_dprv(self, **_):
            raise MemoryError("Unable to allocate 2.59 TiB")  # what its grid asks for here, after ten seconds

    monkeypatch.setattr("accountants.methods.prv._opacus_accountant", lambda _: Opacus())
    with pytest.raises(ValueError, match="use 'tilted'"):
        question(event, 0.5, accountant=accountant)


@pytest.mark.parametrize(
    ("count", "prob"),
    [(2, 0.1), (50, 0.3), (1000, 1e-4), (10**5, 1e-3), (10**9, 1e-6), (700, 0.999), (3, 1 - 1e-9), (5, 1e-200)],
)
def test_group_weights_are_binomial_and_cut_upwards(count, prob):
    weights = dict(_binomial(count, prob))
    assert math.fsum(weights.values()) == pytest.approx(1, abs=1e-15)
    assert all(weight > 0 for weight in weights.values())
    with mp.workdps(60):
        for i in sorted(weights)[:: max(1, len(weights) // 40)]:
            exact = mp.binomial(count, i) * mp.mpf(prob) ** i * (1 - mp.mpf(prob)) ** (count - i)
            if exact > 1e-280 and i < count:
                assert abs(weights[i] / exact - 1) < 1e-12
        last = max(i for i in weights if i < count)
        left_out = mp.mpf(count - last) / (last + 1) * prob / (1 - mp.mpf(prob)) * weights[last]
        assert count - 1 == last or weights[count] >= left_out, "the tail is given to all records"


def test_groups_too_large_to_account_for_are_refused():
    with pytest.raises(ValueError, match="too many outcomes"):
        group_event(noise_multiplier=1.0, sampling_prob=0.5, num_steps=1, num_records=10**9)


def test_renyi_delta_keeps_its_digits_where_divergences_end():
    """The library takes 1 - exp(-divergence) as a difference: no digits, or no answer, below 1e-16."""
    for prob in (1e-10, 1e-9, 2.7e-9, 1e-7):
        event = dp_sgd(prob, 142.8, 1)
        for epsilon in (0.0, 1e-12, 1e-10, 1e-8, 1.0, 50.0, 1e4):
            answer = accountants.delta(event, epsilon, accountant="rdp")
            assert answer.upper >= accountants.delta(event, epsilon, accountant="tilted").lower
            assert answer.upper > 0, "noise hides nothing for certain"
    assert accountants.delta(dp_accounting.NoOpDpEvent(), 0.0, accountant="rdp").upper == 0


def test_divergences_below_zero_are_no_privacy(monkeypatch):
    """They are round-off; the library would make an epsilon and a delta of 0 of one."""
    monkeypatch.setattr(rdp_method, "_divergences", lambda *_: ((1.5, 2.0), [-1e-9, 3.0]))
    assert accountants.epsilon(GAUSSIAN, 1e-5, accountant="rdp").upper > 3
    assert accountants.delta(GAUSSIAN, 1.0, accountant="rdp").upper > 0.1


def test_prv_is_refused_where_exponentials_end():
    """Its implementation answers 709 there: far below the truth, with an upper end that claims to be certified."""
    event = dp_sgd(1.0, 1.3361820640953512, 2597)
    assert accountants.epsilon(event, 4.4e-5, accountant="tilted").lower > 800
    with pytest.raises(ValueError, match="float64; use 'tilted'"):
        accountants.epsilon(event, 4.4e-5, accountant="prv")


@pytest.mark.parametrize("name", ["aea1", "aea3", "eeai"])
def test_edgeworth_is_refused_where_variances_leave_float64(name):
    """Where a CPU's last bits let the sum through, nothing finite comes of it; the truth is 3081."""
    event = dp_sgd(0.9968261915957359, 0.013599408743691956, 1)
    try:
        answer = accountants.epsilon(event, 1.3e-7, accountant=name)
    except ValueError as refusal:
        assert "float64 in an Edgeworth expansion; use 'tilted'" in str(refusal)  # noqa: PT017
    else:
        assert answer.upper == math.inf
