"""Budgets over runs: the life cycle, on SQLite and on PostgreSQL."""

from __future__ import annotations

import json
import math
import os
import pathlib
import re
import stat
import time

import dp_accounting
import pytest
import sqlalchemy as sa
from alembic import command
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext
from hypothesis import given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

import accountants
from privtrain import cli
from privtrain.config.load import apply_overrides, public_tree, validate
from privtrain.config.publishing import RegistrySection
from privtrain.errors import BudgetExceeded, ConfigError, GuaranteeLost, PrivtrainError, RegistryUnreachable
from privtrain.registry import database as database_module
from privtrain.registry import reservations, spending, views
from privtrain.registry.commands import parse_period
from privtrain.registry.database import Database, key_path
from privtrain.registry.evidence import LedgerEvidence
from privtrain.registry.snapshot import snapshot_of
from privtrain.registry.spending import Settings
from privtrain.registry.store import Registry, Settled
from privtrain.registry.tables import Base, Budget, Dataset, Population, ReservationRow, Settlement
from tests.privtrain.registry_server import PASSWORD
from tests.privtrain.registry_work import DATASET, request

DAY = 86400.0


def number_that_fits(settings_: Settings, epsilon: float, delta: float) -> int:
    """By the accountants alone."""
    count = 0
    while True:
        event = dp_accounting.SelfComposedDpEvent(settings_.event(), count + 1)
        if accountants.epsilon(event, delta, accountant="tilted").upper > epsilon:
            return count
        count += 1


def fill(registry: Registry, **kwargs) -> int:
    count = 0
    while True:
        try:
            registry.reserve(request(f"fill-{count}", **kwargs))
        except BudgetExceeded:
            return count
        count += 1


def age(registry: Registry, seconds: float) -> None:
    """Let time pass for everything that is in the registry."""
    columns = ("created_at", "lease_until", "closed_at")
    values = {name: getattr(ReservationRow, name) - seconds for name in columns}
    registry.database.write(lambda c: c.execute(sa.update(ReservationRow).values(**values)))


def test_exactly_as_many_runs_fit_as_the_accountants_say(registry):
    one = Settings(1.0, 0.01, 1000)
    fits = number_that_fits(one, 8, 1e-6)
    assert fill(registry, settings=one) == fits
    view = views.budgets(registry.database)[0]
    assert view.num_runs == view.num_live == fits
    assert view.spent <= 8
    assert view.sum_of_epsilons == pytest.approx(1.83 * fits)
    assert view.sum_of_epsilons > 2 * view.spent


def test_different_mechanisms_are_composed_not_added(registry):
    chosen = [Settings(1.0, 0.01, 500), Settings(2.0, 0.05, 300), Settings(5.0, 1.0, 10)]
    for index, one in enumerate(chosen):
        registry.reserve(request(f"run-{index}", one))
    event = dp_accounting.ComposedDpEvent([one.event() for one in chosen])
    view = views.budgets(registry.database)[0]
    exact = accountants.epsilon(event, 1e-6, accountant="pld").upper
    assert view.spent == pytest.approx(exact, rel=2e-3)
    assert view.spent >= accountants.epsilon(event, 1e-6, accountant="tilted").lower


def test_a_resumed_run_finds_its_own_reservation(registry):
    first = registry.reserve(request("run"))
    again = registry.reserve(request("run"))
    assert first.is_new
    assert not again.is_new
    assert again.id == first.id
    assert views.budgets(registry.database)[0].num_runs == 1


def test_settling_charges_what_was_spent_and_is_done_once(registry):
    registry.reserve(request("run"))
    for _ in range(2):
        registry.settle("run", LedgerEvidence(400, "head"), contributions={"0" * 32: (3, 7), "1" * 32: (1, 1)})
    (run,) = views.runs(registry.database)
    assert (run.state, run.num_charged, run.num_reserved) == ("closed", 400, 1000)
    held = views.user(registry.database, "0" * 32).held[0]
    assert (held.num_steps, held.num_records) == (3, 7)
    counts = registry.database.read(
        lambda c: c.execute(sa.select(sa.func.count()).select_from(Settlement)).scalar_one()
    )
    assert counts == 1
    expected = accountants.epsilon(Settings(73.0, 1.0, 400).event(), 1e-6, accountant="tilted").upper
    assert views.budgets(registry.database)[0].spent == pytest.approx(expected)


def test_a_reservation_counts_in_full_until_its_run_ends(registry):
    before = fill(registry)
    age(registry, 2 * 3600)
    assert {run.state for run in views.runs(registry.database)} == {"expired"}
    with pytest.raises(BudgetExceeded):
        registry.reserve(request("another"))
    assert views.budgets(registry.database)[0].num_runs == before


def test_expired_run_that_returns_keeps_its_reservation(registry):
    first = registry.reserve(request("run"))
    age(registry, 2 * 3600)
    assert views.runs(registry.database)[0].state == "expired"
    assert registry.reserve(request("run")).id == first.id
    assert views.runs(registry.database)[0].state == "open"
    age(registry, 2 * 3600)
    registry.renew(first.id, 3600)
    assert views.runs(registry.database)[0].state == "open"


def test_an_expired_reservation_is_settled_in_full(registry):
    registry.reserve(request("run"))
    age(registry, 2 * 3600)
    registry.settle("run", LedgerEvidence(10, "h"), contributions={})
    (run,) = views.runs(registry.database)
    assert (run.state, run.num_charged, run.epsilon) == ("closed", 1000, 1.83)


def test_a_refund_gives_back_only_what_never_began(registry):
    before = fill(registry)
    assert registry.refund("fill-0", LedgerEvidence(0, "h")) == 1000
    assert registry.reserve(request("instead")).is_new
    assert registry.refund("fill-1", LedgerEvidence(999, "h")) == 1
    with pytest.raises(BudgetExceeded):
        registry.reserve(request("one more"))
    with pytest.raises(PrivtrainError, match="nothing to refund"):
        registry.refund("fill-0", LedgerEvidence(0, "h"))
    assert views.budgets(registry.database)[0].num_runs == before


def test_refunded_run_reserves_again_on_resume(registry):
    first = registry.reserve(request("run"))
    registry.refund("run", LedgerEvidence(100, "h"))
    second = registry.reserve(request("run"))
    assert second.is_new
    assert second.id != first.id
    assert sum(run.num_charged for run in views.runs(registry.database)) == 1100


def test_an_open_reservation_cannot_be_closed_by_hand(registry):
    held = registry.reserve(request("run"))
    with pytest.raises(PrivtrainError, match="alive"):
        registry.close(held.id)
    age(registry, 2 * 3600)
    url = registry.database.url.render_as_string(hide_password=False)
    done = CliRunner().invoke(cli.app, ["registry", "close", held.id, "--registry", url])
    assert done.exit_code == 0, done.output
    (run,) = views.runs(registry.database)
    assert (run.state, run.num_charged) == ("closed", 1000)
    with pytest.raises(PrivtrainError, match="no reservation"):
        registry.close("nothing")


def test_a_period_counts_from_the_end_of_a_run_in_every_window(registry):
    registry.set_budget(DATASET, epsilon=8, delta=1e-6, period_seconds=30 * DAY)
    before = fill(registry)
    age(registry, 365 * DAY)
    with pytest.raises(BudgetExceeded, match="any 30 days"):
        registry.reserve(request("runs that have not ended count however old they are"))
    for index in range(before):
        registry.settle(f"fill-{index}", LedgerEvidence(1000, "h"), contributions={})
    age(registry, 29.9 * DAY)
    with pytest.raises(BudgetExceeded):
        registry.reserve(request("inside the window"))
    age(registry, 0.2 * DAY)
    assert registry.reserve(request("after it")).is_new


def test_a_budget_per_user_spans_the_data_sets_of_a_population(registry):
    registry.set_budget("mail", epsilon=8, delta=1e-6, population="people")
    registry.set_budget("chat", epsilon=8, delta=1e-6, population="people")
    count = fill(registry, dataset="mail")
    with pytest.raises(BudgetExceeded, match="every user of 'people'"):
        registry.reserve(request("chat-run", dataset="chat"))
    assert registry.reserve(request("elsewhere")).is_new
    assert count == number_that_fits(Settings(73.0, 1.0, 1000), 8, 1e-6)


def test_every_budget_that_applies_must_allow_a_run(registry):
    registry.set_budget("mail", epsilon=8, delta=1e-6, population="people")
    registry.set_budget("mail", epsilon=2.5, delta=1e-6, population="people", scope="dataset")
    registry.set_budget("chat", epsilon=8, delta=1e-6, population="people")
    registry.reserve(request("first", dataset="mail"))
    with pytest.raises(BudgetExceeded, match="the data set 'mail'"):
        registry.reserve(request("second", dataset="mail"))
    assert registry.reserve(request("third", dataset="chat")).is_new


def test_changed_budget_decides_about_next_run(registry):
    registry.reserve(request("run"))
    registry.set_budget(DATASET, epsilon=1, delta=1e-6)
    with pytest.raises(BudgetExceeded, match="nothing of this budget is left"):
        registry.reserve(request("next", advice=True))
    assert registry.reserve(request("run")).is_new is False, "a run that has begun keeps what it reserved"
    registry.set_budget(DATASET, epsilon=20, delta=1e-6)
    assert registry.reserve(request("next")).is_new


@pytest.mark.parametrize("registry_url", ["sqlite"], indirect=True)
def test_refusal_names_what_is_left_and_what_fits(registry):
    for index in range(11):
        registry.reserve(request(f"run-{index}"))
    asked = Settings(noise_multiplier=0.9, sampling_prob=0.01, num_steps=2000)
    with pytest.raises(BudgetExceeded) as caught:
        registry.reserve(request("big", asked, advice=True, epsilon=3.4))
    text = str(caught.value)
    assert "left: ε" in text
    assert "records_per_user changes nothing" in text
    noise = float(re.search(r"noise_multiplier=([\d.]+) \(given 0.9\)", text)[1])
    epsilon = float(re.search(r"target_epsilon=([\d.]+) \(given", text)[1])
    steps = int(re.search(r"num_steps=(\d+) ", text)[1])
    prob = float(re.search(r"sampling_prob=([\d.]+) ", text)[1])
    calibrated = accountants.calibrate_noise_multiplier(
        target_epsilon=epsilon, target_delta=1e-5, sampling_prob=0.01, num_steps=2000
    )
    for fits, too_much in (
        (Settings(noise, 0.01, 2000), Settings(noise - 0.002, 0.01, 2000)),
        (Settings(calibrated, 0.01, 2000), Settings(calibrated - 0.003, 0.01, 2000)),
        (Settings(0.9, 0.01, steps), Settings(0.9, 0.01, steps + 3)),
        (Settings(0.9, prob, 2000), Settings(0.9, prob * 1.005, 2000)),
    ):
        with pytest.raises(BudgetExceeded):
            registry.reserve(request("too much", too_much))
        assert registry.reserve(request("fits", fits)).is_new
        registry.refund("fits", LedgerEvidence(0, ""))


def test_a_run_without_noise_fits_no_budget(registry):
    with pytest.raises(BudgetExceeded, match="with this run: ε inf"):
        registry.reserve(request("run", Settings(0.0, 0.01, 10)))


def test_unknown_names_are_refused_with_the_command(registry):
    with pytest.raises(PrivtrainError, match="budget set unheard-of"):
        registry.reserve(request("run", dataset="unheard-of"))
    with pytest.raises(PrivtrainError, match="per user"):
        registry.reserve(request("run", unit="example"))
    with pytest.raises(PrivtrainError, match="add_or_remove_one"):
        registry.reserve(request("run", relation="replace_one"))
    registry.set_budget("alias", epsilon=8, delta=1e-6)
    registry.reserve(request("run"))
    with pytest.raises(PrivtrainError, match="are the data set 'customers'"):
        registry.reserve(request("other", dataset="alias", manifest_sha256=f"manifest of {DATASET}"))
    with pytest.raises(PrivtrainError, match="needs a user-level guarantee"):
        registry.set_budget("records", epsilon=8, delta=1e-6, unit="example")
    registry.set_budget("records", epsilon=8, delta=1e-6, unit="example", scope="dataset")
    with pytest.raises(PrivtrainError, match="per example"):
        registry.reserve(request("of-records", dataset="records"))
    for wrong in ({"epsilon": -1}, {"delta": 2.0}, {"scope": "month"}, {"period_seconds": -1.0}, {"unit": "example"}):
        with pytest.raises(PrivtrainError):
            registry.set_budget(DATASET, **({"epsilon": 8, "delta": 1e-6} | wrong))


def test_a_population_has_one_unit(registry):
    registry.set_budget("mail", epsilon=8, delta=1e-6, population="people")
    with pytest.raises(PrivtrainError, match="'mail' of the same population has unit user"):
        registry.set_budget("lines", epsilon=8, delta=1e-6, population="people", scope="dataset", unit="example")
    registry.set_budget("rows", epsilon=8, delta=1e-6, population="tables", scope="dataset", unit="example")
    with pytest.raises(PrivtrainError, match="unit example"):
        registry.set_budget("owners", epsilon=8, delta=1e-6, population="tables")
    names = registry.database.read(lambda c: c.execute(sa.select(Dataset.name)).scalars().all())
    assert sorted(names) == [DATASET, "mail", "rows"], "what was refused left nothing behind"


def test_registry_with_mixed_units_reserves_nothing(registry):
    registry.set_budget("mail", epsilon=8, delta=1e-6, population="people")
    registry.set_budget("lines", epsilon=8, delta=1e-6, scope="dataset", unit="example")
    people = sa.select(Population.id).where(Population.name == "people").scalar_subquery()
    mixed = sa.update(Dataset).where(Dataset.name == "lines").values(population_id=people)
    moved = sa.update(Budget).where(Budget.scope == "dataset").values(population_id=people)
    registry.database.write(lambda c: (c.execute(mixed), c.execute(moved)))
    for name, unit in (("lines", "example"), ("mail", "user")):
        with pytest.raises(PrivtrainError, match="do not add up"):
            registry.reserve(request("run", dataset=name, unit=unit))
    alone = sa.delete(Dataset).where(Dataset.name == "mail")
    registry.database.write(lambda c: c.execute(alone))
    with pytest.raises(PrivtrainError, match="a budget for every user"):
        registry.reserve(request("run", dataset="lines", unit="example"))


def test_the_same_records_get_no_second_name_by_a_race(registry):
    registry.set_budget("alias", epsilon=8, delta=1e-6)
    same = registry.database.key().derive("dataset-manifest", f"manifest of {DATASET}").hex()
    asked = request("slow", dataset="alias", manifest_sha256=f"manifest of {DATASET}")
    part = spending.part_of(asked.event)
    snapshot = registry.database.read(lambda c: snapshot_of(c, asked, same))
    registry.reserve(request("fast"))  # takes the records for 'customers', in another population
    with pytest.raises(PrivtrainError, match="are the data set 'customers'"):
        registry.database.write(lambda c: reservations.insert(c, snapshot, asked, part, same))
    assert [run.uid for run in views.runs(registry.database)] == ["fast"]


def test_split_run_keeps_its_list_over_a_refund(registry):
    first, second = registry.pseudonym("alice"), registry.pseudonym("bob")
    registry.reserve(request("run"))
    registry.refund("run", LedgerEvidence(0, ""))
    registry.forget(first)
    assert registry.opted_out(registry.reserve(request("run"))) == {first}
    registry.refund("run", LedgerEvidence(100, "h"))
    registry.forget(second)
    again = registry.reserve(request("run", has_split=True))
    assert again.is_new
    assert registry.opted_out(again) == {first}
    assert registry.opted_out(registry.reserve(request("new", has_split=True))) == {first, second}


def test_user_sees_settled_reservation_with_whole_epsilon(registry):
    registry.reserve(request("run"))
    registry.refund("run", LedgerEvidence(100, "h"))
    registry.reserve(request("run"))
    registry.settle("run", LedgerEvidence(1000, "hh"), contributions={"0" * 32: (4, 9)})
    held = views.user(registry.database, "0" * 32).held
    assert [(one.run.epsilon, one.num_steps) for one in held] == [(1.83, 4)]


def test_more_steps_than_reserved_are_an_error(registry):
    registry.reserve(request("run"))
    with pytest.raises(GuaranteeLost, match="1001 steps, but 1000 were reserved"):
        registry.settle("run", LedgerEvidence(1001, "h"), contributions={})
    with pytest.raises(GuaranteeLost, match="1001 steps"):
        registry.refund("run", LedgerEvidence(1001, "h"))
    assert views.runs(registry.database)[0].state == "open"


def test_the_key_is_checked_once_for_all_users(registry, monkeypatch):
    registry.pseudonym("alice")
    monkeypatch.setattr(Database, "_retry", lambda *_, **__: pytest.fail("asked the database again"))
    assert len({registry.pseudonym(f"user-{i}") for i in range(100)}) == 100


def test_a_database_that_others_can_read_is_refused(tmp_path):
    file = tmp_path / "registry.db"
    Registry(str(file))
    file.chmod(0o640)
    with pytest.raises(PrivtrainError, match=f"chmod 600 {file}"):
        Registry(str(file), read_only=True)


def settled(registry: Registry, uid: str, head: str, **more) -> bool:
    """Whether it was charged beside another."""
    users = {"0" * 32: (3, 7)}
    return registry.settle(uid, LedgerEvidence(400, head), contributions=users, **more) is Settled.BESIDE


def test_release_after_closed_reservation_is_charged_in_full(registry):
    registry.set_budget(DATASET, epsilon=8, delta=1e-6, period_seconds=30 * DAY)
    held = registry.reserve(request("run"))
    age(registry, 2 * 3600)
    registry.close(held.id)
    age(registry, 31 * DAY)
    assert views.budgets(registry.database)[0].num_runs == 0
    with pytest.raises(GuaranteeLost, match="was closed"):
        registry.renew(held.id, 3600)
    for _ in range(2):
        assert not settled(registry, "run", "head")
    (run,) = views.runs(registry.database)
    assert run.num_charged == 1000
    assert run.closed_at == pytest.approx(time.time(), abs=60)
    assert views.budgets(registry.database)[0].num_runs == 1
    (one,) = views.user(registry.database, "0" * 32).held
    assert (one.num_steps, one.num_records) == (3, 7)


def test_two_releases_never_settle_as_one(registry):
    registry.reserve(request("run"))
    assert not settled(registry, "run", "head")
    assert settled(registry, "run", "another head")
    assert not settled(registry, "run", "another head"), "repeated: it is charged already"
    assert sorted(run.num_charged for run in views.runs(registry.database)) == [400, 1000]
    assert not settled(registry, "run", "head")
    assert len(views.runs(registry.database)) == 2
    assert {one.num_steps for one in views.user(registry.database, "0" * 32).held} == {6}


def test_second_copy_of_a_run_holds_the_reservation(registry):
    first = registry.reserve(request("run", claim="a"))
    second = registry.reserve(request("run", claim="b", earlier_claims=("a",)))
    assert second.id == first.id
    with pytest.raises(GuaranteeLost, match="another copy"):
        registry.renew(first.id, 3600, "a")
    registry.renew(first.id, 3600, "b")
    with pytest.raises(PrivtrainError, match="another copy"):
        registry.reserve(request("run", claim="c", earlier_claims=("a",)))
    with pytest.raises(PrivtrainError, match="another copy"):
        registry.refund("run", LedgerEvidence(0, ""), claims=("a",))
    assert settled(registry, "run", "head of a", claims=("a",)), "it was released all the same"
    assert not settled(registry, "run", "head of b", claims=("b",))
    assert sorted(run.num_charged for run in views.runs(registry.database)) == [400, 1000]


def test_crashed_start_finds_its_reservation(registry):
    first = registry.reserve(request("run", claim="a"))
    registry.reserve(request("run", claim="b", earlier_claims=("a",)))  # and the directory still has both
    assert registry.reserve(request("run", claim="c", earlier_claims=("a", "b"))).id == first.id


def test_first_schema_is_upgraded_with_reservations(registry):
    held = registry.reserve(request("run", claim="a"))
    config = database_module._alembic_config
    registry.database._retry(lambda c: command.downgrade(config(c), "0001"), write=True)
    registry.database.seen.path.unlink()  # that schema came before it
    registry.database.upgrade()
    assert registry.reserve(request("run", claim="z")).id == held.id


def test_a_snapshot_that_is_out_of_date_reserves_nothing(registry):
    manifest = "m" * 64
    part = spending.part_of(Settings(1.0, 0.01, 1000).event())
    first, second = request("first"), request("second")
    snapshot = registry.database.read(lambda c: snapshot_of(c, first, manifest))
    assert registry.database.write(lambda c: reservations.insert(c, snapshot, first, part, manifest)) is not None
    assert registry.database.write(lambda c: reservations.insert(c, snapshot, second, part, manifest)) is None
    assert views.budgets(registry.database)[0].num_runs == 1


def test_changing_a_budget_makes_snapshots_out_of_date(registry):
    asked, manifest = request("run"), "m" * 64
    part = spending.part_of(asked.event)
    snapshot = registry.database.read(lambda c: snapshot_of(c, asked, manifest))
    registry.set_budget(DATASET, epsilon=0.1, delta=1e-6)
    assert registry.database.write(lambda c: reservations.insert(c, snapshot, asked, part, manifest)) is None


def test_repeated_transaction_changes_nothing(registry, monkeypatch):
    """The server commits and dies before it says so: the call is repeated."""
    real = Database._retry

    def twice(self, work, *, write):
        if write:
            real(self, work, write=True)
        return real(self, work, write=write)

    monkeypatch.setattr(Database, "_retry", twice)
    held = registry.reserve(request("run"))
    registry.settle("run", LedgerEvidence(5, "h"), contributions={"0" * 32: (1, 1)})
    registry.forget("0" * 32)
    registry.forget("1" * 32)
    monkeypatch.undo()
    assert [run.reservation for run in views.runs(registry.database)] == [held.id]
    assert views.runs(registry.database)[0].num_charged == 5
    assert registry.opted_out(registry.reserve(request("next"))) == {"0" * 32, "1" * 32}


def test_opt_out_holds_for_later_runs_alone(registry):
    user, other = registry.pseudonym("alice"), registry.pseudonym("bob")
    before = registry.reserve(request("before"))
    registry.settle("before", LedgerEvidence(1000, "h"), contributions={user: (4, 9)})
    running = registry.reserve(request("running"))
    registry.forget(user)
    after = registry.reserve(request("after"))
    registry.forget(other)
    assert registry.opted_out(before) == registry.opted_out(running) == frozenset()
    assert registry.opted_out(after) == {user}
    assert registry.opted_out(registry.reserve(request("after"))) == {user}, "resumed: the same data"
    view = views.user(registry.database, user)
    assert [(held.run.name, held.num_steps, held.run.epsilon, held.run.delta) for held in view.held] == [
        ("before", 4, 1.83, 1e-5)
    ]
    assert [run.name for run in view.unfinished] == ["running"]
    assert view.opted_out_at is not None


def test_the_migrations_give_the_tables_of_the_code(registry):
    def differences(connection):
        return compare_metadata(MigrationContext.configure(connection), Base.metadata)

    assert registry.database.read(differences) == []


def test_a_registry_of_another_schema_is_refused(registry, registry_url):
    registry.database.write(lambda c: c.execute(sa.text("UPDATE alembic_version SET version_num = 'ffff'")))
    with pytest.raises(PrivtrainError, match="privtrain registry upgrade"):
        Registry(registry_url)


def test_a_server_without_a_registry_says_how_to_make_one(postgres):
    with pytest.raises(PrivtrainError, match="privtrain registry init"):
        Registry(postgres.new_database())


def test_another_key_of_opt_outs_is_refused(registry, registry_url):
    path = key_path(registry.database.url)
    path.write_text("ab" * 32 + "\n")
    with pytest.raises(GuaranteeLost, match="opted out would not be recognised"):
        Registry(registry_url).reserve(request("run"))
    path.unlink()
    with pytest.raises(GuaranteeLost, match="missing or damaged"):
        Registry(registry_url).pseudonym("alice")


def test_neither_ids_nor_digests_nor_keys_are_in_the_database(registry, tmp_path):
    registry.reserve(request("run"))
    registry.forget(registry.pseudonym("alice@example.org"))
    registry.settle("run", LedgerEvidence(1, "h"), contributions={registry.pseudonym("bob@example.org"): (1, 1)})
    key = key_path(registry.database.url).read_text().strip()
    if registry.database.url.drivername == "sqlite":
        stored = (tmp_path / "registry.db").read_bytes()
    else:
        tables = [table.name for table in Base.metadata.sorted_tables]
        stored = "".join(
            str(registry.database.read(lambda c, n=name: c.execute(sa.text(f"SELECT * FROM {n}")).all()))
            for name in tables
        ).encode()
    assert registry.pseudonym("alice@example.org").encode() in stored
    for secret in ("alice", "bob@", f"manifest of {DATASET}", key):
        assert secret.encode() not in stored
    assert stat.S_IMODE(key_path(registry.database.url).stat().st_mode) == 0o600


def test_a_sqlite_registry_is_private_to_its_owner(tmp_path):
    Registry(str(tmp_path / "new" / "registry.db"))
    assert stat.S_IMODE((tmp_path / "new").stat().st_mode) == 0o700
    assert stat.S_IMODE((tmp_path / "new" / "registry.db").stat().st_mode) == 0o600
    (tmp_path / "new" / "registry.db.key").chmod(0o644)
    with pytest.raises(PrivtrainError, match="chmod 600"):
        Registry(str(tmp_path / "new" / "registry.db")).pseudonym("alice")


def test_readers_cannot_write(registry_url):
    reader = Registry(registry_url, retry_seconds=0.2, read_only=True)
    with pytest.raises(RegistryUnreachable, match="read"):
        reader.forget("0" * 32)


def test_idle_jobs_hold_no_connection_of_the_server(postgres):
    url = postgres.new_database()
    Database(url).upgrade()
    jobs = [Registry(url) for _ in range(5)]
    count = sa.text("SELECT count(*) FROM pg_stat_activity WHERE application_name = 'privtrain'")
    assert jobs[0].database.read(lambda connection: connection.execute(count).scalar_one()) == 1


def test_a_password_is_never_shown(postgres, tmp_path):
    url = postgres.new_database()
    Database(url).upgrade()
    wrong = url.replace(PASSWORD, "wrong-" + PASSWORD)
    nowhere = url.replace(str(postgres.directory), str(tmp_path))
    for bad in (wrong, nowhere, f"postgresql://u@/d?host={tmp_path}&password={PASSWORD}"):
        began = time.monotonic()
        with pytest.raises(RegistryUnreachable) as caught:
            Registry(bad, retry_seconds=0.5)
        assert PASSWORD not in str(caught.value)
        assert time.monotonic() - began < 30
    with pytest.raises(PrivtrainError) as caught:
        Registry(f"mysql://u:{PASSWORD}@host/d")
    assert PASSWORD not in str(caught.value)
    assert PASSWORD not in Database(url).shown


def test_password_in_config_is_refused_url_not_published(tree):
    for url in (f"postgresql://u:{PASSWORD}@h/d", f"postgresql://h/d?password={PASSWORD}"):
        with pytest.raises(ConfigError) as caught:
            validate(apply_overrides(tree, [f"registry.url={url}"]))
        assert PASSWORD not in str(caught.value)
        assert "PRIVTRAIN_REGISTRY" in str(caught.value)
    config = validate(apply_overrides(tree, ["registry.url=postgresql://db.internal/budgets", "registry.dataset=mail"]))
    assert "db.internal" not in json.dumps(public_tree(config))


def test_the_registry_is_used_only_when_asked_for(monkeypatch, tmp_path):
    assert database_module.registry_url(RegistrySection()) is None
    assert database_module.registry_url(RegistrySection(dataset="mail")) == (
        f"sqlite:///{tmp_path}/data-home/privtrain/registry.db"
    )
    assert database_module.registry_url(RegistrySection(url="sqlite:////a.db")) == "sqlite:////a.db"
    monkeypatch.setenv("PRIVTRAIN_REGISTRY", "sqlite:////b.db")
    assert database_module.registry_url(RegistrySection(url="sqlite:////a.db")) == "sqlite:////b.db"


@pytest.mark.parametrize(
    ("text", "seconds"), [("365d", 365 * DAY), ("24h", DAY), ("2w", 14 * DAY), ("0.5y", 182.5 * DAY)]
)
def test_periods_are_read_as_people_write_them(text, seconds):
    assert parse_period(text) == seconds


@pytest.mark.parametrize("text", ["", "365", "d", "-1d", "0d", "1 fortnight"])
def test_other_periods_are_refused(text):
    with pytest.raises(PrivtrainError, match="365d"):
        parse_period(text)


mechanisms = st.builds(
    Settings,
    noise_multiplier=st.floats(0.6, 8),
    sampling_prob=st.sampled_from([0.001, 0.01, 0.2, 1.0]),
    num_steps=st.integers(1, 400),
)


@given(st.lists(mechanisms, min_size=1, max_size=4), st.floats(0.5, 12))
@settings(max_examples=12)
def test_fits_is_certified_and_never_refuses_what_fits(chosen, epsilon):
    parts = [spending.part_of(one.event()) for one in chosen]
    event = dp_accounting.ComposedDpEvent([one.event() for one in chosen])
    try:
        answer = accountants.epsilon(event, 1e-6, accountant="tilted")
    except ValueError:  # losses of hundreds beside tiny ones: beyond float64, and beyond every budget asked for here
        assert accountants.epsilon(event, 1e-6, accountant="tilted-edgeworth").upper > 12
        assert not spending.fits(parts, epsilon, 1e-6)
        return
    if spending.fits(parts, epsilon, 1e-6):
        assert answer.lower <= epsilon
    else:
        assert answer.upper > epsilon
    assert answer.lower <= spending.composed_epsilon(parts, 1e-6).epsilon <= answer.upper * 1.001
    assert spending.renyi_epsilon(parts, 1e-6) >= answer.lower


def test_uncomposable_mechanisms_are_added_with_split_delta():
    allocation = accountants.random_allocation_event(noise_multiplier=3.0, num_steps=5, num_epochs=1)
    parts = [spending.part_of(allocation), spending.part_of(Settings(2.0, 0.01, 100).event())]
    spent = spending.composed_epsilon(parts, 1e-6)
    own = accountants.epsilon(Settings(2.0, 0.01, 100).event(), 5e-7, accountant="tilted").upper
    assert "basic composition" in spent.method
    assert own < spent.epsilon < math.inf
    assert spending.fits(parts, spent.epsilon * 1.01, 1e-6)
    assert not spending.fits(parts, own, 1e-6)


def test_events_survive_the_database(registry):
    one = Settings(1.25, 0.02, 7)
    registry.reserve(request("run", one))
    (run,) = views.runs(registry.database)
    assert run.mechanism == {"noise_multiplier": 1.25, "sampling_prob": 0.02, "num_steps": 7}


def invoke(*arguments: str) -> str:
    result = CliRunner().invoke(cli.app, list(arguments), env={"COLUMNS": "200"}, catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.output


def test_the_command_line_sets_shows_and_forgets(registry_url, registry, monkeypatch):
    monkeypatch.setenv("PRIVTRAIN_REGISTRY", registry_url)
    said = invoke(
        "registry", "budget", "set", "mail", "--epsilon", "4", "--delta", "1e-6", "--per", "user", "--period", "365d"
    )
    assert "every user of 'mail': ε 4 at δ 1e-06 in any 365 days" in said
    registry.reserve(request("run", dataset="mail"))
    shown = invoke("registry", "status")
    assert "each user of mail" in shown
    assert "1.830 at δ 1e-05" in shown
    found = json.loads(invoke("registry", "status", "--json"))
    assert [view["name"] for view in found] == [DATASET, "mail"]
    assert found[1]["num_live"] == 1
    assert "noise 73, prob 1, 1,000 steps" in " ".join(invoke("registry", "runs").split())
    user = registry.pseudonym("alice")
    registry.settle("run", LedgerEvidence(1000, "h"), contributions={user: (4, 9)})
    said = invoke("ledger", "forget", "alice")
    assert "alice" not in said
    assert "on the do-not-train list since" in said
    assert "(1.830, 1e-05)-DP for one user" in said
    assert json.loads(invoke("registry", "user", "--pseudonym", user, "--json"))["held"][0]["num_records"] == 9
    assert registry.opted_out(registry.reserve(request("next"))) == {user}


def test_the_command_line_makes_a_registry(tmp_path):
    said = invoke("registry", "init", "--registry", str(tmp_path / "r.db"))
    assert "r.db is ready" in said
    assert "no budgets yet" in invoke("registry", "status", "--registry", str(tmp_path / "r.db"))
    assert os.listdir(tmp_path / "data-home") == [] if (tmp_path / "data-home").exists() else True


def test_help_does_not_wait_for_the_accountants():
    import subprocess
    import sys

    code = "import sys, privtrain.cli; print([m for m in ('sqlalchemy', 'dp_accounting', 'torch') if m in sys.modules])"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=pathlib.Path.cwd()
    )
    assert done.stdout.strip() == "[]"
