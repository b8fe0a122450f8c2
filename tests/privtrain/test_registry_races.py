"""Races, kills and servers that die: the last of a budget is given once, and nothing is ever half-applied."""

from __future__ import annotations

import pathlib
import threading
import time

import numpy as np
import pytest
import sqlalchemy as sa

from privtrain.errors import GuaranteeLost, RegistryUnreachable
from privtrain.registry import store, views
from privtrain.registry.database import Database, key_path
from privtrain.registry.store import Registry
from privtrain.registry.tables import Contribution, OptOut, ReservationRow, Settlement
from tests.privtrain import registry_work as work
from tests.privtrain.registry_work import request

pytestmark = [pytest.mark.timeout(600)]


def key_of(url: str) -> str:
    """The key file that this test's registry uses."""
    return str(key_path(Database(url).url))


def test_run_asking_from_many_processes_reserves_once(registry, registry_url, processes):
    barrier, results = processes.Barrier(6), processes.Queue()
    racers = [
        processes.Process(
            target=work.reserve_at_once, args=(registry_url, key_of(registry_url), "same", barrier, results)
        )
        for _ in range(6)
    ]
    for racer in racers:
        racer.start()
    held = {results.get(timeout=150)[1] for _ in racers}
    for racer in racers:
        racer.join()
    assert len(held) == 1
    assert len(views.runs(registry.database)) == 1


def test_process_between_look_and_snapshot_is_seen(registry, registry_url, monkeypatch):
    first = Registry(registry_url).reserve(request("same"))
    look, looks = store.holds, []

    def looked_too_early(connection, uid):
        looks.append(uid)
        return len(looks) > 1 and look(connection, uid)

    monkeypatch.setattr(store, "holds", looked_too_early)
    assert registry.reserve(request("same")).id == first.id
    assert len(views.runs(registry.database)) == 1


def test_a_sqlite_registry_made_by_many_processes_at_once_is_one(tmp_path, processes):
    url = f"sqlite:///{tmp_path}/new/registry.db"
    barrier, results = processes.Barrier(6), processes.Queue()
    makers = [processes.Process(target=work.open_at_once, args=(url, key_of(url), barrier, results)) for _ in range(6)]
    for maker in makers:
        maker.start()
    names = {results.get(timeout=150) for _ in makers}
    for maker in makers:
        maker.join()
    assert len(names) == 1
    assert sorted(path.name for path in (tmp_path / "new").iterdir()) == [
        ".registry.db.lock",
        "registry.db",
        "registry.db.key",
    ]


def num_entries(journal: pathlib.Path) -> int:
    return journal.read_bytes().count(b"\n")


def wait_for_entries(journal: pathlib.Path, count: int) -> None:
    deadline = time.monotonic() + 120
    while num_entries(journal) < count:
        assert time.monotonic() < deadline
        time.sleep(0.002)


def kill_at_random_points(url: str, journal: pathlib.Path, processes, num_kills: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    began = time.monotonic()
    work.work_until_killed(url, str(journal), 1000 * seed + 999, 3, threading.Event())
    call_seconds = (time.monotonic() - began) / 9
    for number in range(num_kills):
        ready = processes.Event()
        worker = processes.Process(
            target=work.start_working, args=(url, key_of(url), str(journal), 1000 * seed + number, 10_000, ready)
        )
        worker.start()
        assert ready.wait(120)
        wait_for_entries(journal, num_entries(journal) + int(rng.integers(0, 4)))
        time.sleep(rng.uniform(0, 1.5 * call_seconds))
        worker.kill()
        worker.join()
    work.check_whole(url, journal)
    assert journal.read_text().count('"began"') > num_kills / 2, "the kills came before there was anything to kill"


def wide_budget(registry: Registry) -> None:
    registry.set_budget(work.DATASET, epsilon=1e6, delta=1e-6)


def test_job_killed_anywhere_leaves_nothing_half_applied(registry, registry_url, tmp_path, processes):
    wide_budget(registry)
    kill_at_random_points(registry_url, tmp_path / "journal", processes, 8, seed=1)


@pytest.mark.campaign
@pytest.mark.timeout(3000)
@pytest.mark.parametrize("seed", [2, 3, 4, 5])
def test_two_hundred_kills_leave_nothing_half_applied(registry, registry_url, tmp_path, processes, seed):
    wide_budget(registry)
    kill_at_random_points(registry_url, tmp_path / "journal", processes, 50, seed=seed)


def test_killed_server_leaves_nothing_half_applied(postgres, tmp_path, processes):
    url = postgres.new_database()
    Database(url).upgrade()
    wide_budget(Registry(url))
    journal = tmp_path / "journal"
    ready = processes.Event()
    worker = processes.Process(target=work.start_working, args=(url, key_of(url), str(journal), 77, 60, ready))
    worker.start()
    assert ready.wait(120)
    for _ in range(3):
        time.sleep(0.4)
        postgres.kill()
        time.sleep(0.2)
        postgres.start()
    worker.join(180)
    assert worker.exitcode == 0, "the job did not get over the restarts"
    assert '"finished"' in journal.read_text()
    work.check_whole(url, journal)


def test_without_its_server_a_job_waits_and_then_says_so(postgres):
    url = postgres.new_database()
    Database(url).upgrade()
    patient, hurried = Registry(url, retry_seconds=60), Registry(url, retry_seconds=0.5)
    wide_budget(patient)
    postgres.kill()
    try:
        with pytest.raises(RegistryUnreachable, match="Nothing was reserved"):
            hurried.reserve(request("hurried"))
        threading.Timer(1.0, postgres.start).start()
        assert patient.reserve(request("patient")).is_new
    finally:
        time.sleep(1.5)
    assert [run.uid for run in views.runs(patient.database)] == ["patient"]


MUTANTS = {
    "a settlement is lost": sa.delete(Settlement),
    "some contributions are lost": sa.delete(Contribution).where(Contribution.user_pseudonym == f"{3:032x}"),
    "a charge is below what was begun": sa.update(ReservationRow).values(num_charged=1),
    "an opt-out is lost": sa.delete(OptOut),
    "a reservation is closed by nothing": sa.update(ReservationRow).values(state="closed", closed_at=1.0),
}


@pytest.mark.parametrize("registry_url", ["sqlite"], indirect=True)
@pytest.mark.parametrize("mutant", MUTANTS)
def test_the_check_after_a_kill_can_fail(registry, registry_url, tmp_path, mutant):
    wide_budget(registry)
    journal = tmp_path / "journal"
    work.work_until_killed(registry_url, str(journal), 5, 6, threading.Event())
    registry.reserve(request("open"))
    work.check_whole(registry_url, journal)
    registry.database.write(lambda c: c.execute(MUTANTS[mutant]))
    with pytest.raises((AssertionError, GuaranteeLost)):  # a settlement is missed already as the registry is opened
        work.check_whole(registry_url, journal)
