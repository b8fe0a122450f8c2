"""A reservation ends by the ledger of its own run, as far as it was ever seen, and by no number that anybody gives."""

from __future__ import annotations

import dataclasses

import pytest

import accountants
from privtrain.errors import GuaranteeLost, PlanMismatch
from privtrain.registry import evidence, spending, views
from privtrain.registry.evidence import NOTHING, LedgerEvidence
from privtrain.registry.spending import Settings
from privtrain.registry.store import Settled
from tests.privtrain.registry_work import request

OWN_KEY, OTHER_KEY = "a" * 64, "b" * 64
SEEN = LedgerEvidence(300, "head at 300", OWN_KEY)
AT_THE_END = LedgerEvidence(700, "last head", OWN_KEY, plan="f" * 64)

#: What a run directory may hold in place of the run's own, newest ledger.
FORGED = {
    "another run's": dataclasses.replace(AT_THE_END, key_sha256=OTHER_KEY),
    "none": NOTHING,
    "older": dataclasses.replace(AT_THE_END, num_steps=299),
    "another plan's": dataclasses.replace(AT_THE_END, plan="e" * 64),
}


def state_of(registry, uid: str) -> tuple[str, int]:
    (view,) = [view for view in views.runs(registry.database) if view.uid == uid]
    return view.state, view.num_charged


@pytest.fixture
def training(registry):
    """A run whose ledger was seen with 300 of 1000 steps."""
    registry.renew(registry.reserve(request("run")).id, 3600, shown=SEEN)
    return registry


def test_epsilon_is_that_of_the_steps_by_the_reserved_event(registry):
    registry.reserve(request("run"))
    registry.settle("run", LedgerEvidence(400, "h"), contributions={})
    exact = accountants.epsilon(Settings(73.0, 1.0, 400).event(), 1e-5, accountant="tilted")
    (view,) = views.runs(registry.database)
    assert exact.lower <= view.epsilon <= exact.upper * 1.001


@pytest.mark.parametrize("kind", FORGED)
def test_a_ledger_that_is_not_the_runs_newest_ends_nothing(training, kind):
    with pytest.raises(GuaranteeLost, match="stays charged in full"):
        training.settle("run", FORGED[kind], contributions={})
    with pytest.raises(GuaranteeLost):
        training.refund("run", FORGED[kind])
    assert state_of(training, "run") == ("open", 1000)
    assert training.settle("run", AT_THE_END, contributions={}) is Settled.OWN
    assert state_of(training, "run") == ("closed", 700)


@pytest.mark.parametrize("kind", FORGED)
def test_a_registry_that_does_not_compare_ledgers_is_found_out(training, kind, monkeypatch):
    """The mutant: each of them would have ended the reservation, most for less."""
    monkeypatch.setattr(evidence, "check", lambda *_: None)
    training.settle("run", FORGED[kind], contributions={})
    assert state_of(training, "run") == ("closed", FORGED[kind].num_steps)


def test_run_with_another_ledger_is_stopped(training):
    (view,) = views.runs(training.database)
    for shown in (dataclasses.replace(SEEN, key_sha256=OTHER_KEY), dataclasses.replace(SEEN, num_steps=299)):
        with pytest.raises(GuaranteeLost):
            training.renew(view.reservation, 3600, shown=shown)
    training.renew(view.reservation, 3600, shown=dataclasses.replace(SEEN, num_steps=301))


@pytest.mark.parametrize(
    "changes",
    [
        {"fingerprint": "e" * 64},
        {"manifest_sha256": "other records"},
        {"settings": Settings(72.0, 1.0, 1000)},
        {"settings": Settings(73.0, 1.0, 1001)},
        {"delta": 1e-4},
    ],
)
def test_a_runs_reservation_serves_no_other_plan(registry, changes):
    """As from a directory whose identity was copied from another run's."""
    registry.reserve(request("run"))
    others = {name: value for name, value in changes.items() if name != "settings"}
    with pytest.raises(PlanMismatch):
        registry.reserve(request("run", changes.get("settings"), **others))
    assert len(views.runs(registry.database)) == 1


def test_a_run_that_was_refunded_reserves_no_other_plan(registry):
    registry.reserve(request("run"))
    registry.refund("run", NOTHING)
    with pytest.raises(PlanMismatch, match="another plan"):
        registry.reserve(request("run", fingerprint="e" * 64))
    assert registry.reserve(request("run")).is_new


def test_release_is_charged_at_least_what_its_ledger_shows(registry):
    registry.reserve(request("run"))
    registry.settle("run", LedgerEvidence(400, "h"), contributions={})
    assert registry.settle("run", LedgerEvidence(1200, "hh"), contributions={}) is Settled.BESIDE
    charged = sorted((view.num_charged, view.epsilon) for view in views.runs(registry.database))
    assert [count for count, _ in charged] == [400, 1200]
    assert (
        charged[1][1] >= spending.composed_epsilon([spending.part_of(Settings(73.0, 1.0, 1200).event())], 1e-5).epsilon
    )


def test_an_outcome_says_whether_anything_was_charged(registry):
    assert registry.settle("nobody", LedgerEvidence(4, "h"), contributions={}) is Settled.UNKNOWN
    registry.reserve(request("run"))
    assert not registry.is_settled("run", "h")
    assert registry.settle("run", LedgerEvidence(4, "h"), contributions={}) is Settled.OWN
    assert registry.settle("run", LedgerEvidence(4, "h"), contributions={}) is Settled.ALREADY
    assert registry.is_settled("run", "h")
