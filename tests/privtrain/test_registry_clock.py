"""Time for budgets is the database's: no client's clock lets a run in, a charge out, or a lease end."""

from __future__ import annotations

import datetime
import time

import pytest
import sqlalchemy as sa
from typer.testing import CliRunner

from privtrain import cli
from privtrain.errors import BudgetExceeded, ClockRefused, GuaranteeLost, PrivtrainError
from privtrain.registry import clock, database, store, views
from privtrain.registry.database import Database, key_path
from privtrain.registry.evidence import LedgerEvidence
from privtrain.registry.store import Registry
from privtrain.registry.tables import Meta, ReservationRow
from tests.privtrain import registry_work as work
from tests.privtrain.registry_work import DATASET, request

DAY = 86400.0
NUM_RACERS, NUM_TAKEN, NUM_FIT = 16, 9, 12

pytestmark = [pytest.mark.timeout(600)]
on_sqlite = pytest.mark.parametrize("registry_url", ["sqlite"], indirect=True)


@pytest.fixture
def yearly(registry: Registry) -> Registry:
    """The registry with a budget a year, of which 9 of 12 runs have ended."""
    registry.set_budget(DATASET, epsilon=8, delta=1e-6, period_seconds=365 * DAY)
    for index in range(NUM_TAKEN):
        registry.reserve(request(f"before-{index}"))
        settle(registry, f"before-{index}")
    return registry


def settle(registry: Registry, uid: str) -> None:
    registry.settle(uid, LedgerEvidence(1000, f"head of {uid}"), contributions={})


def wrong_machine(registry_url: str, days: float) -> Registry:
    """The same registry from a machine whose clock is wrong."""
    opened = Registry(registry_url)
    work.set_machine_clock(opened, days * DAY)
    return opened


def winners_of_race(registry_url: str, processes, offsets: list[float], is_machine_wrong: bool) -> list[float]:
    """The clock errors of those that got a reservation, of 16 processes that ask at once."""
    barrier, results = processes.Barrier(NUM_RACERS), processes.Queue()
    key = str(key_path(Database(registry_url).url))
    racers = [
        processes.Process(
            target=work.reserve_at_once,
            args=(registry_url, key, f"racer-{i}", barrier, results, offset * DAY, is_machine_wrong),
        )
        for i, offset in enumerate(offsets)
    ]
    for racer in racers:
        racer.start()
    answers = dict(results.get(timeout=150) for _ in racers)
    for racer in racers:
        racer.join()
    return [offset for i, offset in enumerate(offsets) if answers[f"racer-{i}"] is not None]


def test_sixteen_racers_with_wrong_clocks_get_exactly_what_fits(yearly, registry_url, processes):
    """Not one client's ``time.time`` or ``datetime`` is within a day of the truth."""
    offsets = [-400 + 800 * i / (NUM_RACERS - 1) for i in range(NUM_RACERS)]
    won = winners_of_race(registry_url, processes, offsets, is_machine_wrong=False)
    assert len(won) == NUM_FIT - NUM_TAKEN
    assert views.budgets(yearly.database)[0].spent <= 8
    assert views.budgets(yearly.database)[0].num_runs == NUM_FIT


def test_racers_with_wrong_clocks_take_nothing(yearly, registry_url, processes):
    """On SQLite the wrong machines are refused and do not spoil the time for the right ones."""
    offsets = [400.0, -400.0, 0.0, 0.0] * (NUM_RACERS // 4)
    won = winners_of_race(registry_url, processes, offsets, is_machine_wrong=True)
    assert len(won) == NUM_FIT - NUM_TAKEN
    if yearly.database.url.drivername == "sqlite":
        assert set(won) == {0.0}


def python_clock(_connection: sa.Connection) -> float:
    return time.time()


def num_reserved_a_year_ahead(registry: Registry, monkeypatch) -> int:
    """How many more runs a client gets whose ``time.time`` is a year ahead."""
    with monkeypatch.context() as patched:
        patched.setattr(time, "time", lambda: time.clock_gettime(time.CLOCK_REALTIME) + 366 * DAY)
        for count in range(NUM_FIT + 1):
            try:
                registry.reserve(request(f"more-{count}"))
            except BudgetExceeded:
                return count
    return NUM_FIT + 1


def test_a_client_a_year_ahead_gets_what_is_left_and_no_more(yearly, monkeypatch):
    assert num_reserved_a_year_ahead(yearly, monkeypatch) == NUM_FIT - NUM_TAKEN


def test_a_store_that_uses_the_clients_clock_is_found_out(yearly, monkeypatch):
    """The mutant: a client a year ahead gets the whole budget again."""
    monkeypatch.setattr(clock, "now", python_clock)
    assert num_reserved_a_year_ahead(yearly, monkeypatch) == NUM_FIT


@pytest.mark.parametrize("is_mutant", [False, True])
def test_a_lease_goes_by_the_databases_clock(registry, monkeypatch, is_mutant):
    """A client a year ahead keeps its lease no longer; with the mutant it does."""
    held = registry.reserve(request("held"))
    if is_mutant:
        monkeypatch.setattr(clock, "estimate", python_clock)
    with monkeypatch.context() as patched:
        patched.setattr(time, "time", lambda: time.clock_gettime(time.CLOCK_REALTIME) + 366 * DAY)
        registry.renew(held.id, 3600)
    lease = registry.database.read(lambda c: c.execute(sa.select(ReservationRow.lease_until)).scalar_one())
    assert (lease > time.time() + 300 * DAY) == is_mutant


def test_no_module_of_the_registry_reads_the_clients_clock():
    """``database`` alone imports ``time``, for waiting; nobody takes "now" from Python."""
    import pathlib
    import re

    folder = pathlib.Path(store.__file__).parent
    forbidden = re.compile(r"time\.time|time_ns|\bnow\(datetime|\.(utc)?now\(\s*(datetime\.UTC|\))|date\.today")
    users = [path.name for path in sorted(folder.rglob("*.py")) if forbidden.search(path.read_text())]
    assert users == []
    assert {name for name in vars(database) if name == "time"} == {"time"}


@on_sqlite
@pytest.mark.parametrize("days", [-400, -1, 92, 366, 400])
def test_wrong_clock_reserves_settles_and_closes_nothing(yearly, registry_url, days):
    held = yearly.reserve(request("running"))
    wrong = wrong_machine(registry_url, days)
    for change in (
        lambda: wrong.reserve(request("new")),
        lambda: wrong.reserve(request("running")),
        lambda: settle(wrong, "running"),
        lambda: wrong.refund("running", LedgerEvidence(0, "")),
        lambda: wrong.close(held.id),
    ):
        with pytest.raises(ClockRefused, match="clock --confirm"):
            change()
    (run,) = [run for run in views.runs(yearly.database) if run.uid == "running"]
    assert (run.state, run.num_charged) == ("open", 1000)
    settle(yearly, "running")


@on_sqlite
@pytest.mark.parametrize("days", [-400, 400])
def test_heartbeat_of_wrong_clock_extends_no_lease(yearly, registry_url, days):
    held = yearly.reserve(request("running"))
    wrong_machine(registry_url, days).renew(held.id, 3600)
    (run,) = [run for run in views.runs(yearly.database) if run.uid == "running"]
    assert run.state == "open"
    assert run.lease_until == pytest.approx(time.time() + 3600, abs=120)
    assert yearly.reserve(request("another")).is_new, "the right clock is not refused because of it"


@on_sqlite
def test_what_is_shown_by_a_wrong_clock_counts_every_charge(yearly, registry_url):
    shown = views.budgets(wrong_machine(registry_url, 400).database)[0]
    assert shown.num_runs == NUM_TAKEN


@on_sqlite
def test_a_short_period_makes_a_short_silence_implausible(registry, registry_url):
    registry.set_budget(DATASET, epsilon=8, delta=1e-6, period_seconds=2 * DAY)
    registry.reserve(request("run"))
    settle(registry, "run")
    with pytest.raises(ClockRefused, match=r"2\.1 days after"):
        wrong_machine(registry_url, 2.1).reserve(request("another"))
    assert wrong_machine(registry_url, 0.4).reserve(request("another")).is_new


@on_sqlite
def test_clock_set_back_does_not_set_registry_back(yearly, registry_url):
    noted = yearly.database.write(clock.now)
    assert wrong_machine(registry_url, -200 / DAY).database.write(clock.now) >= noted


@on_sqlite
def test_a_person_confirms_the_date_and_the_registry_goes_on(yearly, registry_url, monkeypatch):
    """Idle for 400 days: the clock is right, and last year's charges have left their window."""
    later = wrong_machine(registry_url, 400)
    monkeypatch.setattr("privtrain.registry.commands._open", lambda *_, **__: later)

    def command(*arguments: str):
        return CliRunner().invoke(cli.app, ["registry", "clock", *arguments, "--registry", registry_url])

    today = (datetime.datetime.now(datetime.UTC) + datetime.timedelta(days=400)).date()
    assert isinstance(command().exception, ClockRefused)
    assert "this machine's clock says" in str(command("--confirm", "2020-01-01").exception)
    assert "YYYY-MM-DD" in str(command("--confirm", "yesterday").exception)
    assert command("--confirm", today.isoformat()).exit_code == 0
    for index in range(NUM_FIT):
        assert later.reserve(request(f"next-{index}")).is_new
    with pytest.raises(ClockRefused):
        yearly.reserve(request("from the past"))


def test_a_server_has_nothing_to_confirm(postgres):
    url = postgres.new_database()
    Database(url).upgrade()
    with pytest.raises(PrivtrainError, match="nothing to confirm"):
        Registry(url).database.write(lambda c: clock.confirm(c, datetime.datetime.now(datetime.UTC).date()))


def test_an_upgraded_registry_knows_its_newest_row(registry):
    from alembic import command

    registry.reserve(request("run"))
    config = database._alembic_config
    registry.database._retry(lambda c: command.downgrade(config(c), "0002"), write=True)
    registry.database.seen.path.unlink()  # that schema came before it
    registry.database.upgrade()
    newest = registry.database.read(lambda c: c.execute(sa.select(Meta.newest_at)).scalar_one())
    assert newest == pytest.approx(time.time(), abs=60)


def test_a_closed_reservation_is_never_renewed_by_a_wrong_clock(registry):
    held = registry.reserve(request("run"))
    settle(registry, "run")
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(time, "time", lambda: 0.0)
        with pytest.raises(GuaranteeLost):
            registry.renew(held.id, 3600)
