import json
import math

import dp_accounting
import pytest
from accounting_cases import dp_sgd
from hypothesis import given, settings
from hypothesis import strategies as st

import accountants
from accountants import events
from accountants.answer import BoundKind, Direction, PrivacyAnswer
from accountants.methods.tilted import TiltedAccountant
from accountants.mixtures import composition
from accountants.units import group_event

QUICK = settings(max_examples=15)
PROBS = st.floats(1e-3, 0.5)
NOISES = st.floats(0.5, 5.0)
COUNTS = st.integers(2, 3000)
LOG_DELTAS = st.floats(-30.0, -7.0)


def ends(event, delta):
    answer = TiltedAccountant().epsilon(event, delta)
    return answer.lower, answer.upper


@QUICK
@given(q=PROBS, sigma=NOISES, steps=COUNTS, log_delta=LOG_DELTAS, factor=st.floats(1.05, 3.0))
def test_epsilon_is_monotone_in_every_argument(q, sigma, steps, log_delta, factor):
    delta = math.exp(log_delta)
    lower, _ = ends(dp_sgd(q, sigma, steps), delta)
    for more in (
        ends(dp_sgd(q, sigma, math.ceil(steps * factor)), delta),
        ends(dp_sgd(min(q * factor, 1.0), sigma, steps), delta),
        ends(dp_sgd(q, sigma / factor, steps), delta),
        ends(dp_sgd(q, sigma, steps), delta / factor),
    ):
        assert more[1] >= lower


@QUICK
@given(q=PROBS, sigma=NOISES, parts=st.lists(st.integers(1, 500), min_size=2, max_size=4), log_delta=LOG_DELTAS)
def test_splitting_and_permuting_phases_changes_nothing(q, sigma, parts, log_delta):
    delta = math.exp(log_delta)
    whole = events.phased_event([(sigma, q, sum(parts)), (2 * sigma, q, 10)])
    split = events.phased_event([(2 * sigma, q, 10), *((sigma, q, part) for part in reversed(parts))])
    assert composition(whole) == composition(split)
    assert ends(whole, delta) == ends(split, delta)


@QUICK
@given(q=PROBS, sigma=NOISES, steps=COUNTS, log_delta=LOG_DELTAS)
def test_a_group_of_one_is_poisson(q, sigma, steps, log_delta):
    group = group_event(noise_multiplier=sigma, sampling_prob=q, num_steps=steps, num_records=1)
    one, two = ends(group, math.exp(log_delta)), ends(dp_sgd(q, sigma, steps), math.exp(log_delta))
    assert one == pytest.approx(two, rel=1e-9, abs=1e-12)


@settings(max_examples=6)
@given(q=st.floats(0.005, 0.1), sigma=st.floats(0.8, 4.0), steps=st.integers(50, 1000))
def test_calibration_inverts_epsilon(q, sigma, steps):
    target = accountants.epsilon(dp_sgd(q, sigma, steps), 1e-6, accountant="tilted").upper
    found = accountants.calibrate_noise_multiplier(
        target_epsilon=target, target_delta=1e-6, sampling_prob=q, num_steps=steps, accountant="tilted"
    )
    assert found == pytest.approx(sigma, abs=2e-4 + 3e-3 * sigma)
    assert accountants.epsilon(dp_sgd(q, found, steps), 1e-6, accountant="tilted").upper <= target


@given(st.floats(0, 1e3), st.floats(0, 10), st.sampled_from(sorted(Direction)), st.text(max_size=20), st.booleans())
def test_answers_survive_json(lower, width, direction, note, infinite):
    upper = math.inf if infinite else lower + width
    answer = PrivacyAnswer(
        "epsilon", lower, lower, upper, BoundKind.CERTIFIED_UPPER, "x", "1", direction, "REPLACE_ONE", note
    )
    text = json.dumps(answer.to_json(), allow_nan=False)
    assert PrivacyAnswer.from_json(json.loads(text)) == answer


ALL_EVENTS = [
    dp_sgd(0.01, 1.0, 100),
    events.phased_event([(1.0, 0.1, 3), (2.0, 1.0, 4)]),
    events.truncated_poisson_event(
        noise_multiplier=1.0, sampling_prob=0.1, max_batch_size=20, num_units=100, num_steps=5
    ),
    events.fixed_size_event(noise_multiplier=1.0, batch_size=10, num_units=100, num_steps=5),
    events.random_allocation_event(noise_multiplier=1.0, num_steps=10, num_selected=2, num_epochs=3),
    events.shuffled_event(noise_multiplier=1.0, num_batches=10, num_epochs=3),
    group_event(noise_multiplier=1.0, sampling_prob=0.1, num_steps=5, num_records=3),
    dp_accounting.NoOpDpEvent(),
]


@pytest.mark.parametrize("event", ALL_EVENTS, ids=lambda e: type(e).__name__)
def test_events_survive_json(event):
    text = json.dumps(events.event_to_json(event), allow_nan=False)
    assert events.event_from_json(json.loads(text)) == event


def test_unknown_events_and_fields_are_named():
    with pytest.raises(ValueError, match="Nonsense"):
        events.event_from_json({"kind": "Nonsense"})
    with pytest.raises(ValueError, match="colour"):
        events.event_from_json({"kind": "GaussianDpEvent", "noise_multiplier": 1.0, "colour": 3})
