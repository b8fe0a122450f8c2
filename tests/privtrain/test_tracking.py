"""Where metrics go: mirrors show what ``metrics.jsonl`` says, once; alerts say only what was released."""

from __future__ import annotations

import contextlib
import json
import pathlib
import socket
import struct
from typing import Any

import pytest
import wandb

from privtrain.config import validate
from privtrain.errors import ConfigError
from privtrain.plan import PrivacyPlan
from privtrain.rundir import RunDirectory
from privtrain.tracking import wandb_tracker
from privtrain.tracking.sync import sync_run
from privtrain.tracking.trackers import NullTracker, QuietTracker, ReleaseGate, open_machine_tracker
from privtrain.training.job import train
from tests.conftest import write_config


def wandb_records(file) -> list[Any]:
    """Records of an offline file: a 7-byte head, then LevelDB's log format."""
    from wandb.proto import wandb_internal_pb2

    data, position, parts, records = file.read_bytes(), 7, b"", []
    while position + 7 <= len(data):
        if 32768 - position % 32768 < 7:  # the rest of a block is filler
            position += 32768 - position % 32768
            continue
        _, length, kind = struct.unpack_from("<IHB", data, position)
        parts += data[position + 7 : position + 7 + length]
        position += 7 + length
        if kind in (1, 4):  # a whole record, or its last part
            records.append(wandb_internal_pb2.Record.FromString(parts))
            parts = b""
    return records


def wandb_rows(records) -> list[dict[str, Any]]:
    rows = []
    for record in records:
        if record.HasField("history"):
            items = {item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in record.history.item}
            rows.append({name: value for name, value in items.items() if not name.startswith("_")})
    return rows


def test_a_replayed_run_has_every_row_once_and_the_release_as_an_artifact(tree, tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    train(write_config(tree, tmp_path / "c.yaml"))
    run = tmp_path / "runs" / "tiny"
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert f"sent {len(rows)} rows" in sync_run(run)
    wandb.teardown()  # waits until the file is written
    (file,) = run.rglob("*.wandb")
    records = wandb_records(file)
    assert wandb_rows(records) == rows
    summary = {u.key or u.nested_key[0]: u.value_json for r in records for u in r.summary.update}
    assert (
        json.loads(summary["privacy/ledger_head"]) == json.loads((run / "privacy.json").read_text())["ledger"]["head"]
    )


def test_sync_of_nothing_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="holds no run"):
        sync_run(tmp_path)


def test_tensorboard_shows_the_released_metrics_without_the_machines_name(tree, tmp_path):
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


@pytest.mark.parametrize("private_metrics", [False, True])
def test_alerts_come_once_and_say_only_what_was_released(tree, private_metrics):
    tree["tracking"] = {"private_metrics": private_metrics}
    listener = Listener()
    gate = ReleaseGate(validate(tree), [listener], Listener())
    for step, fraction in enumerate([0.5, 0.85, 0.95, 1.0]):
        gate.log(step, {"privacy/budget_fraction": fraction, "train/num_nonfinite_units": int(step == 1)})
    titles = [title for title, _ in listener.titles]
    assert titles == (["Non-finite gradients", "Privacy budget"] if private_metrics else ["Privacy budget"])


def everything_in(file) -> str:
    """The records in full, and the raw bytes as text, so that nothing hides in a field that nobody prints."""
    return "".join(str(record) for record in wandb_records(file)) + file.read_bytes().decode("latin-1")


@pytest.mark.parametrize("system_metrics", [False, True])
def test_nothing_private_is_in_the_offline_file(tree, tmp_path, monkeypatch, system_metrics):
    monkeypatch.setenv("WANDB_MODE", "offline")
    tree["tracking"] = {"wandb": True, "system_metrics": system_metrics}
    tree["privacy"]["noised_metrics"] = {}
    train(write_config(tree, tmp_path / "c.yaml"))
    wandb.teardown()
    run = tmp_path / "runs" / "tiny"
    (file,) = run.rglob("*.wandb")
    text = everything_in(file)
    assert "noised/loss" in text, "it is the right file"
    keys = [path.read_bytes() for path in (run / "secret").iterdir() if path.suffix == ".key" or "key" in path.name]
    assert keys
    private_rows = [json.loads(line) for line in (run / "secret" / "private_metrics.jsonl").read_text().splitlines()]
    private_names = {name for row in private_rows for name in row} - {"train/step"}
    assert {"train/loss", "train/clip_fraction", "train/num_units"} <= private_names
    private_values = {repr(value) for row in private_rows for value in row.values() if isinstance(value, float)}
    private_values = {value for value in private_values if len(value) > 8}  # 0.0 is in every version number
    secrets = [form for key in keys for form in (key.hex(), key.decode("latin-1"))]
    manifest = json.loads((run / "secret" / "manifest.json").read_text())
    users = [*manifest["held_in"], *manifest["held_out"]]
    words = ["alder", "birch", "cedar", "gorse", "hazel", "larch", "maple"]
    places = [str(tmp_path), str(pathlib.Path.home()) + "/", str(pathlib.Path.cwd()), socket.gethostname()]
    for forbidden in [*private_names, *private_values, *secrets, *users, *words, *places]:
        assert forbidden not in text, forbidden


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
    text = everything_in(file)
    for forbidden in ("train/lr", "tiny", str(tmp_path), socket.gethostname()):
        assert forbidden not in text, forbidden


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
