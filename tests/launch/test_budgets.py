"""Whole jobs under a budget: reserve before anything is trained, settle at the release, drop who opted out."""

from __future__ import annotations

import dataclasses
import json
import pathlib
import re
import shutil
import stat
import time

import pytest
import sqlalchemy as sa
from typer.testing import CliRunner

from privtrain.cli import app
from privtrain.data.split import seal
from privtrain.errors import (
    BudgetExceeded,
    ConfigError,
    GuaranteeLost,
    LedgerCorrupt,
    PlanMismatch,
    Preempted,
    PrivtrainError,
    RegistryUnreachable,
)
from privtrain.job import reservation as budget_module
from privtrain.job import train as job
from privtrain.job.evidence import evidence_so_far
from privtrain.job.train import train
from privtrain.ledger.head import head_path
from privtrain.registry import evidence, views
from privtrain.registry.evidence import LedgerEvidence
from privtrain.registry.store import Registry
from privtrain.registry.tables import ReservationRow
from privtrain.run.directory import RunDirectory
from tests.conftest import tiny_tree, write_config
from tests.privtrain.interrupted import after_step

pytestmark = [pytest.mark.timeout(600), pytest.mark.usefixtures("no_self_test")]


@pytest.fixture
def registry(tmp_path, monkeypatch) -> Registry:
    monkeypatch.delenv("PRIVTRAIN_REGISTRY_KEY", raising=False)
    monkeypatch.setenv("PRIVTRAIN_REGISTRY", str(tmp_path / "budgets" / "registry.db"))
    made = Registry(str(tmp_path / "budgets" / "registry.db"))
    made.set_budget("people", epsilon=20, delta=1e-6)
    return made


@pytest.fixture
def private_tree(tree):
    """The same run with a secret of its own: one with a test seed may not be charged."""
    del tree["privacy"]["insecure_seed"]
    tree["registry"] = {"dataset": "people", "retry_seconds": 1}
    return tree


def start(tree, tmp_path, name: str = "tiny") -> pathlib.Path:
    tree["run"]["name"] = name
    train(write_config(tree, tmp_path / f"{name}.yaml"))
    return tmp_path / "runs" / name


def test_a_run_reserves_settles_and_says_who_contributed(private_tree, tmp_path, registry):
    run = start(private_tree, tmp_path)
    (view,) = views.runs(registry.database)
    statement = json.loads((run / "privacy.json").read_text())
    assert (view.state, view.num_charged, view.name, view.dataset) == ("closed", 4, "tiny", "people")
    assert view.epsilon == statement["epsilon"]
    note = run / "secret" / "reservation.json"
    assert json.loads(note.read_text())["reservation"] == view.reservation
    assert stat.S_IMODE(note.stat().st_mode) == 0o600
    manifest = json.loads((run / "secret" / "manifest.json").read_text())
    held = {user: views.user(registry.database, registry.pseudonym(user)).held for user in manifest["held_in"]}
    assert sum(bool(runs) for runs in held.values()) > len(held) / 4
    assert all(
        1 <= one.num_steps <= 4 and one.num_records <= 3 * one.num_steps for runs in held.values() for one in runs
    )
    for user in manifest["held_out"]:
        assert views.user(registry.database, registry.pseudonym(user)).held == ()
    start(private_tree, tmp_path)  # complete: nothing is reserved again
    assert len(views.runs(registry.database)) == 1


def test_mirror_that_fails_at_the_release_stops_no_settlement(private_tree, tmp_path, registry, monkeypatch):
    def fail(*_) -> None:
        raise PrivtrainError("W&B did not take it")

    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setattr("privtrain.tracking.mirrors.MirrorAtTheEnd.publish", fail)
    private_tree["tracking"] = {"wandb": True}
    for _ in range(2):  # the same command goes on failing, and the release stands
        with pytest.raises(PrivtrainError, match="did not take it"):
            start(private_tree, tmp_path)
        (view,) = views.runs(registry.database)
        assert (view.state, view.num_charged) == ("closed", 4)


@pytest.mark.parametrize("error", [PrivtrainError("no"), Preempted("asked to stop"), RegistryUnreachable("gone")])
def test_a_start_that_fails_after_it_reserved_can_be_repeated(private_tree, tmp_path, registry, monkeypatch, error):
    """Nothing was trained: the next start finds the reservation, or makes another one after a refund."""

    def fail(*_) -> None:
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(job, "check_rows", fail)
        with pytest.raises(type(error)):
            start(private_tree, tmp_path)
    start(private_tree, tmp_path)
    assert [view.num_charged for view in views.runs(registry.database) if view.num_charged] == [4]


def test_start_without_the_registry_keeps_a_stopped_ones_hold(private_tree, tmp_path, registry, monkeypatch):
    def stop(*_) -> None:
        raise Preempted("asked to stop")

    with monkeypatch.context() as patch:
        patch.setattr(job, "check_rows", stop)
        with pytest.raises(Preempted):
            start(private_tree, tmp_path)
    with monkeypatch.context() as patch:
        patch.delenv("PRIVTRAIN_REGISTRY")
        del private_tree["registry"]["dataset"]
        with pytest.raises(PlanMismatch, match="holds a reservation"):
            start(private_tree, tmp_path)
    private_tree["registry"]["dataset"] = "people"
    start(private_tree, tmp_path)
    (view,) = views.runs(registry.database)
    assert (view.state, view.num_charged) == ("closed", 4)


def test_nothing_of_the_registry_is_published(private_tree, tmp_path, registry):
    registry.forget(registry.pseudonym("user-003"))
    run = start(private_tree, tmp_path)
    secrets = [view.reservation for view in views.runs(registry.database)]
    secrets += [registry.pseudonym(f"user-{i:03d}") for i in range(24)] + ["user-003", str(tmp_path / "budgets")]
    for path in run.rglob("*"):
        if path.is_file() and path.relative_to(run).parts[0] not in ("secret", "checkpoints"):
            content = path.read_bytes()
            assert not any(secret.encode() in content for secret in secrets), path


def test_a_run_that_does_not_fit_trains_nothing(private_tree, tmp_path, registry, monkeypatch):
    registry.set_budget("people", epsilon=0.5, delta=1e-6)
    monkeypatch.setattr(job, "load_network", lambda *_: pytest.fail("the model was loaded"))
    with pytest.raises(BudgetExceeded, match="target_epsilon="):
        start(private_tree, tmp_path)
    assert views.runs(registry.database) == []
    assert not (tmp_path / "runs" / "tiny" / "secret" / "ledger.jsonl").exists()
    monkeypatch.undo()
    monkeypatch.setenv("PRIVTRAIN_REGISTRY", str(tmp_path / "budgets" / "registry.db"))
    private_tree["privacy"]["noise_multiplier"] = 12.0
    start(private_tree, tmp_path)  # the directory was not taken by the plan that was refused
    assert [view.state for view in views.runs(registry.database)] == ["closed"]


def test_without_its_registry_a_run_does_not_start(private_tree, tmp_path, registry, monkeypatch):
    monkeypatch.setenv("PRIVTRAIN_REGISTRY", f"postgresql://nobody@/nothing?host={tmp_path}")
    monkeypatch.setattr(job, "load_network", lambda *_: pytest.fail("the model was loaded"))
    with pytest.raises(RegistryUnreachable):
        start(private_tree, tmp_path)


def test_run_not_private_or_without_a_data_set_is_refused(private_tree, tmp_path, registry):
    private_tree["privacy"]["insecure_seed"] = 1
    with pytest.raises(PrivtrainError, match="not private cannot be charged"):
        start(private_tree, tmp_path)
    del private_tree["privacy"]["insecure_seed"], private_tree["registry"]
    with pytest.raises(ConfigError, match="name the data set to be charged"):
        start(private_tree, tmp_path, "other")
    assert views.runs(registry.database) == []


def test_a_start_that_fails_costs_nothing(private_tree, tmp_path, registry, monkeypatch):
    def fail(*_args):
        raise GuaranteeLost("the self-test found something")

    monkeypatch.setattr(job, "_self_test", fail)
    with pytest.raises(GuaranteeLost):
        start(private_tree, tmp_path)
    (view,) = views.runs(registry.database)
    assert (view.state, view.num_charged) == ("closed", 0)
    monkeypatch.undo()
    monkeypatch.setenv("PRIVTRAIN_REGISTRY", str(tmp_path / "budgets" / "registry.db"))
    start(private_tree, tmp_path)
    assert sorted(view.num_charged for view in views.runs(registry.database)) == [0, 4]


def stop() -> None:
    raise GuaranteeLost("stopped here")


def start_until_stopped(num_steps: int, *arguments) -> None:
    with after_step(num_steps - 1, stop), pytest.raises(GuaranteeLost):
        start(*arguments)


def test_stopped_run_keeps_its_reservation_and_ends_under_it(private_tree, tmp_path, registry, monkeypatch):
    start_until_stopped(3, private_tree, tmp_path)
    (view,) = views.runs(registry.database)
    assert (view.state, view.num_charged) == ("open", 4)
    with monkeypatch.context() as patched:
        patched.delenv("PRIVTRAIN_REGISTRY")
        del private_tree["registry"]
        with pytest.raises(PlanMismatch, match="no registry is configured"):
            start(private_tree, tmp_path)
    private_tree["registry"] = {"dataset": "people"}
    start(private_tree, tmp_path)
    (after,) = views.runs(registry.database)
    assert (after.reservation, after.state, after.num_charged) == (view.reservation, "closed", 4)


def test_abandoned_run_gets_back_the_steps_it_never_began(private_tree, tmp_path, registry):
    start_until_stopped(2, private_tree, tmp_path)
    url = str(tmp_path / "budgets" / "registry.db")
    done = CliRunner().invoke(app, ["registry", "refund", str(tmp_path / "runs" / "tiny"), "--registry", url])
    assert "2 steps stay charged, 2 were given back" in done.output
    (view,) = views.runs(registry.database)
    assert (view.state, view.num_charged) == ("closed", 2)
    assert 0 < view.epsilon < views.budgets(registry.database)[0].epsilon
    start(private_tree, tmp_path)  # resumed after all: its plan is reserved anew
    assert sorted(view.num_charged for view in views.runs(registry.database)) == [2, 4]
    with pytest.raises(PrivtrainError, match="is released"):
        budget_module.refund_run(tmp_path / "runs" / "tiny", str(tmp_path / "budgets" / "registry.db"))


def stopped_after(num_steps: int, tree, tmp_path) -> RunDirectory:
    tree["performance"]["checkpoint_interval_steps"] = 1
    start_until_stopped(num_steps, tree, tmp_path)
    return RunDirectory(tmp_path / "runs" / "tiny")


def lose_all_but_a_key(run: RunDirectory) -> None:
    for path in (head_path(run.ledger), run.manifest):
        path.unlink()
    for path in (run.checkpoints, run.ledger.with_suffix("")):
        shutil.rmtree(path)
        path.mkdir(mode=0o700)


def lose_the_head(run: RunDirectory) -> None:
    head_path(run.ledger).unlink()


@pytest.mark.parametrize("lose_more", [None, lose_the_head, lose_all_but_a_key])
def test_a_lost_ledger_gives_nothing_back(private_tree, tmp_path, registry, lose_more):
    run = stopped_after(3, private_tree, tmp_path)
    run.ledger.unlink()
    if lose_more is not None:
        lose_more(run)
    with pytest.raises(LedgerCorrupt, match="is missing"):
        start(private_tree, tmp_path)
    with pytest.raises(LedgerCorrupt, match=r"is (gone|missing)"):
        budget_module.refund_run(run.root, str(tmp_path / "budgets" / "registry.db"))
    (view,) = views.runs(registry.database)
    assert (view.state, view.num_charged) == ("open", 4)
    assert run.exists(), "it keeps its identity, and with it its reservation"


def test_an_older_ledger_gives_nothing_back(private_tree, tmp_path, registry, monkeypatch):
    real = job.begin_session

    def keep_a_copy(inputs, *others):
        real(inputs, *others)
        secret = inputs.run.secret
        shutil.copytree(secret, tmp_path / "older")

    monkeypatch.setattr(job, "begin_session", keep_a_copy)
    run = stopped_after(3, private_tree, tmp_path)
    for name in ("ledger.jsonl", "ledger.head"):
        shutil.copy(tmp_path / "older" / name, run.secret / name)
    with pytest.raises(LedgerCorrupt, match="is newer than"):
        budget_module.refund_run(run.root, str(tmp_path / "budgets" / "registry.db"))
    assert views.runs(registry.database)[0].num_charged == 4


def close_the_reservation(registry: Registry) -> None:
    (view,) = views.runs(registry.database)
    registry.database.write(lambda c: c.execute(sa.update(ReservationRow).values(lease_until=1.0)))
    registry.close(view.reservation)


def test_a_run_whose_reservation_was_closed_releases_nothing(private_tree, tmp_path, registry):
    with after_step(3, lambda: close_the_reservation(registry)), pytest.raises(GuaranteeLost, match="was closed"):
        start(private_tree, tmp_path)
    run = RunDirectory(tmp_path / "runs" / "tiny")
    assert not run.privacy.exists()
    assert not run.adapter.exists()
    start(private_tree, tmp_path)
    assert [view.num_charged for view in views.runs(registry.database)] == [4, 4]


def test_heartbeat_that_finds_the_reservation_closed_stops(private_tree, tmp_path, registry, monkeypatch):
    private_tree["registry"]["lease_hours"] = 0.4 / 3600
    private_tree["privacy"]["num_steps"] = 30
    steps = []
    real = job.Trainer.train_step

    def step(self, number):
        real(self, number)
        steps.append(number)
        if number == 0:
            close_the_reservation(registry)
        time.sleep(0.1)

    monkeypatch.setattr(job.Trainer, "train_step", step)
    with pytest.raises(GuaranteeLost, match="was closed"):
        start(private_tree, tmp_path)
    assert len(steps) < 29


def test_copied_run_does_not_train_on_the_same_reservation(private_tree, tmp_path, registry):
    run = stopped_after(2, private_tree, tmp_path)
    shutil.copytree(run.root, tmp_path / "copies" / "tiny")
    start(private_tree, tmp_path)
    registry.database.write(  # as if the first were still training
        lambda c: c.execute(sa.update(ReservationRow).values(state="open", lease_until=time.time() + 3600))
    )
    private_tree["run"]["output_dir"] = str(tmp_path / "copies")
    with pytest.raises(PrivtrainError, match="another copy of this run directory"):
        start(private_tree, tmp_path)
    with pytest.raises(PrivtrainError, match="another copy of this run directory"):
        budget_module.refund_run(tmp_path / "copies" / "tiny", str(tmp_path / "budgets" / "registry.db"))
    assert RunDirectory(tmp_path / "copies" / "tiny").exists()


def test_run_resumes_after_a_refund_and_an_opt_out(private_tree, tmp_path, registry):
    run = stopped_after(2, private_tree, tmp_path)
    budget_module.refund_run(run.root, str(tmp_path / "budgets" / "registry.db"))
    for index in range(0, 24, 3):
        registry.forget(registry.pseudonym(f"user-{index:03d}"))
    start(private_tree, tmp_path)
    assert run.is_complete()
    assert sorted(view.num_charged for view in views.runs(registry.database)) == [2, 4]


def test_user_who_opted_out_is_in_no_later_run_counted_privately(private_tree, tmp_path, registry, capsys):
    first = start(private_tree, tmp_path, "first")
    before = json.loads((first / "secret" / "manifest.json").read_text())
    gone = ["user-004", "user-011", "user-020"]
    for user in gone:
        registry.forget(registry.pseudonym(user))
    second = start(private_tree, tmp_path, "second")
    after = json.loads((second / "secret" / "manifest.json").read_text())
    assert set(gone) <= {*before["held_in"], *before["held_out"]}
    assert set(gone).isdisjoint({*after["held_in"], *after["held_out"], *after["attacker"]})
    assert all(user not in gone for user, _ in after["evaluation"])
    assert json.loads((second / "secret" / "data_counts.json").read_text())["num_users_opted_out"] == 3
    assert json.loads((first / "secret" / "data_counts.json").read_text())["num_users_opted_out"] == 0
    assert after["data_sha256"] == before["data_sha256"], "the attack job checks it against the files"
    said = capsys.readouterr().out
    assert not re.search(r"opt(ed)?[ -]out|do-not-train|dropped", said.replace(str(tmp_path), ""))


def test_undelivered_settlement_is_made_up_by_the_same_command(private_tree, tmp_path, registry, monkeypatch, capsys):
    def unreachable(*_args, **_kwargs):
        raise RegistryUnreachable("no server")

    with monkeypatch.context() as patched:
        patched.setattr(Registry, "settle", unreachable)
        run = start(private_tree, tmp_path)
    assert (run / "privacy.json").exists()
    assert "Until the same command settles this run" in " ".join(capsys.readouterr().out.split())
    assert views.runs(registry.database)[0].state == "open"
    start(private_tree, tmp_path)
    assert views.runs(registry.database)[0].state == "closed"


def unsettled(tree, tmp_path, monkeypatch, name: str = "tiny") -> RunDirectory:
    """A run that was released while the registry was away at the last moment."""

    def unreachable(*_args, **_kwargs):
        raise RegistryUnreachable("no server")

    with monkeypatch.context() as patched:
        patched.setattr(Registry, "settle", unreachable)
        return RunDirectory(start(tree, tmp_path, name))


def test_settling_believes_the_ledger_not_the_statement(private_tree, tmp_path, registry, monkeypatch, capsys):
    run = unsettled(private_tree, tmp_path, monkeypatch)
    statement = json.loads(run.privacy.read_text())
    reserved = views.runs(registry.database)[0].epsilon
    run.privacy.write_text(json.dumps({**statement, "steps_released": 0, "epsilon": 0.0}))
    start(private_tree, tmp_path)
    (view,) = views.runs(registry.database)
    assert (view.state, view.num_charged, view.epsilon) == ("closed", 4, reserved)
    assert "steps_released is 0, the ledger shows 4" in " ".join(capsys.readouterr().out.split())


def test_mutant_that_settles_by_the_statement_is_seen(private_tree, tmp_path, registry, monkeypatch):
    """The registry remembers what the ledger showed, and refuses; did it believe as well, nothing would be charged."""

    def by_the_statement(run: RunDirectory, *_: object) -> LedgerEvidence:
        statement = json.loads(run.privacy.read_text())
        shown = evidence_so_far(run)
        assert shown is not None
        return dataclasses.replace(shown, num_steps=statement["steps_released"])

    run = unsettled(private_tree, tmp_path, monkeypatch)
    statement = json.loads(run.privacy.read_text())
    run.privacy.write_text(json.dumps({**statement, "steps_released": 0, "epsilon": 0.0}))
    monkeypatch.setattr(budget_module, "evidence_of_release", by_the_statement)
    with pytest.raises(GuaranteeLost, match="shows 0 steps, but the run had begun 4"):
        start(private_tree, tmp_path)
    assert views.runs(registry.database)[0].state == "open"
    monkeypatch.setattr(evidence, "check", lambda *_: None)
    start(private_tree, tmp_path)
    assert views.runs(registry.database)[0].num_charged == 0


def put_in_the_ledger_of(other: RunDirectory, run: RunDirectory) -> None:
    """With its keys and its manifest: all that a ledger goes with."""
    for path in (*other.secret.glob("ledger.*"), *other.secret.glob("*.key"), other.manifest):
        shutil.copy(path, run.secret / path.name)
    shutil.rmtree(run.ledger.with_suffix(""))
    shutil.copytree(other.ledger.with_suffix(""), run.ledger.with_suffix(""))


def test_another_runs_ledger_settles_nothing(private_tree, tmp_path, registry, monkeypatch):
    """Of the same plan and the same data, so that only the registry knows whose it is."""
    run = unsettled(private_tree, tmp_path, monkeypatch)
    put_in_the_ledger_of(RunDirectory(start(private_tree, tmp_path, "other")), run)
    with pytest.raises(GuaranteeLost, match="was replaced"):
        start(private_tree, tmp_path)
    charged = {view.name: (view.state, view.num_charged) for view in views.runs(registry.database)}
    assert charged == {"tiny": ("open", 4), "other": ("closed", 4)}


def test_a_fresh_runs_ledger_gives_nothing_back(private_tree, tmp_path, registry, monkeypatch):
    """A ledger that shows one step, in the directory of a run that began three."""
    start_until_stopped(3, private_tree, tmp_path)
    start_until_stopped(1, private_tree, tmp_path, "other")
    run = RunDirectory(tmp_path / "runs" / "tiny")
    shutil.rmtree(run.checkpoints)
    run.checkpoints.mkdir(mode=0o700)
    put_in_the_ledger_of(RunDirectory(tmp_path / "runs" / "other"), run)
    with pytest.raises(GuaranteeLost, match="was replaced"):
        budget_module.refund_run(run.root, str(tmp_path / "budgets" / "registry.db"))
    assert {view.num_charged for view in views.runs(registry.database)} == {4}


def test_a_manifest_that_calls_a_user_invented_hides_nobody(private_tree, tmp_path, registry, monkeypatch):
    """Invented users are nobody's budget; the manifest that says who they are is the one training began with."""
    run = unsettled(private_tree, tmp_path, monkeypatch)
    manifest = json.loads(run.manifest.read_text())
    del manifest["sha256"]
    manifest["held_out"] = manifest["held_out"][1:]
    run.manifest.write_text(json.dumps({**manifest, "sha256": seal(manifest)}))
    with pytest.raises(LedgerCorrupt, match="was replaced"):
        start(private_tree, tmp_path)
    assert views.runs(registry.database)[0].state == "open"


def test_a_release_without_its_statement_is_not_refunded(private_tree, tmp_path, registry, monkeypatch):
    """Settled it says who contributed; refunded it would not."""
    run = unsettled(private_tree, tmp_path, monkeypatch)
    run.privacy.unlink()
    with pytest.raises(LedgerCorrupt, match="was released"):
        budget_module.refund_run(run.root, str(tmp_path / "budgets" / "registry.db"))


def test_a_release_that_never_reserved_is_told(private_tree, tmp_path, registry, monkeypatch, capsys):
    with monkeypatch.context() as patched:
        patched.delenv("PRIVTRAIN_REGISTRY")
        section = private_tree.pop("registry")
        start(private_tree, tmp_path)
    private_tree["registry"] = section
    start(private_tree, tmp_path)
    assert "it is charged in full now" in " ".join(capsys.readouterr().out.split())
    (view,) = views.runs(registry.database)
    assert (view.state, view.num_charged) == ("closed", view.num_reserved)


def test_the_lease_is_renewed_while_training(private_tree, tmp_path, registry, monkeypatch):
    private_tree["registry"]["lease_hours"] = 0.2 / 3600
    seen = []
    real = job.Trainer.train_step

    def slow(self, number):
        import time

        time.sleep(0.2)
        seen.append(registry.database.read(lambda c: c.execute(sa.select(ReservationRow.lease_until)).scalar_one()))
        real(self, number)

    monkeypatch.setattr(job.Trainer, "train_step", slow)
    start(private_tree, tmp_path)
    assert seen == sorted(set(seen))


@pytest.mark.dist
@pytest.mark.slow
def test_two_ranks_drop_the_same_users_by_one_ones_registry(tmp_path, tiny_llama, users_file, registry):
    from tests import jobs

    registry.forget(registry.pseudonym("user-004"))
    tree = tiny_tree(tiny_llama, users_file, tmp_path / "runs")
    del tree["privacy"]["insecure_seed"]
    tree["run"]["name"] = "two"
    tree["privacy"]["num_steps"] = 2
    tree["registry"] = {"url": str(tmp_path / "budgets" / "registry.db"), "dataset": "people"}
    done = jobs.run("privtrain", "train", write_config(tree, tmp_path / "two.yaml"))
    assert done.returncode == 0, done.output[-3000:]
    counts = json.loads((tmp_path / "runs" / "two" / "secret" / "data_counts.json").read_text())
    assert counts["num_users_opted_out"] == 1
    assert views.runs(registry.database)[0].state == "closed"
