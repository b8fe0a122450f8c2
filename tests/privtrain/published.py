"""Everything that a finished run publishes, decoded, and what must not be found in it."""

from __future__ import annotations

import dataclasses
import json
import pathlib
import re
import socket
import struct
from typing import Any

#: What is measured and not computed; the names alone show that a row of it was published.
MEASURED = ("perf/step_seconds", "perf/expected_units_per_second", "perf/peak_memory_bytes")


def wandb_records(file: pathlib.Path) -> list[Any]:
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


def wandb_rows(records: list[Any], *, with_internal: bool = False) -> list[dict[str, Any]]:
    rows = []
    for record in records:
        if record.HasField("history"):
            items = {item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in record.history.item}
            rows.append({name: value for name, value in items.items() if with_internal or not name.startswith("_")})
    return rows


def tensorboard_events(file: pathlib.Path) -> list[Any]:
    from tensorboard.backend.event_processing.event_file_loader import EventFileLoader

    return list(EventFileLoader(str(file)).Load())


def published_texts(*roots: pathlib.Path) -> dict[str, str]:
    """File → its name, its raw bytes as text, and what is packed in it, of all that is not ``secret`` or a checkpoint.

    W&B's ``logs`` stay on the machine: ``wandb sync`` sends the ``.wandb`` file and ``files``.
    """
    found = {}
    for root in roots:
        for file in sorted(path for path in root.rglob("*") if path.is_file() and not path.is_symlink()):
            inside = file.relative_to(root)
            if inside.parts[0] in ("secret", "checkpoints") or "logs" in inside.parts:
                continue
            text = f"{inside}\n{file.read_bytes().decode('latin-1')}"
            if file.suffix == ".wandb":
                text += "".join(str(record) for record in wandb_records(file))
            elif "tfevents" in file.name:
                text += "".join(str(event) for event in tensorboard_events(file))
            found[f"{root.name}/{inside}"] = text
    return found


@dataclasses.dataclass(frozen=True)
class Private:
    """What a run must keep to itself: exact strings, and words that count only where they stand alone."""

    strings: frozenset[str]
    words: frozenset[str]
    run_id: str

    @classmethod
    def of(cls, run: pathlib.Path, words: list[str], places: list[str]) -> Private:
        """Ids, pseudonyms, keys, private values and names, texts, this machine's name and places."""
        from privtrain.privacy.secret import pseudonym
        from privtrain.run.directory import RunDirectory

        secret = RunDirectory(run).secret
        manifest = json.loads((secret / "manifest.json").read_text())
        users = [*manifest["held_in"], *manifest["held_out"]]
        key = RunDirectory(run).load_key("pseudonym")
        keys = [path.read_text().strip() for path in secret.glob("*.key")]
        rows = [json.loads(line) for line in (secret / "private_metrics.jsonl").read_text().splitlines()]
        values = {repr(value) for row in rows for value in row.values() if isinstance(value, float)}
        names = {name for row in rows for name in row} - {"train/step"}
        assert users
        assert keys
        assert {"train/loss", "train/num_units", "perf/step_seconds"} <= names
        strings = {*users, *(pseudonym(key, user) for user in users), *keys, *names, *places}
        strings |= {bytes.fromhex(found).decode("latin-1") for found in keys}
        strings |= {value for value in values if len(value) > 8}  # 0.0 is in every version number
        run_id = json.loads((secret / "identity.json").read_text())["tracker_id"]
        return cls(frozenset(strings), frozenset([*words, socket.gethostname()]), run_id)

    def found_in(self, texts: dict[str, str]) -> list[str]:
        """``file: what`` for everything that leaks. W&B's id of the run is random and may hold any letters."""
        found = []
        for file, text in texts.items():
            found += [f"{file}: {string}" for string in self.strings if string in text]
            without_id = text.replace(self.run_id, "")
            found += [f"{file}: {word}" for word in self.words if re.search(_alone(word), without_id)]
        return found


def _alone(word: str) -> str:
    return rf"(?<![A-Za-z0-9]){re.escape(word)}(?![A-Za-z0-9])"


def num_moments(run: pathlib.Path) -> dict[str, int]:
    """How many different moments the rows of each mirror show."""
    (wandb_file,) = run.rglob("*.wandb")
    rows = wandb_rows(wandb_records(wandb_file), with_internal=True)
    (events_file,) = (run / "tensorboard").iterdir()
    scalars = [event.wall_time for event in tensorboard_events(events_file) if event.HasField("summary")]
    return {"wandb": len({row["_timestamp"] for row in rows}), "tensorboard": len(set(scalars))}


def times_told(run: pathlib.Path) -> list[str]:
    """What the mirrors and the released files tell of when something was done while the run trained."""
    found = []
    ended = (run / "secret" / "private_metrics.jsonl").stat().st_mtime  # its last row is that of the last step
    (wandb_file,) = run.rglob("*.wandb")
    records = wandb_records(wandb_file)
    moments = [record.run.start_time.ToMicroseconds() / 1e6 for record in records if record.HasField("run")]
    moments += [row["_timestamp"] for row in wandb_rows(records, with_internal=True)]
    found += ["wandb knows a moment of training"] if min(moments) < ended else []
    for file in (run / "tensorboard").iterdir():
        events = tensorboard_events(file)
        if max(event.wall_time for event in events) > events[0].wall_time or file.stat().st_mtime > events[0].wall_time:
            found.append("tensorboard knows more than when it was opened")
    parts = ("config.yaml", "metrics.jsonl", "privacy.json", "release.json", "adapter")
    released = [path for part in parts for path in (run / part, *(run / part).rglob("*"))]
    if len({path.stat().st_mtime for path in released}) > 1 or released[0].stat().st_mtime % 3600:
        found.append("released files bear times of their own")
    return found
