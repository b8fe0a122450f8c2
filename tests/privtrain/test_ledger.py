"""Invariant 7 and the ledger's promises: chained, bounded, torn tails repaired, everything else refused."""

from __future__ import annotations

import json

import hypothesis
import numpy as np
import pytest
from hypothesis import strategies as st

from privtrain.errors import GuaranteeLost, LedgerCorrupt
from privtrain.ledger import open_ledger, read_records, verify
from privtrain.secret import SecretKey

KEY = SecretKey.insecure(0, "pseudonym")


def opened(path, plan="plan", k=3):
    return open_ledger(path, plan_fingerprint=plan, records_per_unit=k, pseudonym_key=KEY)


def write_steps(path, num_steps=5, last_committed=True):
    rng = np.random.default_rng(0)
    with opened(path) as ledger:
        ledger.begin_session(generation=0, from_step=0, environment="e")
        for step in range(num_steps):
            ledger.intend(0, step, [(f"user-{u}", int(rng.integers(1, 4))) for u in rng.permutation(9)[: step % 4]])
            if last_committed or step < num_steps - 1:
                ledger.commit(0, step, f"sum-{step}")
    return path


def test_what_was_written_is_what_is_read(tmp_path):
    state = verify(write_steps(tmp_path / "l"))
    assert (state.num_charged, len(state.commits), state.plan_fingerprint, state.generation) == (5, 5, "plan", 0)
    assert [entry.step for entry in state.path] == [0, 1, 2, 3, 4]
    assert (tmp_path / "l").stat().st_mode & 0o777 == 0o600


def test_no_user_id_is_in_the_log(tmp_path):
    assert b"user-" not in write_steps(tmp_path / "l").read_bytes()


def test_an_intent_without_commit_is_charged(tmp_path):
    state = verify(write_steps(tmp_path / "l", last_committed=False))
    assert (state.num_charged, len(state.commits)) == (5, 4)


def test_a_replayed_step_is_recorded_once_and_must_draw_the_same_users(tmp_path):
    path = write_steps(tmp_path / "l")
    units = [("a", 1), ("b", 2)]
    with opened(path) as ledger:
        ledger.intend(0, 5, units)
        size = path.stat().st_size
        ledger.intend(0, 5, list(reversed(units)))
        assert path.stat().st_size == size
        with pytest.raises(GuaranteeLost, match="begun before with other users"):
            ledger.intend(0, 5, [("a", 1)])
        ledger.commit(0, 5, "sum")
        size = path.stat().st_size
        ledger.commit(0, 5, "sum")
        assert path.stat().st_size == size


def test_every_torn_tail_is_repaired_to_the_records_before_it(tmp_path):
    whole = write_steps(tmp_path / "l").read_bytes()
    start = whole[:-1].rindex(b"\n") + 1
    intact = verify(tmp_path / "l").num_records
    for cut in range(start + 1, len(whole) - 1):
        path = tmp_path / "torn"
        path.write_bytes(whole[:cut])
        with pytest.raises(LedgerCorrupt, match="torn"):
            verify(path)
        with opened(path) as ledger:
            assert ledger.state.num_records == intact  # one record fewer, and one that records the repair
        records = list(read_records(path))
        assert records[-1]["kind"] == "repair"
        assert records[-1]["num_torn_bytes"] == cut - start
        verify(path)


@hypothesis.settings(
    max_examples=150, deadline=None, suppress_health_check=[hypothesis.HealthCheck.function_scoped_fixture]
)
@hypothesis.given(data=st.data())
def test_any_changed_byte_is_found(tmp_path, data):
    source = tmp_path / "source"
    if not source.exists():
        write_steps(source)
    content = bytearray(source.read_bytes())
    position = data.draw(st.integers(0, len(content) - 1))
    content[position] ^= data.draw(st.integers(1, 255))
    path = tmp_path / "edited"
    path.write_bytes(content)
    with pytest.raises(LedgerCorrupt):
        verify(path)
    # Opening for a resume must not take damage for a torn write and drop a committed record.
    with pytest.raises(LedgerCorrupt), opened(path):
        pass


@pytest.mark.parametrize("change", range(1, 256))
def test_a_damaged_last_line_end_is_not_taken_for_a_torn_write(tmp_path, change):
    path = write_steps(tmp_path / "l", num_steps=1)
    content = bytearray(path.read_bytes())
    content[-1] ^= change
    path.write_bytes(content)
    with pytest.raises(LedgerCorrupt, match="at byte"), opened(path):
        pass


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
    ],
    ids=["removed", "reordered", "doubled", "beheaded", "appended", "blank"],
)
def test_whole_records_cannot_be_moved_removed_or_added(tmp_path, edit):
    path = write_steps(tmp_path / "l")
    path.write_bytes(b"".join(edit(lines_of(path))))
    with pytest.raises(LedgerCorrupt, match="at byte"):
        verify(path)


def test_a_well_chained_log_that_breaks_the_plan_is_refused(tmp_path):
    """A forger who recomputes every hash still cannot put a user above k, twice in a step, or a step twice."""
    for units in ([("a", 4)], [("a", 0)], [("a", 1), ("a", 1)]):
        path = tmp_path / "forged"
        path.unlink(missing_ok=True)
        with opened(path) as ledger:
            ledger.begin_session(generation=0, from_step=0, environment="e")
            ledger.intend(0, 0, units)
        with pytest.raises(LedgerCorrupt, match="unit"):
            verify(path)


SESSION = {"generation": 0, "from_step": 0, "environment": "e"}
STEP = {"generation": 0, "step": 0, "units": []}


@pytest.mark.parametrize(
    ("records", "message"),
    [
        ([("commit", {"generation": 0, "step": 0, "update": ""})], "without an open intent"),
        ([("intent", {**STEP, "step": 1})], "out of order"),
        ([("intent", {**STEP, "generation": 1})], "out of order"),
        ([("intent", STEP), ("intent", STEP)], "a step twice"),
        ([("session", {**SESSION, "generation": 2})], "neither the last nor the next"),
        ([("session", {**SESSION, "from_step": 1})], "past the steps"),
        ([("release", {"num_charged": 3})], "charges other steps"),
        ([("release", {"num_charged": 0}), ("intent", STEP)], "after the release"),
        ([("note", {})], "unknown kind"),
    ],
)
def test_a_well_chained_log_of_impossible_events_is_refused(tmp_path, records, message):
    path = tmp_path / "forged"
    with opened(path) as ledger:
        ledger.begin_session(**SESSION)
        for kind, fields in records:
            ledger._append(kind, **fields)
    with pytest.raises(LedgerCorrupt, match=message):
        verify(path)


def test_a_log_of_another_plan_is_refused(tmp_path):
    path = write_steps(tmp_path / "l")
    with pytest.raises(LedgerCorrupt, match="another plan"), opened(path, plan="other"):
        pass


def test_a_new_generation_abandons_the_steps_past_its_start(tmp_path):
    path = write_steps(tmp_path / "l")
    with opened(path) as ledger:
        ledger.begin_session(generation=1, from_step=3, environment="f")
        ledger.intend(1, 3, [])
    state = verify(path)
    assert [(e.generation, e.step, e.environment) for e in state.path] == [
        (0, 0, "e"),
        (0, 1, "e"),
        (0, 2, "e"),
        (1, 3, "f"),
    ]
    assert state.num_charged == 6


def test_records_are_json_lines(tmp_path):
    for line in lines_of(write_steps(tmp_path / "l")):
        assert json.loads(line)["hash"]
