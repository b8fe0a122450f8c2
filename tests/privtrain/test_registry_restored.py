"""A registry that forgot: restored from a backup, one of two copies, or gone. Nothing is spent twice in it."""

from __future__ import annotations

import dataclasses
import pathlib
import shutil
import types

import pytest
import sqlalchemy as sa
from alembic import command
from typer.testing import CliRunner

from privtrain.cli import app
from privtrain.errors import BudgetExceeded, DamagedFile, GuaranteeLost, PrivtrainError, RegistryUnreachable
from privtrain.job import reservation as budget
from privtrain.job.reservation import BudgetReservation
from privtrain.registry import clock, views
from privtrain.registry import database as database_module
from privtrain.registry.database import KEY_VARIABLE, Database
from privtrain.registry.evidence import LedgerEvidence
from privtrain.registry.requests import Reservation
from privtrain.registry.seen import SeenFile
from privtrain.registry.store import Registry, Settled
from tests.privtrain.registry_work import DATASET, request

DAY = 86400.0
AT_THE_END = LedgerEvidence(1000, "head", "a" * 64, "f" * 64)


@pytest.fixture
def file(tmp_path) -> pathlib.Path:
    """A registry on SQLite."""
    path = tmp_path / "place" / "registry.db"
    Registry(str(path)).set_budget(DATASET, epsilon=8, delta=1e-6)
    return path


def spend(file: pathlib.Path, num_runs: int = 12) -> None:
    """Settle as many runs; twelve spend the budget."""
    registry = Registry(str(file))
    for number in range(num_runs):
        registry.reserve(request(f"run-{number}"))
        shown = dataclasses.replace(AT_THE_END, head=f"head {number}")
        registry.settle(f"run-{number}", shown, contributions={"0" * 32: (1, 1)})


def restored(file: pathlib.Path) -> Registry:
    """A registry that is open while its file gives way to an older one, after the budget was spent."""
    backup = file.with_name("backup.db")
    shutil.copy(file, backup)
    spend(file)
    opened = Registry(str(file))
    shutil.copy(backup, file)
    return opened


def test_a_restored_registry_is_refused(file):
    opened = restored(file)
    for use in (
        lambda: Registry(str(file)),
        lambda: Registry(str(file), read_only=True),
        lambda: opened.reserve(request("next")),
        lambda: opened.settle("run-3", AT_THE_END, contributions={}, request=request("run-3")),
        lambda: opened.set_budget(DATASET, epsilon=9, delta=1e-6),
        lambda: opened.forget("1" * 32),
    ):
        with pytest.raises(GuaranteeLost, match="older than this machine knows it"):
            use()
    assert views.runs(opened.database) == []


def test_mutant_registry_that_believes_any_file_overspends(file, monkeypatch):
    """The mutant."""
    restored(file)
    monkeypatch.setattr(SeenFile, "check", lambda *_: None)
    assert Registry(str(file)).reserve(request("next")).is_new


def test_an_opt_out_that_a_backup_forgot_is_missed(file):
    backup = file.with_name("backup.db")
    shutil.copy(file, backup)
    Registry(str(file)).forget("1" * 32)
    shutil.copy(backup, file)
    with pytest.raises(GuaranteeLost, match="1 opt-outs are missing"):
        Registry(str(file))


def test_two_copies_under_one_key_do_not_both_spend(file, monkeypatch):
    monkeypatch.setenv(KEY_VARIABLE, str(file.with_name("registry.db.key")))
    copy = file.with_name("copy.db")
    shutil.copy(file, copy)
    spend(file)
    with pytest.raises(GuaranteeLost, match="one of two copies"):
        Registry(str(copy))
    with pytest.raises(BudgetExceeded):
        Registry(str(file)).reserve(request("next"))


def test_registries_that_share_a_key_are_told_apart(file, monkeypatch):
    monkeypatch.setenv(KEY_VARIABLE, str(file.with_name("registry.db.key")))
    spend(file)
    Registry(str(file.with_name("other.db"))).set_budget(DATASET, epsilon=8, delta=1e-6)
    spend(file.with_name("other.db"), num_runs=1)


def test_a_registry_that_is_gone_is_not_begun_again(file):
    spend(file, num_runs=1)
    file.unlink()
    with pytest.raises(GuaranteeLost, match="is gone"):
        Registry(str(file))
    with pytest.raises(GuaranteeLost, match="is gone"):
        Database(str(file)).upgrade()
    assert not file.exists()


def test_a_backup_from_before_registries_had_ids_is_refused(file):
    """An upgrade draws it another id, under which nothing was seen."""
    spend(file)
    database = Database(str(file))
    database._retry(lambda c: command.downgrade(database_module._alembic_config(c), "0004"), write=True)
    database.upgrade()
    with pytest.raises(GuaranteeLost, match="noted under its earlier id are missing"):
        Registry(str(file))
    invoke = lambda *words: CliRunner().invoke(app, ["registry", "restored", "--registry", str(file), *words])  # noqa: E731
    assert "noted under its earlier id are missing" in invoke().output
    assert "going on without" in invoke("--confirm").output
    assert "is as new as this machine knows it" in invoke().output
    assert len(database.seen.known()) == 1
    Registry(str(file))


def test_a_registry_that_was_emptied_is_not_begun_again(file):
    spend(file, num_runs=1)
    file.write_bytes(b"")
    for begin in (Database(str(file)).upgrade, lambda: Registry(str(file))):
        with pytest.raises(PrivtrainError, match=r"is gone|holds no registry"):
            begin()
    assert file.read_bytes() == b""


def test_an_empty_file_that_was_no_registry_becomes_one(tmp_path):
    file = tmp_path / "registry.db"
    file.touch(mode=0o600)
    Database(str(file)).upgrade()
    assert views.runs(Registry(str(file)).database) == []


def test_a_server_that_was_restored_is_refused(registry, registry_url):
    registry.reserve(request("run"))
    registry.database._retry(lambda c: c.execute(sa.text("UPDATE populations SET version = 1")), write=True)
    with pytest.raises(GuaranteeLost, match="older than this machine knows it"):
        Registry(registry_url).reserve(request("next"))


def test_what_was_seen_and_is_damaged_is_refused(file):
    seen = file.with_name("registry.db.key.seen")
    for content in (b"", b"{", b'{"a": 1}', b'{"a": {"num_charges": "1"}}'):
        seen.write_bytes(content)
        with pytest.raises(DamagedFile, match="restored from a backup"):
            Registry(str(file))


def test_backup_in_use_charges_released_runs_again(file):
    restored(file)
    invoke = lambda *words: CliRunner().invoke(app, ["registry", "restored", "--registry", str(file), *words])  # noqa: E731
    assert "changes of budgets, 12 settlements are missing" in invoke().output
    assert "going on without" in invoke("--confirm").output
    assert "is as new as this machine knows it" in invoke().output
    registry = Registry(str(file))
    for number in range(12):
        uid, shown = f"run-{number}", dataclasses.replace(AT_THE_END, head=f"head {number}")
        outcomes = [
            registry.settle(uid, shown, contributions={"0" * 32: (1, 1)}, request=request(uid)) for _ in range(2)
        ]
        assert outcomes == [Settled.LATE, Settled.ALREADY]
    with pytest.raises(BudgetExceeded):
        registry.reserve(request("next"))
    assert len(views.user(registry.database, "0" * 32).held) == 12


def test_release_unknown_to_registry_is_charged_in_full(registry):
    shown = dataclasses.replace(AT_THE_END, num_steps=400)
    assert registry.settle("run", shown, contributions={}, request=request("run")) is Settled.LATE
    (view,) = views.runs(registry.database)
    assert (view.state, view.num_charged, view.epsilon) == ("closed", 1000, 1.83)


def test_release_under_second_name_is_charged_to_known_data(registry):
    """Else whoever trains without the registry and settles under a new name pays nothing."""
    registry.reserve(request("first"))
    registry.set_budget("alias", epsilon=8, delta=1e-6)
    for uid, name in (("second", "alias"), ("third", "nobody's")):
        asked = request(uid, dataset=name, manifest_sha256=request("first").manifest_sha256)
        shown = dataclasses.replace(AT_THE_END, head=uid)
        assert registry.settle(uid, shown, contributions={}, request=asked) is Settled.LATE
    assert {view.name: view.num_runs for view in views.budgets(registry.database)} == {DATASET: 3, "alias": 0}


def test_a_run_that_cannot_settle_is_not_told_that_it_is_charged(monkeypatch, capsys):
    """The registry may not know it."""

    def unreachable(*_: object, **__: object) -> None:
        raise RegistryUnreachable("no answer")

    held = held_by(types.SimpleNamespace(settle=unreachable))
    held._inputs.run = types.SimpleNamespace(is_complete=lambda: True)  # pyright: ignore[reportAttributeAccessIssue]
    held._inputs.fingerprint = held._inputs.plan = None  # pyright: ignore[reportAttributeAccessIssue]
    for name in ("evidence_so_far", "evidence_of_release", "_request_if_any"):
        monkeypatch.setattr(budget, name, lambda *_: None)
    monkeypatch.setattr(held, "_contributions", dict)
    held.settle()
    told = " ".join(capsys.readouterr().out.split())
    assert "a reservation that it holds stays charged in full; without one, it is charged nowhere" in told


def test_a_release_outdates_what_others_decided_before_it(registry):
    """Whoever looked at the budget before the late charge must look again."""
    before = registry.database.read(lambda c: c.execute(sa.text("SELECT version FROM populations")).scalar_one())
    registry.settle("run", AT_THE_END, contributions={}, request=request("run"))
    after = registry.database.read(lambda c: c.execute(sa.text("SELECT version FROM populations")).scalar_one())
    assert after > before


@pytest.mark.parametrize("changes", [{"unit": "example"}, {"dataset": "nobody's"}, {"relation": "zero_out"}])
def test_a_release_of_no_budget_here_is_charged_nowhere(registry, changes):
    asked = request("run", **changes)
    assert registry.settle("run", AT_THE_END, contributions={}, request=asked) is Settled.UNKNOWN


def test_a_run_ends_no_earlier_than_its_last_sign_of_life(registry, monkeypatch):
    """Though the server's clock was set back in between: no window of a budget may close earlier."""
    held, start = registry.reserve(request("run")), 4e9
    monkeypatch.setattr(clock, "estimate", lambda _: start + 100 * DAY)
    registry.renew(held.id, 3600)
    monkeypatch.setattr(clock, "estimate", lambda _: start)
    registry.renew(held.id, 3600)
    monkeypatch.setattr(clock, "now", lambda _: start + DAY)
    registry.settle("run", AT_THE_END, contributions={})
    assert views.runs(registry.database)[0].closed_at == start + 100 * DAY


@pytest.mark.parametrize("period", [float("nan"), float("inf"), 1e-300, 59 * 60.0, -DAY])
def test_a_period_that_no_clock_can_tell_is_refused(registry, period):
    """NaN is before and after every time: what was charged would never count again."""
    with pytest.raises(PrivtrainError, match="period"):
        registry.set_budget(DATASET, epsilon=8, delta=1e-6, period_seconds=period)
    assert [view.period_seconds for view in views.budgets(registry.database)] == [None]


@pytest.mark.parametrize(
    "changes",
    [
        *({"epsilon": value} for value in (float("nan"), float("inf"), -1.0)),
        *({"delta": value} for value in (float("nan"), 0.0, 1.0, 2.0)),
        *({"lease_seconds": value} for value in (float("nan"), float("inf"), 0.0, -1.0)),
        {"num_steps": -1},
    ],
)
def test_a_request_with_a_number_that_is_none_is_refused(changes):
    with pytest.raises(PrivtrainError, match=next(iter(changes))):
        request("run", **changes)


class Unanswering:
    """A registry that answers from some call on."""

    def __init__(self, num_unanswered: int) -> None:
        self.num_left = num_unanswered

    def renew(self, *_: object) -> None:
        self.num_left -= 1
        if self.num_left >= 0:
            raise RegistryUnreachable("no answer")


def held_by(registry: object) -> BudgetReservation:
    section = types.SimpleNamespace(lease_hours=1.0)
    inputs = types.SimpleNamespace(config=types.SimpleNamespace(registry=section), run=None)
    return BudgetReservation(registry, Reservation("r" * 32, "open", 0, True), inputs, "uid", ("claim",))  # pyright: ignore[reportArgumentType]


def test_no_step_is_taken_before_the_registry_knows_the_ledger(monkeypatch):
    """Else any ledger, also none, would end the reservation."""
    monkeypatch.setattr(budget, "evidence_so_far", lambda _: AT_THE_END)
    registry = Unanswering(1)
    held = held_by(registry)
    with pytest.raises(RegistryUnreachable):
        held.check()
    held.check()
    registry.num_left = 5
    held.check()


def test_a_user_opts_out_in_whatever_unicode_form(registry):
    """The data may hold an accented letter as two characters."""
    registry.forget(registry.pseudonym("Ren\u00e9e"))
    assert registry.pseudonym("Rene\u0301e") in registry.opted_out(registry.reserve(request("run")))


def test_unicode_forms_of_one_id_add_up(monkeypatch):
    held = held_by(types.SimpleNamespace(pseudonym=lambda user: user.replace("e\u0301", "\u00e9")))
    held._inputs.run = types.SimpleNamespace(manifest=pathlib.Path("nowhere"))  # pyright: ignore[reportAttributeAccessIssue]
    held._inputs.corpus = held._inputs.plan = None  # pyright: ignore[reportAttributeAccessIssue]
    monkeypatch.setattr(budget, "plant", lambda *_: None)
    monkeypatch.setattr(budget, "contributions_of", lambda *_: {"\u00e9": (2, 3), "e\u0301": (4, 5), "b": (1, 1)})
    assert held._contributions() == {"\u00e9": (6, 8), "b": (1, 1)}


def test_users_who_are_in_two_populations_are_told(registry):
    """Under another name the same people have a second budget."""
    registry.set_budget("renamed", epsilon=8, delta=1e-6)
    people = {f"{number:032x}": (1, 1) for number in range(3)}
    for uid, dataset, users in (
        ("first", DATASET, people),
        ("again", DATASET, people),
        ("other", "renamed", {"e" * 32: (1, 1)}),
        ("alias", "renamed", {"f" * 32: (1, 1), f"{2:032x}": (1, 1)}),
    ):
        registry.reserve(request(uid, dataset=dataset))
        registry.settle(uid, dataclasses.replace(AT_THE_END, head=uid), contributions=users)
    found = {uid: views.populations_shared_with(registry.database, uid) for uid in ("first", "again", "other", "alias")}
    assert found == {"first": ["renamed"], "again": ["renamed"], "other": [], "alias": [DATASET]}


@pytest.mark.parametrize("answers", [True, False])
def test_settlement_names_shared_users_or_stands(monkeypatch, capsys, answers):
    def shared(*_: object) -> list[str]:
        if not answers:
            raise RegistryUnreachable("no answer")
        return ["[red]others"]

    monkeypatch.setattr(budget, "populations_shared_with", shared)
    held_by(types.SimpleNamespace(database=None))._tell_of_shared_users()
    told = " ".join(capsys.readouterr().out.split())
    assert ("are also in the population '[red]others'" in told) is answers
