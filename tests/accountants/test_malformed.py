"""What is no event is refused by name, wherever it enters."""

import math

import dp_accounting
import pytest
from accounting_cases import dp_sgd
from dp_accounting import dp_event

import accountants
from accountants import events, validation
from accountants.mixtures import composition
from accountants.registry import ACCOUNTANTS
from accountants.units import group_delta_of, group_event, record_delta_of

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


def test_group_conversions_round_to_the_safe_side_and_check_their_arguments():
    for epsilon in (0.0, 1e-300, 1e-17, 1e-6, 1.0, 30.0):
        of_record = record_delta_of(epsilon, 1e-6, 5)
        assert 0 < of_record <= 1e-6 / 5
        assert group_delta_of(epsilon, of_record, 5)[1] <= 1e-6 * (1 + 1e-12)
        assert group_delta_of(epsilon, of_record * (1 + 1e-10), 5)[1] > 1e-6
    for bad in ((-1.0, 1e-5, 2), (1.0, 2.0, 2), (1.0, 1e-5, 0), (NAN, 1e-5, 2)):
        with pytest.raises(ValueError, match="must be"):
            group_delta_of(*bad)
