"""Invariant 7 and the ledger's promises: chained, bounded, torn tails repaired, everything else refused."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading

import hypothesis
import numpy as np
import pytest
from hypothesis import strategies as st

from privtrain.errors import GuaranteeLost, LedgerCorrupt, RunBusy, UnsafePath
from privtrain.ledger import log, merkle
from privtrain.ledger.bodies import ROW, charged_units, rows_path, segment_path
from privtrain.ledger.chain import read_records
from privtrain.ledger.head import head_path
from privtrain.ledger.log import verify, verify_chain
from privtrain.privacy.secret import pseudonym
from tests.privtrain.ledgers import (
    KEY,
    by_pseudonym,
    contents,
    could_be_torn,
    files_of,
    forge,
    manifest_of,
    opened,
    restore,
    rewrite_head,
    snapshot,
    units_of,
    write_steps,
)


def test_what_was_written_is_what_is_read(tmp_path):
    path = write_steps(tmp_path / "l.jsonl")
    state = verify(path)
    assert (state.num_charged, len(state.commits), state.generation) == (5, 5, 0)
    assert [entry.step for entry in state.path] == [0, 1, 2, 3, 4]
    assert contents(path) == {(0, step): by_pseudonym(units_of(step)) for step in range(5)}
    for file in files_of(path):
        assert file.stat().st_mode & 0o777 == 0o600, file
    assert path.with_suffix("").stat().st_mode & 0o777 == 0o700


@pytest.mark.parametrize("segment_rows", [1, 7, 20])
def test_sealed_bodies_say_what_the_open_ones_said(tmp_path, segment_rows):
    path = write_steps(tmp_path / "l.jsonl", 30, segment_rows=segment_rows)
    state = verify(path)
    assert len(state.segments) >= 3
    assert contents(path) == {(0, step): by_pseudonym(units_of(step)) for step in range(30)}
    write_steps(path, 34, segment_rows=segment_rows)  # opened again
    assert contents(path) == {(0, step): by_pseudonym(units_of(step)) for step in range(34)}
    assert verify(path).num_charged == 34
    rows = sorted(file.name for file in path.with_suffix("").glob("rows-*"))
    assert len(rows) == 1, "the rows of sealed segments are gone"


def test_the_units_of_all_steps_are_those_that_were_charged(tmp_path):
    path = write_steps(tmp_path / "l.jsonl", 12, segment_rows=20, last_committed=False)
    expected = [(pseudonym(KEY, name), n) for step in range(12) for name, n in units_of(step)]
    assert sorted(charged_units(path, verify(path))) == sorted(expected)


def test_who_counted_as_zero_is_on_record(tmp_path):
    path = write_steps(tmp_path / "l.jsonl", 12, segment_rows=20)
    state = verify(path)
    expected = {(0, step): pseudonym(KEY, units_of(step)[0][0]) for step in range(12) if step % 3 == 1 and step % 5}
    assert set(state.zeroed) == set(expected)
    for step, (place,) in state.zeroed.items():
        context = merkle.step_context(*step)
        ordered = sorted(contents(path)[step], key=lambda p: merkle.row_hashes(context, bytes.fromhex(p))[0])
        assert ordered[place] == expected[step]


def test_no_user_id_and_no_digest_of_the_data_is_in_the_log(tmp_path):
    path = write_steps(tmp_path / "l.jsonl", 12, segment_rows=20)
    for file in files_of(path):
        content = file.read_bytes()
        assert b"user-" not in content
        assert b'"plan":"plan"' not in content
        assert b'"environment":"e"' not in content


def test_an_intent_without_commit_is_charged(tmp_path):
    state = verify(write_steps(tmp_path / "l.jsonl", last_committed=False))
    assert (state.num_charged, len(state.commits)) == (5, 4)


def test_replayed_step_is_recorded_once_with_same_users(tmp_path):
    path = write_steps(tmp_path / "l.jsonl")
    units = [("a", 1), ("b", 2)]
    with opened(path) as ledger:
        ledger.intend(0, 5, units)
        before = snapshot(path)
        ledger.intend(0, 5, list(reversed(units)))
        assert snapshot(path) == before
        for other in ([("a", 1)], [("a", 1), ("b", 1)], [("a", 1), ("c", 2)], []):
            with pytest.raises(GuaranteeLost, match="begun before with other users"):
                ledger.intend(0, 5, other)
        ledger.intend(0, 5, units)
        ledger.commit(0, 5, "sum")
        before = snapshot(path)
        ledger.commit(0, 5, "sum")
        assert snapshot(path) == before


@pytest.mark.parametrize("units", [[("a", 4)], [("a", 0)], [("a", 1), ("a", 1)]])
def test_a_draw_that_breaks_the_bound_never_begins(tmp_path, units):
    path = write_steps(tmp_path / "l.jsonl")
    before = snapshot(path)
    with opened(path) as ledger, pytest.raises(GuaranteeLost, match="a unit twice or with more than 3"):
        ledger.intend(0, 5, units)
    assert snapshot(path) == before


def test_every_torn_tail_is_repaired_to_the_records_before_it(tmp_path):
    path = write_steps(tmp_path / "l.jsonl", 4)
    before = snapshot(path)
    write_steps(path, 5)  # appends an intent with its rows, and a commit
    after = snapshot(path)
    rows = rows_path(path, 0)
    first = len(before[path])
    intent = after[path].index(b"\n", first) + 1 - first
    written_rows = len(after[rows]) - len(before[rows])
    # A crash leaves any part of the rows and none of the intent, or all rows and any part of the intent.
    states = [(written, 0) for written in range(1, written_rows + 1)] + [(written_rows, n) for n in range(1, intent)]
    assert written_rows > 0
    for num_row_bytes, num_bytes in states:
        restore(path, before)
        rows.write_bytes(after[rows][: len(before[rows]) + num_row_bytes])
        path.write_bytes(after[path][: first + num_bytes])
        with pytest.raises(LedgerCorrupt, match="torn"):
            verify(path)
        with opened(path) as ledger:
            assert "cut off" in ledger.repair
            assert ledger.state.num_charged == 4
        last = list(read_records(path))[-1]
        assert (last["kind"], last["num_torn_bytes"]) == ("repair", num_row_bytes + num_bytes)
        assert last["num_torn_row_bytes"] == num_row_bytes
        assert path.read_bytes().startswith(before[path])
        assert rows.read_bytes() == before[rows]
        verify(path)


def test_crash_around_head_file_write_is_no_damage(tmp_path):
    path = write_steps(tmp_path / "l.jsonl", 4)
    with opened(path) as ledger:
        ledger.intend(0, 4, [])
        previous = head_path(path).read_bytes()
        ledger.commit(0, 4, "sum")
    whole = head_path(path).read_bytes()
    changed = [i for i in range(256) if previous[i] != whole[i]]
    for cut in range(changed[0], changed[-1] + 2):
        head_path(path).write_bytes(whole[:cut] + previous[cut:])
        assert verify(path).num_charged == 5
        with opened(path) as ledger:
            assert not ledger.repair
        assert head_path(path).read_bytes() == whole


@hypothesis.settings(max_examples=200)
@hypothesis.given(data=st.data())
def test_any_changed_byte_is_found(tmp_path, data):
    path = tmp_path / "l.jsonl"
    whole = _source(tmp_path)
    restore(path, whole)
    file = data.draw(st.sampled_from([f for f, content in whole.items() if content]))
    content = bytearray(whole[file])
    position = data.draw(st.integers(0, len(content) - 1))
    content[position] ^= data.draw(st.integers(1, 255))
    hypothesis.assume(file != head_path(path) or not could_be_torn(path, position, content[position]))
    file.write_bytes(content)
    with pytest.raises(LedgerCorrupt, match=r"byte|damaged|record"):
        verify(path)
    # Opening for a resume must not take damage for a torn write and drop a committed record.
    damaged = snapshot(path)
    with pytest.raises(LedgerCorrupt), opened(path):
        pass
    assert snapshot(path) == damaged, "what is refused is left as it is"


_SOURCES: dict[str, dict] = {}


def _source(tmp_path):
    if str(tmp_path) not in _SOURCES:
        _SOURCES[str(tmp_path)] = snapshot(write_steps(tmp_path / "l.jsonl", 22, segment_rows=30))
    return _SOURCES[str(tmp_path)]


def lines_of(path):
    return path.read_bytes().splitlines(keepends=True)


@pytest.mark.parametrize(
    "edit",
    [
        lambda lines: lines[:3] + lines[4:],
        lambda lines: [*lines[:3], lines[4], lines[3], *lines[5:]],
        lambda lines: [*lines[:4], lines[3], *lines[4:]],
        lambda lines: lines[1:],
        lambda lines: [*lines, b"{}\n"],
        lambda lines: [*lines, b"\n"],
        lambda lines: lines[:-1],
        lambda lines: lines[:-4],
        lambda lines: [],
    ],
    ids=["removed", "reordered", "doubled", "beheaded", "appended", "blank", "last gone", "cut short", "emptied"],
)
def test_whole_records_cannot_be_moved_removed_or_added(tmp_path, edit):
    path = write_steps(tmp_path / "l.jsonl")
    path.write_bytes(b"".join(edit(lines_of(path))))
    with pytest.raises(LedgerCorrupt, match="at byte"):
        verify(path)
    with pytest.raises(LedgerCorrupt, match="at byte"), opened(path):
        pass


def test_removed_swapped_or_foreign_files_are_found(tmp_path):
    path = write_steps(tmp_path / "l.jsonl", 22, segment_rows=30)
    other = write_steps(tmp_path / "m.jsonl", 23, segment_rows=25, num_users=8)
    whole = snapshot(path)
    assert len(verify(path).segments) >= 2
    for file in (f for f in files_of(path) if f.stat().st_size):
        file.unlink()
        with pytest.raises(LedgerCorrupt if file != path else (LedgerCorrupt, FileNotFoundError)):
            verify(path)
        with pytest.raises(LedgerCorrupt), opened(path):
            pass
        restore(path, whole)
    pairs = zip(files_of(path), files_of(other), strict=False)
    for mine, theirs in [*pairs, (segment_path(path, 0), segment_path(path, 1))]:
        if mine.read_bytes() == theirs.read_bytes():
            continue
        mine.write_bytes(theirs.read_bytes())
        with pytest.raises(LedgerCorrupt):
            verify(path)
        restore(path, whole)
    verify(path)


def test_older_log_is_found_only_by_head_kept_elsewhere(tmp_path):
    """What the trust anchors are for: the head file shows a shortened log, and a noted head shows both shortened."""
    path = write_steps(tmp_path / "l.jsonl")
    noted = verify(path).head
    lines = lines_of(path)
    path.write_bytes(b"".join(lines[:-2]))
    with pytest.raises(LedgerCorrupt, match="records were removed"):
        verify(path)
    rewrite_head(path)
    rows = rows_path(path, 0)
    size = ROW.itemsize * verify_chain(path).num_contributions
    rows.write_bytes(rows.read_bytes()[:size])
    verify(path)
    assert noted not in {record["hash"] for record in read_records(path)}


@pytest.mark.parametrize("units", [[("a", 4)], [("a", 0)], [("a", 1), ("a", 1)]])
def test_a_well_chained_log_that_breaks_the_plan_is_refused(tmp_path, units):
    """A forger who recomputes every hash still cannot put a user above k, or twice in a step."""
    path = write_steps(tmp_path / "l.jsonl", 0)
    context = merkle.step_context(0, 0)
    secrets = b"".join(bytes.fromhex(pseudonym(KEY, name)) for name, _ in units)
    counts = np.array([count for _, count in units], dtype="<u4")
    rows = np.zeros(len(units), dtype=ROW)
    rows["unit"], rows["records"] = np.frombuffer(secrets, dtype=ROW["unit"]), counts
    rows_path(path, 0).write_bytes(rows.tobytes())
    root = merkle.root_of(merkle.rows_of(context, secrets, counts))
    forge(path, [("intent", {"generation": 0, "step": 0, "num_units": len(units), "root": root})])
    with pytest.raises(LedgerCorrupt, match="a unit"):
        verify(path)


SESSION = {"generation": 0, "from_step": 0, "environment": "e"}
STEP = {"generation": 0, "step": 0, "num_units": 0, "root": merkle.root_of(b"")}


def release_of(head: str) -> dict[str, object]:
    return {"epsilon": None, "delta": 1e-5, "num_charged": 0, "manifest": manifest_of(head).body}


COMMIT = {"generation": 0, "step": 0, "update": "", "zeroed": []}


@pytest.mark.parametrize(
    ("records", "message"),
    [
        ([("commit", COMMIT)], "without an open intent"),
        ([("intent", STEP), ("commit", COMMIT), ("commit", COMMIT)], "without an open intent"),
        ([("intent", STEP), ("commit", {**COMMIT, "zeroed": [0]})], "not in the step"),
        ([("intent", {**STEP, "step": 1})], "out of order"),
        ([("intent", {**STEP, "generation": 1})], "out of order"),
        ([("intent", {**STEP, "num_units": -1})], "a count is negative"),
        ([("intent", {**STEP, "num_units": 0.0})], "a count is negative"),
        ([("intent", STEP), ("intent", STEP)], "a step twice"),
        ([("session", {**SESSION, "generation": 2})], "neither the last nor the next"),
        ([("session", {**SESSION, "from_step": 1})], "past the steps"),
        ([("release", {"num_charged": 3})], "charges other steps"),
        ([("release", release_of), ("intent", STEP)], "after the release"),
        ([("seal", {"segment": 1, "num_rows": 0, "num_bytes": 0, "chunks": []})], "out of order"),
        ([("seal", {"segment": 0, "num_rows": 1, "num_bytes": 0, "chunks": []})], "does not hold the rows"),
        ([("begin", {"schema": "privtrain/ledger/2"})], "one beginning"),
        ([("note", {})], "unknown kind"),
        ([("intent", {})], "missing or malformed field"),
        ([("release", {"num_charged": 0})], "missing or malformed field"),
        ([("release", release_of), ("session", SESSION)], "after the release"),
        ([("release", release_of), ("release", release_of)], "after the release"),
        ([("release", release_of), ("repair", {"num_torn_bytes": 1})], "after the release"),
        ([("release", release_of("0" * 64))], "quotes another head"),
        ([("release", {**release_of("0" * 64), "manifest": {"files": {}}})], "a release manifest holds"),
    ],
)
def test_a_well_chained_log_of_impossible_events_is_refused(tmp_path, records, message):
    path = write_steps(tmp_path / "l.jsonl", 0)
    forge(path, records)
    with pytest.raises(LedgerCorrupt, match=message):
        verify(path)


def test_a_log_of_another_plan_or_key_is_refused(tmp_path, monkeypatch):
    path = write_steps(tmp_path / "l.jsonl")
    with pytest.raises(LedgerCorrupt, match="another plan"), opened(path, plan="other"):
        pass
    from privtrain.privacy.secret import SecretKey
    from tests.privtrain import ledgers

    monkeypatch.setattr(ledgers, "KEY", SecretKey.insecure(1, "pseudonym"))
    with pytest.raises(LedgerCorrupt, match="another pseudonym key"), opened(path):
        pass


def test_a_new_generation_abandons_the_steps_past_its_start(tmp_path):
    path = write_steps(tmp_path / "l.jsonl")
    with opened(path) as ledger:
        ledger.begin_session(generation=1, from_step=3, environment="f")
        ledger.intend(1, 3, [])
        environment = ledger.blinded("environment", "f")
    state = verify(path)
    assert [(e.generation, e.step) for e in state.path] == [(0, 0), (0, 1), (0, 2), (1, 3)]
    assert state.environment == environment
    assert state.num_charged == 6


def test_records_are_json_lines_that_begin_with_their_hash(tmp_path):
    for line in lines_of(write_steps(tmp_path / "l.jsonl")):
        assert next(iter(json.loads(line))) == "hash"


def test_a_second_writer_is_refused_with_and_without_locks(tmp_path, monkeypatch):
    path = write_steps(tmp_path / "l.jsonl")
    script = (
        "import sys, pathlib; from tests.privtrain.ledgers import opened\n"
        f"with opened(pathlib.Path({str(path)!r})): pass"
    )
    with opened(path) as first:
        with pytest.raises(RunBusy, match="another process writes"), opened(path):
            pass
        done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
        assert "RunBusy" in done.stderr
        # Where the file system has no locks, both open the log; the slower one finds that it grew.
        monkeypatch.setattr("privtrain.ledger.head._lock", lambda descriptor, log: None)
        with opened(path) as second:
            second.intend(0, 5, [("a", 1)])
        with pytest.raises(RunBusy, match="changed under its writer"):
            first.intend(0, 5, [("b", 1)])
    assert verify(path).num_charged == 6


def test_after_a_write_that_failed_nothing_more_is_written(tmp_path, monkeypatch):
    path = write_steps(tmp_path / "l.jsonl")
    write = os.write
    with opened(path) as ledger:
        monkeypatch.setattr(os, "write", lambda fd, data: write(fd, bytes(data)[:7]) and (_ for _ in ()).throw(OSError))
        with pytest.raises(OSError):  # noqa: PT011 - a full disk
            ledger.intend(0, 5, [])
        monkeypatch.undo()
        with pytest.raises(RunBusy, match="failed half-way"):
            ledger.intend(0, 5, [])
    with opened(path) as ledger:
        assert "7 bytes" in ledger.repair
        ledger.intend(0, 5, [])
    assert verify(path).num_charged == 6


def test_a_log_can_be_read_while_it_is_written(tmp_path):
    path = write_steps(tmp_path / "l.jsonl", 1)
    stop, problems, num_read = threading.Event(), [], 0

    def write():
        try:
            write_steps(path, 150, segment_rows=100)
        except Exception as error:  # noqa: BLE001 - shown by the assertion below
            problems.append(error)
        finally:
            stop.set()

    writer = threading.Thread(target=write)
    writer.start()
    while not stop.is_set():
        verify_chain(path, allow_torn=True)
        num_read += 1
    writer.join()
    assert not problems
    assert num_read > 3


# What the file system may show after power was lost, not only after a kill.


def test_power_loss_keeps_everything_acknowledged(tmp_path, monkeypatch):
    """Every write reaches the disk at its fsync; before it, any part of it may. Replay each such moment."""
    path = tmp_path / "l.jsonl"
    disk: dict[str, bytes] = {}
    moments: list[tuple[int, dict[str, bytes], str, bytes]] = []
    fsync = os.fsync
    acknowledged = [0]

    def recording_fsync(descriptor):
        name = os.readlink(f"/proc/self/fd/{descriptor}")
        if os.path.isfile(name):
            with open(name, "rb") as file:
                moments.append((acknowledged[0], dict(disk), name, file.read()))
            disk[name] = moments[-1][3]
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", recording_fsync)
    with opened(path, segment_rows=12) as ledger:
        ledger.begin_session(generation=0, from_step=0, environment="e")
        for step in range(8):
            ledger.intend(0, step, units_of(step))
            acknowledged[0] += 1
            ledger.commit(0, step, f"sum-{step}")
            acknowledged[0] += 1
    monkeypatch.undo()
    assert any("segment" in name for name in disk)
    rng = np.random.default_rng(0)
    place = path.with_suffix("")
    for num_acknowledged, durable, name, written in moments:
        old = durable.get(name, b"")
        partial = [old, written, written[: int(rng.integers(len(old), len(written) + 1))]]
        for content in partial if name != str(head_path(path)) else [old, written]:
            for file in [path, head_path(path), *place.iterdir()]:
                file.unlink(missing_ok=True)
            for file, data in {**durable, name: content}.items():
                with open(file, "wb") as handle:
                    handle.write(data)
            with opened(path, segment_rows=12) as ledger:
                state = ledger.state
                found = state.num_charged + len(state.commits)
                assert found >= num_acknowledged, (name, num_acknowledged)
                assert found <= num_acknowledged + 1
            verify(path)
            assert all(contents(path)[0, step] == by_pseudonym(units_of(step)) for step in range(state.num_charged))


def parts_of_an_open_log(path):
    """What a writer will write to, and a segment that it goes on from where there is one."""
    number = len(verify(path).segments) if path.exists() else 0
    return [path, head_path(path), rows_path(path, number), rows_path(path, number + 1), segment_path(path, 0)]


@pytest.mark.parametrize("part", range(5))
@pytest.mark.parametrize("kind", ["link", "second name", "pipe", "directory"])
@pytest.mark.parametrize("begun", [False, True])
def test_planted_file_is_neither_read_nor_written_through(tmp_path, part, kind, begun):
    """A link would send who took part elsewhere; content behind one is somebody else's."""
    path = tmp_path / "l.jsonl"
    victim = tmp_path / "victim"
    if begun:
        write_steps(path, 12, segment_rows=20)
    planted = parts_of_an_open_log(path)[part]
    content = planted.read_bytes() if planted.exists() else b""
    planted.unlink(missing_ok=True)
    planted.parent.mkdir(mode=0o700, exist_ok=True)
    victim.write_bytes(content)
    victim.chmod(0o644)
    if kind == "link":
        planted.symlink_to(victim)
    elif kind == "second name":
        planted.hardlink_to(victim)
    elif kind == "pipe":
        os.mkfifo(planted)
    else:
        planted.mkdir()
    with pytest.raises((UnsafePath, LedgerCorrupt, IsADirectoryError)) as caught:
        write_steps(path, 30, segment_rows=20)
    assert planted.name in str(caught.value)
    assert victim.read_bytes() == content
    assert victim.stat().st_mode & 0o777 == 0o644


def test_directory_of_a_log_that_others_can_enter_is_refused(tmp_path):
    place = tmp_path / "place"
    place.mkdir(mode=0o755)
    with pytest.raises(UnsafePath, match="can be read by other users"):
        write_steps(place / "l.jsonl")
    place.chmod(0o700)
    write_steps(place / "l.jsonl", 2)
    (tmp_path / "link").symlink_to(place)
    with pytest.raises(UnsafePath, match="is a link"):
        write_steps(tmp_path / "link" / "l.jsonl", 4)


def test_mutant_that_opens_plainly_writes_through_a_link(tmp_path, monkeypatch):
    """What the check is for: without it rows of a step end up where a link leads."""
    path, victim = tmp_path / "l.jsonl", tmp_path / "victim"
    rows = rows_path(path, 0)
    rows.parent.mkdir(mode=0o700)
    rows.symlink_to(victim)
    monkeypatch.setattr(log, "open_private_file", lambda path, flags: os.open(path, flags, 0o600))
    monkeypatch.setattr(log, "_check_file", lambda path: None)
    write_steps(path, 3)
    assert victim.stat().st_size > 0
