"""Both ledgers take the same steps: rank 0's writes them down, the others' discards them and writes nothing."""

from __future__ import annotations

import inspect
import os

import pytest

from privtrain.errors import GuaranteeLost
from privtrain.ledger.log import Ledger, NullLedger
from tests.privtrain.ledgers import by_pseudonym, contents, opened, units_of


@pytest.fixture(params=["written", "null"])
def ledger(request, tmp_path):
    if request.param == "null":
        yield NullLedger()
        return
    (tmp_path / "secret").mkdir(mode=0o700)
    with opened(tmp_path / "secret" / "ledger.jsonl") as log:
        log.begin_session(generation=0, from_step=0, environment="e")
        yield log


def test_what_a_trainer_calls_takes_the_same_arguments():
    for name in ("intend", "commit", "close"):
        assert inspect.signature(getattr(NullLedger, name)) == inspect.signature(getattr(Ledger, name))


def test_steps_with_nobody_zeroed_units_and_repeats_are_taken(ledger, tmp_path):
    for step in (*range(6), 5):
        units = units_of(step)
        ledger.intend(0, step, units)
        ledger.commit(0, step, f"sum-{step}", [name for name, _ in units[:1]])
    path = tmp_path / "secret" / "ledger.jsonl"
    if isinstance(ledger, NullLedger):
        assert os.listdir(tmp_path) == []
        assert ledger.state.num_charged == 0
    else:
        assert contents(path) == {(0, step): by_pseudonym(units_of(step)) for step in range(6)}
        assert ledger.state.num_charged == 6


def test_only_the_ledger_that_writes_refuses(ledger):
    """The others hear of it from rank 0, whose step does not begin."""
    if isinstance(ledger, NullLedger):
        ledger.intend(0, 0, [("a", 1), ("a", 1)])
        return
    with pytest.raises(GuaranteeLost, match="twice"):
        ledger.intend(0, 0, [("a", 1), ("a", 1)])


def test_what_rank_0_alone_does_fails_elsewhere():
    with pytest.raises(AttributeError):
        NullLedger().begin_session(generation=0, from_step=0, environment="e")
