"""Where metrics go: mirrors show what ``metrics.jsonl`` says, once; alerts say only what was released."""

from __future__ import annotations

import json
import socket
import struct
from typing import Any

import pytest
import wandb

from privtrain.config import validate
from privtrain.errors import ConfigError
from privtrain.tracking.sync import sync_run
from privtrain.tracking.trackers import QuietTracker, ReleaseGate
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
