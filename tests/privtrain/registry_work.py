"""What the registry's tests run in other processes, and what must hold of a registry whatever happened to them."""

from __future__ import annotations

import datetime
import json
import os
import pathlib
import time
from typing import Any

import numpy as np
import sqlalchemy as sa
from sqlalchemy import event

from privtrain.errors import BudgetExceeded, ClockRefused
from privtrain.registry import spending, views
from privtrain.registry.evidence import LedgerEvidence
from privtrain.registry.requests import RunRequest
from privtrain.registry.spending import Settings
from privtrain.registry.store import Registry
from privtrain.registry.tables import Contribution, Meta, OptOut, ReservationRow, Run, Settlement

DATASET = "customers"
USERS_OF_A_RUN = 40


def request(
    uid: str, settings: Settings | None = None, *, advice: bool = False, dataset: str = DATASET, **changes: Any
) -> RunRequest:
    """A run that asks for budget; 12 of the default one, whose accounting is quick, fit into ε 8 at δ 1e-6."""
    settings = settings or Settings(noise_multiplier=73.0, sampling_prob=1.0, num_steps=1000)
    values: dict[str, Any] = {
        "uid": uid,
        "name": uid,
        "fingerprint": "f" * 64,
        "dataset": dataset,
        "manifest_sha256": f"manifest of {dataset}",
        "unit": "user",
        "relation": "add_or_remove_one",
        "event": settings.event(),
        "num_steps": settings.num_steps,
        "epsilon": 1.83,
        "delta": 1e-5,
        "settings": settings if advice else None,
        "lease_seconds": 3600.0,
    }
    return RunRequest(**(values | changes))


def set_python_clock(offset_seconds: float) -> None:
    """Let Python's clocks of this process be wrong; not the operating system's."""
    real, real_ns, real_class = time.time, time.time_ns, datetime.datetime

    class Wrong(real_class):
        @classmethod
        def now(cls, tz=None):
            return real_class.fromtimestamp(real() + offset_seconds, tz)

    time.time = lambda: real() + offset_seconds
    time.time_ns = lambda: real_ns() + int(offset_seconds * 1e9)
    datetime.datetime = Wrong


def set_machine_clock(registry: Registry, offset_seconds: float) -> None:
    """Let the clock of the machine that opens a SQLite registry be wrong: SQLite's own then is."""

    def wrong(connection: Any, _record: Any) -> None:
        seconds = lambda *_: 2440587.5 + (time.clock_gettime(time.CLOCK_REALTIME) + offset_seconds) / 86400  # noqa: E731
        connection.create_function("julianday", -1, seconds)

    assert registry.database.url.drivername == "sqlite"
    event.listen(registry.database._engine, "connect", wrong)


def _use_key(path: str) -> None:
    # A process that is forked from a server has the environment that the server was started with.
    os.environ["PRIVTRAIN_REGISTRY_KEY"] = path


def reserve_at_once(
    url: str,
    key: str,
    uid: str,
    barrier: Any,
    results: Any,
    offset_seconds: float = 0.0,
    is_machine_wrong: bool = False,
) -> None:
    """One racer, whose clock is wrong by ``offset_seconds``: Python's, and the machine's on SQLite if asked for."""
    _use_key(key)
    registry = Registry(url)
    registry.database.key()
    set_python_clock(offset_seconds)
    if is_machine_wrong and registry.database.url.drivername == "sqlite":
        set_machine_clock(registry, offset_seconds)
    barrier.wait(120)
    try:
        results.put((uid, registry.reserve(request(uid)).id))
    except (BudgetExceeded, ClockRefused):
        results.put((uid, None))


def open_at_once(url: str, key: str, barrier: Any, results: Any) -> None:
    """Make the same SQLite registry from many processes."""
    _use_key(key)
    barrier.wait(120)
    registry = Registry(url)
    results.put(registry.pseudonym("somebody"))


def start_working(url: str, key: str, journal: str, seed: int, num_runs: int, ready: Any) -> None:
    """:func:`work_until_killed` in a process of its own."""
    _use_key(key)
    work_until_killed(url, journal, seed, num_runs, ready)


def work_until_killed(url: str, journal: str, seed: int, num_runs: int, ready: Any) -> None:
    """Reserve, train, settle, refund and forget; every call that returned is written to the journal."""
    rng = np.random.default_rng(seed)
    registry = Registry(url, retry_seconds=60)
    descriptor = os.open(journal, os.O_WRONLY | os.O_CREAT | os.O_APPEND)

    def done(**what: Any) -> None:
        os.write(descriptor, json.dumps(what).encode() + b"\n")

    ready.set()
    for index in range(num_runs):
        uid = f"run-{seed}-{index}"
        num_steps = int(rng.integers(2, 50))
        begun = int(rng.integers(1, num_steps + 1))
        settings = Settings(float(rng.choice([2.0, 3.0])), 0.01, num_steps)
        registry.reserve(request(uid, settings))
        done(kind="began", uid=uid, noise=settings.noise_multiplier, steps=begun)
        ending = rng.integers(0, 4)
        if ending == 0:
            registry.refund(uid, LedgerEvidence(begun, "h"))
            done(kind="refunded", uid=uid)
        elif ending < 3:
            users = {f"{user:032x}": (1, 2) for user in range(USERS_OF_A_RUN)}
            registry.settle(uid, LedgerEvidence(begun, "h"), contributions=users)
            done(kind="settled", uid=uid)
        user = f"{rng.integers(0, 2**62):032x}"
        registry.forget(user)
        done(kind="forgotten", user=user)
    done(kind="finished")


def check_whole(url: str, journal: pathlib.Path) -> None:
    """Nothing half-applied, nothing acknowledged lost, nothing charged below what was begun."""
    registry = Registry(url)
    entries = [json.loads(line) for line in journal.read_text().splitlines()] if journal.exists() else []
    database = registry.database

    def rows(table: Any) -> list[Any]:
        return list(database.read(lambda c: c.execute(sa.select(table)).all()))

    reservations, settlements, contributions = rows(ReservationRow), rows(Settlement), rows(Contribution)
    uids = {row.id: row.uid for row in rows(Run)}
    by_uid: dict[str, list[Any]] = {}
    for row in reservations:
        by_uid.setdefault(uids[row.run_id], []).append(row)
    assert set(by_uid) == set(uids.values()), "a run without its reservation"
    assert all(len(found) == 1 for found in by_uid.values())
    assert len(views.runs(database)) == len(reservations), "a reservation whose run, data set or mechanism is missing"
    ends = {row.reservation_id: row for row in settlements}
    assert len(ends) == len(settlements), "settled twice"
    for row in reservations:
        assert (row.state == "closed") == (row.id in ends) == (row.closed_at is not None)
        assert 0 < row.num_charged <= row.num_reserved
        assert row.state == "closed" or row.num_charged == row.num_reserved
    settled = {row.run_id for row in reservations if row.id in ends and ends[row.id].kind == "settle"}
    counts = {run: sum(item.run_id == run for item in contributions) for run in {c.run_id for c in contributions}}
    assert counts == dict.fromkeys(settled, USERS_OF_A_RUN), "contributions without their settlement, or not all"
    listed = [row.number for row in rows(OptOut)]
    assert sorted(listed) == list(range(1, len(listed) + 1))
    assert rows(Meta)[0].num_opt_outs == len(listed)
    opted_out = {row.user_pseudonym for row in rows(OptOut)}
    truth: dict[float, int] = {}
    for entry in entries:
        if entry["kind"] == "forgotten":
            assert entry["user"] in opted_out
        if entry["kind"] in ("settled", "refunded"):
            assert by_uid[entry["uid"]][0].state == "closed"
        if entry["kind"] == "began":
            assert by_uid[entry["uid"]][0].num_charged >= entry["steps"]
            truth[entry["noise"]] = truth.get(entry["noise"], 0) + entry["steps"]
    parts = [spending.part_of(Settings(noise, 0.01, steps).event()) for noise, steps in truth.items()]
    budget = views.budgets(database)[0]
    assert budget.spent >= spending.composed_epsilon(parts, budget.delta).epsilon
    if database.url.drivername == "sqlite":
        assert database.read(lambda c: c.exec_driver_sql("PRAGMA integrity_check").scalar_one()) == "ok"


def wait_for(path: pathlib.Path, text: str, seconds: float = 60) -> None:
    """Wait until a file holds a text."""
    deadline = time.monotonic() + seconds
    while not path.exists() or text not in path.read_text():
        assert time.monotonic() < deadline
        time.sleep(0.02)
