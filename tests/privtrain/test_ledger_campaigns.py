"""Many random crashes and many random edits: nothing committed is lost, nothing that was edited passes."""

from __future__ import annotations

import collections
import json
import pathlib
import subprocess
import sys

import numpy as np
import pytest

from privtrain.errors import LedgerCorrupt
from privtrain.ledger.bodies import rows_path
from privtrain.ledger.head import head_path
from privtrain.ledger.log import verify
from tests.privtrain.ledgers import contents, could_be_torn, files_of, opened, restore, snapshot, write_steps

REPOSITORY = pathlib.Path(__file__).parents[2]


def crash(place: pathlib.Path, num_trials: int, seed: int) -> dict[str, int]:
    done = subprocess.run(
        [sys.executable, "-m", "tests.privtrain.ledger_crash", str(place), str(num_trials), str(seed)],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout)


def test_a_writer_killed_at_random_moments_loses_nothing(tmp_path):
    outcomes = crash(tmp_path, 40, seed=0)
    assert sum(outcomes.values()) == 40


@pytest.mark.campaign
@pytest.mark.slow
def test_writer_killed_at_400_moments_loses_nothing(tmp_path):
    outcomes = crash(tmp_path, 400, seed=1)
    print(outcomes)
    assert sum(outcomes.values()) == 400
    assert sum(count for outcome, count in outcomes.items() if outcome != "whole") >= 20, "kills must hit writes"


EDITS = ("flip", "set", "delete", "insert", "repeat", "swap", "truncate", "append", "replace", "older")


def edited(rng: np.random.Generator, kind: str, data: bytes, replacement: bytes, older: bytes) -> bytes:
    """One random edit of a file."""
    start, other = (int(i) for i in rng.integers(0, max(len(data), 1), 2))
    length = int(min(rng.geometric(0.05), 400))
    match kind:
        case "flip":
            changed = bytearray(data)
            changed[start] ^= 1 << int(rng.integers(8))
            return bytes(changed)
        case "set":
            return data[:start] + rng.bytes(length) + data[start + length :]
        case "delete":
            return data[:start] + data[start + length :]
        case "insert":
            return data[:start] + rng.bytes(length) + data[start:]
        case "repeat":
            return data[: start + length] + data[start:]
        case "swap":
            a, b = sorted((start, other))
            size = min(length, b - a)
            return data[:a] + data[b : b + size] + data[a + size : b] + data[a : a + size] + data[b + size :]
        case "truncate":
            return data[:start]
        case "append":
            return data + rng.bytes(length)
        case "replace":
            return replacement
        case _:
            return older


@pytest.fixture(scope="module", params=["running", "released"])
def logs(request, tmp_path_factory):
    """A log, the state of it some steps earlier, and another log of the same shape."""
    place = tmp_path_factory.mktemp("logs")
    is_released = request.param == "released"
    path = write_steps(place / "l.jsonl", 19, segment_rows=30)
    earlier = snapshot(path)
    write_steps(path, 23, segment_rows=30, released=is_released)
    other = write_steps(place / "m.jsonl", 23, segment_rows=27, num_users=8, released=is_released)
    others = dict(zip(files_of(path), (file.read_bytes() for file in files_of(other)), strict=False))
    return path, snapshot(path), earlier, others


def test_every_one_of_many_random_edits_is_found(logs):
    """250 edits of each of two logs. What is cut off as never committed must be just what the edit had added."""
    path, whole, earlier, others = logs
    before, bodies = verify(path), contents(path)
    rng = np.random.default_rng(0)
    outcomes: collections.Counter[str] = collections.Counter()
    files = [file for file, data in whole.items() if data]
    while sum(outcomes.values()) < 250:
        restore(path, whole)
        kind, file = str(rng.choice(EDITS)), files[int(rng.integers(len(files)))]
        data = edited(rng, kind, whole[file], others.get(file, b""), earlier.get(file, b""))
        if data == whole[file] or (file == head_path(path) and _is_crash(path, whole[file], data)):
            continue
        file.write_bytes(data)
        with pytest.raises(LedgerCorrupt):
            verify(path)
        try:
            with opened(path, segment_rows=30) as ledger:
                assert ledger.repair, (kind, file)
        except LedgerCorrupt:
            assert file.read_bytes() == data, "what is refused is left as it is"
            outcomes["refused"] += 1
            continue
        # Only what comes after everything that was committed may be cut off.
        assert file in (path, rows_path(path, len(before.segments)))
        assert data.startswith(whole[file]), (kind, file)
        assert file.read_bytes().startswith(whole[file])
        after = verify(path)
        assert (after.intents, after.commits, after.path) == (before.intents, before.commits, before.path)
        assert contents(path) == bodies
        outcomes["repaired"] += 1
    restore(path, whole)
    assert outcomes["refused"] >= 200
    if before.is_released:
        assert outcomes["repaired"] == 0, "nothing is written behind a release, so no crash can have torn it"
    else:
        assert outcomes["repaired"] >= 3, "the campaign must reach the tail"


def _is_crash(path: pathlib.Path, whole: bytes, data: bytes) -> bool:
    """Whether the head file now is what a crash in its last write would have left, so that nothing is wrong."""
    return len(data) == len(whole) and all(
        new == old or could_be_torn(path, position, new)
        for position, (old, new) in enumerate(zip(whole, data, strict=True))
    )
