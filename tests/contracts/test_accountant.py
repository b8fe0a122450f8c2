"""Every accountant: an answer that says what it is about, ends in order, and nothing where it has no analysis."""

from __future__ import annotations

import math

import dp_accounting
import pytest

import accountants
from accountants import events
from accountants.answer import BoundKind, Direction
from accountants.registry import ACCOUNTANTS, get_accountant

RELATIONS = list(dp_accounting.NeighboringRelation)
#: What each has an analysis of; one epsilon is enough to see that it does.
EVENT_OF = dict.fromkeys(ACCOUNTANTS, accountants.dp_sgd_event(noise_multiplier=1.0, sampling_prob=0.01, num_steps=200))
EVENT_OF["allocation"] = events.random_allocation_event(noise_multiplier=2.0, num_steps=5, num_selected=1, num_epochs=1)

every_accountant = pytest.mark.parametrize("name", ACCOUNTANTS)


@every_accountant
@pytest.mark.parametrize(("quantity", "argument"), [("epsilon", 1e-5), ("delta", 1.0)])
def test_answer_says_who_gave_it_and_its_ends_are_in_order(name, quantity, argument):
    if (name, quantity) == ("prv", "delta"):
        with pytest.raises(accountants.UnsupportedEventError, match="gives no delta"):
            get_accountant(name).delta(EVENT_OF[name], argument)
        return
    answer = getattr(get_accountant(name), quantity)(EVENT_OF[name], argument)
    assert (answer.quantity, answer.method, answer.relation) == (quantity, name, "ADD_OR_REMOVE_ONE")
    assert 0 <= answer.lower <= answer.estimate <= answer.upper
    assert answer.version
    is_vacuous = answer.upper >= (math.inf if quantity == "epsilon" else 1.0)
    assert not is_vacuous or answer.kind is not BoundKind.CERTIFIED_UPPER or answer.note.startswith("vacuous")


@every_accountant
def test_gate_needs_certified_answers_in_both_directions(name):
    answer = get_accountant(name).epsilon(EVENT_OF[name], 1e-5)
    if answer.kind is BoundKind.CERTIFIED_UPPER and answer.direction is Direction.BOTH:
        assert accountants.certified_upper(answer, dp_accounting.NeighboringRelation.ADD_OR_REMOVE_ONE) == answer.upper
    else:
        with pytest.raises(accountants.NotCertifiedError):
            accountants.certified_upper(answer, dp_accounting.NeighboringRelation.ADD_OR_REMOVE_ONE)


@every_accountant
@pytest.mark.parametrize("delta", [0.0, 1.0, -1e-5, math.nan])
def test_delta_outside_its_range_is_refused(name, delta):
    with pytest.raises(ValueError, match="delta"):
        get_accountant(name).epsilon(EVENT_OF[name], delta)


@every_accountant
@pytest.mark.parametrize("epsilon", [-1.0, math.nan])
def test_epsilon_outside_its_range_is_refused(name, epsilon):
    with pytest.raises(ValueError, match="epsilon"):
        get_accountant(name).delta(EVENT_OF[name], epsilon)


@every_accountant
def test_replacement_is_answered_only_by_who_covers_it(name):
    accountant = get_accountant(name)
    if not accountant.covers_replacement:
        with pytest.raises(accountants.UnsupportedEventError):
            accountant.epsilon(EVENT_OF[name], 1e-5, dp_accounting.NeighboringRelation.REPLACE_ONE)


@every_accountant
def test_what_is_not_private_costs_everything(name):
    answer = get_accountant(name).epsilon(dp_accounting.NonPrivateDpEvent(), 1e-5)
    assert answer.upper == math.inf
