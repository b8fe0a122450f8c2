"""A banded run in the registry: one mechanism, charged whole once a step was begun."""

from __future__ import annotations

import pytest

import accountants
from privtrain.config import validate
from privtrain.errors import BudgetExceeded
from privtrain.inputs import read_inputs
from privtrain.job.reservation import _request
from privtrain.privacy.plan import PrivacyPlan
from privtrain.registry.evidence import NOTHING, LedgerEvidence
from privtrain.registry.spending import composed_epsilon, part_of
from privtrain.registry.store import Registry


@pytest.fixture
def request_of(tree):
    del tree["privacy"]["insecure_seed"]
    tree["privacy"] |= {"noise": "banded", "num_bands": 2, "sampling_prob": 0.3}
    tree["registry"] = {"dataset": "people"}
    inputs = read_inputs(validate(tree))
    return lambda uid: _request(inputs, uid, None), inputs.plan


def test_a_banded_run_asks_for_its_own_epsilon(request_of):
    make, plan = request_of
    part = part_of(make("a").event)
    assert part.count == 1
    assert composed_epsilon([part], plan.delta).epsilon == pytest.approx(plan.epsilon, rel=1e-2)
    rounds = accountants.dp_sgd_event(noise_multiplier=plan.noise_multiplier, sampling_prob=0.6, num_steps=2)
    assert accountants.epsilon(rounds, plan.delta, accountant="tilted").upper == pytest.approx(plan.epsilon, rel=1e-2)


def test_a_banded_run_is_charged_whole_from_its_first_step(request_of, tmp_path):
    make, plan = request_of
    registry = Registry(f"sqlite:///{tmp_path}/registry.db")
    registry.set_budget("people", epsilon=plan.epsilon * 1.05, delta=plan.delta)
    registry.reserve(make("untouched"))
    assert registry.refund("untouched", NOTHING) == 1  # no step was begun: all of it comes back
    registry.reserve(make("begun"))
    assert registry.refund("begun", LedgerEvidence(1, "a" * 64, "b" * 64)) == 0
    with pytest.raises(BudgetExceeded):
        registry.reserve(make("another"))


def test_the_plan_of_a_banded_run_says_what_is_charged(request_of):
    make, plan = request_of
    asked = make("a")
    assert (asked.epsilon, asked.delta, asked.settings) == (plan.epsilon, plan.delta, None)
    assert isinstance(plan, PrivacyPlan)
