"""Where metrics go: mirrors show what ``metrics.jsonl`` says, once; alerts say only what was released."""

from __future__ import annotations

import contextlib
import importlib.machinery
import json
import pathlib
import socket
import sys
import types
from typing import Any

import pytest
import wandb

from privtrain.config import validate
from privtrain.errors import ConfigError, PrivtrainError
from privtrain.inputs import check_inputs
from privtrain.job.train import train
from privtrain.privacy.plan import PrivacyPlan
from privtrain.run.directory import RunDirectory
from privtrain.tracking import wandb_tracker
from privtrain.tracking.mirrors import BlockedMirror, MirrorAtTheEnd
from privtrain.tracking.open import open_machine_tracker
from privtrain.tracking.sync import sync_run
from privtrain.tracking.trackers import JsonlTracker, NullTracker, QuietTracker, ReleaseGate
from tests.conftest import write_config
from tests.privtrain.published import Private, published_texts, wandb_records, wandb_rows

pytestmark = pytest.mark.usefixtures("no_self_test")


def test_replayed_run_has_every_row_once(tree, tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    train(write_config(tree, tmp_path / "c.yaml"))
    run = tmp_path / "runs" / "tiny"
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    said = sync_run(run)
    assert said.startswith("sent nothing (WANDB_MODE=offline)")
    assert f"{len(rows)} rows are in {run}" in said
    wandb.teardown()  # waits until the file is written
    (file,) = run.rglob("*.wandb")
    records = wandb_records(file)
    assert wandb_rows(records) == rows
    summary = {u.key or u.nested_key[0]: u.value_json for r in records for u in r.summary.update}
    assert (
        json.loads(summary["privacy/ledger_head"]) == json.loads((run / "privacy.json").read_text())["ledger"]["head"]
    )


@pytest.mark.parametrize("moment", ["before it is installed", "before the mirrors know"])
def test_next_start_mirrors_release_lost_in_a_crash(tree, moment, tmp_path, monkeypatch):
    """Every row and the release, once; and a third start shows nothing more."""
    from privtrain.job import publish as publishing
    from privtrain.job import train as job

    def die(*_):
        raise KeyboardInterrupt

    monkeypatch.setenv("WANDB_MODE", "offline")
    tree["tracking"] = {"wandb": True, "tensorboard": True}
    path = write_config(tree, tmp_path / "c.yaml")
    with monkeypatch.context() as patched:
        if moment == "before it is installed":
            patched.setattr(publishing, "install", die)
        else:
            patched.setattr(job, "after_release", die)
        with pytest.raises(KeyboardInterrupt):
            train(path)
    wandb.teardown()
    run = tmp_path / "runs" / "tiny"
    metrics = (run / "metrics.jsonl").read_bytes()
    known = {file for file in run.rglob("*") if "wandb" in str(file) or "tensorboard" in str(file)}
    train(path)
    wandb.teardown()
    assert (run / "metrics.jsonl").read_bytes() == metrics
    (file,) = set(run.rglob("*.wandb")) - known
    records = wandb_records(file)
    rows = [json.loads(line) for line in metrics.splitlines()]
    assert wandb_rows(records) == rows
    assert "privacy/ledger_head" in {u.key or u.nested_key[0] for r in records for u in r.summary.update}
    assert [file for file in (run / "tensorboard").iterdir() if file not in known]
    files = set(run.rglob("*"))
    train(path)
    wandb.teardown()
    assert set(run.rglob("*")) == files


def test_sync_without_a_key_is_refused_before_anything_is_read(tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "online")
    monkeypatch.setattr("privtrain.tracking.sync._has_key", lambda: False)
    run = tmp_path / "run"
    (run / "secret").mkdir(parents=True, mode=0o700)
    for name in ("secret/identity.json", "metrics.jsonl"):
        (run / name).write_text("{}")
    with pytest.raises(ConfigError, match="WANDB_API_KEY: no key of W&B"):
        sync_run(run)


def test_sync_of_nothing_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="holds no run"):
        sync_run(tmp_path)


def test_tensorboard_shows_released_metrics_without_host(tree, tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    tree["tracking"] = {"wandb": False, "tensorboard": True}
    train(write_config(tree, tmp_path / "c.yaml"))
    run = tmp_path / "runs" / "tiny"
    (file,) = (run / "tensorboard").iterdir()
    assert socket.gethostname() not in file.name
    events = EventAccumulator(str(file))
    events.Reload()
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    names = {name for row in rows for name, value in row.items() if value is not None} - {"train/step"}
    assert set(events.Tags()["scalars"]) == names
    shown = {event.step: event.value for event in events.Scalars("privacy/epsilon")}
    expected = {row["train/step"]: row["privacy/epsilon"] for row in rows if row.get("privacy/epsilon") is not None}
    assert shown == pytest.approx(expected)


class Listener(QuietTracker):
    def __init__(self):
        self.titles = []

    def log(self, step, values):
        pass

    def alert(self, title, text):
        self.titles.append((title, text))

    def close(self):
        pass


class Shown(Listener):
    """A mirror that keeps what it is shown."""

    def __init__(self):
        super().__init__()
        self.blocks: list[list[int]] = []

    def log_rows(self, rows):
        self.blocks.append([step for step, _ in rows])


def blocks_shown(directory: pathlib.Path) -> list[list[int]]:
    """What a mirror is shown by a job that is killed after step 5 and by the one that goes on to step 8."""
    run = RunDirectory(directory)
    run.secret.mkdir(mode=0o700)

    def job(from_step: int, steps: range) -> tuple[Shown, BlockedMirror]:
        shown, rows = Shown(), JsonlTracker(run.metrics, from_step)
        mirror = BlockedMirror(shown, run, "shown", num_steps=3, from_step=from_step)
        for step in steps:
            rows.log(step, {"train/lr": 1.0})
            mirror.log(step, {"train/lr": 1.0})
            if step == 2:
                mirror.alert("half", "way")
            assert ("half", "way") not in shown.titles or step >= 4, "an alert tells the time as well as a row does"
        return shown, mirror

    killed, _ = job(-1, range(6))
    resumed, mirror = job(5, range(6, 9))  # the checkpoint was after step 5, whose row was never shown
    mirror.close()
    return killed.blocks + resumed.blocks


def check_blocks(blocks: list[list[int]]) -> None:
    assert [step for block in blocks for step in block] == list(range(9)), "every row once"
    assert all(len(block) >= 3 for block in blocks[:-1]), "no row alone"


def test_mirrors_get_whole_blocks_and_a_killed_job_loses_no_row(tmp_path):
    blocks = blocks_shown(tmp_path)
    check_blocks(blocks)
    assert blocks == [[0, 1, 2, 3], [4, 5, 6], [7, 8]]


def shown_per_step(mirror: BlockedMirror, step: int, values: Any) -> None:
    mirror._rows.append((step, values))
    mirror._flush()


def shown_early(mirror: BlockedMirror, step: int, values: Any) -> None:
    mirror._rows.append((step, values))
    if len(mirror._rows) == 2:
        mirror._flush()


MIRROR_MUTANTS = {
    "shown per step": ("privtrain.tracking.mirrors.BlockedMirror.log", shown_per_step),
    "shown before the block is whole": ("privtrain.tracking.mirrors.BlockedMirror.log", shown_early),
    "shown twice": ("privtrain.tracking.mirrors._read", lambda path: {}),
    "never shown": ("privtrain.tracking.mirrors.BlockedMirror.close", lambda mirror: mirror._mirror.close()),
    "kept rows forgotten": ("privtrain.tracking.mirrors.rows_of", lambda run: []),
    "alert at once": (
        "privtrain.tracking.mirrors.BlockedMirror.alert",
        lambda mirror, title, text: mirror._mirror.alert(title, text),
    ),
}


@pytest.mark.parametrize("mutant", MIRROR_MUTANTS)
def test_mutant_of_the_mirrors_is_seen(tmp_path, monkeypatch, mutant):
    monkeypatch.setattr(*MIRROR_MUTANTS[mutant])
    with pytest.raises(AssertionError):
        check_blocks(blocks_shown(tmp_path))


@pytest.mark.parametrize("private_metrics", [False, True])
def test_alerts_come_once_and_say_only_what_was_released(tree, private_metrics):
    tree["tracking"] = {"private_metrics": private_metrics}
    listener = Listener()
    gate = ReleaseGate(validate(tree), [listener], Listener())
    for step, fraction in enumerate([0.5, 0.85, 0.95, 1.0]):
        gate.log(step, {"privacy/budget_fraction": fraction, "train/num_nonfinite_units": int(step == 1)})
    titles = [title for title, _ in listener.titles]
    assert titles == (["Non-finite gradients", "Privacy budget"] if private_metrics else ["Privacy budget"])


def test_the_load_of_machines_brings_no_name_of_theirs(tree, tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    tree["tracking"] = {"wandb": True, "system_metrics": True}
    train(write_config(tree, tmp_path / "c.yaml"))
    wandb.teardown()
    run = tmp_path / "runs" / "tiny"
    assert any(record.HasField("stats") for record in wandb_records(next(run.rglob("*.wandb"))))
    private = Private.of(run, ["alder", "maple"], [str(tmp_path), str(pathlib.Path.cwd())])
    assert private.found_in(published_texts(run)) == []


def test_another_machine_sends_its_load_and_nothing_else(tree, tmp_path, monkeypatch):
    """What shared mode would send, written to a file: it cannot be asked for offline."""
    monkeypatch.setenv("WANDB_MODE", "offline")
    kept = tmp_path / "kept"
    kept.mkdir()
    monkeypatch.setattr(wandb_tracker.tempfile, "TemporaryDirectory", lambda **_: contextlib.nullcontext(kept))
    monkeypatch.setattr(contextlib.nullcontext, "name", str(kept), raising=False)
    monkeypatch.setattr(contextlib.nullcontext, "cleanup", lambda self: None, raising=False)
    tree["tracking"] = {"system_metrics": True}
    tracker = wandb_tracker.MachineTracker(validate(tree), "the-run", 8)
    tracker.log(3, {"train/lr": 1.0})
    tracker.close()
    wandb.teardown()
    (file,) = kept.rglob("*.wandb")
    records = wandb_records(file)
    kinds = {record.WhichOneof("record_type") for record in records}
    assert "stats" in kinds
    assert kinds <= {"header", "run", "stats", "telemetry", "summary", "exit", "final", "footer", "files"}
    names = {item.path for record in records for item in record.files.files}
    assert names <= {"wandb-summary.json", "config.yaml", "requirements.txt"}
    assert {key.key.rpartition("/l:")[2] for record in records for key in record.stats.item} == {"rank-8"}
    (run,) = (record.run for record in records if record.HasField("run"))
    assert (run.run_id, run.host, run.display_name) == ("the-run", "privtrain", "")
    strings = frozenset({"train/lr", str(tmp_path)})
    private = Private(strings, frozenset({"tiny", socket.gethostname()}), run_id="the-run")
    assert private.found_in(published_texts(kept)) == []


def test_every_machine_joins_the_one_run_in_shared_mode(tree, tmp_path, monkeypatch):
    """The settings that W&B's guide on distributed training names; nothing is sent here."""
    monkeypatch.setenv("WANDB_MODE", "online")
    calls: list[dict[str, Any]] = []

    class Run:
        def define_metric(self, *_: object, **__: object) -> None: ...
        def finish(self) -> None: ...

    monkeypatch.setattr(wandb, "init", lambda **options: calls.append(options) or Run())
    tree["tracking"] = {"system_metrics": True}
    config = validate(tree)
    run = RunDirectory(tmp_path / "run")
    wandb_tracker.WandbTracker(config, PrivacyPlan.build(config.privacy), run, "the-run").close()
    for rank, local_rank in ((0, "0"), (3, "1"), (8, "0")):
        monkeypatch.setenv("LOCAL_RANK", local_rank)
        open_machine_tracker(config, "the-run", rank).close()
    assert [call["id"] for call in calls] == ["the-run", "the-run"], "one writer a machine"
    primary, other = (call["settings"] for call in calls)
    assert (primary.mode, primary.x_label, primary.x_primary, primary.x_update_finish_state) == (
        "shared",
        "rank-0",
        True,
        True,
    )
    assert (other.mode, other.x_label, other.x_primary, other.x_update_finish_state) == (
        "shared",
        "rank-8",
        False,
        False,
    )
    assert "config" not in calls[1]
    monkeypatch.setenv("WANDB_MODE", "offline")
    assert type(open_machine_tracker(config, "the-run", 8)) is NullTracker, "offline, other machines write nothing"


def test_a_machine_that_cannot_reach_wandb_goes_on_training(tree, monkeypatch, capsys):
    monkeypatch.setenv("WANDB_MODE", "online")
    monkeypatch.setenv("LOCAL_RANK", "0")

    def unreachable(**_: object) -> None:
        raise wandb.errors.CommError("no network")

    monkeypatch.setattr(wandb, "init", unreachable)
    tree["tracking"] = {"system_metrics": True}
    assert type(open_machine_tracker(validate(tree), "the-run", 8)) is NullTracker
    assert "is not shown in W&B: no network" in capsys.readouterr().out


def test_wandb_that_cannot_be_opened_is_one_error(tree, tmp_path, monkeypatch):
    def fail(**_: object) -> None:
        raise wandb.Error("no service")

    monkeypatch.setattr(wandb, "init", fail)
    config, run = validate(tree), RunDirectory(tmp_path)
    opened = lambda: wandb_tracker.WandbTracker(config, PrivacyPlan.build(config.privacy), run, "the-run")  # noqa: E731
    with pytest.raises(PrivtrainError, match=r"W&B cannot be opened: no service.*the same command again"):
        MirrorAtTheEnd(opened, run, "wandb").publish(run)


class Recorder:
    """Stands for MLflow's client and for trackio: keeps every call."""

    def __init__(self):
        self.calls = []

    def __getattr__(self, name):
        def call(*words, **keys):
            self.calls.append((name, words, keys))
            if name == "create_run":
                return types.SimpleNamespace(info=types.SimpleNamespace(run_id="r1"))
            return [] if name == "search_runs" else None

        return call

    def named(self, name):
        return [(words, keys) for called, words, keys in self.calls if called == name]


def install_fakes(monkeypatch):
    """mlflow and trackio as modules that record what they are told."""
    client, trackio = Recorder(), Recorder()
    mlflow = types.ModuleType("mlflow")
    mlflow.MlflowClient = lambda: client
    mlflow.entities = types.SimpleNamespace(Param=lambda *words: words, Metric=lambda *words: words)
    mlflow.exceptions = types.SimpleNamespace(MlflowException=ConnectionError)
    for module in (mlflow, trackio):
        module.__spec__ = importlib.machinery.ModuleSpec("fake", None)
    monkeypatch.setitem(sys.modules, "mlflow", mlflow)
    monkeypatch.setitem(sys.modules, "trackio", trackio)
    return client, trackio


def test_mlflow_and_trackio_see_the_release_and_nothing_private(tree, tmp_path, monkeypatch):
    """Rows are those of metrics.jsonl; no path, key, id or private metric is in any call."""
    client, trackio = install_fakes(monkeypatch)
    tree["tracking"] = {"wandb": False, "mlflow": True, "trackio": True}
    train(write_config(tree, tmp_path / "c.yaml"))
    run = tmp_path / "runs" / "tiny"
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    expected = {
        (row["train/step"], name, value)
        for row in rows
        for name, value in row.items()
        if name != "train/step" and value is not None
    }
    logged = {
        (step, name, value) for _, keys in client.named("log_batch") for name, value, _, step in keys.get("metrics", ())
    }
    assert logged == expected
    assert len({stamp for _, keys in client.named("log_batch") for *_, stamp, _ in keys.get("metrics", ())}) == 1
    shown = {
        (keys["step"], name, value)
        for words, keys in trackio.named("log")
        for name, value in words[0].items()
        if not name.startswith("privacy/released_")
    }
    assert shown == expected
    assert client.named("set_terminated")
    assert len(trackio.named("finish")) == 1
    ((_, opened),) = trackio.named("init")
    assert opened["auto_log_gpu"] is opened["auto_log_cpu"] is False
    # Artifacts are named by their place here, which MLflow does not keep.
    said = repr([call for call in (*client.calls, *trackio.calls) if not call[0].startswith("log_artifact")])
    private = json.loads((run / "secret" / "private_metrics.jsonl").read_text().splitlines()[0]).keys() - {"train/step"}
    assert private
    for word in (str(tmp_path), (run / "secret" / "root.key").read_text().strip(), "user-0", *private):
        assert word not in said, word
    sent = [words[1] for words, _ in (*client.named("log_artifact"), *client.named("log_artifacts"))]
    assert sent == [str(run / "privacy.json"), str(run / "adapter")]


def test_silent_mlflow_costs_no_release_and_shows_no_password(tree, tmp_path, monkeypatch):
    client, _ = install_fakes(monkeypatch)

    def refuse(*_):
        raise ConnectionError("http://me:secret-word@server is down")

    client.get_experiment_by_name = refuse
    tree["tracking"] = {"wandb": False, "mlflow": True}
    path = write_config(tree, tmp_path / "c.yaml")
    with pytest.raises(PrivtrainError, match=r"MLflow does not answer.*tracking\.mlflow: false") as caught:
        train(path)
    assert "secret-word" not in str(caught.value)
    assert (tmp_path / "runs" / "tiny" / "release.json").is_file()
    del client.get_experiment_by_name
    train(path)  # the same command shows it
    assert len(client.named("create_run")) == 1
    train(path)
    assert len(client.named("create_run")) == 1


def test_tracker_that_is_not_installed_is_named_before_training(tree, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    tree["tracking"] = {"wandb": False, "mlflow": True, "trackio": True}
    with pytest.raises(ConfigError) as caught:
        check_inputs(validate(tree))
    assert [fault.path for fault in caught.value.faults] == ["tracking.mlflow", "tracking.trackio"]
